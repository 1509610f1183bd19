from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.unit.elfwriter import Part, note, notes, write_elf
from vmm.boot import image as image_module
from vmm.boot import layout
from vmm.boot.elf import MAX_NOTES_SIZE, MAX_PROGRAM_HEADERS
from vmm.boot.image import (
    EntryMode,
    Image,
    SegmentFlags,
    find_image,
    load_image,
    parse_image,
    prebuilt_images,
    resolve_kernel,
)
from vmm.errors import ImageError
from vmm.memory import guest
from vmm.units import GIB, MIB

RAM = ((0, 16 * MIB),)
CODE = b"\xf4" * 16
GPA = 1 * MIB
PATH = Path("guest.elf")
PREBUILT = Path(__file__).resolve().parents[2] / "firmware" / "images"


def parse(data: bytes, **arguments: Any) -> Image:
    return parse_image(PATH, data, **{"ram": RAM} | arguments)


def refused(sentence: str, data: bytes, **arguments: Any) -> None:
    """`data` is refused with exactly this sentence behind the file's name."""
    with pytest.raises(ImageError) as caught:
        parse(data, **arguments)
    assert f"{PATH}: {sentence}" == str(caught.value)


# --- what loads ---------------------------------------------------------------------------------------------


def test_elf64() -> None:
    data = write_elf(
        [Part(GPA, CODE, fields={"p_memsz": 0x2000}), Part(0x20_0000, b"data", flags=6)], entry=GPA + 4
    )
    image = parse(data)
    assert image.mode is EntryMode.LONG64
    assert (image.path, image.entry, image.kind, image.results) == (PATH, GPA + 4, "elf64", None)
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    code, rest = image.segments
    assert (code.gpa, bytes(code.data), code.memory_size, code.end) == (GPA, CODE, 0x2000, GPA + 0x2000)
    assert code.flags == SegmentFlags.READ | SegmentFlags.WRITE | SegmentFlags.EXECUTE
    assert (rest.gpa, bytes(rest.data), rest.memory_size) == (0x20_0000, b"data", 4)
    assert rest.flags == SegmentFlags.READ | SegmentFlags.WRITE


def test_elf32_enters_protected_mode() -> None:
    image = parse(write_elf([Part(GPA, CODE)], bits=32))
    assert (image.mode, image.kind) == (EntryMode.PROTECTED32, "elf32")


def test_elf32_for_x86_64_is_an_x32_image() -> None:
    assert parse(write_elf([Part(GPA, CODE)], bits=32, e_machine=62)).mode is EntryMode.PROTECTED32


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("mode", list(EntryMode))
def test_the_note_overrides_the_class(bits: int, mode: EntryMode) -> None:
    data = write_elf([Part(0x7C00, CODE), notes(note(1, struct.pack("<I", mode.value)))], bits=bits)
    assert mode is parse(data).mode


def test_the_caller_overrides_the_note() -> None:
    data = write_elf([Part(GPA, CODE), notes(note(1, struct.pack("<I", 32)))])
    assert parse(data, entry_mode=EntryMode.LONG64).mode is EntryMode.LONG64


def test_results_note_among_others() -> None:
    data = write_elf(
        [
            Part(GPA, CODE),
            notes(note(1, b"a build id", owner=b"GNU\0"), note(5, bytes(16), owner=b"GNU\0")),
            notes(note(1, struct.pack("<I", 64)), note(2, struct.pack("<QQ", 0x20_0000, 4096)), bytes(4)),
        ]
    )
    image = parse(data)
    assert image.results == (0x20_0000, 4096)
    assert image.mode is EntryMode.LONG64


def test_physical_addresses_count() -> None:
    data = write_elf([Part(GPA, CODE, fields={"p_vaddr": 0xFFFF_FFFF_8000_0000})])
    assert [segment.gpa for segment in parse(data).segments] == [GPA]


def test_other_program_headers_and_empty_segments_are_passed_over() -> None:
    gnu_stack = Part(0, b"", type=0x6474_E551, fields={"p_offset": 1 << 60})
    assert len(parse(write_elf([Part(GPA, CODE), gnu_stack, Part(0, b"")])).segments) == 1


def test_segments_above_4_gib() -> None:
    ram = ((0, 3 * GIB), (4 * GIB, 2 * GIB))
    assert parse(write_elf([Part(4 * GIB + MIB, CODE)]), ram=ram).entry == 4 * GIB + MIB


def test_flat_is_real_mode_at_the_boot_sector_address() -> None:
    image = parse(CODE)
    (segment,) = image.segments
    assert (image.mode, image.entry, image.kind) == (EntryMode.REAL16, 0x7C00, "flat")
    assert (segment.gpa, segment.data, segment.memory_size) == (0x7C00, CODE, len(CODE))


@pytest.mark.parametrize("mode", [EntryMode.PROTECTED32, EntryMode.LONG64])
def test_flat_in_another_mode_is_at_1_mib(mode: EntryMode) -> None:
    image = parse(CODE, entry_mode=mode)
    assert (image.mode, image.entry) == (mode, MIB)


def test_flat_at_a_load_address() -> None:
    assert parse(CODE, load_address=0x8000).entry == 0x8000


@pytest.mark.parametrize("path", sorted(PREBUILT.glob("*.elf")), ids=lambda path: path.stem)
def test_prebuilt_images_load_at_128_mib(path: Path) -> None:
    assert load_image(path, ram=((0, 128 * MIB),)).segments


# --- what is refused ----------------------------------------------------------------------------------------


def test_empty() -> None:
    refused("the file is empty; copy or build the image again", b"")


@pytest.mark.parametrize("bits", [32, 64])
def test_every_truncation_of_a_header(bits: int) -> None:
    data = write_elf([Part(GPA, CODE)], bits=bits)
    for size in range(4, len(data)):
        with pytest.raises(ImageError, match=r"guest\.elf: .*(truncated|damaged)"):
            parse(data[:size])


def test_truncated_segment() -> None:
    refused(
        "program header 0 wants 16 bytes at offset 0x78 of a file of 135 bytes, which is truncated;"
        " copy or build the image again",
        write_elf([Part(GPA, CODE)])[:-1],
    )


def test_program_headers_beyond_the_file() -> None:
    refused(
        "its 1 program headers at offset 0xffffffffffffffff are truncated or misplaced in a file of"
        " 136 bytes; copy or build the image again",
        write_elf([Part(GPA, CODE)], e_phoff=(1 << 64) - 1),
    )


def test_program_headers_within_the_file_header() -> None:
    refused(
        "its 1 program headers at offset 0x0 are truncated or misplaced in a file of"
        " 136 bytes; copy or build the image again",
        write_elf([Part(GPA, CODE)], e_phoff=0),
    )


def test_program_header_size() -> None:
    refused(
        "program headers of 1 bytes, where ELF64 has 56; link the image again",
        write_elf([Part(GPA, CODE)], e_phentsize=1),
    )


@pytest.mark.parametrize("count", [MAX_PROGRAM_HEADERS + 1, 0xFFFF])
def test_absurd_count(count: int) -> None:
    refused(
        f"{count} program headers, of which vmm takes 64; link the image again",
        write_elf([Part(GPA, CODE)], e_phnum=count),
    )


def test_bad_class_is_damage() -> None:
    data = bytearray(write_elf([Part(GPA, CODE)]))
    data[4] = 3
    refused(
        r"its ELF header is truncated or damaged (Invalid EI_CLASS b'\x03'); copy or build the image again",
        bytes(data),
    )


def test_big_endian() -> None:
    data = bytearray(write_elf([Part(GPA, CODE)]))
    data[5] = 2
    refused("a big-endian ELF file, but x86 is little-endian; build the image for x86", bytes(data))


def test_machine() -> None:
    refused(
        "an ELF64 file for machine EM_AARCH64, not for x86 (EM_X86_64); build the image for x86",
        write_elf([Part(GPA, CODE)], e_machine=183),
    )
    refused(
        "an ELF32 file for machine 51966, not for x86 (EM_386 or EM_X86_64); build the image for x86",
        write_elf([Part(GPA, CODE)], bits=32, e_machine=0xCAFE),
    )


def test_elf64_for_the_386() -> None:
    refused(
        "an ELF64 file for machine EM_386, not for x86 (EM_X86_64); build the image for x86",
        write_elf([Part(GPA, CODE)], e_machine=3),
    )


def test_position_independent() -> None:
    refused(
        "position-independent (ET_DYN), but nothing here relocates it;"
        " link a static ET_EXEC (-static -no-pie)",
        write_elf([Part(GPA, CODE)], e_type=3),
    )


def test_object_file() -> None:
    refused(
        "its ELF type is ET_REL, not ET_EXEC; link it as an executable image",
        write_elf([Part(GPA, CODE)], e_type=1),
    )


def test_user_space_program() -> None:
    refused(
        "program header 0 names a program interpreter, so this is a user-space program; give a guest image",
        write_elf([Part(0, b"/lib64/ld-linux-x86-64.so.2\0", type=3), Part(GPA, CODE)]),
    )


@pytest.mark.parametrize(
    "parts", [[], [notes(note(1, bytes(4)))], [Part(GPA, b"")]], ids=["none", "note", "empty"]
)
def test_nothing_to_load(parts: list[Part]) -> None:
    refused(
        "no PT_LOAD segment, so there is nothing to load; link it as an executable image", write_elf(parts)
    )


def test_file_size_beyond_memory_size() -> None:
    refused(
        "program header 0 has 16 bytes in the file but 15 in memory; link the image again",
        write_elf([Part(GPA, CODE, fields={"p_memsz": 15})]),
    )


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(16 * MIB, 16), (16 * MIB - 8, 16), (GPA, 1 << 62), ((1 << 64) - 1, 1 << 63)],
    ids=["behind", "across the end", "huge", "wrapping"],
)
def test_outside_ram(gpa: int, size: int) -> None:
    with pytest.raises(ImageError) as caught:
        parse(write_elf([Part(gpa, CODE, fields={"p_memsz": size})]))
    word = "outside guest RAM (0x0-0xffffff); give the guest more memory or link it lower"
    gap = "reaches into the 32-bit MMIO gap"
    assert (gap if gpa < 3 * GIB < gpa + size else word) in str(caught.value)
    assert f"the segment at {gpa:#x}-{gpa + size - 1:#x}" in str(caught.value)


def test_outside_ram_says_which_ram() -> None:
    refused(
        "the segment at 0x140000000-0x14000000f is outside guest RAM (0x0-0xbfffffff,"
        " 0x100000000-0x13fffffff); give the guest more memory or link it lower",
        write_elf([Part(5 * GIB, CODE)]),
        ram=((0, 3 * GIB), (4 * GIB, GIB)),
    )


@pytest.mark.parametrize("gpa", [3 * GIB, 3 * GIB - 8, 4 * GIB - 8, 0xFEE0_0000])
def test_mmio_gap(gpa: int) -> None:
    refused(
        f"the segment at {gpa:#x}-{gpa + 15:#x} reaches into the 32-bit MMIO gap at 0xc0000000-0xffffffff,"
        " where there is never RAM; link it elsewhere",
        write_elf([Part(gpa, CODE)]),
        ram=((0, 3 * GIB), (4 * GIB, GIB)),
    )


def test_the_gap_is_the_one_of_guest_memory() -> None:
    assert (guest.LOW_RAM_END, guest.HIGH_RAM_START) == (layout.MMIO_GAP_START, layout.HIGH_RAM_GPA)


def test_overlap() -> None:
    parts = [Part(GPA + 0x1000, CODE), Part(GPA, CODE, fields={"p_memsz": 0x1001})]
    refused(
        "the segment at 0x100000-0x101000 overlaps the one at 0x101000-0x10100f by physical address;"
        " correct the linker script",
        write_elf(parts),
    )
    touching = [parts[0], Part(GPA, CODE, fields={"p_memsz": 0x1000})]
    assert len(parse(write_elf(touching)).segments) == 2


@pytest.mark.parametrize(
    ("gpa", "what", "where"),
    [
        (0, "the boot information", "0x0-0x6fff"),
        (0x6FFF, "the boot information", "0x0-0x6fff"),
        (0x8FF1, "the page tables", "0x9000-0xefff"),
        (0xEFFF, "the page tables", "0x9000-0xefff"),
    ],
)
@pytest.mark.parametrize("bits", [32, 64])
def test_low_memory_of_vmm(bits: int, gpa: int, what: str, where: str) -> None:
    refused(
        f"the segment at {gpa:#x}-{gpa + 15:#x} overlaps {what} that vmm puts at {where};"
        " link it at 0x100000 or above (16-bit code at 0x7c00)",
        write_elf([Part(gpa, CODE)], bits=bits),
    )


def test_free_low_memory() -> None:
    for gpa in (0x7000, 0x8FF0, 0xF000):
        assert parse(write_elf([Part(gpa, CODE)])).entry == gpa


def test_page_tables_for_high_ram() -> None:
    data = write_elf([Part(0xEF_E000, CODE)])
    ram = ((0, 3 * GIB), (4 * GIB, 2 * GIB))
    refused(
        "the segment at 0xefe000-0xefe00f overlaps the page tables for RAM above 4 GiB that vmm puts at"
        " 0xefe000-0xefffff; link it at 0x100000 or above (16-bit code at 0x7c00)",
        data,
        ram=ram,
    )
    assert parse(data, ram=((0, 3 * GIB), (4 * GIB, 1 * GIB))).entry
    assert parse(data, ram=ram, entry_mode=EntryMode.PROTECTED32).entry


def test_flat_too_large_says_that_it_is_no_elf() -> None:
    refused(
        "the flat binary (no ELF header) at 0x7c00-0x9000 overlaps the page tables that vmm puts at"
        " 0x9000-0xefff; link it at 0x100000 or above (16-bit code at 0x7c00)",
        bytes(0x1401),
    )
    assert parse(bytes(0x1400)).segments


@pytest.mark.parametrize("address", [-1, 0x1_0000_0000_0000_0000])
def test_flat_load_address_outside_ram(address: int) -> None:
    with pytest.raises(ImageError, match="outside guest RAM"):
        parse(CODE, load_address=address)


def test_load_address_for_an_elf() -> None:
    refused(
        "an ELF file says itself where it goes; leave out the load address 0x200000",
        write_elf([Part(GPA, CODE)]),
        load_address=0x20_0000,
    )


@pytest.mark.parametrize(
    ("entry", "flags", "memory_size"),
    [(GPA - 1, 7, 16), (GPA + 16, 7, 16), (GPA + 16, 7, 32), (GPA, 6, 16), ((1 << 64) - 1, 7, 16)],
    ids=["before", "behind", "in zeros", "not executable", "far"],
)
def test_entry_outside_code(entry: int, flags: int, memory_size: int) -> None:
    refused(
        f"the entry point {entry:#x} is in no executable segment's contents (by physical address); correct"
        " ENTRY or the segments' flags in the linker script",
        write_elf([Part(GPA, CODE, flags=flags, fields={"p_memsz": memory_size})], entry=entry),
    )


@pytest.mark.parametrize(
    ("mode", "entry", "limit"), [(EntryMode.REAL16, GPA, "64K"), (EntryMode.PROTECTED32, 4 * GIB, "4G")]
)
def test_entry_beyond_its_mode(mode: EntryMode, entry: int, limit: str) -> None:
    refused(
        f"the entry point {entry:#x} is beyond the first {limit}, where {mode.value}-bit code starts;"
        " link it lower or choose another entry mode",
        write_elf([Part(entry, CODE)]),
        entry_mode=mode,
        ram=((0, 3 * GIB), (4 * GIB, GIB)),
    )


BAD_NOTES = {
    "mode": (
        note(1, struct.pack("<I", 65)),
        "its entry mode note says 65; build the image with one of [16, 32, 64]",
    ),
    "short": (
        note(1, b""),
        "vmm note type 1 must be there once with 4 bytes, not 1 times with 0; build the image again",
    ),
    "twice": (
        note(2, bytes(16)) * 2,
        "vmm note type 2 must be there once with 16 bytes, not 2 times with 16; build the image again",
    ),
    "unknown": (note(3, bytes(4)), "vmm note type 3 is unknown; use the vmm that the image was made for"),
    "empty": (
        note(2, struct.pack("<QQ", GPA, 0)),
        "the results area at 0x100000 has no bytes; build the image again",
    ),
    "outside": (
        note(2, struct.pack("<QQ", 16 * MIB, 16)),
        (
            "the results area at 0x1000000-0x100000f is outside guest RAM (0x0-0xffffff);"
            " give the guest more memory or link it lower"
        ),
    ),
    "cut": (
        note(1, bytes(4))[:-1],
        "program header 1 has a note at 0x0 that is longer than what holds it; link the image again",
    ),
    "lengths": (
        note(9, bytes(4), owner=b"X") + struct.pack("<III", 0xFFFF_FFFF, 0xFFFF_FFFF, 1),
        "program header 1 has a note at 0x14 that is longer than what holds it; link the image again",
    ),
    "size": (
        bytes(MAX_NOTES_SIZE + 1),
        "program header 1 has 16385 bytes of notes, of which vmm takes 16384; link the image again",
    ),
}


@pytest.mark.parametrize("case", BAD_NOTES)
def test_notes(case: str) -> None:
    contents, sentence = BAD_NOTES[case]
    refused(sentence, write_elf([Part(GPA, CODE), notes(contents)]))


# --- files --------------------------------------------------------------------------------------------------


def test_load_image(tmp_path: Path) -> None:
    path = tmp_path / "guest.elf"
    path.write_bytes(write_elf([Part(GPA, CODE)]))
    image = load_image(path, ram=RAM)
    assert (image.path, image.entry) == (path, GPA)
    assert image == load_image(str(path), ram=RAM)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match=r"none: cannot be read \(No such file or directory\); check the path"
    ):
        load_image(tmp_path / "none", ram=RAM)


def test_nul_in_the_path() -> None:
    with pytest.raises(ImageError, match=r"cannot be read \(embedded null byte\)"):
        load_image("a\0b", ram=RAM)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"not a regular file"):
        load_image(tmp_path, ram=RAM)


def test_fifo_without_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="fifo: not a regular file; give the image as one"):
        load_image(tmp_path / "fifo", ram=RAM)


def test_endless_device() -> None:
    with pytest.raises(ImageError, match="/dev/zero: not a regular file"):
        load_image("/dev/zero", ram=RAM)


def test_larger_than_ram(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 16 * MIB + 1)
    sentence = (
        "large: 16777217 bytes, more than guest RAM (16M); give the guest more memory or use a smaller image"
    )
    with pytest.raises(ImageError, match=re.escape(sentence)):
        load_image(path, ram=RAM)


def test_larger_than_any_image(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, GIB + 1)
    with pytest.raises(ImageError, match=re.escape("more than what vmm loads (1G)")):
        load_image(path, ram=((0, 2 * GIB),))


@pytest.mark.parametrize("change", ["grown", "shrunk", "rewritten"])
def test_changed_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path = tmp_path / "guest"
    path.write_bytes(CODE)
    os.utime(path, ns=(0, 0))
    stat_of = os.fstat

    def fstat_then_change(fd: int) -> os.stat_result:
        result = stat_of(fd)
        path.write_bytes({"grown": CODE * 2, "shrunk": b"", "rewritten": bytes(16)}[change])
        return result

    monkeypatch.setattr(os, "fstat", fstat_then_change)
    with pytest.raises(
        ImageError, match="the file changed while it was read; start again once its writer is done"
    ):
        load_image(path, ram=RAM)


# --- names --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The installed and the checkout's directory; `ticker` is in both, `sentinel` in the latter alone."""
    installed, checkout = tmp_path / "installed", tmp_path / "checkout"
    for directory, names in ((installed, ["ticker"]), (checkout, ["ticker", "sentinel"])):
        directory.mkdir()
        for name in names:
            (directory / f"{name}.elf").touch()
    monkeypatch.setattr(image_module, "_prebuilt_directories", lambda: (installed, checkout))
    return installed, checkout


def test_find_image(two_images: tuple[Path, Path]) -> None:
    installed, checkout = two_images
    assert find_image("ticker") == installed / "ticker.elf"
    assert find_image("sentinel") == checkout / "sentinel.elf"
    assert list(prebuilt_images()) == ["sentinel", "ticker"]


def test_unknown_name_lists_the_known(two_images: tuple[Path, Path]) -> None:
    sentence = (
        "tikcer: no such file, and no prebuilt image of that name; choose a file or one of sentinel, ticker"
    )
    with pytest.raises(ImageError, match=f"^{sentence}$"):
        resolve_kernel("tikcer")


def test_no_images_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_prebuilt_directories", lambda: (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(
        ImageError, match=r"ticker: no prebuilt images in \S+/a and \S+/b; run scripts/build-firmware"
    ):
        find_image("ticker")


def test_names_are_no_paths(two_images: tuple[Path, Path]) -> None:
    with pytest.raises(ImageError):
        find_image("../installed/ticker")


def test_resolve_kernel(
    two_images: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, checkout = two_images
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sentinel").mkdir()
    assert resolve_kernel("sentinel") == checkout / "sentinel.elf"
    assert resolve_kernel("ticker") == installed / "ticker.elf"
    (tmp_path / "ticker").touch()
    assert resolve_kernel("ticker") == Path("ticker")
    assert resolve_kernel("./none") == Path("./none")


def test_images_of_the_checkout_are_found() -> None:
    assert image_module._prebuilt_directories()[1] == PREBUILT
