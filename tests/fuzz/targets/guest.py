"""Guests that make KVM exit with any I/O: every port and page, every width, strings, over the edges of
devices.

The run loop and all devices are the real ones; the kernel under them is not. A VMM that dies in the middle of
an exit, and the next one that goes on from its journal, are part of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.reading import Reader
from tests.fuzz.test_fuzz_serial import Peer, Wire
from vmm.bus import COUNTED_ADDRESSES, Bus
from vmm.devices.debug_exit import DebugExit
from vmm.devices.power import PowerOff
from vmm.devices.reset import I8042, I8042_PORTS, RESET_PORTS, ResetControl, ResetState
from vmm.devices.serial import Serial, SerialState
from vmm.devices.testdev import PAGE, PORTS, TestDevice, TestState
from vmm.errors import GuestCrash
from vmm.fds import FdStore
from vmm.kvm import Exit, abi
from vmm.machine.journal import Journal
from vmm.machine.machine import (
    COM1_PORT,
    DEBUG_EXIT_PORT,
    I8042_PORT,
    MMIO_SPACE,
    PIO_SPACE,
    POWER_OFF_PORT,
    RESET_CONTROL_PORT,
    TESTDEV_PAGE,
    TESTDEV_PORT,
)
from vmm.machine.vcpu_thread import VcpuThread
from vmm.state import Arena

IO_OFFSET = 0x1000  # of the data in a vCPU's mapping, as KVM has it
IO_BYTES = 0x1000
LAST_PORT = PIO_SPACE - 1
EDGES = (
    *(COM1_PORT, DEBUG_EXIT_PORT, I8042_PORT, RESET_CONTROL_PORT, POWER_OFF_PORT, TESTDEV_PORT, 0),
    LAST_PORT,
)
PAGES = (TESTDEV_PAGE, TESTDEV_PAGE + PAGE, 3 << 30, 1 << 32, 0xFEC0_0000, 0xFEE0_0000, MMIO_SPACE - 1)
ENDS = (Exit.HLT, Exit.SHUTDOWN, Exit.SYSTEM_EVENT, Exit.FAIL_ENTRY, Exit.INTERNAL_ERROR, Exit.INTR, 9999)


class Killed(BaseException):
    """The VMM is killed."""


class FakeVcpu:
    """A vCPU whose exits are read from the input."""

    index = 0
    immediate_exit = False
    waiting_ns = 0

    def __init__(self, reader: Reader) -> None:
        self.run_page = abi.kvm_run()
        self.pending_exit = 0
        self._reader = reader
        self._data = bytearray(IO_BYTES)

    def run(self) -> bool:
        """The next exit; none once the input is at its end, and none while the run loop wants to leave."""
        if not self._reader or self.immediate_exit:
            return False
        self.pending_exit += 1
        kind = self._reader.number() % 8
        page, reader = self.run_page, self._reader
        if kind < 5:
            page.exit_reason = Exit.IO
            page.io.direction = kind & 1
            page.io.size = reader.choice((1, 1, 2, 4))
            near = reader.choice(EDGES) + reader.number() % 16 - 4
            page.io.port = reader.choice((near, near, reader.number(2))) % PIO_SPACE
            most = IO_BYTES // page.io.size
            page.io.count = most if reader.number() == 255 else reader.choice((1, 1, 1, 2, 3, 16))
            page.io.data_offset = IO_OFFSET
            content = reader.bytes(16)
            self._data[: len(content)] = content
        elif kind < 7:
            page.exit_reason = Exit.MMIO
            page.mmio.is_write = kind & 1
            page.mmio.len = reader.choice((1, 2, 4, 8, 3, 5, 6, 7))
            page.mmio.phys_addr = (reader.choice(PAGES) + reader.number() % 16 - 8) % (1 << 52)
            page.mmio.data[:] = reader.bytes(8).ljust(8, b"\0")
        else:
            page.exit_reason = reader.choice(ENDS)
            page.internal.ndata = reader.number(4)
        return True

    def io_data(self, offset: int, length: int) -> memoryview:
        """The exit's data."""
        assert offset == IO_OFFSET
        assert length <= IO_BYTES
        return memoryview(self._data)[:length]


class Stage:
    """Devices, a run loop, and what the guest has brought about."""

    def __init__(self, reader: Reader, *, journaled: bool) -> None:
        self.fds = FdStore()
        self.ended: list[str] = []
        self._reader = reader
        self._journaled = journaled
        self._vcpu = FakeVcpu(reader)
        self._peer = Peer()
        self.build(Arena.open(self.fds))

    def build(self, arena: Arena) -> None:
        """The machine, on new state or on that of a VMM which is gone."""
        serial, reset, counts = (
            arena.place("serial", 0, SerialState),
            arena.place("reset", 0, ResetState),
            arena.place("testdev", 0, TestState),
        )
        self.pio, self.mmio = Bus("PIO", PIO_SPACE), Bus("MMIO", MMIO_SPACE)
        journal = Journal(arena, "journal", 0) if self._journaled else None
        turn: Any = threading.Lock() if self._journaled else contextlib.nullcontext()
        self.thread = VcpuThread(self._vcpu, self.pio, self.mmio, self, lambda: True, journal, turn)  # type: ignore[arg-type]
        self.thread.recover()
        test = TestDevice(arena)
        self._serial = serial
        self.pio.attach(
            COM1_PORT, 8, Serial(arena, Wire(bool(serial.irq_level)), self._peer), "serial", serial
        )
        self.pio.attach(DEBUG_EXIT_PORT, 4, DebugExit(lambda status: self._end("debug-exit")), "debug-exit")
        self.pio.attach(I8042_PORT, I8042_PORTS, I8042(self.guest_reset), "i8042")
        self.pio.attach(
            RESET_CONTROL_PORT, RESET_PORTS, ResetControl(arena, self.guest_reset), "reset", reset
        )
        self.pio.attach(POWER_OFF_PORT, 2, PowerOff(lambda: self._end("power-off")), "power-off")
        self.pio.attach(TESTDEV_PORT, PORTS, test.ports, "testdev", counts)
        self.mmio.attach(TESTDEV_PAGE, PAGE, test.registers, "testdev", counts)

    def _end(self, what: str) -> None:
        self.ended.append(what)
        self.thread.stop_after_exit()
        if self._reader.number() == 1:
            raise Killed

    def guest_reset(self) -> None:
        self._end("reset")

    def guest_shutdown(self, reason: str) -> None:
        self._end(reason)

    def guest_crashed(self, index: int, error: GuestCrash) -> None:
        assert str(error)
        self._end("crash")

    def thread_failed(self, index: int, error: BaseException) -> None:
        raise error

    def run(self) -> None:
        """Until the input is at its end, over everything that ends the guest."""
        while self._reader:
            self._peer.room = self._reader.number() % 64
            self._peer.waiting = bytearray(self._reader.number() % 32)
            self._peer.turn()
            self._vcpu.immediate_exit = False
            self.thread._stop = False
            try:
                with self._until_input_ends():
                    self.thread._serve()
            except Killed:
                self.build(Arena(self.fds.get("state"), create=False))
            for bus in (self.pio, self.mmio):
                assert len(bus.unclaimed) <= COUNTED_ADDRESSES
            assert ctypes.sizeof(self._serial) < 1024

    @contextlib.contextmanager
    def _until_input_ends(self) -> Iterator[None]:
        run: Callable[[], bool] = self._vcpu.run

        def once() -> bool:
            if not self._reader:
                self.thread.stop_after_exit()
            return run()

        self._vcpu.run = once  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._vcpu.run


def one(data: bytes) -> None:
    """Byte 0: with a journal or without; then exits."""
    reader = Reader(data)
    stage = Stage(reader, journaled=bool(reader.number() & 1))
    try:
        stage.run()
    finally:
        stage.fds.close()


def seeds() -> Iterator[bytes]:
    """Output, a string of it, input, odd MMIO, resets, a VMM that dies in an exit."""
    near = bytes((4, 0))  # the edge itself; that choice
    out = bytes((1, 0, 0)) + near + b"\0" + b"a" * 16
    string = bytes((1, 0, 0)) + near + bytes((3, 77)) + b"b" * 16
    into = bytes((0, 0, 0)) + near + b"\0" + bytes(16)
    over = bytes((1, 3, 0, 10, 0, 4)) + bytes(16)
    mmio = b"".join(bytes((5 + write, width, 0, 8)) + b"m" * 8 for write in (0, 1) for width in range(8))
    reset = bytes((1, 0, 2, 8, 0, 0)) + b"\xfe" + bytes(15) + b"\1"
    exit_ = bytes((1, 0, 1)) + near + b"\0" + b"\x07" + bytes(15)
    for journaled in (0, 1):
        yield bytes((journaled, 9, 9)) + out + string + into + over + mmio
        yield bytes((journaled, 0, 0)) + out * 3 + reset + bytes((5, 5)) + string + exit_ + out
        yield bytes((journaled, 1, 1)) + b"".join(
            bytes((7, kind)) + bytes(4) + b"\0\1\1" for kind in range(7)
        )
