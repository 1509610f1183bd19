"""Arbitrary guests, peers and handovers against the UART: nothing raises, no byte is lost."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Lock

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmm.devices.serial import FIFO_BYTES, Serial, SerialState
from vmm.errors import StateError
from vmm.fds import FdStore
from vmm.state import Arena

SIZES = st.sampled_from((1, 2, 4, 8))
OFFSETS = st.one_of(st.integers(0, 7), st.integers(0, 1 << 16))
FIFOS_ON, LOOP, DATA_READY, THR_EMPTY = 0x01, 0x10, 0x01, 0x20


class Wire:
    """An interrupt line that accepts changes of its level alone."""

    def __init__(self, level: bool) -> None:
        self.level = level

    def set(self, level: bool) -> None:
        assert self.level is not level
        self.level = level


class Peer:
    """A character device that takes as much as it has room for."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.label = "fuzz"
        self.sent = bytearray()
        self.waiting = bytearray()
        self.room = 0
        self.reading = True

    def attach(self, on_readable: Callable[[], object], on_writable: Callable[[], object]) -> None:
        self.on_readable, self.on_writable = on_readable, on_writable

    def write(self, data: bytes) -> int:
        taken = min(len(data), self.room)
        self.sent += data[:taken]
        self.room -= taken
        return taken

    def read(self, limit: int) -> bytes:
        assert 1 <= limit <= FIFO_BYTES
        data = bytes(self.waiting[:limit])
        del self.waiting[:limit]
        return data

    def want_read(self, wanted: bool) -> None:
        self.reading = wanted

    def want_write(self) -> None:
        """`room` alone decides when more goes out."""

    def start(self) -> None:
        """Nothing to start."""

    hold = quiet = freeze = thaw = close = start

    def turn(self) -> None:
        with self.lock:
            self.on_writable()
            while self.waiting and self.reading:
                self.on_readable()


class _Uart(RuleBasedStateMachine):
    """A UART, its peer, and a new UART on the same state now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.fds = FdStore()
        self.arena = Arena.open(self.fds)
        self.peer = Peer()
        self.wire = Wire(False)
        self.typed = bytearray()
        self.build()

    def build(self) -> None:
        self.uart = Serial(self.arena, self.wire, self.peer)
        self.state = self.arena.place("serial", 0, SerialState)

    def teardown(self) -> None:
        self.fds.close()

    @rule()
    def hand_over(self) -> None:
        self.arena = Arena(self.fds.get("state"), create=False)
        self.build()
        self.peer.reading = True

    @rule(room=st.integers(0, 40), data=st.binary(max_size=40))
    def peer_acts(self, room: int, data: bytes) -> None:
        self.peer.room = room
        self.peer.waiting += data
        self.typed += data
        self.peer.turn()

    @invariant()
    def indices_stay_inside(self) -> None:
        for fifo in (self.state.rx, self.state.tx):
            assert fifo.head < FIFO_BYTES
            assert fifo.count <= FIFO_BYTES

    @invariant()
    def the_line_follows_the_state(self) -> None:
        assert self.wire.level is bool(self.state.irq_level)


class Guests(_Uart):
    """Guests that do anything at all."""

    @rule(offset=OFFSETS, size=SIZES)
    def guest_reads(self, offset: int, size: int) -> None:
        assert len(self.uart.read(offset, size)) == size

    @rule(offset=OFFSETS, size=SIZES, value=st.integers(0, (1 << 64) - 1))
    def guest_writes(self, offset: int, size: int, value: int) -> None:
        self.uart.write(offset, value.to_bytes(8, "little")[:size])

    @rule()
    def guest_is_reset(self) -> None:
        self.uart.reset()
        assert not self.wire.level

    @invariant()
    def input_is_never_forgotten(self) -> None:
        """Who has input waiting and room for it is reading."""
        if self.peer.waiting and not self.state.rx.count and not self.state.mcr & LOOP:
            assert self.peer.reading


class PoliteGuests(_Uart):
    """Guests that ask the LSR first, as drivers do: they get every byte, in order, and so does their peer."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.got = bytearray(), bytearray()

    @initialize(fcr=st.sampled_from((0x00, 0x01, 0x41, 0x81, 0xC1)), ier=st.integers(0, 15))
    def guest_sets_up(self, fcr: int, ier: int) -> None:
        self.uart.write(2, bytes((fcr,)))
        self.uart.write(1, bytes((ier,)))

    @rule(data=st.binary(max_size=FIFO_BYTES))
    def guest_prints(self, data: bytes) -> None:
        burst = len(data) if self.state.fcr & FIFOS_ON else 1
        if self.uart.read(5, 1)[0] & THR_EMPTY:
            for byte in data[:burst]:
                self.uart.write(0, bytes((byte,)))
            self.written += data[:burst]

    @rule(count=st.integers(0, 20))
    def guest_reads(self, count: int) -> None:
        for _ in range(count):
            if self.uart.read(5, 1)[0] & DATA_READY:
                self.got += self.uart.read(0, 1)

    @invariant()
    def nothing_is_lost(self) -> None:
        def ring(fifo: ctypes.LittleEndianStructure) -> bytes:
            return bytes(fifo.data[(fifo.head + at) % FIFO_BYTES] for at in range(fifo.count))

        assert self.peer.sent + ring(self.state.tx) == self.written
        assert self.got + ring(self.state.rx) + self.peer.waiting == self.typed


TestGuests = Guests.TestCase
TestPoliteGuests = PoliteGuests.TestCase
TestGuests.settings = TestPoliteGuests.settings = settings(max_examples=60, stateful_step_count=40)


@settings(max_examples=300)
@given(content=st.binary(min_size=ctypes.sizeof(SerialState), max_size=ctypes.sizeof(SerialState)))
def test_a_received_state_is_refused_or_works(content: bytes) -> None:
    fds = FdStore()
    arena = Arena.open(fds)
    state = arena.place("serial", 0, SerialState)
    ctypes.memmove(ctypes.addressof(state), content, len(content))
    possible = all(fifo.head < FIFO_BYTES and fifo.count <= FIFO_BYTES for fifo in (state.rx, state.tx))
    peer = Peer()
    try:
        uart = Serial(arena, Wire(bool(state.irq_level)), peer)
    except StateError:
        assert not possible
    else:
        assert possible
        peer.room = 100
        peer.waiting += b"x" * 100
        peer.turn()
        for offset in range(8):
            uart.write(offset, b"\x5a")
            assert len(uart.read(offset, 1)) == 1
    fds.close()
