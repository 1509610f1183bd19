"""The 16550A against its data sheet: registers, FIFOs, interrupts, loopback, and its state in a handover."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator

import pytest

from vmm.devices.serial import FIFO_BYTES, Serial, SerialState
from vmm.errors import StateError
from vmm.fds import FdStore
from vmm.state import Arena

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

RX, THRE, LINE, MODEM = 1, 2, 4, 8  # IER
NO_INTERRUPT, IS_LINE, IS_RX, IS_TIMEOUT, IS_THRE, IS_MODEM = 1, 6, 4, 0xC, 2, 0
LOOP, OUT2, OUT1, RTS, DTR = 0x10, 8, 4, 2, 1
IDLE = 0x60  # LSR: THRE and TEMT


class Wire:
    """An interrupt line that remembers what was done to it."""

    def __init__(self) -> None:
        self.levels: list[bool] = []

    def set(self, level: bool) -> None:
        self.levels.append(level)


class Peer:
    """A character device whose other end the test holds: `room` bytes are taken, `waiting` are to be read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.label = "test"
        self.sent = b""
        self.room = 1 << 20
        self.waiting = b""
        self.reading = True
        self.wants_write = False

    def attach(self, on_readable: Callable[[], object], on_writable: Callable[[], object]) -> None:
        self.on_readable, self.on_writable = on_readable, on_writable

    def write(self, data: bytes) -> int:
        assert self.lock.locked()
        taken = data[: self.room]
        self.sent += taken
        self.room -= len(taken)
        return len(taken)

    def read(self, limit: int) -> bytes:
        assert self.lock.locked()
        data, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return data

    def want_read(self, wanted: bool) -> None:
        assert self.lock.locked()
        self.reading = wanted

    def want_write(self) -> None:
        assert self.lock.locked()
        self.wants_write = True

    def start(self) -> None:
        self.drain(0)

    def close(self) -> None:
        """Nothing to end."""

    hold = quiet = freeze = thaw = close

    def type(self, data: bytes) -> None:
        """Input arrives; it is announced for as long as the device reads."""
        self.waiting += data
        while self.waiting and self.reading:
            with self.lock:
                self.on_readable()

    def drain(self, room: int) -> None:
        """`room` bytes more can go out."""
        self.room += room
        self.wants_write = False
        with self.lock:
            self.on_writable()


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


class Rig:
    """A UART with both of its ends."""

    def __init__(self, fds: FdStore, *, gated: bool = False) -> None:
        self.arena = Arena.open(fds)
        self.wire, self.peer = Wire(), Peer()
        self.uart = Serial(self.arena, self.wire, self.peer, out2_gates_irq=gated)
        self.state = self.arena.place("serial", 0, SerialState)

    def get(self, register: int) -> int:
        return self.uart.read(register, 1)[0]

    def put(self, register: int, value: int) -> None:
        self.uart.write(register, bytes((value,)))

    def take(self) -> bytes:
        """What the guest reads until the receiver is empty."""
        data = b""
        while self.get(LSR) & 1:
            data += self.uart.read(RBR, 1)
            self.peer.type(b"")
        return data


@pytest.fixture
def rig(fds: FdStore) -> Iterator[Rig]:
    rig = Rig(fds)
    yield rig
    vars(rig).clear()  # the state memfd's mapping goes with the last structure in it


def test_reset_values(rig: Rig) -> None:
    assert [rig.get(register) for register in range(8)] == [0, 0, NO_INTERRUPT, 0, 0, IDLE, 0xB0, 0]
    assert rig.wire.levels == []


def test_a_byte_written_goes_straight_out(rig: Rig) -> None:
    for byte in b"hello":
        rig.put(THR, byte)
        assert rig.get(LSR) == IDLE
    assert rig.peer.sent == b"hello"


def test_divisor_latch_hides_data_and_ier(rig: Rig) -> None:
    rig.put(IER, RX)
    rig.put(LCR, 0x83)
    rig.put(DLL, 0x0C)
    rig.put(DLM, 0x01)
    assert (rig.get(DLL), rig.get(DLM)) == (0x0C, 0x01)
    rig.put(LCR, 0x03)
    assert rig.get(IER) == RX
    assert rig.peer.sent == b""
    rig.put(LCR, 0x83)
    assert (rig.get(DLL), rig.get(DLM)) == (0x0C, 0x01)


def test_scratch_and_unwritable_bits(rig: Rig) -> None:
    rig.put(SCR, 0xA5)
    rig.put(IER, 0xF0)
    rig.put(MCR, 0xE0)
    rig.put(LSR, 0)
    rig.put(MSR, 0)
    assert [rig.get(at) for at in (SCR, IER, MCR, LSR, MSR)] == [0xA5, 0, 0, IDLE, 0xB0]


def test_received_byte_interrupts_without_fifo(rig: Rig) -> None:
    rig.put(IER, RX)
    rig.peer.type(b"ab")
    assert rig.wire.levels == [True]
    assert rig.get(IIR) == IS_RX
    assert rig.get(LSR) == IDLE | 1
    assert rig.peer.waiting == b"b"  # one byte of room, and so one byte was taken
    assert not rig.peer.reading
    assert rig.get(RBR) == ord("a")
    assert rig.wire.levels == [True, False]
    assert rig.peer.reading
    rig.peer.type(b"")
    assert rig.take() == b"b"
    assert rig.get(IIR) == NO_INTERRUPT


def test_rbr_of_an_empty_receiver_reads_zero(rig: Rig) -> None:
    assert rig.get(RBR) == 0


@pytest.mark.parametrize(("bits", "trigger"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_receiver_trigger_levels_and_timeout(rig: Rig, bits: int, trigger: int) -> None:
    rig.put(FCR, 0x01 | bits)
    rig.put(IER, RX)
    for count in range(1, FIFO_BYTES + 1):
        rig.peer.type(b"x")
        assert rig.get(IIR) == 0xC0 | (IS_RX if count >= trigger else IS_TIMEOUT)
    rig.peer.type(b"yz")
    assert rig.peer.waiting == b"yz"
    for left in range(FIFO_BYTES - 1, 0, -1):
        rig.get(RBR)
        assert rig.get(IIR) == 0xC0 | (IS_RX if left >= trigger else IS_TIMEOUT)
    rig.get(RBR)
    assert rig.get(IIR) == 0xC0 | NO_INTERRUPT
    assert rig.wire.levels == [True, False]
    rig.peer.type(b"")
    assert rig.take() == b"yz"


def test_receiver_keeps_order_across_the_ring(rig: Rig) -> None:
    rig.put(FCR, 0x01)
    got = b""
    text = bytes(range(100))
    rig.peer.type(text)
    while len(got) < len(text):
        got += rig.uart.read(RBR, 1)
        rig.peer.type(b"")
    assert text == got


def test_thre_interrupt(rig: Rig) -> None:
    rig.put(IER, THRE)  # the THR is empty: at once
    assert rig.wire.levels == [True]
    assert rig.get(IIR) == IS_THRE  # reading it is the acknowledgement
    assert rig.wire.levels == [True, False]
    assert rig.get(IIR) == NO_INTERRUPT
    rig.put(THR, ord("a"))
    assert rig.wire.levels == [True, False, True]
    rig.put(THR, ord("b"))  # unacknowledged: the line falls and rises, as it does on the chip
    assert rig.wire.levels == [True, False, True, False, True]
    rig.put(IER, 0)
    assert rig.wire.levels[-1] is False
    rig.put(IER, THRE)
    assert rig.wire.levels[-1] is True


def test_interrupt_priorities(rig: Rig) -> None:
    rig.put(FCR, 0x01)
    rig.put(MCR, LOOP)
    rig.put(IER, RX | THRE | LINE | MODEM)
    rig.put(MCR, LOOP | RTS)
    for _ in range(FIFO_BYTES + 1):
        rig.put(THR, 0x55)
    assert rig.get(IIR) == 0xC0 | IS_LINE
    assert rig.get(LSR) == IDLE | 3
    assert rig.get(LSR) == IDLE | 1  # OE is cleared by being read
    assert rig.get(IIR) == 0xC0 | IS_RX
    rig.put(FCR, 0x03)
    assert rig.get(IIR) == 0xC0 | IS_THRE
    assert rig.get(IIR) == 0xC0 | IS_MODEM
    rig.get(MSR)
    assert rig.get(IIR) == 0xC0 | NO_INTERRUPT
    assert rig.wire.levels[-1] is False


def test_disabled_interrupts_do_not_move_the_line(rig: Rig) -> None:
    rig.peer.type(b"x")
    rig.put(THR, 0)
    rig.put(MCR, RTS)
    assert rig.wire.levels == []


def test_out2_gates_the_line_where_wired(fds: FdStore) -> None:
    rig = Rig(fds, gated=True)
    rig.put(IER, RX)
    rig.peer.type(b"x")
    assert rig.wire.levels == []
    assert rig.get(IIR) == IS_RX
    rig.put(MCR, OUT2)
    assert rig.wire.levels == [True]
    rig.put(MCR, 0)
    assert rig.wire.levels == [True, False]


def test_loopback_data_stays_inside(rig: Rig) -> None:
    rig.put(FCR, 0x01)
    rig.put(MCR, LOOP)
    rig.peer.type(b"outside")
    for byte in b"inside":
        rig.put(THR, byte)
    assert rig.take() == b"inside"
    assert rig.peer.sent == b""
    rig.put(MCR, 0)
    rig.peer.type(b"")
    assert rig.take() == b"outside"


def test_loopback_overrun(rig: Rig) -> None:
    rig.put(MCR, LOOP)
    rig.put(THR, 1)
    rig.put(THR, 2)
    assert rig.get(LSR) == IDLE | 3
    assert rig.get(RBR) == 2  # without FIFO the new byte takes the old one's place
    rig.put(FCR, 0x01)
    for byte in range(FIFO_BYTES + 2):
        rig.put(THR, byte)
    assert rig.get(LSR) == IDLE | 3
    assert rig.take() == bytes(range(FIFO_BYTES))  # with it, what is in the FIFO stays


@pytest.mark.parametrize(("output", "line", "delta"), [(RTS, 0x10, 1), (DTR, 0x20, 2), (OUT2, 0x80, 8)])
def test_loopback_modem_lines(rig: Rig, output: int, line: int, delta: int) -> None:
    rig.put(MCR, LOOP)
    rig.get(MSR)
    rig.put(MCR, LOOP | output)
    assert rig.get(MSR) == line | delta
    assert rig.get(MSR) == line
    rig.put(MCR, LOOP)
    assert rig.get(MSR) == delta


def test_ring_indicator_reports_its_trailing_edge_alone(rig: Rig) -> None:
    rig.put(MCR, LOOP)
    rig.get(MSR)
    rig.put(MCR, LOOP | OUT1)
    assert rig.get(MSR) == 0x40
    rig.put(MCR, LOOP)
    assert rig.get(MSR) == 0x04


def test_fcr_clears_what_it_is_told_to(rig: Rig) -> None:
    rig.put(FCR, 0x01)
    rig.peer.room = 0
    rig.peer.type(b"in")
    rig.put(THR, 0x55)
    rig.put(FCR, 0x06)  # bit 0 clear: the FIFOs go off, which empties them
    assert rig.get(LSR) == IDLE
    assert rig.get(IIR) == NO_INTERRUPT
    rig.put(FCR, 0x01)
    rig.peer.type(b"in")
    rig.put(THR, 0x55)
    rig.put(FCR, 0x03)
    assert rig.get(LSR) == 0
    rig.peer.type(b"in")
    rig.put(FCR, 0x05)
    assert rig.get(LSR) == IDLE | 1


def test_a_stuck_reader_makes_the_guest_wait(rig: Rig) -> None:
    rig.put(FCR, 0x01)
    rig.put(IER, THRE)
    rig.get(IIR)
    rig.peer.room = 3
    for byte in b"abcdefgh":
        rig.put(THR, byte)
    assert rig.peer.sent == b"abc"
    assert rig.get(LSR) == 0
    assert rig.get(IIR) == 0xC0 | NO_INTERRUPT
    assert rig.peer.wants_write
    rig.peer.drain(2)
    assert rig.peer.sent == b"abcde"
    assert rig.get(LSR) == 0
    assert rig.peer.wants_write
    level = len(rig.wire.levels)
    rig.peer.drain(100)
    assert rig.peer.sent == b"abcdefgh"
    assert rig.get(LSR) == IDLE
    assert rig.wire.levels[level:] == [True]
    assert rig.get(IIR) == 0xC0 | IS_THRE


@pytest.mark.parametrize(("fcr", "capacity"), [(0x00, 1), (0x01, FIFO_BYTES)])
def test_a_guest_that_does_not_wait_loses_bytes(rig: Rig, fcr: int, capacity: int) -> None:
    rig.put(FCR, fcr)
    rig.peer.room = 0
    for byte in range(FIFO_BYTES + 4):
        rig.put(THR, byte)
    rig.peer.drain(1000)
    assert rig.peer.sent == bytes(range(capacity))


def test_wide_accesses_are_one_to_each_register(rig: Rig) -> None:
    rig.uart.write(SCR, b"\x5a\xff")
    assert rig.uart.read(SCR, 4) == b"\x5a\xff\xff\xff"
    rig.put(LCR, 0x80)
    rig.uart.write(DLL, b"\x0c\x01")
    assert rig.uart.read(DLL, 2) == b"\x0c\x01"


def test_master_reset(rig: Rig) -> None:
    rig.put(FCR, 0xC1)
    rig.put(IER, RX)
    rig.peer.room = 0
    rig.put(THR, 1)
    rig.peer.type(b"x" * 20)
    rig.uart.reset()
    assert rig.wire.levels == [True, False]
    assert bytes(rig.state) == bytes(ctypes.sizeof(SerialState))
    assert rig.peer.reading
    rig.uart.reset()
    assert rig.wire.levels == [True, False]


def test_handover_in_the_middle_of_both_fifos(fds: FdStore, rig: Rig) -> None:
    rig.put(FCR, 0x81)
    rig.put(IER, RX | THRE)
    rig.put(SCR, 0x77)
    rig.peer.room = 2
    rig.peer.type(b"0123456789")
    for byte in b"abcdef":
        rig.put(THR, byte)
    assert [rig.get(RBR) for _ in range(3)] == list(b"012")

    after = Rig(fds)  # a second UART on the same state, as the next VMM has it
    assert after.wire.levels == []  # the irqchip's state has moved the pin
    assert after.state.irq_level == 1
    after.peer.room = 1
    after.peer.start()
    assert after.peer.sent == b"c"
    assert after.peer.wants_write
    after.peer.drain(100)
    assert rig.peer.sent + after.peer.sent == b"abcdef"
    assert after.get(SCR) == 0x77
    assert after.get(IIR) == 0xC0 | IS_TIMEOUT
    assert after.take() == b"3456789"
    assert after.get(IIR) == 0xC0 | IS_THRE
    assert after.wire.levels == [False]


@pytest.mark.parametrize("fifo", ["rx", "tx"])
@pytest.mark.parametrize(("head", "count"), [(16, 0), (0, 17), (255, 255)])
def test_a_received_state_with_impossible_indices_is_refused(
    fds: FdStore, fifo: str, head: int, count: int
) -> None:
    state = getattr(Arena.open(fds).place("serial", 0, SerialState), fifo)
    state.head, state.count = head, count
    with pytest.raises(StateError, match=rf"serial/0: .* FIFO: {count} bytes from {head} on are impossible"):
        Rig(fds)


def test_many_threads(rig: Rig) -> None:
    rig.put(FCR, 0x01)
    rig.put(IER, RX | THRE)
    threads = [
        threading.Thread(target=lambda byte=byte: [rig.put(THR, byte) for _ in range(2000)])
        for byte in b"abc"
    ]
    threads.append(threading.Thread(target=lambda: [rig.get(IIR) for _ in range(2000)]))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(rig.peer.sent) == sorted(b"abc" * 2000)
    assert all(one is not two for one, two in zip(rig.wire.levels, rig.wire.levels[1:], strict=False))
