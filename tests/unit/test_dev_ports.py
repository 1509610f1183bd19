"""Debug-exit, the two resets, power-off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmm.bus import Bus
from vmm.devices.debug_exit import DebugExit
from vmm.devices.power import PowerOff
from vmm.devices.reset import I8042, I8042_PORTS, RESET_PORTS, ResetControl
from vmm.fds import FdStore
from vmm.state import Arena


class Calls:
    """Counts what a device asks for."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def __call__(self, *what: object) -> None:
        self.seen.append(what)

    @property
    def count(self) -> int:
        return len(self.seen)


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00", 1),
        (b"\x01", 3),
        (b"\x2a", 85),
        (b"\xff", 511),
        (b"\x34\x12", 0x2469),
        (b"\x05\x00\x00\x00", 11),
        (b"\xff\xff\xff\xff", 0x1_FFFF_FFFF),
    ],
)
def test_debug_exit_status(data: bytes, status: int) -> None:
    calls = Calls()
    device = DebugExit(calls)
    device.write(0, data)
    assert calls.seen == [(status,)]
    assert device.read(0, len(data)) == bytes(len(data))


@pytest.mark.parametrize("command", range(256))
def test_i8042_resets_by_pulse_commands_alone(command: int) -> None:
    calls = Calls()
    device = I8042(calls)
    device.write(4, bytes((command,)))
    assert calls.count == (command in range(0xF0, 0x100, 2))


def test_i8042_data_is_no_command() -> None:
    calls = Calls()
    device = I8042(calls)
    device.write(0, b"\xfe")
    device.write(1, b"\xfe")
    assert calls.count == 0


def test_i8042_reads_idle() -> None:
    device = I8042(Calls())
    assert device.read(4, 1) == b"\x1c"  # neither buffer full
    assert device.read(0, 1) == b"\x00"
    assert device.read(0, I8042_PORTS) == b"\x00\xff\xff\xff\x1c"


@pytest.mark.parametrize(
    ("value", "resets"), [(0x00, 0), (0x02, 0), (0x06, 1), (0x04, 1), (0x0E, 1), (0xFB, 0)]
)
def test_reset_control(fds: FdStore, value: int, resets: int) -> None:
    calls = Calls()
    device = ResetControl(Arena.open(fds), calls)
    device.write(1, bytes((value,)))
    assert calls.count == resets
    assert device.read(1, 1) == bytes((value & 0x0A,))


def test_reset_control_goes_on_in_the_next_vmm(fds: FdStore) -> None:
    ResetControl(Arena.open(fds), Calls()).write(1, b"\x02")
    assert ResetControl(Arena.open(fds), Calls()).read(1, 1) == b"\x02"


@pytest.mark.parametrize(
    ("port", "data"), [(0xCF8, b"\x00\x06\x00\x80"), (0xCF8, b"\x00\x06"), (0xCF9, b"\x06\x00")]
)
def test_a_pci_configuration_address_is_no_reset(fds: FdStore, port: int, data: bytes) -> None:
    calls = Calls()
    bus = Bus("PIO", 1 << 16)
    bus.attach(0xCF8, RESET_PORTS, ResetControl(Arena.open(fds), calls), "reset-control")
    bus.write(port, data)  # the address of bus 0, device 0, function 6
    assert calls.count == 0
    assert bus.read(0xCF8, 4) == b"\xff" * 4
    assert bus.unclaimed == {}
    bus.write(0xCF9, b"\x06")
    assert calls.count == 1


@pytest.mark.parametrize(
    ("offset", "data", "off"),
    [
        (0, b"\x00\x20", True),
        (0, b"\x00\x34", True),
        (0, b"\x00\x14", False),
        (0, b"\x20", False),
        (1, b"\x20", True),
        (0, b"\x00\x20\x00\x00", True),
        (0, b"\x00\x00\x00\x20", False),
    ],
)
def test_power_off(offset: int, data: bytes, off: bool) -> None:
    calls = Calls()
    device = PowerOff(calls)
    device.write(offset, data)
    assert calls.count == off
    assert device.read(0, 2) == b"\x00\x00"
