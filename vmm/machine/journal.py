"""Changing a device's state once, though the VMM may be killed in the middle: a snapshot of the state, kept
until the change is made.

Whatever changes a device is a row of steps: an exit has one for each element that it moves, an event of the
loop has one. A step belongs to one device, whose whole state is one structure in the state memfd. Before the
step the structure is copied into the journal of whoever takes it, a vCPU or the loop; once the step is taken,
one store says so. A VMM that comes after a crash and finds a step begun puts the copy back; an exit that is
still to be served it serves from that step on. So the guest sees every step once. What the step had already
sent out (a byte on the console, say) goes out again: at most what that one step wrote.

Who takes steps takes turns: between a snapshot and the end of its step nothing else may change the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import ClassVar

from vmm.devices.chardev import Reactor
from vmm.errors import StateError, VmmError
from vmm.state import Arena

LARGEST_STATE = 1024  # bytes of one device's state
NO_STEP = (1 << 64) - 1


class JournalState(ctypes.LittleEndianStructure):
    """One journal: of row `number`, `steps` are taken; the snapshot is from before step `snapshot`."""

    VERSION: ClassVar[int] = 1
    number: int
    steps: int
    snapshot: int
    offset: int
    size: int
    _fields_ = (
        ("number", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("snapshot", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("data", ctypes.c_ubyte * LARGEST_STATE),
    )


class Journal:
    """One journal in the state memfd. Used by one thread at a time."""

    def __init__(self, arena: Arena, name: str, index: int) -> None:
        self._arena = arena
        self._label = f"{name}/{index}"
        self._state = arena.place(name, index, JournalState)
        self._data = ctypes.addressof(self._state) + JournalState.data.offset

    @property
    def number(self) -> int:
        """The row that was begun last."""
        return self._state.number

    @property
    def taken(self) -> int:
        """How many of its steps are taken."""
        return self._state.steps

    def steps(self, number: int, count: int, device_state: ctypes.Structure) -> Iterator[int]:
        """The steps of row `number` that are still to be taken, out of `count`: take each before the next."""
        state = self._state
        size = ctypes.sizeof(device_state)
        if size > LARGEST_STATE:
            raise VmmError(f"a device state of {size} bytes is too large for the journal")
        if state.number != number:  # the stores of this process happen in order
            state.number = 0
            state.steps = 0
            state.snapshot = NO_STEP
            state.number = number
        source, offset = ctypes.addressof(device_state), self._arena.offset_of(device_state)
        for step in range(state.steps, count):
            state.snapshot = NO_STEP
            ctypes.memmove(self._data, source, size)
            state.offset = offset
            state.size = size
            state.snapshot = step
            yield step
            state.steps = step + 1

    def clear(self) -> None:
        """Know of no row: those to come are another VM's."""
        self._state.number = 0

    def recover(self, number: int) -> bool:
        """Undo the step of row `number` that was begun and not ended; whether there was one.

        Raises StateError where the journal cannot be right.
        """
        state = self._state
        if not number or state.number != number or state.snapshot != state.steps:
            return False
        offset, size = state.offset, state.size
        if size > LARGEST_STATE or not self._arena.restore(offset, bytes(state.data[:size])):
            raise StateError(f"state section {self._label}: {size} bytes at {offset} are no device's state")
        state.snapshot = NO_STEP
        return True


class JournaledReactor:
    """An event loop whose callbacks change one device's state as the vCPUs do: in turn, each a row of one
    step. (A callback that the loop calls while it holds the turn anyway is part of that step.)
    """

    def __init__(
        self,
        loop: Reactor,
        turn: AbstractContextManager[object],
        journal: Journal,
        device_state: ctypes.Structure,
    ) -> None:
        self._loop = loop
        self._turn = turn
        self._journal = journal
        self._device_state = device_state
        self.remove_reader = loop.remove_reader
        self.remove_writer = loop.remove_writer

    def step(self, callback: Callable[[], object]) -> None:
        """Call `callback` as one step."""
        with self._turn:
            for _ in self._journal.steps(self._journal.number + 1, 1, self._device_state):
                callback()

    def recover(self) -> bool:
        """See `Journal.recover`."""
        return self._journal.recover(self._journal.number)

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> object:
        """See `Reactor.add_reader`."""
        return self._loop.add_reader(fd, lambda: self.step(callback))

    def add_writer(self, fd: int, callback: Callable[[], object], /) -> object:
        """See `Reactor.add_writer`."""
        return self._loop.add_writer(fd, lambda: self.step(callback))

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> object:
        """See `Reactor.call_soon_threadsafe`."""
        return self._loop.call_soon_threadsafe(lambda: self.step(callback))
