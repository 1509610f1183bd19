"""Serving an exit once, though the VMM may be killed in the middle: a snapshot of the device's state, kept
until the exit is served.

An exit is served by one device, whose whole state is one structure in the state memfd. Before it is touched,
the structure is copied into the vCPU's journal with the exit's number. A VMM that comes after a crash and
finds that very exit unserved puts the copy back and serves the exit again: the guest sees it served once.
What had already gone out (a byte on the console, say) goes out again: at most what that one exit wrote.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

from vmm.errors import StateError, VmmError
from vmm.state import Arena

LARGEST_STATE = 1024  # bytes of one device's state


class JournalState(ctypes.LittleEndianStructure):
    """The journal of one vCPU; `exit` is 0 while it says nothing."""

    VERSION: ClassVar[int] = 1
    exit: int
    offset: int
    size: int
    _fields_ = (
        ("exit", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("data", ctypes.c_ubyte * LARGEST_STATE),
    )


class ExitJournal:
    """The journal of one vCPU, in the state memfd."""

    def __init__(self, arena: Arena, index: int) -> None:
        self._arena = arena
        self._index = index
        self._state = arena.place("journal", index, JournalState)
        self._data = ctypes.addressof(self._state) + JournalState.data.offset

    def begin(self, exit_number: int, device_state: ctypes.Structure) -> None:
        """Exit `exit_number` is about to be served by the device with that state."""
        state = self._state
        size = ctypes.sizeof(device_state)
        if size > LARGEST_STATE:
            raise VmmError(f"a device state of {size} bytes is too large for the journal")
        state.exit = 0
        ctypes.memmove(self._data, ctypes.addressof(device_state), size)
        state.offset = self._arena.offset_of(device_state)
        state.size = size
        state.exit = exit_number

    def recover(self, exit_number: int) -> bool:
        """Undo what was done of exit `exit_number`, which is still to be served. Whether anything had been
        begun.

        Raises StateError where the journal cannot be right.
        """
        state = self._state
        if not exit_number or state.exit != exit_number:
            return False
        offset, size = state.offset, state.size
        if not any(
            section.offset == offset and section.size == size <= LARGEST_STATE for section in self._arena
        ):
            raise StateError(
                f"state section journal/{self._index}: {size} bytes at {offset} is no device's state"
            )
        self._arena.overwrite(offset, bytes(state.data[:size]))
        return True
