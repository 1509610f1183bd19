"""A 16550A UART, by National Semiconductor's PC16550D data sheet (1995): its register names and tables are
used here.

What differs from the chip: there is no wire, so no baud rate and no parity, framing or break error; a byte
leaves at once when the character device takes it; and the character timeout is reported at once. A zeroed
structure is the chip after master reset.

A byte that the character device does not take stays in the transmitter FIFO, and THRE stays clear until it is
gone: a guest that floods a stuck reader waits as it would for a stuck modem, the VMM never does. Input is
taken only as far as the receiver FIFO has room. So every byte is in the kernel's buffers or in the state, and
a handover loses none. This module must never keep one elsewhere.

Thread-safe: vCPU threads and the event loop share the character device's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import ClassVar

from vmm.devices.chardev.interface import CharDevice
from vmm.errors import StateError
from vmm.irq import IrqLine
from vmm.state import Arena

REGISTERS = 8
FIFO_BYTES = 16

# IER, interrupt enable (8.6)
IER_RX = 0x01
IER_THRE = 0x02
IER_LINE = 0x04
IER_MODEM = 0x08

# IIR, interrupt identification, in order of priority (8.5, table IV)
IIR_LINE = 0x06
IIR_RX = 0x04
IIR_TIMEOUT = 0x0C
IIR_THRE = 0x02
IIR_MODEM = 0x00
IIR_NONE = 0x01
IIR_FIFOS = 0xC0

# FCR, FIFO control (8.4)
FCR_ENABLE = 0x01
FCR_CLEAR_RX = 0x02
FCR_CLEAR_TX = 0x04
FCR_KEPT = 0xC9
TRIGGERS = (1, 4, 8, 14)  # by bits 7 and 6

LCR_DLAB = 0x80  # (8.1)

# MCR, modem control (8.7)
MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10
MCR_KEPT = 0x1F

# LSR, line status (8.3)
LSR_DR = 0x01
LSR_OE = 0x02
LSR_THRE = 0x20
LSR_TEMT = 0x40

# MSR, modem status (8.8); the delta bits are the lines' four bits below
MSR_TERI = 0x04
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_DELTAS = 0x0F
CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD
LOOPED = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))


class FifoState(ctypes.LittleEndianStructure):
    """A ring of bytes: the oldest is at `head`."""

    head: int
    count: int
    _fields_ = (("head", ctypes.c_uint8), ("count", ctypes.c_uint8), ("data", ctypes.c_uint8 * FIFO_BYTES))


class SerialState(ctypes.LittleEndianStructure):
    """All that a guest can observe of the UART."""

    VERSION: ClassVar[int] = 1
    ier: int
    fcr: int
    lcr: int
    mcr: int
    scr: int
    dll: int
    dlm: int
    overrun: int
    msr_deltas: int
    thre_pending: int
    irq_level: int
    _fields_ = (
        ("ier", ctypes.c_uint8),
        ("fcr", ctypes.c_uint8),
        ("lcr", ctypes.c_uint8),
        ("mcr", ctypes.c_uint8),
        ("scr", ctypes.c_uint8),
        ("dll", ctypes.c_uint8),
        ("dlm", ctypes.c_uint8),
        ("overrun", ctypes.c_uint8),
        ("msr_deltas", ctypes.c_uint8),
        ("thre_pending", ctypes.c_uint8),
        ("irq_level", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8),
        ("rx", FifoState),
        ("tx", FifoState),
    )


class _Fifo:
    """One FIFO, working on its state; its arithmetic stays inside the ring whatever the state holds."""

    def __init__(self, state: FifoState, what: str) -> None:
        if state.head >= FIFO_BYTES or state.count > FIFO_BYTES:
            raise StateError(f"{what} FIFO: {state.count} bytes from {state.head} on are impossible; refused")
        self._state = state
        self._data = state.data

    def __len__(self) -> int:
        return self._state.count

    def push(self, byte: int) -> None:
        state = self._state
        self._data[(state.head + state.count) % FIFO_BYTES] = byte
        state.count += 1

    def pop(self) -> int:
        byte = int(self._data[self._state.head % FIFO_BYTES])
        self.drop(1)
        return byte

    def content(self) -> bytes:
        data, head = bytes(self._data), self._state.head
        return (data[head:] + data[:head])[: self._state.count]

    def drop(self, count: int) -> None:
        state = self._state
        state.head = (state.head + count) % FIFO_BYTES
        state.count -= count

    def clear(self) -> None:
        self._state.head = self._state.count = 0


class Serial:
    """One UART of eight byte-wide registers; an access of several bytes is one to each, as on the ISA bus."""

    def __init__(
        self,
        arena: Arena,
        irq: IrqLine,
        chardev: CharDevice,
        instance: int = 0,
        *,
        out2_gates_irq: bool = False,
    ) -> None:
        """Work on section `serial/instance`, a new or a received one; `out2_gates_irq` wires OUT2 as PCs do.

        Raises StateError for a state that cannot be.
        """
        self._state = state = arena.place("serial", instance, SerialState)
        self._rx = _Fifo(state.rx, f"state section serial/{instance}: receiver")
        self._tx = _Fifo(state.tx, f"state section serial/{instance}: transmitter")
        self._irq = irq
        self._chardev = chardev
        self._lock = chardev.lock
        self._out2_gates_irq = out2_gates_irq
        self._readers: tuple[Callable[[], int], ...] = (
            self._read_rbr,
            self._read_ier,
            self._read_iir,
            lambda: state.lcr,
            lambda: state.mcr,
            self._read_lsr,
            self._read_msr,
            lambda: state.scr,
        )
        self._writers: tuple[Callable[[int], None], ...] = (
            self._write_thr,
            self._write_ier,
            self._write_fcr,
            self._write_lcr,
            self._write_mcr,
            _write_nothing,
            _write_nothing,
            self._write_scr,
        )
        chardev.attach(self._receive, self._transmit)

    def reset(self) -> None:
        """Master reset, with the machine's."""
        with self._lock:
            if self._state.irq_level:
                self._irq.set(False)
            ctypes.memset(ctypes.byref(self._state), 0, ctypes.sizeof(self._state))
            self._chardev.want_read(True)

    # --- the bus's side: vCPU threads ---

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from register `offset` on; all ones beyond the last register."""
        with self._lock:
            if size == 1 and offset < REGISTERS:
                return bytes((self._readers[offset](),))
            registers = range(offset, offset + size)
            return bytes(self._readers[at]() if at < REGISTERS else 0xFF for at in registers)

    def write(self, offset: int, data: bytes) -> None:
        """`data` to register `offset` and on; nothing happens beyond the last register."""
        with self._lock:
            for at, value in enumerate(data, offset):
                if at < REGISTERS:
                    self._writers[at](value)

    # --- the character device's side: callbacks, with the lock held ---

    def _receive(self) -> None:
        """Take as much input as the receiver FIFO has room for."""
        room = 0 if self._state.mcr & MCR_LOOP else self._capacity() - len(self._rx)
        if room > 0:
            for byte in self._chardev.read(room):
                self._rx.push(byte)
                room -= 1
            self._update_irq()
        if room <= 0:
            self._chardev.want_read(False)

    def _transmit(self) -> None:
        """Send what the transmitter FIFO holds."""
        if len(self._tx):
            self._tx.drop(self._chardev.write(self._tx.content()))
            if len(self._tx):
                self._chardev.want_write()
            else:
                self._sent()

    # --- interrupts ---

    def _pending(self) -> int:
        """The IIR's identification bits for the most important interrupt pending."""
        state = self._state
        enabled = state.ier
        if enabled & IER_LINE and state.overrun:
            return IIR_LINE
        if enabled & IER_RX and (count := len(self._rx)):
            return IIR_RX if not state.fcr & FCR_ENABLE or count >= TRIGGERS[state.fcr >> 6] else IIR_TIMEOUT
        if enabled & IER_THRE and state.thre_pending:
            return IIR_THRE
        if enabled & IER_MODEM and state.msr_deltas:
            return IIR_MODEM
        return IIR_NONE

    def _update_irq(self) -> None:
        state = self._state
        level = self._pending() != IIR_NONE and (not self._out2_gates_irq or bool(state.mcr & MCR_OUT2))
        if level != bool(state.irq_level):
            state.irq_level = level
            self._irq.set(level)

    def _sent(self) -> None:
        """The transmitter holding register has become empty."""
        if self._state.ier & IER_THRE:
            self._state.thre_pending = 1
            self._update_irq()

    def _capacity(self) -> int:
        return FIFO_BYTES if self._state.fcr & FCR_ENABLE else 1

    # --- registers ---

    def _read_rbr(self) -> int:
        state = self._state
        if state.lcr & LCR_DLAB:
            return state.dll
        if not len(self._rx):
            return 0
        byte = self._rx.pop()
        if not len(self._rx) and not state.mcr & MCR_LOOP:
            self._chardev.want_read(True)
        self._update_irq()
        return byte

    def _write_thr(self, value: int) -> None:
        state = self._state
        if state.lcr & LCR_DLAB:
            state.dll = value
            return
        if state.ier & IER_THRE and state.thre_pending:
            state.thre_pending = 0
            self._update_irq()  # low now, high again when sent: the edge that the PIC wants
        if state.mcr & MCR_LOOP:
            self._loop_back(value)
            self._sent()
        elif len(self._tx) or not self._chardev.write(bytes((value,))):
            if len(self._tx) < self._capacity():  # what is written to a full one is lost
                self._tx.push(value)
            self._chardev.want_write()
        else:
            self._sent()

    def _loop_back(self, value: int) -> None:
        if len(self._rx) >= self._capacity():
            self._state.overrun = 1
            if self._state.fcr & FCR_ENABLE:
                return  # the FIFO keeps what it has; the RBR alone is overwritten (8.3, bit 1)
            self._rx.clear()
        self._rx.push(value)
        self._update_irq()

    def _read_ier(self) -> int:
        return self._state.dlm if self._state.lcr & LCR_DLAB else self._state.ier

    def _write_ier(self, value: int) -> None:
        state = self._state
        if state.lcr & LCR_DLAB:
            state.dlm = value
            return
        before, state.ier = state.ier, value & (IER_RX | IER_THRE | IER_LINE | IER_MODEM)
        if not state.ier & IER_THRE:
            state.thre_pending = 0
        elif not before & IER_THRE and not len(self._tx):
            state.thre_pending = 1  # enabled while the THR is empty, it interrupts at once
        self._update_irq()

    def _read_iir(self) -> int:
        state = self._state
        pending = self._pending()
        if pending == IIR_THRE:
            state.thre_pending = 0
            self._update_irq()
        return pending | IIR_FIFOS if state.fcr & FCR_ENABLE else pending

    def _write_fcr(self, value: int) -> None:
        state = self._state
        switched = (value ^ state.fcr) & FCR_ENABLE  # either way empties both FIFOs
        clear = value if value & FCR_ENABLE else 0  # the other bits count with that one alone
        state.fcr = clear & FCR_KEPT
        if switched or clear & FCR_CLEAR_RX:
            self._rx.clear()
            self._chardev.want_read(not state.mcr & MCR_LOOP)
        if (switched or clear & FCR_CLEAR_TX) and len(self._tx):
            self._tx.clear()
            self._sent()
        self._update_irq()

    def _write_lcr(self, value: int) -> None:
        self._state.lcr = value

    def _write_mcr(self, value: int) -> None:
        state = self._state
        before, state.mcr = state.mcr, value & MCR_KEPT
        old, new = _lines(before), _lines(state.mcr)
        changed = old ^ new
        if changed & MSR_RI and new & MSR_RI:
            changed ^= MSR_RI  # the ring indicator's trailing edge alone is reported
        state.msr_deltas |= changed >> 4
        if before & MCR_LOOP and not state.mcr & MCR_LOOP:
            self._chardev.want_read(True)
        self._update_irq()

    def _read_lsr(self) -> int:
        state = self._state
        value = (LSR_DR if len(self._rx) else 0) | (0 if len(self._tx) else LSR_THRE | LSR_TEMT)
        if state.overrun:
            state.overrun = 0
            self._update_irq()
            value |= LSR_OE
        return value

    def _read_msr(self) -> int:
        state = self._state
        value = _lines(state.mcr) | state.msr_deltas & MSR_DELTAS
        if state.msr_deltas:
            state.msr_deltas = 0
            self._update_irq()
        return value

    def _write_scr(self, value: int) -> None:
        self._state.scr = value


def _lines(mcr: int) -> int:
    """The modem lines as the MSR shows them: a modem that is always ready, or in loopback our own outputs."""
    if mcr & MCR_LOOP:
        return sum(line for output, line in LOOPED if mcr & output)
    return CONNECTED


def _write_nothing(_: int) -> None:
    """LSR and MSR are for reading; writing to them is a factory test."""
