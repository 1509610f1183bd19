"""State memfds with a changed directory: refused, or every section lies where it may."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.fuzz.reading import Reader
from tests.fuzz.test_fuzz_arena import CRC_AT, EDGES, HEADER, NAMES, USED, USED_AT, Words, check, edge, sign
from vmm.fds import FdStore
from vmm.state import Arena
from vmm.state.arena import DIRECTORY_ENTRIES


def one(data: bytes) -> None:
    """Byte 0: whether the checksum is made right; then patches: where (2 bytes), how long, what."""
    reader = Reader(data)
    signed = bool(reader.number() & 1)
    fds = FdStore()
    try:
        fresh = Arena.open(fds)
        for name, instance in NAMES:
            fresh.place(name, instance, Words)
        state = fds.get("state")
        content = bytearray(os.pread(state, HEADER + DIRECTORY_ENTRIES * 64, 0))
        before = bytes(content)
        while reader:
            at = reader.number(2) % (USED + HEADER)
            patch = edge(reader.choice(EDGES)) if (size := reader.number() % 9) == 0 else reader.bytes(size)
            content[at : at + len(patch)] = patch
        if signed:
            sign(content)
        os.pwrite(state, content, 0)
        check(state, unchanged=content[:USED] == before[:USED], signed=signed)
    finally:
        fds.close()


def seeds() -> Iterator[bytes]:
    """No change, a wrong checksum, more sections than there is room for, one that wraps."""
    yield b"\x00"
    yield bytes((0, CRC_AT, 0, 1, 0xFF))
    yield bytes((1, USED_AT, 0, 4, 0xFF, 0xFF, 0xFF, 0xFF))
    yield bytes((1, HEADER + 48, 0, 0, 6, HEADER + 56, 0, 0, 3))
