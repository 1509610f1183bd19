"""The test device of firmware/README.md, which the sentinel guest checks: it counts what reaches it.

So a guest can tell an access that was lost from one that happened twice. Nothing else may ever count.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import ClassVar

from vmm.state import Arena

PORTS = 8
PAGE = 0x1000
STREAM, POSTED_PORT, COUNT = (0, 1), (2, 2), (4, 4)  # offset and width in bytes, among the ports
LATCH, COUNTED, POSTED_REGISTER = (0, 8), (0x20, 4), (0x24, 4)  # and in the page
IDENTITY = 0x5453_4554  # "TEST"
REGISTERS = struct.Struct("<QI4xIIII8xII")  # the page; those that the table of firmware/README.md lists
U32, U64 = (1 << 32) - 1, (1 << 64) - 1


class TestState(ctypes.LittleEndianStructure):
    """What the device has counted; all zero at power-on."""

    VERSION: ClassVar[int] = 1
    latch: int
    latch_writes: int
    count: int
    sum: int
    reads: int
    register_reads: int
    posted: int
    posted_sum: int
    _fields_ = (
        ("latch", ctypes.c_uint64),
        ("latch_writes", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("sum", ctypes.c_uint32),
        ("reads", ctypes.c_uint32),
        ("register_reads", ctypes.c_uint32),
        ("posted", ctypes.c_uint32),
        ("posted_sum", ctypes.c_uint32),
    )


class TestDevice:
    """Both halves of the device: `ports` and `registers` are for the two buses. Thread-safe."""

    def __init__(self, arena: Arena, instance: int = 0) -> None:
        """Work on section `testdev/instance`, a new or a received one."""
        state = arena.place("testdev", instance, TestState)
        lock = threading.Lock()
        self.ports = _Ports(state, lock)
        self.registers = _Registers(state, lock)


def _append(total: int, value: int) -> int:
    """A sum that depends on the order of what is added."""
    return ((total << 1 | total >> 31) + value) & U32


def _post(state: TestState, data: bytes) -> None:
    """A write that may come late."""
    state.posted = (state.posted + 1) & U32
    state.posted_sum = _append(state.posted_sum, int.from_bytes(data, "little"))


class _Ports:
    """The byte stream, and its count."""

    posted = (POSTED_PORT,)

    def __init__(self, state: TestState, lock: threading.Lock) -> None:
        self._state = state
        self._lock = lock

    def read(self, offset: int, size: int) -> bytes:
        """The stream's next byte, or the count; all ones for an access that is neither."""
        state = self._state
        with self._lock:
            if (offset, size) == STREAM:
                value = state.reads & 0xFF
                state.reads = (state.reads + 1) & U32
                return bytes((value,))
            if (offset, size) == COUNT:
                return state.count.to_bytes(4, "little")
        return b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        """Append a byte to the stream, set all that is counted of it to zero, or count a posted write."""
        state = self._state
        with self._lock:
            if (offset, len(data)) == STREAM:
                state.count = (state.count + 1) & U32
                state.sum = _append(state.sum, data[0])
            elif (offset, len(data)) == POSTED_PORT:
                _post(state, data)
            elif (offset, len(data)) == COUNT:
                state.count = state.sum = state.reads = 0


class _Registers:
    """The latch, what has been counted, and a register that counts how often it is read."""

    posted = (POSTED_REGISTER,)

    def __init__(self, state: TestState, lock: threading.Lock) -> None:
        self._state = state
        self._lock = lock

    def read(self, offset: int, size: int) -> bytes:
        """The counting register, or `size` bytes of the page; zeros behind the last register."""
        state = self._state
        with self._lock:
            if (offset, size) == COUNTED:
                value = state.register_reads
                state.register_reads = (value + 1) & U32
                return value.to_bytes(4, "little")
            page = REGISTERS.pack(
                (state.latch + state.latch_writes) & U64,
                state.latch_writes & U32,
                state.count,
                state.sum,
                state.reads,
                IDENTITY,
                state.posted,
                state.posted_sum,
            )
        return page[offset : offset + size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Set the latch, or count a posted write; other writes are ignored."""
        with self._lock:
            if (offset, len(data)) == LATCH:
                self._state.latch = int.from_bytes(data, "little")
                self._state.latch_writes = (self._state.latch_writes + 1) & U64
            elif (offset, len(data)) == POSTED_REGISTER:
                _post(self._state, data)
