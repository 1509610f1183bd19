"""Guest memory: layouts, sparse sizes, checked accesses, and the same memory in a second mapping."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.errors import ConfigError, HostError, StateError, VmmError
from vmm.fds import FdStore, identify, sealed_memfd
from vmm.memory import GuestMemory, layout
from vmm.memory.guest import PIECE
from vmm.units import GIB, MIB

GAP, HIGH = 3 * GIB, 4 * GIB
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


def free_huge_pages() -> int:
    return int(FREE_HUGE_PAGES.read_text()) if FREE_HUGE_PAGES.exists() else 0


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (1 * MIB, ((0, MIB),)),
        (128 * MIB, ((0, 128 * MIB),)),
        (GAP, ((0, GAP),)),
        (GAP + 4096, ((0, GAP), (HIGH, 4096))),
        (4 * GIB, ((0, GAP), (HIGH, GIB))),
        (64 * GIB, ((0, GAP), (HIGH, 61 * GIB))),
    ],
)
def test_layout(size: int, regions: tuple[tuple[int, int], ...]) -> None:
    assert layout(size) == regions


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "memory: 0 is outside 1M..64G"),
        (MIB - 4096, "memory: 1020K is outside 1M..64G"),
        (64 * GIB + 4096, "outside 1M..64G"),
        (MIB + 1, "1048577 bytes is not a multiple of the page size, 4096"),
    ],
)
def test_impossible_sizes(size: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        layout(size)


@pytest.mark.parametrize("size", [MIB, 256 * MIB, GAP, 4 * GIB, 64 * GIB])
def test_memory_is_sparse_and_usable_to_its_ends(fds: FdStore, size: int) -> None:
    memory = GuestMemory.map(fds, size)
    try:
        assert memory.size == size
        for region in memory.regions:
            for gpa in (region.gpa, region.gpa + region.size - 4):
                assert memory.read(gpa, 4) == b"\0\0\0\0"
                memory.write(gpa, b"vmm!")
                assert memory.read(gpa, 4) == b"vmm!"
            assert identify(region.fd).size == region.size
            assert (
                os.fstat(region.fd).st_blocks * 512 <= 4 * MIB
            )  # at most a transparent huge page at each end
    finally:
        memory.close()
    assert len(fds) == len(layout(size))


def test_memory_is_sealed(fds: FdStore) -> None:
    GuestMemory.map(fds, MIB).close()
    with pytest.raises(PermissionError):
        os.ftruncate(fds.get("ram"), 0)


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (MIB - 1, 2),
        (MIB, 1),
        (MIB, 0x1000),
        (-1, 1),
        (-4, 8),
        (0, MIB + 1),
        (8, -4),
        (1 << 64, 1),
        ((1 << 64) - 1, 2),
    ],
)
def test_accesses_outside_are_refused(fds: FdStore, gpa: int, length: int) -> None:
    memory = GuestMemory.map(fds, MIB)
    with pytest.raises(VmmError, match=r"is not RAM \(RAM: 0x0\.\.0x100000\)"):
        memory.read(gpa, length)
    if length > 0:
        with pytest.raises(VmmError, match="is not RAM"):
            memory.write(gpa, b"x" * length)
        assert memory.read(MIB - 8, 8) == bytes(8)
    memory.close()


def test_accesses_across_the_gap_are_refused(fds: FdStore) -> None:
    memory = GuestMemory.map(fds, 4 * GIB)
    for gpa, length in ((GAP - 4, 8), (GAP, 4), (HIGH - 4, 4), (HIGH - 4, 8), (GAP - 4, HIGH - GAP + 8)):
        with pytest.raises(VmmError, match=r"RAM: 0x0\.\.0xc0000000, 0x100000000\.\.0x140000000"):
            memory.read(gpa, length)
    memory.write(GAP - 4, b"last")
    memory.write(HIGH, b"next")
    assert memory.read(GAP - 4, 4) + memory.read(HIGH, 4) == b"lastnext"
    memory.close()


def test_buffers_of_every_sort_are_stored(fds: FdStore) -> None:
    memory = GuestMemory.map(fds, MIB)
    for at, data in enumerate((b"abc", bytearray(b"def"), memoryview(b"xghix")[1:4], b"")):
        memory.write(3 * at, data)
    assert memory.read(0, 12) == b"abcdefghi\0\0\0"
    assert memory.read(0, 0) == b""
    memory.close()


def test_a_second_mapping_sees_the_same_memory(fds: FdStore) -> None:
    first = GuestMemory.map(fds, 4 * GIB)
    received = FdStore()
    for name, index, fd in fds.items():
        received.add(name, index, os.dup(fd))
    second = GuestMemory.map(received, 4 * GIB)
    first.write(HIGH + 10, b"here")
    assert second.read(HIGH + 10, 4) == b"here"
    assert [region.hva for region in first.regions] != [region.hva for region in second.regions]
    first.close()
    second.write(HIGH + 10, b"on")
    assert second.read(HIGH + 10, 4) == b"onre"
    second.close()
    received.close()


def test_received_memory_of_another_size_is_refused(fds: FdStore) -> None:
    fds.add("ram", 0, sealed_memfd("ram", 2 * MIB))
    with pytest.raises(StateError, match="fd ram/0 has 2097152 bytes where 1048576 were expected"):
        GuestMemory.map(fds, MIB)


def test_received_memory_that_is_no_memory_is_refused(fds: FdStore, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB))
    fds.add("ram", 0, os.open(path, os.O_RDWR))
    with pytest.raises(StateError, match="fd ram/0 is a file where a memfd was expected"):
        GuestMemory.map(fds, MIB)


def test_a_second_region_that_is_refused_leaves_no_mapping(fds: FdStore) -> None:
    fds.add("ram", 1, sealed_memfd("ram", MIB))
    with pytest.raises(StateError, match="fd ram/1 has"):
        GuestMemory.map(fds, 4 * GIB)


@pytest.mark.parametrize(
    ("size", "pages", "text"),
    [
        (128 * MIB, "4K", "hugepages: '4K' is not a page size; use 2M or 1G"),
        (3 * MIB, "2M", "memory: 3M is not a multiple of hugepages=2M"),
        (GIB + 2 * MIB, "1G", "is not a multiple of hugepages=1G"),
    ],
)
def test_impossible_huge_pages(fds: FdStore, size: int, pages: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GuestMemory.map(fds, size, pages)
    assert len(fds) == 0


def test_a_host_without_huge_pages_says_so(fds: FdStore) -> None:
    size = (free_huge_pages() + 1) * 2 * MIB
    with pytest.raises(HostError, match=r"hugepages=2M: the host has not enough free pages .*nr_hugepages"):
        GuestMemory.map(fds, size, "2M")


@pytest.mark.skipif(free_huge_pages() < 2, reason="the host has no two free huge pages of 2 MiB")
def test_huge_pages(fds: FdStore) -> None:
    memory = GuestMemory.map(fds, 4 * MIB, "2M")
    memory.write(2 * MIB, b"huge")
    assert memory.read(2 * MIB, 4) == b"huge"
    assert os.fstat(fds.get("ram")).st_blksize == 2 * MIB
    memory.close()


def test_what_the_guest_has_used(fds: FdStore) -> None:
    memory = GuestMemory.map(fds, 4 * GIB)
    assert list(memory.populated()) == []
    low, high = memory.regions
    memory.write(5 * MIB, b"x")
    memory.write(64 * MIB, bytes(40 * MIB))
    memory.write(high.gpa + high.size - 1, b"y")
    page = os.sysconf("SC_PAGESIZE")
    assert list(memory.populated()) == [
        (low, 5 * MIB, page),
        (low, 64 * MIB, PIECE),
        (low, 64 * MIB + PIECE, 40 * MIB - PIECE),
        (high, high.size - page, page),
    ]
    memory.close()


def test_memory_is_cleared_where_there_is_any(fds: FdStore) -> None:
    memory = GuestMemory.map(fds, 4 * GIB)
    page = os.sysconf("SC_PAGESIZE")
    memory.write(8 * MIB - 1, b"abc")
    memory.write(512 * MIB - 2, b"defg")
    before = list(memory.populated())
    memory.clear(8 * MIB, 504 * MIB)
    assert memory.read(8 * MIB - 1, 3) == b"a\0\0"
    assert memory.read(512 * MIB - 2, 4) == b"\0\0fg"
    assert list(memory.populated()) == before
    assert sum(size for _, _, size in before) <= 4 * page
    memory.close()
