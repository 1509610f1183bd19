"""The test device against firmware/README.md, "The test device"."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain
from random import Random

import pytest

from vmm.devices import testdev
from vmm.fds import FdStore
from vmm.state import Arena


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


def word(device: testdev.TestDevice, offset: int, size: int = 4) -> int:
    return int.from_bytes(device.registers.read(offset, size), "little")


def test_power_on(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    assert device.registers.read(0, 0x1C) == bytes(0x1C)
    assert word(device, 0x1C) == 0x54534554
    assert device.ports.read(4, 4) == bytes(4)


def test_stream_written(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    data = Random(1).randbytes(300)
    expected = 0
    for at, byte in enumerate(data, 1):
        device.ports.write(0, bytes((byte,)))
        expected = ((expected << 1) % (1 << 32) | expected >> 31) + byte & 0xFFFF_FFFF
        assert word(device, 0x14) == expected
        assert word(device, 0x10) == at
    assert device.ports.read(4, 4) == (300).to_bytes(4, "little")
    device.ports.write(4, b"abcd")
    assert device.registers.read(0x10, 12) == bytes(12)


def test_stream_read(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    assert [device.ports.read(0, 1)[0] for _ in range(300)] == [at % 256 for at in range(300)]
    assert word(device, 0x18) == 300
    device.ports.write(4, bytes(4))
    assert device.ports.read(0, 1) == b"\0"


def test_latch(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    for count, value in enumerate((0, 0x1122_3344_5566_7788, (1 << 64) - 1), 1):
        device.registers.write(0, value.to_bytes(8, "little"))
        assert word(device, 0, 8) == (value + count) % (1 << 64)
        assert word(device, 8) == count
    assert device.registers.read(0, 4) == b"\x02\0\0\0"


def test_a_register_that_counts_its_reads(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    assert [word(device, 0x20) for _ in range(3)] == [0, 1, 2]
    device.registers.write(0x20, bytes(4))
    device.registers.read(0x20, 2)
    device.registers.read(0x18, 8)
    assert word(testdev.TestDevice(Arena.open(fds)), 0x20) == 3


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, b"abcd"), (8, b"abcd"), (4, b"abcd"), (0x1C, b"abcd"), (8, b"abcdefgh"), (0xFF8, b"a" * 8)],
)
def test_writes_that_have_no_meaning(fds: FdStore, offset: int, data: bytes) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    before = device.registers.read(0, 0x20)
    device.registers.write(offset, data)
    assert device.registers.read(0, 0x20) == before


@pytest.mark.parametrize(("offset", "size"), [(0, 2), (0, 4), (1, 1), (3, 1), (4, 1), (4, 2), (7, 1), (0, 8)])
def test_port_accesses_that_have_no_meaning(fds: FdStore, offset: int, size: int) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    device.ports.write(0, b"x")
    before = device.registers.read(0, 0x20)
    assert device.ports.read(offset, size) == b"\xff" * size
    device.ports.write(offset, b"x" * size)
    assert device.registers.read(0, 0x20) == before


def test_the_rest_of_the_page_is_zero(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    assert device.registers.read(0x20, 8) == device.registers.read(0xFF8, 8) == bytes(8)


def test_counters_go_on_in_the_next_vmm(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    device.ports.write(0, b"x")
    device.ports.read(0, 1)
    device.registers.write(0, b"latched!")
    after = testdev.TestDevice(Arena.open(fds))
    assert after.registers.read(0, 0x20) == device.registers.read(0, 0x20)
    assert after.ports.read(0, 1) == b"\x01"


def test_no_access_of_several_vcpus_is_lost(fds: FdStore) -> None:
    device = testdev.TestDevice(Arena.open(fds))
    seen: list[list[int]] = [[], [], []]

    def guest(mine: list[int]) -> None:
        for _ in range(1000):
            device.ports.write(0, b"\0")
            mine.append(device.ports.read(0, 1)[0])

    threads = [threading.Thread(target=guest, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert word(device, 0x10) == word(device, 0x18) == 3000
    assert sorted(chain.from_iterable(seen)) == sorted(at % 256 for at in range(3000))
