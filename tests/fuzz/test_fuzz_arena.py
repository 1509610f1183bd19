"""Mutated state memfds: whatever is in one, opening it works or raises StateError."""

from __future__ import annotations

import ctypes
import os
import zlib
from itertools import pairwise
from typing import ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmm.errors import StateError, VmmError
from vmm.fds import FdStore
from vmm.state import Arena
from vmm.state.arena import ALIGNMENT, DIRECTORY_ENTRIES, SIZE

HEADER, ENTRY = 128, 64  # the header, and what is before the entries of the first directory
CRC_AT, USED_AT = 64, 68
SECTIONS = 64 + 2 * (64 + DIRECTORY_ENTRIES * ENTRY)
NAMES = [("a", 0), ("a", 1), ("serial", 0), ("vcpu/0/regs", 0)]
USED = HEADER + len(NAMES) * ENTRY


class Words(ctypes.LittleEndianStructure):
    VERSION: ClassVar[int] = 1
    _fields_ = (("words", ctypes.c_uint64 * 9),)


def sign(content: bytearray) -> None:
    """Make the checksum right, so that what lies behind it is reached."""
    used = int.from_bytes(content[USED_AT : USED_AT + 4], "little")
    end = HEADER + min(used, DIRECTORY_ENTRIES) * ENTRY
    content[CRC_AT:USED_AT] = zlib.crc32(content[USED_AT:end]).to_bytes(4, "little")


def edge(value: int) -> bytes:
    return (value % (1 << 64)).to_bytes(8, "little")


EDGES = (0, 1, SECTIONS, SECTIONS + ALIGNMENT, SIZE - ALIGNMENT, SIZE, -ALIGNMENT, -1)
PATCHES = st.lists(
    st.tuples(
        st.integers(0, USED + ENTRY),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([edge(value) for value in EDGES]),
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=400)
@given(patches=PATCHES, signed=st.booleans())
@example(patches=[(USED_AT, b"\xff\xff\xff\xff")], signed=True)
@example(patches=[(USED_AT, b"\x00\x10\x00\x00")], signed=True)
@example(patches=[(HEADER + 48, edge(-ALIGNMENT)), (HEADER + 56, edge(2 * ALIGNMENT))], signed=True)
def test_a_mutated_directory_is_refused_or_harmless(patches: list[tuple[int, bytes]], signed: bool) -> None:
    fds = FdStore()
    try:
        fresh = Arena.open(fds)
        for name, instance in NAMES:
            fresh.place(name, instance, Words)
        state = fds.get("state")
        content = bytearray(os.pread(state, HEADER + DIRECTORY_ENTRIES * ENTRY, 0))
        before = bytes(content)
        for at, data in patches:
            content[at : at + len(data)] = data
        if signed:
            sign(content)
        os.pwrite(state, content, 0)
        check(state, unchanged=content[:USED] == before[:USED], signed=signed)
    finally:
        fds.close()


def check(state: int, *, unchanged: bool, signed: bool) -> None:
    try:
        arena = Arena(state, create=False)
    except StateError:
        assert not unchanged
        return
    assert unchanged or signed, "the checksum missed a change"
    taken = sorted((section.offset, section.offset + section.size) for section in arena)
    assert all(SECTIONS <= start <= end <= SIZE for start, end in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    for name, instance in (*NAMES, ("new", 0)):
        try:
            arena.place(name, instance, Words).words[8] = 1
        except VmmError:  # another version or size, or no room for one that is new
            continue
    arena.settle()
    again = Arena(state, create=False)
    assert list(again) == list(arena)


@settings(max_examples=200)
@given(content=st.binary(max_size=4 * ENTRY))
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    fds = FdStore()
    try:
        Arena.open(fds)
        blank = bytearray(HEADER + 8 * ENTRY)
        blank[: len(content)] = content
        os.pwrite(fds.get("state"), blank, 0)
        with pytest.raises(StateError, match=r"^state memfd: "):
            Arena(fds.get("state"), create=False)
    finally:
        fds.close()
