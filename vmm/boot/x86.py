"""The state that the boot contract promises a guest: its memory's contents and the first vCPU's registers.

Follows Intel SDM vol. 3 ("Segment Descriptors", "4-Level Paging", "Processor State After Reset",
"Initializing IA-32e Mode"). Everything is computed before anything is written. It never touches another vCPU
than the first: those wait for INIT and SIPI.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from enum import IntFlag
from typing import TYPE_CHECKING

from vmm.boot.image import EntryMode, Image
from vmm.boot.layout import (
    BOOT_INFO_GPA,
    CMDLINE_GPA,
    CMDLINE_SIZE,
    GDT_GPA,
    HIGH_PDS_END,
    HIGH_PDS_START,
    HIGH_RAM_GPA,
    LOW_PDS_GPA,
    PDPT_GPA,
    PML4_GPA,
    STACK_TOP,
    high_pd_count,
    high_pd_gpa,
)
from vmm.errors import ConfigError
from vmm.units import GIB, MIB, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from vmm.kvm.abi import kvm_regs, kvm_segment, kvm_sregs

BOOT_INFO_MAGIC = 0x424D_4D56  # "VMMB"
BOOT_INFO_VERSION = 1
# magic, version, ram_below_4g, ram_above_4g, cpus, tsc_khz, flags, cmdline_len, cmdline_gpa
BOOT_INFO = struct.Struct("<IIQQIIIIQ")

CODE32_SELECTOR = 0x08
DATA_SELECTOR = 0x10
CODE64_SELECTOR = 0x18

CR0_PE = 1 << 0
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESET = 1 << 1  # the bit that always reads as one: interrupts off, direction flag clear

TYPE_DATA = 0x3  # read/write, accessed
TYPE_CODE = 0xB  # execute/read, accessed
FLAT_LIMIT = 0xFFFF_FFFF
REAL_MODE_LIMIT = 0xFFFF

PTE_PRESENT_WRITABLE = 0x03
PTE_LARGE_PAGE = 0x83  # present, writable, PS
ENTRIES = 512  # of any paging structure
LARGE_PAGE = 2 * MIB
FIRST_HIGH_GIB = HIGH_RAM_GPA // GIB

Writes = list[tuple[int, bytes | memoryview]]


class BootFlags(IntFlag):
    """`flags` of the boot information."""

    IRQCHIP = 1  # PIC, IOAPIC and LAPIC are there
    PIT = 2


def prepare_memory(
    memory_write: Callable[[int, bytes | memoryview], object],
    image: Image,
    ram_below_4g: int,
    ram_above_4g: int,
    cpus: int,
    tsc_khz: int,
    flags: int,
    cmdline: str,
    *,
    pdpe1gb: bool = False,
) -> None:
    """Writes GDT, boot information, command line, page tables (64-bit entry only) and the image's segments.

    `ram_below_4g` and `ram_above_4g` are bytes, `flags` are BootFlags, `pdpe1gb` says that the guest's CPUID
    offers 1 GiB pages. RAM must read as zeros beforehand: what a segment has beyond its data is not written.
    Raises ConfigError, with nothing written, for a command line or an amount of RAM that does not fit.
    """
    line = _cmdline(cmdline)
    info = BOOT_INFO.pack(
        BOOT_INFO_MAGIC,
        BOOT_INFO_VERSION,
        ram_below_4g,
        ram_above_4g,
        cpus,
        tsc_khz,
        flags,
        len(line) - 1,
        CMDLINE_GPA,
    )
    writes: Writes = [(GDT_GPA, _gdt()), (BOOT_INFO_GPA, info), (CMDLINE_GPA, line)]
    if image.mode is EntryMode.LONG64:
        writes += page_tables(ram_above_4g, pdpe1gb=pdpe1gb)
    writes += [(segment.gpa, segment.data) for segment in image.segments if segment.data]
    for gpa, data in writes:
        memory_write(gpa, data)


def page_tables(ram_above_4g: int, *, pdpe1gb: bool) -> Writes:
    """An identity map of the first 4 GiB and of `ram_above_4g` bytes from there on.

    In pages of 2 MiB; of 1 GiB, but only above 4 GiB, with `pdpe1gb`. Raises ConfigError for too much RAM.
    """
    count = high_pd_count(ram_above_4g)
    most = ENTRIES - FIRST_HIGH_GIB if pdpe1gb else (HIGH_PDS_END - HIGH_PDS_START) // PAGE_SIZE
    if count > most:
        raise ConfigError(
            f"memory: {format_size(ram_above_4g)} above 4 GiB, but the boot page tables map {most} GiB of it;"
            " give the guest less memory"
        )
    low = [LOW_PDS_GPA + number * PAGE_SIZE | PTE_PRESENT_WRITABLE for number in range(FIRST_HIGH_GIB)]
    if pdpe1gb:
        high = [HIGH_RAM_GPA + number * GIB | PTE_LARGE_PAGE for number in range(count)]
    else:
        high = [high_pd_gpa(number) | PTE_PRESENT_WRITABLE for number in range(count)]
    tables: Writes = [
        (PML4_GPA, _table([PDPT_GPA | PTE_PRESENT_WRITABLE])),
        (PDPT_GPA, _table(low + high)),
        *(
            (LOW_PDS_GPA + number * PAGE_SIZE, _directory(number * GIB, GIB))
            for number in range(FIRST_HIGH_GIB)
        ),
    ]
    if not pdpe1gb:
        for number in range(count):
            rest = min(GIB, ram_above_4g - number * GIB)
            tables.append((high_pd_gpa(number), _directory(HIGH_RAM_GPA + number * GIB, rest)))
    return tables


def apply_boot_state(regs: kvm_regs, sregs: kvm_sregs, image: Image) -> None:
    """Turns the registers of a fresh vCPU, as KVM reads them out, into those promised at the entry point.

    Set the vCPU's CPUID first: KVM refuses long mode that CPUID does not offer.
    """
    regs.rip = image.entry
    regs.rsp = STACK_TOP
    regs.rflags = RFLAGS_RESET
    if image.mode is EntryMode.LONG64:
        regs.rdi = BOOT_INFO_GPA
    else:
        regs.rbx = BOOT_INFO_GPA
    sregs.cr0 &= ~(CR0_CD | CR0_NW)  # set by reset; firmware's first act on a PC is to turn the caches on
    data_segments = (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss)
    if image.mode is EntryMode.REAL16:
        for segment in (sregs.cs, *data_segments):
            segment.base = 0
            segment.selector = 0
            segment.limit = REAL_MODE_LIMIT
        return
    sregs.cr0 |= CR0_PE
    sregs.gdt.base = GDT_GPA
    sregs.gdt.limit = len(_gdt()) - 1
    sregs.idt.base = 0
    sregs.idt.limit = 0  # an exception before the guest loads its own IDT is a triple fault, then and there
    for segment in data_segments:
        _flat_segment(segment, DATA_SELECTOR, TYPE_DATA)
    if image.mode is EntryMode.PROTECTED32:
        _flat_segment(sregs.cs, CODE32_SELECTOR, TYPE_CODE)
        return
    _flat_segment(sregs.cs, CODE64_SELECTOR, TYPE_CODE)
    sregs.cs.db = 0
    sregs.cs.l = 1
    sregs.cr3 = PML4_GPA
    sregs.cr4 |= CR4_PAE
    sregs.cr0 |= CR0_PG
    sregs.efer |= EFER_LME | EFER_LMA


def _flat_segment(segment: kvm_segment, selector: int, kind: int) -> None:
    segment.base = 0
    segment.limit = FLAT_LIMIT
    segment.selector = selector
    segment.type = kind
    segment.present = 1
    segment.dpl = 0
    segment.db = 1
    segment.s = 1
    segment.l = 0
    segment.g = 1
    segment.unusable = 0


def _gdt() -> bytes:
    """Null, flat 32-bit code, flat data, 64-bit code: the descriptors behind the selectors above."""
    code32 = _descriptor(TYPE_CODE, db=1, long=0)
    data = _descriptor(TYPE_DATA, db=1, long=0)
    code64 = _descriptor(TYPE_CODE, db=0, long=1)
    return struct.pack("<4Q", 0, code32, data, code64)


def _descriptor(kind: int, *, db: int, long: int) -> int:
    """The descriptor of a flat segment: base 0, limit 0xFFFFF pages, present, privilege level 0."""
    limit = 0xFFFF | 0xF << 48
    present, not_system, in_pages = 1 << 47, 1 << 44, 1 << 55
    return limit | kind << 40 | not_system | present | long << 53 | db << 54 | in_pages


def _table(entries: list[int]) -> bytes:
    """One paging structure: the given entries, then entries that are not present."""
    return struct.pack(f"<{ENTRIES}Q", *entries, *[0] * (ENTRIES - len(entries)))


def _directory(start: int, size: int) -> bytes:
    """A page directory that maps `size` bytes (at most 1 GiB, rounded up to whole pages) to themselves."""
    return _table([page | PTE_LARGE_PAGE for page in range(start, start + size, LARGE_PAGE)])


def _cmdline(text: str) -> bytes:
    """The NUL-terminated bytes of a command line that fits."""
    try:
        line = os.fsencode(text)  # the bytes that the process itself was given
    except UnicodeEncodeError as error:
        raise ConfigError(f"command line: character {error.start} is not text; leave that out") from error
    if b"\0" in line:
        raise ConfigError(f"command line: it contains a NUL byte at {line.index(0)}; leave that out")
    if len(line) >= CMDLINE_SIZE:
        raise ConfigError(f"command line: {len(line)} bytes, but at most {CMDLINE_SIZE - 1} fit; shorten it")
    return line + b"\0"
