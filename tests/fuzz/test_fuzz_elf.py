"""Whatever bytes an image file holds: it loads within its machine, or ImageError says why not, soon."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path

from hypothesis import find, given, settings
from hypothesis import strategies as st

from tests.unit.elfwriter import FILE_HEADER, LAYOUTS, PROGRAM_HEADER, Part, note, notes, write_elf
from vmm.boot.elf import MAX_NOTES_SIZE, MAX_PROGRAM_HEADERS
from vmm.boot.image import EntryMode, Image, parse_image
from vmm.boot.layout import reserved_areas
from vmm.errors import ImageError
from vmm.units import GIB, KIB, MIB

RAM = ((0, 3 * GIB), (4 * GIB, 2 * GIB))
PATH = Path("fuzz.elf")

LONGEST_SENTENCE = 400  # characters
ALLOWANCE = 256 * KIB  # bytes of memory that parsing may take beside the file itself


def load(data: bytes, entry_mode: EntryMode | None = None, load_address: int | None = None) -> bool:
    """Whether `data` loads; it is right about that and says why not in one sentence."""
    try:
        image = parse_image(PATH, data, ram=RAM, entry_mode=entry_mode, load_address=load_address)
    except ImageError as error:
        sentence = str(error)
    else:
        holds(image)
        return True
    assert sentence.startswith(f"{PATH}: ")
    assert "\n" not in sentence
    assert len(sentence) < LONGEST_SENTENCE
    return False


def holds(image: Image) -> None:
    """Fails if `image` is not what is promised of every image that loads."""
    spans = sorted((segment.gpa, segment.end) for segment in image.segments)
    for start, end in spans:
        assert start < end
        assert any(gpa <= start and end <= gpa + size for gpa, size in RAM)
        for area in reserved_areas(2 * GIB, paging=image.mode is EntryMode.LONG64):
            assert end <= area.start or area.end <= start
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start
    for segment in image.segments:
        assert len(segment.data) <= segment.memory_size
    assert any(segment.gpa <= image.entry < segment.gpa + len(segment.data) for segment in image.segments)
    if image.results is not None:
        gpa, size = image.results
        assert size
        assert any(start <= gpa and gpa + size <= start + length for start, length in RAM)


def integers(bits: int) -> st.SearchStrategy[int]:
    """Values of a field of so many bits, most of them near something that matters."""
    most = (1 << bits) - 1
    edges = [
        0,
        1,
        56,
        64,
        0x7C00,
        0x9000,
        MIB,
        0xE0_0000,
        0xF0_0000,
        3 * GIB,
        4 * GIB,
        6 * GIB,
        1 << 63,
        most,
    ]
    near = st.builds(lambda edge, step: (edge + step) & most, st.sampled_from(edges), st.integers(-2, 2))
    return near | st.integers(0, most)


def sizes_of(layout: struct.Struct, names: tuple[str, ...]) -> dict[str, int]:
    """Bits of each field."""
    codes = layout.format.lstrip("<")
    return {name: 8 * struct.calcsize(code) for name, code in zip(names, codes, strict=True)}


@st.composite
def overrides(draw: st.DrawFn, layout: struct.Struct, names: tuple[str, ...]) -> dict[str, int]:
    """A few fields with other values."""
    bits = sizes_of(layout, names)
    chosen = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    return {name: draw(integers(bits[name])) for name in chosen}


@st.composite
def elf_files(draw: st.DrawFn) -> bytes:
    """An ELF file that may be right, or wrong in a few fields, or cut, or both."""
    bits = draw(st.sampled_from([32, 64]))
    header, program_header = LAYOUTS[bits]
    contents = st.binary(max_size=64)
    vmm_note = st.builds(note, st.integers(0, 3), contents, st.sampled_from([b"VMM\0", b"GNU\0", b""]))
    segment = st.builds(
        Part,
        st.integers(0x7000, 16 * MIB),
        contents,
        st.sampled_from([1, 1, 1, 4, 3, 2]),
        st.integers(0, 7),
        overrides(program_header, PROGRAM_HEADER[bits]),
    )
    parts = [Part(MIB, b"\xf4" * 64), *draw(st.lists(segment | st.builds(notes, vmm_note), max_size=4))]
    data = write_elf(parts, bits=bits, **draw(overrides(header, FILE_HEADER)))
    return data[: draw(st.just(len(data)) | st.integers(0, len(data)))]


soon = settings(deadline=2000)  # ms for one file; the first one also imports pyelftools
modes = st.none() | st.sampled_from(EntryMode)


@soon
@given(st.binary(max_size=8192), modes, st.none() | integers(64))
def test_any_bytes(data: bytes, mode: EntryMode | None, address: int | None) -> None:
    load(data, mode, address)


@soon
@given(st.binary(max_size=512), modes)
def test_any_bytes_behind_the_magic(data: bytes, mode: EntryMode | None) -> None:
    load(b"\x7fELF" + data, mode)


@soon
@given(elf_files(), modes)
def test_elf_files(data: bytes, mode: EntryMode | None) -> None:
    load(data, mode)


@soon
@given(elf_files(), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4))
def test_changed_bytes(data: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for at, value in changes:
        if changed:
            changed[at % len(changed)] = value
    load(bytes(changed))


def test_the_generator_makes_both_kinds() -> None:
    find(elf_files(), load)
    find(elf_files(), lambda data: not load(data))


def test_a_hostile_file_costs_no_more_than_its_size() -> None:
    """Many headers, each over the largest notes there may be, all full of the smallest note."""
    many = notes(note(7, b"", owner=b"") * (MAX_NOTES_SIZE // 12))
    shared = {"p_offset": 64 + 56 * MAX_PROGRAM_HEADERS, "p_filesz": len(many.data)}
    same = [Part(0, b"", type=4, fields=shared) for _ in range(MAX_PROGRAM_HEADERS - 2)]
    data = write_elf([many, *same, Part(MIB, b"\xf4" * 64)], entry=MIB)
    assert load(data)
    tracemalloc.start()
    load(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < ALLOWANCE + len(data)
