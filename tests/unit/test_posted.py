"""Writes that KVM has put aside reach their device once each, whatever becomes of the VMM meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from vmm.bus import Bus
from vmm.devices import testdev
from vmm.fds import FdStore
from vmm.kvm import abi
from vmm.machine.journal import Journal
from vmm.machine.posted import RING, PostedWrites
from vmm.state import Arena

PORT, REGISTER, ELSEWHERE = 0x5F2, 0xFED1_0024, 0xFED2_0000


class Killed(Exception):
    """The VMM is gone."""


class Killer:
    """The device's state, at whose every store the VMM may be killed: before it, `after` that many."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.after = -1
        self.read = device.read

    def write(self, offset: int, data: bytes) -> None:
        if self.after == 0:
            raise Killed
        self._device.write(offset, data)
        self.after -= 1
        if self.after == 0:
            raise Killed


class Machine:
    """A ring, a test device and what is between; made again, it is the next VMM's."""

    def __init__(self, fds: FdStore, ring: Any) -> None:
        arena = Arena.open(fds)
        self.state = arena.place("testdev", 0, testdev.TestState)
        device = testdev.TestDevice(arena)
        self.ports, self.registers = Killer(device.ports), Killer(device.registers)
        pio, mmio = Bus("PIO", 1 << 16), Bus("MMIO", 1 << 52)
        pio.attach(0x5F0, testdev.PORTS, self.ports, "testdev", self.state, device.ports.posted)
        mmio.attach(0xFED1_0000, testdev.PAGE, self.registers, "testdev", self.state, device.registers.posted)
        self.announced = (pio.posted, mmio.posted)
        self.journal = Journal(arena, "journal-posted", 0)
        self.posted = PostedWrites(ring, pio, mmio, self.journal)
        self.posted.recover()

    @property
    def counted(self) -> tuple[int, int]:
        return self.state.posted, self.state.posted_sum


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


@pytest.fixture
def ring() -> Any:
    return abi.sized(abi.kvm_coalesced_mmio_ring, RING)()


def post(ring: Any, *values: int) -> None:
    """As KVM does."""
    for value in values:
        entry = ring.coalesced_mmio[ring.last]
        entry.pio = value % 2
        entry.phys_addr, entry.len = (PORT, 2) if value % 2 else (REGISTER, 4)
        entry.data[:] = value.to_bytes(8, "little")
        ring.last = (ring.last + 1) % RING


def total(values: range | list[int]) -> tuple[int, int]:
    """What the device has counted after these values."""
    value = 0
    for one in values:
        value = ((value << 1 | value >> 31) + one) & 0xFFFF_FFFF
    return len(values), value


def test_what_takes_posted_writes(fds: FdStore, ring: Any) -> None:
    assert Machine(fds, ring).announced == ([(PORT, 2)], [(REGISTER, 4)])


def test_all_of_them_in_their_order(fds: FdStore, ring: Any) -> None:
    machine = Machine(fds, ring)
    assert not machine.posted.waiting
    for start in range(0, 5 * RING, 50):  # round and round
        post(ring, *range(start, start + 50))
        assert machine.posted.waiting
        machine.posted.drain()
        assert not machine.posted.waiting
        assert machine.counted == total(range(start + 50))


def test_what_no_device_takes_is_dropped(fds: FdStore, ring: Any) -> None:
    machine = Machine(fds, ring)
    ring.coalesced_mmio[0].phys_addr, ring.coalesced_mmio[0].len = ELSEWHERE, 4
    ring.last = 1
    machine.posted.drain()
    assert machine.counted == (0, 0)
    assert not machine.posted.waiting


@pytest.mark.parametrize(("first", "last"), [(RING, 3), (3, RING + 5), (2**32 - 1, 1), (0, 2**32 - 1)])
def test_indices_that_cannot_be(fds: FdStore, ring: Any, first: int, last: int) -> None:
    """Another process has the ring mapped as well."""
    ring.first, ring.last = first, last
    machine = Machine(fds, ring)
    machine.posted.drain()
    assert ring.first < RING


@pytest.mark.parametrize("killed_after", range(1, 8))
def test_a_vmm_that_is_killed(fds: FdStore, ring: Any, killed_after: int) -> None:
    """Between any two stores: the next VMM gives the device what it has not got."""
    values = [6, 6, 6, 7, 7]
    machine = Machine(fds, ring)
    post(ring, 1, 2, 3)
    machine.posted.drain()
    post(ring, *values)
    machine.ports.after = machine.registers.after = killed_after
    try:
        machine.posted.drain()
    except Killed:
        before = machine.counted
        machine = Machine(fds, ring)  # its step is undone, for it was begun and not ended
        assert machine.counted[0] == before[0] - 1
    machine.posted.drain()
    assert machine.counted == total([1, 2, 3, *values])


def test_a_vmm_that_is_killed_before_the_ring_knows(fds: FdStore, ring: Any) -> None:
    """The device has it, the journal says so, and it is still in the ring."""
    machine = Machine(fds, ring)
    post(ring, 5, 5, 5)
    machine.posted.drain()
    ring.first = (ring.last - 1) % RING
    machine = Machine(fds, ring)
    assert not machine.posted.waiting
    post(ring, 8)
    machine.posted.drain()
    assert machine.counted == total([5, 5, 5, 8])


def test_the_ring_of_another_vm(fds: FdStore, ring: Any) -> None:
    """What the journal says of the last one's is not true of it."""
    machine = Machine(fds, ring)
    post(ring, 5)
    machine.posted.drain()
    ctypes.memset(ctypes.addressof(ring), 0, ctypes.sizeof(ring))
    machine.posted.begin_anew()
    post(ring, 5)
    machine = Machine(fds, ring)
    machine.posted.drain()
    assert machine.counted == total([5, 5])
