"""How a guest resets a PC: the keyboard controller's pulse, and the chipset's reset control register."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import ClassVar

from vmm.state import Arena

# i8042 (Intel UPI-41 keyboard controller, as IBM's PC/AT Technical Reference describes it)
I8042_PORTS = 5
DATA, STATUS = 0, 4
STATUS_IDLE = 0x1C  # keyboard not locked, last write was a command, self-test passed; both buffers empty
PULSE = 0xF0  # commands F0-FF pulse those output port bits whose bit is 0
PULSE_NONE = 0xFF
PULSE_RESET = 0x01  # bit 0 is the CPU's reset line

# Reset control register (Intel ICH9 data sheet, 13.7.5 RST_CNT)
RESET_PORTS = 4  # the register is byte-wide at offset 1 of the PCI configuration address port, 0xCF8
RESET_OFFSET = 1
RST_CPU = 0x04
RST_KEPT = 0x0A  # SYS_RST and FULL_RST


class I8042:
    """The data port (0x60) and the status and command port (0x64), with nothing connected to either."""

    def __init__(self, on_reset: Callable[[], object]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> bytes:
        """Data: zero. Status: idle. The ports between are others' and read all ones."""
        registers = {DATA: 0, STATUS: STATUS_IDLE}
        return bytes(registers.get(at, 0xFF) for at in range(offset, offset + size))

    def write(self, offset: int, data: bytes) -> None:
        """Calls `on_reset()` on the vCPU's thread where the command pulses the reset line, as 0xFE does."""
        command = dict(enumerate(data, offset)).get(STATUS, PULSE_NONE)
        if command & PULSE == PULSE and not command & PULSE_RESET:
            self._on_reset()


class ResetState(ctypes.LittleEndianStructure):
    """The reset control register's bits that read back."""

    VERSION: ClassVar[int] = 1
    control: int
    _fields_ = (("control", ctypes.c_uint32),)


class ResetControl:
    """The reset control register within the PCI configuration address port, where there is no PCI bus.

    It is to be attached at 0xCF8 with RESET_PORTS ports: only a byte access at offset 1 is the register's. A
    doubleword there is a PCI configuration address, whose second byte must not reset the machine.
    """

    def __init__(self, arena: Arena, on_reset: Callable[[], object], instance: int = 0) -> None:
        """Work on section `reset/instance`, a new or a received one."""
        self._state = arena.place("reset", instance, ResetState)
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> bytes:
        """The register; elsewhere all ones, which is how a guest learns that there is no PCI bus."""
        if (offset, size) == (RESET_OFFSET, 1):
            return bytes((self._state.control & RST_KEPT,))
        return b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        """Calls `on_reset()` on the vCPU's thread where the register is given RST_CPU."""
        if (offset, len(data)) == (RESET_OFFSET, 1):
            self._state.control = data[0] & RST_KEPT
            if data[0] & RST_CPU:
                self._on_reset()
