"""Guest RAM: regions of memfds or guest_memfds and checked access to them by guest physical address."""

from vmm.memory.guest import GuestMemory, Region, layout

__all__ = ["GuestMemory", "Region", "layout"]
