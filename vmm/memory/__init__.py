"""Guest RAM: memfd-backed regions and checked access to them by guest physical address."""

from vmm.memory.guest import GuestMemory, Region, layout

__all__ = ["GuestMemory", "Region", "layout"]
