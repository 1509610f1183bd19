"""The buses: who answers an address, and what becomes of an access that nobody answers."""

from __future__ import annotations

import logging

import pytest

from vmm.bus import COUNTED_ADDRESSES, Bus
from vmm.errors import ConfigError


class Registers:
    """Reads give the offsets, writes are remembered."""

    def __init__(self) -> None:
        self.accesses: list[tuple[int, int | bytes]] = []

    def read(self, offset: int, size: int) -> bytes:
        self.accesses.append((offset, size))
        return bytes(range(offset, offset + size))

    def write(self, offset: int, data: bytes) -> None:
        self.accesses.append((offset, data))


@pytest.fixture
def bus() -> Bus:
    return Bus("PIO", 1 << 16)


def test_a_device_sees_offsets(bus: Bus) -> None:
    device = Registers()
    bus.attach(0x3F8, 8, device, "serial")
    assert bus.read(0x3FA, 2) == b"\x02\x03"
    bus.write(0x3FF, b"\x55")
    assert device.accesses == [(2, 2), (7, b"\x55")]
    assert bus.unclaimed == {}


def test_neighbours_do_not_see_each_other(bus: Bus) -> None:
    devices = {start: Registers() for start in (0x20, 0x10, 0x18, 0xFFF8)}
    for start, device in devices.items():
        bus.attach(start, 8, device, f"device-{start:#x}")
    for start in devices:
        bus.read(start, 1)
        bus.read(start + 7, 1)
    assert [device.accesses for device in devices.values()] == [[(0, 1), (7, 1)]] * 4
    assert bus.ranges() == [(start, start + 8, f"device-{start:#x}") for start in (0x10, 0x18, 0x20, 0xFFF8)]


@pytest.mark.parametrize(("start", "size"), [(0x10, 8), (0x0C, 5), (0x17, 1), (0x00, 0x100), (0x12, 2)])
def test_overlap_is_refused(bus: Bus, start: int, size: int) -> None:
    bus.attach(0x10, 8, Registers(), "first")
    with pytest.raises(
        ConfigError, match=rf"^second: {start:#x}\.\.{start + size:#x} overlaps first at 0x10 on"
    ):
        bus.attach(start, size, Registers(), "second")
    assert len(bus.ranges()) == 1


@pytest.mark.parametrize(("start", "size"), [(-1, 4), (0xFFFF, 2), (0x1_0000, 1), (0x10, 0), (0x10, -1)])
def test_ranges_beyond_the_bus_are_refused(bus: Bus, start: int, size: int) -> None:
    with pytest.raises(ConfigError, match="lies outside the PIO bus"):
        bus.attach(start, size, Registers(), "device")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_unclaimed_accesses_read_all_ones_and_are_counted(
    bus: Bus, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    bus.attach(0x1000, 1, Registers(), "far away")
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert bus.read(0x80, size) == b"\xff" * size
        bus.write(0x80, bytes(size))
        bus.write(0x84, bytes(size))
    assert bus.unclaimed == {0x80: 4, 0x84: 1}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"PIO 0x80: read of {size} bytes that no device claims (logged once)"),
        ("INFO", f"PIO 0x84: write of {size} bytes that no device claims (logged once)"),
    ]


def test_counters_are_bounded(bus: Bus) -> None:
    for address in range(COUNTED_ADDRESSES + 100):
        bus.read(address, 1)
        bus.read(address, 1)
    assert bus.unclaimed == dict.fromkeys(range(COUNTED_ADDRESSES), 2)
    assert bus.unclaimed_elsewhere == 200


def test_an_access_over_an_edge_goes_byte_by_byte(bus: Bus) -> None:
    low, high = Registers(), Registers()
    bus.attach(0x10, 2, low, "low")
    bus.attach(0x12, 1, high, "high")
    assert bus.read(0x10, 4) == b"\x00\x01\x00\xff"
    bus.write(0x0F, b"abcd")
    assert low.accesses == [(0, 1), (1, 1), (0, b"b"), (1, b"c")]
    assert high.accesses == [(0, 1), (0, b"d")]
    assert bus.unclaimed == {0x13: 1, 0x0F: 1}


def test_the_end_of_the_address_space(bus: Bus) -> None:
    bus.attach(0xFFFF, 1, Registers(), "last")
    assert bus.read(0xFFFF, 4) == b"\x00\xff\xff\xff"
