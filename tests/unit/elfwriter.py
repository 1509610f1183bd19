"""ELF files, written field by field and well formed unless a test says otherwise (System V gABI)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

ET_EXEC = 2
EM_386 = 3
EM_X86_64 = 62
PT_LOAD = 1
PT_NOTE = 4

# class -> (file header behind e_ident, program header); the fields' names in the same order stand below
LAYOUTS = {
    32: (struct.Struct("<HHIIIIIHHHHHH"), struct.Struct("<IIIIIIII")),
    64: (struct.Struct("<HHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")),
}
FILE_HEADER = (
    "e_type", "e_machine", "e_version", "e_entry", "e_phoff", "e_shoff", "e_flags",
    "e_ehsize", "e_phentsize", "e_phnum", "e_shentsize", "e_shnum", "e_shstrndx",
)  # fmt: skip
PROGRAM_HEADER = {
    32: ("p_type", "p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_flags", "p_align"),
    64: ("p_type", "p_flags", "p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_align"),
}


@dataclass(frozen=True)
class Part:
    """One program header and its bytes; `fields` replaces what the header would say."""

    gpa: int
    data: bytes
    type: int = PT_LOAD
    flags: int = 7
    fields: dict[str, int] = field(default_factory=dict)


def note(note_type: int, desc: bytes, owner: bytes = b"VMM\0") -> bytes:
    """One note, padded to 4 bytes."""
    header = struct.pack("<III", len(owner), len(desc), note_type)
    return header + owner + bytes(-len(owner) % 4) + desc + bytes(-len(desc) % 4)


def notes(*contents: bytes) -> Part:
    """A PT_NOTE program header over some notes."""
    return Part(0, b"".join(contents), type=PT_NOTE, flags=4)


def write_elf(parts: Sequence[Part], *, bits: int = 64, entry: int | None = None, **fields: int) -> bytes:
    """An ELF file of the given class; its entry point is the first part's address unless `entry` or a field
    says so.
    """
    header, program_header = LAYOUTS[bits]
    header_size = 16 + header.size
    table, contents = b"", b""
    start = header_size + len(parts) * program_header.size
    for part in parts:
        values = {
            "p_type": part.type,
            "p_flags": part.flags,
            "p_offset": start + len(contents),
            "p_vaddr": part.gpa,
            "p_paddr": part.gpa,
            "p_filesz": len(part.data),
            "p_memsz": len(part.data),
            "p_align": 4,
        } | part.fields
        table += program_header.pack(*(values[name] for name in PROGRAM_HEADER[bits]))
        contents += part.data
    if entry is None:
        entry = parts[0].gpa if parts else 0
    values = {
        "e_type": ET_EXEC,
        "e_machine": EM_X86_64 if bits == 64 else EM_386,
        "e_version": 1,
        "e_entry": entry,
        "e_phoff": header_size if parts else 0,
        "e_shoff": 0,
        "e_flags": 0,
        "e_ehsize": header_size,
        "e_phentsize": program_header.size,
        "e_phnum": len(parts),
        "e_shentsize": 0,
        "e_shnum": 0,
        "e_shstrndx": 0,
    } | fields
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    return ident + header.pack(*(values[name] for name in FILE_HEADER)) + table + contents
