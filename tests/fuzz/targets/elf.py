"""Image files: each loads within its machine or is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.reading import Reader
from tests.fuzz.test_fuzz_elf import load
from tests.unit.elfwriter import Part, note, notes, write_elf
from vmm.boot.image import EntryMode
from vmm.units import MIB

IMAGES = Path(__file__).parents[3] / "firmware" / "images"
MODES = (None, *EntryMode)


def one(data: bytes) -> None:
    """Byte 0: entry mode; byte 1: whether a load address of 4 bytes follows; then the file."""
    reader = Reader(data)
    mode = reader.choice(MODES)
    address = reader.number(4) if reader.number() & 1 else None
    load(reader.rest(), mode, address)


def seeds() -> Iterator[bytes]:
    """The smallest prebuilt images, what the tests' writer makes, and a flat file."""
    for name in ("hello16", "hello32", "hello64"):
        yield bytes(2) + (IMAGES / f"{name}.elf").read_bytes()
    for bits in (32, 64):
        parts = [notes(note(1, (64).to_bytes(4, "little"))), Part(MIB, b"\xf4" * 64)]
        yield bytes(2) + write_elf(parts, bits=bits)
    yield b"\x01\x01\x00\x00\x10\x00" + b"\xf4" * 16
