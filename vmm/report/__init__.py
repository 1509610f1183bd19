"""Reads what guests and handovers recorded, after the fact; imports none of the rooms that record it."""
