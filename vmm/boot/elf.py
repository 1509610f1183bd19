"""What an ELF file asks to have loaded, read with pyelftools and checked as a file format.

Follows the System V gABI (ELF header, program header, note section) and its i386 and x86-64 supplements. It
knows nothing of the machine: whether the segments fit is `image`'s business. The file is hostile input:
whatever it holds, only ImageError leaves here, in time and memory proportional to the file. Sections, symbols
and relocations are never looked at.
"""

from __future__ import annotations

import binascii  # noqa: F401 -- of pyelftools: it is imported late, when no machine code can be loaded any more
import struct
import zlib  # noqa: F401 -- likewise
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from io import BytesIO
from typing import Any

from vmm.errors import ImageError
from vmm.units import KIB

ELF_MAGIC = b"\x7fELF"

# Linkers emit fewer than ten of these and less than 1 KiB of those: the bounds are against hostile files.
MAX_PROGRAM_HEADERS = 64
MAX_NOTES_SIZE = 16 * KIB

NOTE_OWNER = b"VMM\0"
_NOTE_HEADER = struct.Struct("<III")  # n_namesz, n_descsz, n_type (gABI, "Note Section")

# ELF class -> size of its file header, and the machines that it may be for
_FILE_HEADER_SIZES = {32: 52, 64: 64}
_MACHINES = {32: ("EM_386", "EM_X86_64"), 64: ("EM_X86_64",)}


class SegmentFlags(IntFlag):
    """`p_flags` of a program header."""

    EXECUTE = 1
    WRITE = 2
    READ = 4


@dataclass(frozen=True)
class Segment:
    """`data` belongs at guest physical address `gpa`; zeros follow it up to `memory_size` bytes in all."""

    gpa: int
    data: bytes | memoryview
    memory_size: int
    flags: SegmentFlags

    @property
    def end(self) -> int:
        """The first guest physical address behind the segment."""
        return self.gpa + self.memory_size


@dataclass(frozen=True)
class Note:
    """One note whose owner is vmm: its type and its descriptor."""

    type: int
    desc: bytes


@dataclass(frozen=True)
class ElfContents:
    """What matters of an ELF file: class in bits, entry point, segments by physical address, vmm's notes."""

    bits: int
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[Note, ...]


def is_elf(data: bytes) -> bool:
    """Whether `data` starts as an ELF file does."""
    return data.startswith(ELF_MAGIC)


def read_elf(name: str, data: bytes) -> ElfContents:
    """The contents of the ELF file `data`, which messages call `name`. Raises nothing but ImageError."""
    bits, entry_point, program_headers = _headers(name, data)
    segments = []
    notes: list[Note] = []
    for number, entry in enumerate(program_headers):
        where = f"{name}: program header {number}"
        if entry["p_type"] == "PT_INTERP":
            raise ImageError(
                f"{where} names a program interpreter, so this is a user-space program; give a guest image"
            )
        if entry["p_type"] not in ("PT_LOAD", "PT_NOTE"):
            continue
        content = _content(where, data, entry["p_offset"], entry["p_filesz"])
        if entry["p_type"] == "PT_NOTE":
            notes += _notes(where, content)
            continue
        if entry["p_filesz"] > entry["p_memsz"]:
            raise ImageError(
                f"{where} has {entry['p_filesz']} bytes in the file but {entry['p_memsz']} in memory;"
                " link the image again"
            )
        if entry["p_memsz"]:
            flags = SegmentFlags(entry["p_flags"] & 7)
            segments.append(Segment(entry["p_paddr"], content, entry["p_memsz"], flags))
    if not segments:
        raise ImageError(
            f"{name}: no PT_LOAD segment, so there is nothing to load; link it as an executable image"
        )
    return ElfContents(bits, entry_point, tuple(segments), tuple(notes))


def _headers(name: str, data: bytes) -> tuple[int, int, list[Any]]:
    """The class in bits, the entry point and the program headers of a whole file for a PC."""
    from elftools.common.utils import struct_parse
    from elftools.elf.elffile import ELFFile

    # pyelftools names no closed set of exceptions, and the file may be made to find unnamed ones.
    try:
        elf = ELFFile(BytesIO(data))
    except Exception as error:
        raise ImageError(
            f"{name}: its ELF header is truncated or damaged ({error}); copy or build the image again"
        ) from error
    header = elf.header
    if not elf.little_endian:
        raise ImageError(f"{name}: a big-endian ELF file, but x86 is little-endian; build the image for x86")
    if header["e_machine"] not in _MACHINES[elf.elfclass]:
        raise ImageError(
            f"{name}: an ELF{elf.elfclass} file for machine {header['e_machine']}, not for x86"
            f" ({' or '.join(_MACHINES[elf.elfclass])}); build the image for x86"
        )
    if header["e_type"] == "ET_DYN":
        raise ImageError(
            f"{name}: position-independent (ET_DYN), but nothing here relocates it;"
            " link a static ET_EXEC (-static -no-pie)"
        )
    if header["e_type"] != "ET_EXEC":
        raise ImageError(
            f"{name}: its ELF type is {header['e_type']}, not ET_EXEC; link it as an executable image"
        )
    count, offset, size = header["e_phnum"], header["e_phoff"], elf.structs.Elf_Phdr.sizeof()
    if count > MAX_PROGRAM_HEADERS:
        raise ImageError(
            f"{name}: {count} program headers, of which vmm takes {MAX_PROGRAM_HEADERS}; link the image again"
        )
    if count and header["e_phentsize"] != size:
        raise ImageError(
            f"{name}: program headers of {header['e_phentsize']} bytes, where ELF{elf.elfclass} has {size};"
            " link the image again"
        )
    if count and not _FILE_HEADER_SIZES[elf.elfclass] <= offset <= len(data) - count * size:
        raise ImageError(
            f"{name}: its {count} program headers at offset {offset:#x} are truncated or misplaced in a file"
            f" of {len(data)} bytes; copy or build the image again"
        )
    headers = [struct_parse(elf.structs.Elf_Phdr, elf.stream, offset + n * size) for n in range(count)]
    return elf.elfclass, header["e_entry"], headers


def _content(where: str, data: bytes, offset: int, size: int) -> memoryview:
    if offset + size > len(data):
        raise ImageError(
            f"{where} wants {size} bytes at offset {offset:#x} of a file of {len(data)} bytes, which is"
            " truncated; copy or build the image again"
        )
    return memoryview(data)[offset : offset + size]


def _notes(where: str, content: memoryview) -> Iterator[Note]:
    """Those notes in `content` that vmm owns. Names and descriptors are padded to 4 bytes in both classes.

    So GNU's tools do it, whatever the gABI says of ELF64. pyelftools' own reader decodes a descriptor by the
    note's type whoever owns it, so it is not asked.
    """
    if len(content) > MAX_NOTES_SIZE:
        raise ImageError(
            f"{where} has {len(content)} bytes of notes, of which vmm takes {MAX_NOTES_SIZE};"
            " link the image again"
        )
    offset = 0
    while offset + _NOTE_HEADER.size <= len(content):
        name_size, desc_size, note_type = _NOTE_HEADER.unpack_from(content, offset)
        name_at = offset + _NOTE_HEADER.size
        desc_at = name_at + _padded(name_size)
        if desc_at + desc_size > len(content):
            raise ImageError(
                f"{where} has a note at {offset:#x} that is longer than what holds it; link the image again"
            )
        if content[name_at : name_at + name_size] == NOTE_OWNER:
            yield Note(note_type, bytes(content[desc_at : desc_at + desc_size]))
        offset = desc_at + _padded(desc_size)


def _padded(size: int) -> int:
    return (size + 3) & ~3
