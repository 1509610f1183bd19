"""The state memfd: sections in place, opened again, and a directory that is never trusted."""

from __future__ import annotations

import ctypes
import os
import re
import zlib
from collections.abc import Iterator
from typing import ClassVar

import pytest

from vmm.errors import StateError, VmmError
from vmm.fds import FdStore, sealed_memfd
from vmm.state import Arena
from vmm.state.arena import (
    ALIGNMENT,
    DIRECTORY_ENTRIES,
    LAYOUT_VERSION,
    MAGIC,
    NAME_BYTES,
    SIZE,
    Section,
    reopen,
)

ENTRY = 64
DIRECTORY = 64
CRC_AT = 20
SECTIONS = DIRECTORY + DIRECTORY_ENTRIES * ENTRY

# offset and size in bytes of the header's fields, as the module's docstring lists them
HEADER = {
    "magic": (0, 8),
    "layout": (8, 4),
    "used": (12, 4),
    "capacity": (16, 4),
    "size": (24, 8),
    "free": (32, 8),
}
FIELDS = {"name": (0, 40), "instance": (40, 4), "version": (44, 4), "offset": (48, 8), "size": (56, 8)}


class Counter(ctypes.LittleEndianStructure):
    VERSION: ClassVar[int] = 3
    value: int
    _fields_ = (("value", ctypes.c_uint64),)


class Wide(ctypes.LittleEndianStructure):
    VERSION: ClassVar[int] = 3
    _fields_ = (("value", ctypes.c_uint64), ("more", ctypes.c_uint8 * 100))


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


@pytest.fixture
def fd(fds: FdStore) -> int:
    """A state memfd with the sections a/0, a/1 and b/0."""
    arena = Arena.open(fds)
    for name, instance in (("a", 0), ("a", 1), ("b", 0)):
        arena.place(name, instance, Counter).value = 7
    return fds.get("state")


def put(fd: int, at: int, value: int | bytes, size: int) -> None:
    os.pwrite(
        fd, value.ljust(size, b"\0") if isinstance(value, bytes) else value.to_bytes(size, "little"), at
    )


def sign(fd: int) -> None:
    """Make the checksum right again: CRC-32 of the used entries, then of the header with a zero checksum."""
    header = bytearray(os.pread(fd, DIRECTORY, 0))
    header[CRC_AT : CRC_AT + 4] = bytes(4)
    used = min(int.from_bytes(header[12:16], "little"), DIRECTORY_ENTRIES)
    crc = zlib.crc32(header, zlib.crc32(os.pread(fd, used * ENTRY, DIRECTORY)))
    put(fd, CRC_AT, crc, 4)


def test_layout_is_what_the_docstring_says(fd: int) -> None:
    header = os.pread(fd, DIRECTORY, 0)
    values = {name: int.from_bytes(header[at : at + size], "little") for name, (at, size) in HEADER.items()}
    free = SECTIONS + 2 * ALIGNMENT + 8
    assert list(values.values()) == [MAGIC, LAYOUT_VERSION, 3, DIRECTORY_ENTRIES, SIZE, free]
    assert header[:8] == b"VMMSTATE"
    second = os.pread(fd, ENTRY, DIRECTORY + ENTRY)
    assert second[:2] == b"a\0"
    assert [int.from_bytes(second[at : at + size], "little") for at, size in list(FIELDS.values())[1:]] == [
        1, 3, SECTIONS + ALIGNMENT, 8
    ]  # fmt: skip
    before = os.pread(fd, 4, CRC_AT)
    sign(fd)
    assert os.pread(fd, 4, CRC_AT) == before


def test_new_sections_are_zeroed_aligned_and_in_place(fds: FdStore) -> None:
    arena = Arena.open(fds)
    placed = [arena.place("counter", instance, Counter) for instance in range(5)]
    assert [each.value for each in placed] == [0] * 5
    sections = list(arena)
    assert all(section.offset % ALIGNMENT == 0 for section in sections)
    assert len({section.offset for section in sections}) == 5
    placed[2].value = 0x1122334455667788
    assert os.pread(fds.get("state"), 8, sections[2].offset) == bytes.fromhex("8877665544332211")
    assert placed[1].value == placed[3].value == 0


def test_sections_are_found_again_through_another_fd(fds: FdStore) -> None:
    first = Arena.open(fds)
    first.place("counter", 0, Counter).value = 41
    first.place("bytes", 7, ctypes.c_uint8 * 5, version=9)[:] = b"hello"
    received = FdStore()
    received.add("state", 0, os.dup(fds.get("state")))
    second = Arena.open(received)
    counter = second.place("counter", 0, Counter)
    counter.value += 1
    assert first.place("counter", 0, Counter).value == 42
    assert bytes(second.place("bytes", 7, ctypes.c_uint8 * 5, version=9)) == b"hello"
    assert list(first) == list(second)
    assert second.find("bytes", 7) == Section("bytes", 7, 9, SECTIONS + ALIGNMENT, 5)
    assert second.find("bytes", 0) is None
    assert second.place("late", 0, Counter).value == 0
    assert Arena(received.get("state"), create=False).find("late", 0) is not None
    received.close()


def test_reopen_is_another_open_file_description(fd: int) -> None:
    other = reopen(fd)
    os.lseek(fd, 5, os.SEEK_SET)
    assert os.lseek(other, 0, os.SEEK_CUR) == 0
    assert not os.get_inheritable(other)
    assert Arena(other, create=False).place("a", 1, Counter).value == 7
    os.close(other)


def test_another_version_is_refused(fd: int) -> None:
    text = "state section a/0 has version 3, this VMM knows 4; hand over to a VMM of a version that knows it"
    with pytest.raises(StateError, match=f"^{re.escape(text)}$"):
        Arena(fd, create=False).place("a", 0, Counter, version=4)


def test_another_size_is_refused(fd: int) -> None:
    with pytest.raises(StateError, match=r"^state section a/0 has 8 bytes where 112 were expected"):
        Arena(fd, create=False).place("a", 0, Wide)


def test_another_memfd_is_refused(fds: FdStore) -> None:
    fds.add("state", 0, sealed_memfd("state", SIZE // 2))
    with pytest.raises(StateError, match=f"fd state/0 has {SIZE // 2} bytes where {SIZE} were expected"):
        Arena.open(fds)


def test_an_empty_memfd_is_refused(fds: FdStore) -> None:
    fds.add("state", 0, sealed_memfd("state", SIZE))
    with pytest.raises(StateError, match="no state directory in it"):
        Arena.open(fds)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("magic", MAGIC + 1, "wrong magic"),
        (
            "layout",
            LAYOUT_VERSION + 1,
            f"layout version {LAYOUT_VERSION + 1}, this VMM knows {LAYOUT_VERSION}",
        ),
        ("layout", 0, f"layout version 0, this VMM knows {LAYOUT_VERSION}"),
        ("used", DIRECTORY_ENTRIES + 1, "bad header"),
        ("used", 0xFFFF_FFFF, "bad header"),
        ("capacity", 0, "bad header"),
        ("size", SIZE * 2, "bad header"),
        ("free", SIZE + 1, "free space starts at"),
        ("free", SECTIONS, "free space starts at"),
        ("free", 0, "free space starts at"),
    ],
)
def test_a_header_that_cannot_be(fd: int, field: str, value: int, text: str) -> None:
    at, size = HEADER[field]
    put(fd, at, value, size)
    sign(fd)
    with pytest.raises(StateError, match=text):
        Arena(fd, create=False)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("name", b"\xff\xfe", "name is not ASCII"),
        ("name", b"b", "section b/0 is listed twice"),
        ("offset", 0, "outside the memfd or over another"),
        ("offset", SECTIONS, "outside the memfd or over another"),
        ("offset", SECTIONS + ALIGNMENT + 1, "outside the memfd or over another"),
        ("offset", SIZE, "outside the memfd or over another"),
        ("offset", (1 << 64) - ALIGNMENT, "outside the memfd or over another"),
        ("size", SIZE, "outside the memfd or over another"),
        ("size", (1 << 64) - 1, "outside the memfd or over another"),
        ("size", ALIGNMENT + 1, "over another"),
    ],
)
def test_an_entry_that_cannot_be(fd: int, field: str, value: int | bytes, text: str) -> None:
    at, size = FIELDS[field]
    second = DIRECTORY + ENTRY
    put(fd, second + FIELDS["instance"][0], 0, 4)
    put(fd, second + FIELDS["name"][0], b"c", 40)
    put(fd, second + at, value, size)
    sign(fd)
    with pytest.raises(StateError, match=text):
        Arena(fd, create=False)


def test_a_directory_that_changed_is_refused(fd: int) -> None:
    put(fd, DIRECTORY + FIELDS["version"][0], 9, 4)
    with pytest.raises(StateError, match="checksum does not match"):
        Arena(fd, create=False)


def test_the_content_of_sections_is_not_the_directorys_concern(fd: int) -> None:
    os.pwrite(fd, b"\xff" * 8, SECTIONS)
    assert Arena(fd, create=False).place("a", 0, Counter).value == (1 << 64) - 1


def test_names(fds: FdStore) -> None:
    arena = Arena.open(fds)
    longest = "n" * NAME_BYTES
    arena.place(longest, 0, Counter).value = 5
    assert Arena(fds.get("state"), create=False).place(longest, 0, Counter).value == 5
    with pytest.raises(VmmError, match=f"longer than {NAME_BYTES} bytes"):
        arena.place(longest + "n", 0, Counter)


def test_a_full_memfd(fds: FdStore) -> None:
    arena = Arena.open(fds)
    arena.place("large", 0, ctypes.c_uint8 * (SIZE - SECTIONS - ALIGNMENT), version=1)
    arena.place("last", 0, Counter)
    with pytest.raises(VmmError, match="the state memfd is full: no room for section more/0 of 8 bytes"):
        arena.place("more", 0, Counter)
    assert len(list(Arena(fds.get("state"), create=False))) == 2


def test_a_full_directory(fds: FdStore) -> None:
    arena = Arena.open(fds)
    for instance in range(DIRECTORY_ENTRIES):
        arena.place("a", instance, Counter)
    with pytest.raises(VmmError, match="full"):
        arena.place("b", 0, Counter)
    assert len(list(Arena(fds.get("state"), create=False))) == DIRECTORY_ENTRIES
