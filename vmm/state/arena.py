"""The state memfd: a directory of sections, each one ctypes structure that its owner works *on*.

Saving is nothing, handing over is handing over the fd, and surviving a crash is opening it again. The layout
(little endian):

    0x00000  header     magic, layout version, entries used and possible, the directory's CRC-32,
                        bytes of the memfd, next free byte
    0x00040  directory  DIRECTORY_ENTRIES entries of 64 bytes: name, instance, version, offset, size
    0x40040  sections   each 64-byte aligned

The directory is never trusted: magic, versions, counts, offsets, sizes, overlaps and the checksum are checked
before any of it is used. No address, fd number or secret of a process is ever part of it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple, TypeVar, cast

from vmm.errors import StateError, VmmError
from vmm.fds import FdStore, check_received, sealed_memfd
from vmm.units import MIB

MAGIC = int.from_bytes(b"VMMSTATE", "little")
LAYOUT_VERSION = 1
SIZE = 8 * MIB  # sparse; room for 255 vCPUs at 30 KiB each
DIRECTORY_ENTRIES = 4096
ALIGNMENT = 64
NAME_BYTES = 40

_T = TypeVar("_T", bound=ctypes.Structure | ctypes.Array)  # type: ignore[type-arg]


class _Header(ctypes.LittleEndianStructure):
    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("layout_version", ctypes.c_uint32),
        ("used", ctypes.c_uint32),
        ("capacity", ctypes.c_uint32),
        ("crc", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64 * 3),
    )


class _Entry(ctypes.LittleEndianStructure):
    _fields_ = (
        ("name", ctypes.c_char * NAME_BYTES),
        ("instance", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


_DIRECTORY = ctypes.sizeof(_Header)
_SECTIONS = _DIRECTORY + DIRECTORY_ENTRIES * ctypes.sizeof(_Entry)


class Section(NamedTuple):
    """One directory entry: offsets and sizes in bytes from the start of the memfd."""

    name: str
    instance: int
    version: int
    offset: int
    size: int


class Arena:
    """The mapped state memfd. `place` finds a section or, where it is not there, makes it, zeroed."""

    def __init__(self, fd: int, *, create: bool) -> None:
        """Map `fd`; with `create` it is new and gets an empty directory, otherwise its directory is checked.

        Raises StateError that says what is wrong with it.
        """
        self._mapping = mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._header = _Header.from_buffer(self._mapping)
        self._index: dict[tuple[str, int], Section] = {}
        self._placed: set[tuple[str, int]] = set()
        if create:
            self._header.magic = MAGIC
            self._header.layout_version = LAYOUT_VERSION
            self._header.capacity = DIRECTORY_ENTRIES
            self._header.size = SIZE
            self._header.free = _SECTIONS
            self._header.crc = self._checksum()
        else:
            self._index = self._read_directory()

    @classmethod
    def open(cls, fds: FdStore) -> Arena:
        """The arena in fd `state/0`: the received one (checked), or a new one."""
        fd = fds.find("state")
        if fd is None:
            return cls(fds.add("state", 0, sealed_memfd("vmm-state", SIZE)), create=True)
        check_received("state", 0, fd, SIZE)
        return cls(fd, create=False)

    def _checksum(self) -> int:
        used = _DIRECTORY + self._header.used * ctypes.sizeof(_Entry)
        crc = zlib.crc32(self._mapping[_DIRECTORY:used])
        header = _Header.from_buffer_copy(self._header)
        header.crc = 0
        return zlib.crc32(bytes(header), crc)

    def _read_directory(self) -> dict[tuple[str, int], Section]:
        header = _Header.from_buffer_copy(self._header)
        if header.magic != MAGIC:
            raise StateError(
                "state memfd: no state directory in it (wrong magic); was it made by another program?"
            )
        if header.layout_version != LAYOUT_VERSION:
            raise StateError(
                f"state memfd: layout version {header.layout_version}, this VMM knows {LAYOUT_VERSION}; "
                "hand over to a VMM of a version that knows it"
            )
        if header.size != SIZE or header.capacity != DIRECTORY_ENTRIES or header.used > DIRECTORY_ENTRIES:
            raise StateError(
                f"state memfd: bad header (size {header.size}, {header.used} of {header.capacity} entries)"
            )
        if header.crc != self._checksum():
            raise StateError("state memfd: the directory's checksum does not match its content")
        index: dict[tuple[str, int], Section] = {}
        end = _SECTIONS
        for entry in (_Entry * header.used).from_buffer_copy(self._mapping, _DIRECTORY):
            try:
                name = entry.name.decode("ascii")
            except UnicodeDecodeError as error:
                raise StateError(f"state memfd: a section's name is not ASCII ({entry.name!r})") from error
            label = f"state memfd: section {name}/{entry.instance}"
            if (name, entry.instance) in index:
                raise StateError(f"{label} is listed twice")
            if (
                entry.offset % ALIGNMENT
                or entry.offset < end
                or entry.size > SIZE
                or entry.offset + entry.size > SIZE
            ):
                raise StateError(
                    f"{label} lies at {entry.offset}, {entry.size} bytes: outside the memfd or over another"
                )
            end = entry.offset + entry.size
            index[name, entry.instance] = Section(
                name, entry.instance, entry.version, entry.offset, entry.size
            )
        if not end <= header.free <= SIZE:
            raise StateError(
                f"state memfd: free space starts at {header.free}, inside a section or outside the memfd"
            )
        return index

    def __iter__(self) -> Iterator[Section]:
        return iter(self._index.values())

    def find(self, name: str, instance: int) -> Section | None:
        """The section of that name, or None."""
        return self._index.get((name, instance))

    def place(self, name: str, instance: int, kind: type[_T], version: int | None = None) -> _T:
        """The structure of section `name/instance`, in place: what is written to it is in the memfd at once.

        `version` defaults to `kind.VERSION`. Raises StateError where the section has another version or size.
        """
        self._placed.add((name, instance))
        wanted: int = kind.VERSION if version is None else version  # type: ignore[attr-defined, assignment]
        size = ctypes.sizeof(kind)
        section = self.find(name, instance)
        if section is None:
            section = self._allocate(name, instance, wanted, size)
        elif section.version != wanted:
            raise StateError(
                f"state section {name}/{instance} has version {section.version}, this VMM knows {wanted}; "
                "hand over to a VMM of a version that knows it"
            )
        elif section.size != size:
            raise StateError(
                f"state section {name}/{instance} has {section.size} bytes where {size} were expected"
            )
        return cast(_T, kind.from_buffer(self._mapping, section.offset))

    def offset_of(self, placed: ctypes.Structure) -> int:
        """Where in the memfd a placed structure begins."""
        return ctypes.addressof(placed) - ctypes.addressof(self._header)

    def overwrite(self, offset: int, data: bytes) -> None:
        """Put `data` at `offset`, as one section's content."""
        self._mapping[offset : offset + len(data)] = data

    def unplaced(self) -> list[Section]:
        """Sections that came with the memfd and that nobody here has asked for."""
        return [section for key, section in self._index.items() if key not in self._placed]

    def _allocate(self, name: str, instance: int, version: int, size: int) -> Section:
        encoded = name.encode("ascii")
        if len(encoded) > NAME_BYTES:
            raise VmmError(f"state section name {name!r} is longer than {NAME_BYTES} bytes")
        header = self._header
        offset = -(-header.free // ALIGNMENT) * ALIGNMENT
        if header.used == DIRECTORY_ENTRIES or offset + size > SIZE:
            raise VmmError(f"the state memfd is full: no room for section {name}/{instance} of {size} bytes")
        entry = _Entry(encoded, instance, version, offset, size)
        at = _DIRECTORY + header.used * ctypes.sizeof(_Entry)
        self._mapping[at : at + ctypes.sizeof(_Entry)] = bytes(entry)
        header.used += 1
        header.free = offset + size
        header.crc = self._checksum()
        section = self._index[name, instance] = Section(name, instance, version, offset, size)
        return section

    def close(self) -> None:
        """Give up this process's view; the mapping itself goes when the last placed structure does."""
        self._index.clear()


def reopen(fd: int) -> int:
    """A new open file description of the memfd behind `fd`, close-on-exec (through /proc/self/fd)."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
