"""The guest physical addresses of the boot contract: what vmm itself puts into guest memory, and where.

Guests are linked against these numbers (firmware/ has its own copy of them), so none ever changes within a
contract version.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.units import GIB, MIB, PAGE_SIZE

GDT_GPA = 0x1000
BOOT_INFO_GPA = 0x6000
CMDLINE_GPA = 0x6100
CMDLINE_SIZE = 0xE00  # bytes, the terminating NUL included
STACK_TOP = 0x7000  # a stack of 256 bytes above a full command line: enough until the guest sets its own
FIRST_FREE_GPA = 0x7000
PML4_GPA = 0x9000
PDPT_GPA = 0xA000
LOW_PDS_GPA = 0xB000  # four page directories: the first 4 GiB
LOW_TABLES_END = 0xF000
HIGH_PDS_START = 0xE0_0000  # page directories for RAM above 4 GiB, placed downward from the end of this area
HIGH_PDS_END = 0xF0_0000

REAL16_GPA = 0x7C00  # where a PC's BIOS puts a boot sector, and so where 16-bit code is linked
IMAGE_GPA = 1 * MIB  # where 32-bit and 64-bit images are linked

MMIO_GAP_START = 0xC000_0000  # RAM below 4 GiB ends here at the latest
HIGH_RAM_GPA = 4 * GIB


@dataclass(frozen=True)
class Area:
    """Guest physical addresses `start` up to, not including, `end`, and in words what vmm keeps there."""

    start: int
    end: int
    what: str


def high_pd_count(ram_above_4g: int) -> int:
    """Page directories, one a GiB, that map `ram_above_4g` bytes of RAM from 4 GiB on with 2 MiB pages."""
    return -(-ram_above_4g // GIB)


def high_pd_gpa(number: int) -> int:
    """Where the page directory for the `number`-th GiB above 4 GiB (from 0) lies: the first one highest."""
    return HIGH_PDS_END - (number + 1) * PAGE_SIZE


def reserved_areas(ram_above_4g: int, paging: bool) -> tuple[Area, ...]:
    """What an image must leave alone. Assumes 2 MiB pages, so that whether an image loads is no matter of the
    host's CPU.
    """
    low = (
        Area(0, FIRST_FREE_GPA, "the boot information"),
        Area(PML4_GPA, LOW_TABLES_END, "the page tables"),
    )
    count = high_pd_count(ram_above_4g)
    if not paging or count == 0:
        return low
    return (*low, Area(high_pd_gpa(count - 1), HIGH_PDS_END, "the page tables for RAM above 4 GiB"))
