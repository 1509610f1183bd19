"""The state memfd: a directory of sections, each one ctypes structure that its owner works *on*.

Saving is nothing, handing over is handing over the fd, and surviving a crash is opening it again. The layout
(little endian):

    0x00000  header       magic, layout version, which directory counts, bytes of the memfd, entries possible
    0x00040  directory 0  CRC-32, entries used; from 0x80 on DIRECTORY_ENTRIES entries of 64 bytes: name,
                          instance, version, offset, size
    0x40080  directory 1  the same
    0x800c0  sections     each 64-byte aligned

A directory is never trusted: magic, versions, counts, offsets, sizes, overlaps and the checksum are checked
before any of it is used. No address, fd number or secret of a process is ever part of it.

Whoever is handed a memfd changes no directory before the guest is its own: sections that it adds, or converts
from the previous version, lie in free space, unlisted. A VMM that still has the guest sees none of it.

    open      directory checked          the old VMM works on its sections
    place     found, or kept aside       "
    convert   previous -> new            the guest stands still
    settle    the other directory is     the guest is ours: one store says which one counts, so that a VMM
              written, then counts       that is killed at any moment leaves either
"""

from __future__ import annotations

import ctypes
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

from vmm.errors import StateError, VmmError
from vmm.fds import FdStore, check_received, sealed_memfd
from vmm.units import MIB

MAGIC = int.from_bytes(b"VMMSTATE", "little")
LAYOUT_VERSION = 1
SIZE = 16 * MIB  # sparse; room for 255 vCPUs at 60 KiB each
DIRECTORY_ENTRIES = 4096
ALIGNMENT = 64
NAME_BYTES = 40

_T = TypeVar("_T", bound=ctypes.Structure | ctypes.Array)  # type: ignore[type-arg]


class _Header(ctypes.LittleEndianStructure):
    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("layout_version", ctypes.c_uint32),
        ("active", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("capacity", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 9),
    )


class _Entry(ctypes.LittleEndianStructure):
    _fields_ = (
        ("name", ctypes.c_char * NAME_BYTES),
        ("instance", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


class _Directory(ctypes.LittleEndianStructure):
    _fields_ = (
        ("crc", ctypes.c_uint32),
        ("used", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 14),
        ("entries", _Entry * DIRECTORY_ENTRIES),
    )

    def checksum(self) -> int:
        """CRC-32 of all that is behind it, to the end of the used entries."""
        end = _Directory.entries.offset + self.used * ctypes.sizeof(_Entry)
        return zlib.crc32(memoryview(self).cast("B")[_Directory.used.offset : end])


_DIRECTORIES = ctypes.sizeof(_Header)
_SECTIONS = _DIRECTORIES + 2 * ctypes.sizeof(_Directory)


class Section(NamedTuple):
    """One directory entry: offsets and sizes in bytes from the start of the memfd."""

    name: str
    instance: int
    version: int
    offset: int
    size: int

    @property
    def label(self) -> str:
        """How an error names it."""
        return f"{self.name}/{self.instance}"


class Arena:
    """The mapped state memfd. `place` finds a section or, where it is not there, makes it, zeroed."""

    def __init__(self, fd: int, *, create: bool) -> None:
        """Map `fd`; with `create` it is new and gets an empty directory, otherwise its directory is checked.

        Raises StateError that says what is wrong with it.
        """
        self._mapping = mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._header = _Header.from_buffer(self._mapping)
        self._own = create  # nobody else looks at it: what is new is listed at once
        self._listed: dict[tuple[str, int], Section] = {}
        self._placed: set[tuple[str, int]] = set()
        self._conversions: list[tuple[Any, Any]] = []
        if create:
            self._header.magic = MAGIC
            self._header.layout_version = LAYOUT_VERSION
            self._header.capacity = DIRECTORY_ENTRIES
            self._header.size = SIZE
            self._directory(0).crc = self._directory(0).checksum()
        else:
            self._listed = self._read_directory()
        self._index = dict(self._listed)  # as it is for this process

    @classmethod
    def open(cls, fds: FdStore) -> Arena:
        """The arena in fd `state/0`: the received one (checked), or a new one."""
        fd = fds.find("state")
        if fd is None:
            return cls(fds.add("state", 0, sealed_memfd("vmm-state", SIZE)), create=True)
        check_received("state", 0, fd, SIZE)
        return cls(fd, create=False)

    def _directory(self, which: int) -> _Directory:
        return _Directory.from_buffer(self._mapping, _DIRECTORIES + which * ctypes.sizeof(_Directory))

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
        shape = header.size == SIZE and header.capacity == DIRECTORY_ENTRIES
        if not shape or header.active > 1 or any(header.reserved):
            raise StateError(
                f"state memfd: bad header (size {header.size}, {header.capacity} entries, directory "
                f"{header.active})"
            )
        directory = _Directory.from_buffer_copy(self._directory(header.active))
        if directory.used > DIRECTORY_ENTRIES:
            raise StateError(
                f"state memfd: {directory.used} entries in a directory that has room for {DIRECTORY_ENTRIES}"
            )
        if directory.crc != directory.checksum():
            raise StateError("state memfd: the directory's checksum does not match its content")
        index: dict[tuple[str, int], Section] = {}
        for entry in directory.entries[: directory.used]:
            try:
                name = entry.name.decode("ascii")
            except UnicodeDecodeError as error:
                raise StateError(f"state memfd: a section's name is not ASCII ({entry.name!r})") from error
            section = Section(name, entry.instance, entry.version, entry.offset, entry.size)
            if (name, entry.instance) in index:
                raise StateError(f"state memfd: section {section.label} is listed twice")
            index[name, entry.instance] = section
        _check_places(index.values())
        return index

    def __iter__(self) -> Iterator[Section]:
        return iter(self._index.values())

    def find(self, name: str, instance: int) -> Section | None:
        """The section of that name, or None."""
        return self._index.get((name, instance))

    def place(self, name: str, instance: int, kind: type[_T], version: int | None = None) -> _T:
        """The structure of section `name/instance`, in place: what is written to it is in the memfd at once.

        `version` defaults to `kind.VERSION`. Where there is a `kind.PREVIOUS`, a structure with a VERSION of
        its own, a section of that version is converted by `kind.convert(previous)`, now and whenever
        `convert` is called. Raises StateError where the section has another version or size.
        """
        self._placed.add((name, instance))
        wanted: int = kind.VERSION if version is None else version  # type: ignore[attr-defined, assignment]
        section = self.find(name, instance)
        if section is None:
            section = self._allocate(name, instance, wanted, ctypes.sizeof(kind))
        elif (previous := _kind_of(section, kind, wanted)) is not kind:
            before = previous.from_buffer(self._mapping, section.offset)
            section = self._allocate(name, instance, wanted, ctypes.sizeof(kind))
            structure: Any = kind.from_buffer(self._mapping, section.offset)
            self._conversions.append((before, structure))
            structure.convert(before)
        return cast(_T, kind.from_buffer(self._mapping, section.offset))

    def peek(self, name: str, instance: int, kind: type[_T]) -> _T:
        """A copy of section `name/instance`, converted if need be. Raises StateError, also where there is
        none.
        """
        section = self.find(name, instance)
        if section is None:
            raise StateError(f"state section {name}/{instance} is missing")
        here: Any = _kind_of(section, kind, kind.VERSION)  # type: ignore[attr-defined, arg-type]
        copy = here.from_buffer_copy(self._mapping, section.offset)
        if here is kind:
            return cast(_T, copy)
        converted: Any = kind()
        converted.convert(copy)
        return cast(_T, converted)

    def convert(self) -> None:
        """Convert the sections of a previous version again, the guest standing still now. What is converted
        stays as it is, for the VMM that may have to go on with it.
        """
        for previous, structure in self._conversions:
            ctypes.memset(ctypes.addressof(structure), 0, ctypes.sizeof(structure))
            structure.convert(previous)

    def settle(self) -> None:
        """List what was added and converted: the guest is this process's."""
        self._own = True
        self._conversions.clear()
        if self._listed != self._index:
            self._list_all()

    def offset_of(self, placed: ctypes.Structure) -> int:
        """Where in the memfd a placed structure begins."""
        return ctypes.addressof(placed) - ctypes.addressof(self._header)

    def restore(self, offset: int, data: bytes) -> bool:
        """Put `data` at `offset` if that is one listed section's whole content; whether it is."""
        if (offset, len(data)) not in {(section.offset, section.size) for section in self._listed.values()}:
            return False
        self._mapping[offset : offset + len(data)] = data
        return True

    def unplaced(self) -> list[Section]:
        """Sections that came with the memfd and that nobody here has asked for."""
        return [section for key, section in self._index.items() if key not in self._placed]

    def _allocate(self, name: str, instance: int, version: int, size: int) -> Section:
        """A new section, zeroed; this process's alone until `settle`."""
        if len(name.encode("ascii")) > NAME_BYTES:
            raise VmmError(f"state section name {name!r} is longer than {NAME_BYTES} bytes")
        offset = self._room(size)
        if len(self._index) == DIRECTORY_ENTRIES or offset is None:
            raise VmmError(f"the state memfd is full: no room for section {name}/{instance} of {size} bytes")
        ctypes.memset(ctypes.addressof(self._header) + offset, 0, size)
        section = self._index[name, instance] = Section(name, instance, version, offset, size)
        if self._own:
            self._list_one(section)
        return section

    def _room(self, size: int) -> int | None:
        """Where `size` bytes are free: behind all sections, or else in the first gap that is large enough."""
        taken = sorted((section.offset, section.size) for section in {*self._listed.values(), *self})
        end = _aligned(sum(taken[-1])) if taken else _SECTIONS
        if end + size <= SIZE:
            return end
        start = _SECTIONS
        for offset, length in taken:
            if start + size <= offset:
                return start
            start = _aligned(offset + length)
        return None

    def _list_one(self, section: Section) -> None:
        """Add an entry to the directory that counts."""
        directory = self._directory(self._header.active)
        directory.entries[directory.used] = _entry(section)
        directory.used += 1
        directory.crc = directory.checksum()
        self._listed[section.name, section.instance] = section

    def _list_all(self) -> None:
        """Write the other directory, and have it count."""
        other = 1 - self._header.active
        directory = self._directory(other)
        for at, section in enumerate(self._index.values()):
            directory.entries[at] = _entry(section)
        directory.used = len(self._index)
        directory.crc = directory.checksum()
        self._header.active = other
        self._listed = dict(self._index)

    def close(self) -> None:
        """Give up this process's view; the mapping itself goes when the last placed structure does."""
        self._index.clear()


def _entry(section: Section) -> _Entry:
    return _Entry(section.name.encode("ascii"), *section[1:])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _kind_of(section: Section, kind: type[_T], version: int) -> Any:
    """`kind` or `kind.PREVIOUS`: what the section holds. Raises StateError where it is neither."""
    previous: Any = getattr(kind, "PREVIOUS", None)
    here: Any
    if section.version == version:
        here = kind
    elif previous is not None and section.version == previous.VERSION:
        here = previous
    else:
        known = f"{version}" if previous is None else f"{previous.VERSION} and {version}"
        raise StateError(
            f"state section {section.label} has version {section.version}, this VMM knows {known}; "
            "hand over to a VMM of a version that knows it"
        )
    if section.size != (size := ctypes.sizeof(here)):
        raise StateError(f"state section {section.label} has {section.size} bytes where {size} were expected")
    return here


def _check_places(sections: Iterable[Section]) -> None:
    """Each aligned, in the memfd, behind the directories, and over no other."""
    end = _SECTIONS
    for section in sorted(sections, key=lambda section: section.offset):
        if section.offset % ALIGNMENT or section.offset < end or section.offset + section.size > SIZE:
            raise StateError(
                f"state memfd: section {section.label} lies at {section.offset}, {section.size} bytes: "
                "outside the memfd or over another"
            )
        end = section.offset + section.size


def reopen(fd: int) -> int:
    """A new open file description of the memfd behind `fd`, close-on-exec (through /proc/self/fd)."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
