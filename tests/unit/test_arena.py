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
DIRECTORY = 64  # the first one
ENTRIES = DIRECTORY + 64
SECTIONS = DIRECTORY + 2 * (64 + DIRECTORY_ENTRIES * ENTRY)

# offset and size in bytes of the fields of the header and of the first directory, as the module's docstring
# lists them
HEADER = {
    "magic": (0, 8),
    "layout": (8, 4),
    "active": (12, 4),
    "size": (16, 8),
    "capacity": (24, 4),
    "reserved": (28, 4),
    "crc": (DIRECTORY, 4),
    "used": (DIRECTORY + 4, 4),
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
    """Make the checksum right again: CRC-32 from the number of used entries to the last of them."""
    at, size = HEADER["used"]
    used = min(int.from_bytes(os.pread(fd, size, at), "little"), DIRECTORY_ENTRIES)
    put(fd, HEADER["crc"][0], zlib.crc32(os.pread(fd, ENTRIES - at + used * ENTRY, at)), 4)


def test_layout_is_what_the_docstring_says(fd: int) -> None:
    values = {name: int.from_bytes(os.pread(fd, size, at), "little") for name, (at, size) in HEADER.items()}
    crc = values.pop("crc")
    assert list(values.values()) == [MAGIC, LAYOUT_VERSION, 0, SIZE, DIRECTORY_ENTRIES, 0, 3]
    assert os.pread(fd, 8, 0) == b"VMMSTATE"
    second = os.pread(fd, ENTRY, ENTRIES + ENTRY)
    assert second[:2] == b"a\0"
    assert [int.from_bytes(second[at : at + size], "little") for at, size in list(FIELDS.values())[1:]] == [
        1, 3, SECTIONS + ALIGNMENT, 8
    ]  # fmt: skip
    sign(fd)
    assert int.from_bytes(os.pread(fd, 4, HEADER["crc"][0]), "little") == crc


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
    received.close()


def test_what_a_receiver_adds_is_its_own_until_it_settles(fds: FdStore) -> None:
    giver = Arena.open(fds)
    giver.place("counter", 0, Counter).value = 41
    before = os.pread(fds.get("state"), SECTIONS, 0)
    failed = Arena.open(fds)
    failed.place("late", 0, Counter).value = 9
    assert os.pread(fds.get("state"), SECTIONS, 0) == before
    receiver = Arena.open(fds)
    late = receiver.place("late", 0, Counter)
    assert late.value == 0  # whatever another one left there
    late.value = 5
    assert Arena.open(fds).find("late", 0) is None
    receiver.settle()
    assert receiver.place("later", 0, Counter).value == 0  # listed at once, from here on
    third = Arena.open(fds)
    assert [section.name for section in third] == ["counter", "late", "later"]
    assert third.place("late", 0, Counter).value == 5
    assert third.place("counter", 0, Counter).value == 41
    assert third.unplaced() == [third.find("later", 0)]


class Pair(ctypes.LittleEndianStructure):
    """`Counter`, as it is one version later."""

    VERSION: ClassVar[int] = 4
    PREVIOUS: ClassVar[type[Counter]] = Counter
    low: int
    high: int
    _fields_ = (("low", ctypes.c_uint32), ("high", ctypes.c_uint32), ("flags", ctypes.c_uint64))

    def convert(self, previous: Counter) -> None:
        self.low, self.high = previous.value & 0xFFFF_FFFF, previous.value >> 32


def test_the_previous_version_is_converted(fds: FdStore) -> None:
    giver = Arena.open(fds)
    counter, other = giver.place("counter", 0, Counter), giver.place("other", 0, Counter)
    counter.value, other.value = 0x1_0000_0002, 7
    receiver = Arena.open(fds)
    pair = receiver.place("counter", 0, Pair)
    assert ctypes.addressof(receiver.place("counter", 0, Pair)) == ctypes.addressof(pair)
    receiver.convert()
    assert (pair.low, pair.high) == (2, 1)
    counter.value = 0x3_0000_0004  # the handover failed, and the guest went on
    assert Arena.open(fds).place("counter", 0, Counter).value == 0x3_0000_0004
    pair.flags = 1
    receiver.convert()
    assert (pair.low, pair.high, pair.flags) == (4, 3, 0)
    receiver.settle()
    again = Arena.open(fds)
    assert {(section.name, section.version) for section in again} == {("counter", 4), ("other", 3)}
    assert again.place("other", 0, Counter).value == 7
    assert again.place("counter", 0, Pair).high == 3
    again.convert()  # nothing is left to do
    assert again.place("counter", 0, Pair).high == 3


def test_only_the_previous_version_is_converted(fds: FdStore) -> None:
    Arena.open(fds).place("counter", 0, Counter, version=2)
    with pytest.raises(StateError, match="state section counter/0 has version 2, this VMM knows 3 and 4; "):
        Arena.open(fds).place("counter", 0, Pair)
    arena = Arena.open(fds)
    arena.place("wide", 0, Wide)
    arena.settle()
    with pytest.raises(StateError, match="wide/0 has 112 bytes where 8 were expected"):
        Arena.open(fds).place("wide", 0, Pair)


def test_a_vmm_that_is_killed_while_it_settles_leaves_either(fds: FdStore) -> None:
    """Every store that `settle` makes is the last one, once."""
    Arena.open(fds).place("counter", 0, Counter).value = 1
    receiver = Arena.open(fds)
    receiver.place("counter", 0, Pair)
    receiver.convert()
    state = fds.get("state")
    before = os.pread(state, SECTIONS, 0)
    receiver.settle()
    after = os.pread(state, SECTIONS, 0)
    changed = [at for at in range(SECTIONS) if before[at] != after[at]]
    (last,) = [at for at in changed if at < DIRECTORY]  # one byte says which directory counts
    content = bytearray(before)
    for at in [*(at for at in changed if at != last), last]:
        os.pwrite(state, content, 0)
        assert [section.version for section in Arena.open(fds)] == [3]
        content[at] = after[at]
    os.pwrite(state, content, 0)
    assert [section.version for section in Arena.open(fds)] == [4]


def test_the_room_of_what_was_converted_is_used_again(fds: FdStore) -> None:
    """A guest may outlive any number of versions."""
    half = ctypes.c_uint8 * (SIZE // 3)
    arena = Arena.open(fds)
    arena.place("large", 0, half, version=0)
    for version in range(1, 12):
        kind = type("Kind", (half,), {"PREVIOUS": type("Before", (half,), {"VERSION": version - 1}),
                                      "convert": lambda self, previous: None})  # fmt: skip
        arena = Arena.open(fds)
        arena.place("large", 0, kind, version=version)
        arena.convert()
        arena.settle()
    assert [section.version for section in Arena.open(fds)] == [11]


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
        ("used", DIRECTORY_ENTRIES + 1, "4097 entries in a directory"),
        ("used", 0xFFFF_FFFF, "4294967295 entries in a directory"),
        ("active", 2, "bad header"),
        ("reserved", 1, "bad header"),
        ("active", 1, "checksum"),
        ("capacity", 0, "bad header"),
        ("size", SIZE * 2, "bad header"),
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
        ("offset", DIRECTORY, "outside the memfd or over another"),
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
    second = ENTRIES + ENTRY
    put(fd, second + FIELDS["instance"][0], 0, 4)
    put(fd, second + FIELDS["name"][0], b"c", 40)
    put(fd, second + at, value, size)
    sign(fd)
    with pytest.raises(StateError, match=text):
        Arena(fd, create=False)


def test_a_directory_that_changed_is_refused(fd: int) -> None:
    put(fd, ENTRIES + FIELDS["version"][0], 9, 4)
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
