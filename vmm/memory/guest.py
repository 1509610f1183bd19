"""Guest RAM as sealed memfds or guest_memfds, mapped shared, split around the 32-bit MMIO gap.

The fds outlive the process: a new VMM maps the same ones at its own addresses and nothing is copied. They
are sparse, so RAM may be larger than the host's. Every access by guest address is checked; nothing outside a
region is ever touched. A guest_memfd is bound to one VM for good; where it came from another VMM and cannot
be mapped here, the guest runs on all the same, and only this process cannot see into it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vmm.errors import ConfigError, HostError, VmmError
from vmm.fds import FdStore, check_received, sealed_memfd
from vmm.units import GIB, MIB, PAGE_SIZE, format_size

log = logging.getLogger(__name__)

MEMFD, GUEST_MEMFD = "memfd", "guest-memfd"  # memory backends
FD_NAMES = {MEMFD: "ram", GUEST_MEMFD: "guest-memfd"}  # what their fds are called in the FdStore

LOW_RAM_END = 0xC000_0000  # the 32-bit MMIO gap is the last GiB below 4 GiB, as on QEMU's q35
HIGH_RAM_START = 1 << 32
SMALLEST = 1 * MIB
LARGEST = 64 * GIB

PIECE = 32 * MIB
MAP_NORESERVE = 0x4000  # asm-generic/mman.h; Python names it from 3.13 on

# hugepages option -> (page size in bytes, memfd_create flag); MFD_HUGE_* of linux/memfd.h
HUGE_PAGES: dict[str, tuple[int, int]] = {
    "2M": (2 * MIB, os.MFD_HUGETLB | os.MFD_HUGE_2MB),
    "1G": (1 * GIB, os.MFD_HUGETLB | os.MFD_HUGE_1GB),
}


def layout(size: int) -> tuple[tuple[int, int], ...]:
    """`(gpa, size)` of each region of a machine with `size` bytes of RAM. Raises ConfigError for an
    impossible size.
    """
    if not SMALLEST <= size <= LARGEST:
        raise ConfigError(
            f"memory: {format_size(size)} is outside {format_size(SMALLEST)}..{format_size(LARGEST)}; "
            "choose a size within it"
        )
    if size % PAGE_SIZE:
        raise ConfigError(f"memory: {size} bytes is not a multiple of the page size, {PAGE_SIZE}")
    if size <= LOW_RAM_END:
        return ((0, size),)
    return ((0, LOW_RAM_END), (HIGH_RAM_START, size - LOW_RAM_END))


@dataclass(frozen=True)
class Region:
    """One stretch of RAM: guest physical address, size in bytes, its fd, and where this process has it
    mapped: None and 0 where it cannot.
    """

    gpa: int
    size: int
    fd: int
    mapping: mmap.mmap | None
    hva: int


class GuestMemory:
    """All RAM of one machine. The fds belong to the FdStore (`ram/N` or `guest-memfd/N`), the mappings to
    this object.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)

    @classmethod
    def map(cls, fds: FdStore, size: int, hugepages: str | None = None) -> GuestMemory:
        """Map RAM of `size` bytes: the memfds that `fds` has already (checked), new ones where it has none.

        Raises ConfigError for a size or page size that cannot be, HostError where the host lacks the pages.
        """
        page, flags = _huge(hugepages)
        regions: list[Region] = []
        try:
            for index, (gpa, length) in enumerate(layout(size)):
                if length % page:
                    raise ConfigError(
                        f"memory: {format_size(size)} is not a multiple of hugepages={hugepages}"
                    )
                fd = fds.find("ram", index)
                if fd is None:
                    fd = fds.add("ram", index, _new_ram(index, length, flags, hugepages))
                else:
                    check_received("ram", index, fd, length)
                regions.append(_map_region(gpa, length, fd, hugepages))
        except BaseException:
            cls(regions).close()
            raise
        return cls(regions)

    @classmethod
    def map_guest_memfd(cls, fds: FdStore, size: int, create: Callable[[int], int] | None) -> GuestMemory:
        """As `map`, of guest_memfds: of a VM that is new, which `create(size in bytes)` returns, or without
        `create` of one that has them.

        One that another VMM made and that cannot be mapped is no error until it is read or written. Raises
        ConfigError, HostError, StateError.
        """
        regions: list[Region] = []
        try:
            for index, (gpa, length) in enumerate(layout(size)):
                if create is not None:
                    fd = fds.add(FD_NAMES[GUEST_MEMFD], index, create(length))
                    regions.append(_map_region(gpa, length, fd, None))
                else:
                    fd = fds.get(FD_NAMES[GUEST_MEMFD], index)
                    check_received(FD_NAMES[GUEST_MEMFD], index, fd, length)
                    regions.append(_map_received(gpa, length, fd))
        except BaseException:
            cls(regions).close()
            raise
        return cls(regions)

    def populated(self) -> Iterator[tuple[Region, int, int]]:
        """`(region, offset in it, size)` of what the guest has used so far, in pieces of at most `PIECE`."""
        for region in self.regions:
            end = 0
            while (start := _data_from(region.fd, end)) is not None:
                end = min(os.lseek(region.fd, start, os.SEEK_HOLE), region.size)
                yield from ((region, at, min(PIECE, end - at)) for at in range(start, end, PIECE))

    def clear(self, gpa: int, length: int) -> None:
        """Zero `length` bytes at `gpa`; what was never written stays a hole."""
        for region, offset, size in self.populated():
            start = max(gpa, region.gpa + offset)
            end = min(gpa + length, region.gpa + offset + size)
            if start < end:
                self.write(start, bytes(end - start))

    @property
    def size(self) -> int:
        """Bytes of RAM in all."""
        return sum(region.size for region in self.regions)

    def _locate(self, gpa: int, length: int) -> tuple[mmap.mmap, int]:
        for region in self.regions:
            if region.gpa <= gpa and gpa + length <= region.gpa + region.size and length >= 0:
                return _mapped(region), gpa - region.gpa
        raise VmmError(f"guest address {gpa:#x}..{gpa + length:#x} is not RAM (RAM: {self._describe()})")

    def _describe(self) -> str:
        return ", ".join(f"{region.gpa:#x}..{region.gpa + region.size:#x}" for region in self.regions)

    def read(self, gpa: int, length: int) -> bytes:
        """`length` bytes at `gpa`; VmmError where any of them is not RAM.

        They are copied page by page, the lowest first: a guest that writes meanwhile can count on that, and
        memcpy(3) keeps to no order.
        """
        mapping, offset = self._locate(gpa, length)
        end = offset + length
        return b"".join(mapping[at : min(at + PAGE_SIZE, end)] for at in range(offset, end, PAGE_SIZE))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at `gpa`; VmmError where any of it is not RAM, and then nothing is stored."""
        mapping, offset = self._locate(gpa, len(data))
        mapping[offset : offset + len(data)] = data

    def check_mapped(self) -> None:
        """VmmError where this process cannot read and write all of RAM."""
        for region in self.regions:
            _mapped(region)

    def close(self) -> None:
        """Unmap everything. The fds stay open: they are the FdStore's."""
        for region in self.regions:
            if region.mapping is not None:
                region.mapping.close()
        self.regions = ()


def _data_from(fd: int, offset: int) -> int | None:
    """Where the first page at or behind `offset` begins that is there; None where there is none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _huge(hugepages: str | None) -> tuple[int, int]:
    if hugepages is None:
        return PAGE_SIZE, 0
    if hugepages not in HUGE_PAGES:
        raise ConfigError(f"hugepages: {hugepages!r} is not a page size; use {' or '.join(HUGE_PAGES)}")
    return HUGE_PAGES[hugepages]


def _no_huge_pages(hugepages: str | None, error: OSError) -> HostError:
    return HostError(
        f"hugepages={hugepages}: the host has not enough free pages of that size ({error.strerror}); "
        "reserve some through /sys/kernel/mm/hugepages/*/nr_hugepages or leave the option out"
    )


def _new_ram(index: int, length: int, flags: int, hugepages: str | None) -> int:
    try:
        return sealed_memfd(f"vmm-ram-{index}", length, flags)
    except OSError as error:
        if flags:
            raise _no_huge_pages(hugepages, error) from error
        raise HostError(f"memory: no memfd of {format_size(length)}: {error.strerror}") from error


def _mapped(region: Region) -> mmap.mmap:
    if region.mapping is None:
        raise VmmError(
            f"this VMM cannot map the guest's memory at {region.gpa:#x} (guest_memfd), so it can neither "
            "read nor write it; hand the guest over to a VMM that can"
        )
    return region.mapping


def _map_received(gpa: int, length: int, fd: int) -> Region:
    """A guest_memfd that may be one which cannot be mapped (ENODEV: made without GUEST_MEMFD_FLAG_MMAP)."""
    try:
        return _map_region(gpa, length, fd, None)
    except HostError as error:
        log.warning(
            "%s: this VMM serves the guest, but cannot read or write its memory; it can neither reset the "
            "guest nor answer x-vmm-read-memory",
            error,
        )
        return Region(gpa, length, fd, None, 0)


def _map_region(gpa: int, length: int, fd: int, hugepages: str | None) -> Region:
    # hugetlb pages are reserved at mmap, so that a host without them says so here and not by SIGBUS in the
    # guest
    reserve = 0 if hugepages else MAP_NORESERVE
    try:
        mapping = mmap.mmap(fd, length, mmap.MAP_SHARED | reserve, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        if hugepages and error.errno == errno.ENOMEM:
            raise _no_huge_pages(hugepages, error) from error
        raise HostError(f"memory: cannot map {format_size(length)}: {error.strerror}") from error
    hva = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    return Region(gpa, length, fd, mapping, hva)
