"""Interrupt lines as devices see them: a wire that is high or low. Where it leads, a device never knows.

The line keeps no level of its own: a device keeps the level it drives in its state, so that a handover moves
it.
"""

from __future__ import annotations

from typing import Protocol


class IrqLine(Protocol):
    """One wire to the interrupt controllers."""

    def set(self, level: bool) -> None:
        """Drive the wire high or low. Call it only when the level changes."""


class UnconnectedIrq:
    """A wire that leads nowhere (machines without an interrupt controller)."""

    def set(self, level: bool) -> None:
        """Nothing listens."""
