from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.unit.elfwriter import Part, write_elf
from vmm.boot import layout
from vmm.boot.image import EntryMode, Image, parse_image
from vmm.boot.x86 import BootFlags, apply_boot_state, page_tables, prepare_memory
from vmm.errors import ConfigError
from vmm.kvm.abi import kvm_regs, kvm_segment, kvm_sregs
from vmm.units import GIB, MIB, PAGE_SIZE

CODE = b"\xf4" * 16
GPA = 1 * MIB


def image_for(mode: EntryMode) -> Image:
    data = write_elf([Part(0x8000, CODE), Part(GPA, b"", fields={"p_memsz": 64})])
    return parse_image(Path("guest.elf"), data, ram=((0, 16 * MIB),), entry_mode=mode)


class Memory:
    """What was written, by guest physical address; an overlapping write fails."""

    def __init__(self) -> None:
        self.writes: dict[int, bytes] = {}

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        end = gpa + len(data)
        assert all(end <= start or start + len(old) <= gpa for start, old in self.writes.items())
        self.writes[gpa] = bytes(data)

    def read_u64(self, gpa: int) -> int:
        for start, data in self.writes.items():
            if start <= gpa < start + len(data):
                return int.from_bytes(data[gpa - start : gpa - start + 8], "little")
        return 0

    def translate(self, address: int) -> int | None:
        """The physical address a CPU would find for `address`, walking from the PML4 as the manual says."""
        table = layout.PML4_GPA
        for shift in (39, 30, 21):
            entry = self.read_u64(table + (address >> shift & 511) * 8)
            if not entry & 1:
                return None
            assert entry & 2, "not writable"
            if entry & 0x80:
                page = entry & ~((1 << shift) - 1)
                return page | address & ((1 << shift) - 1)
            table = entry & ~0xFFF
        raise AssertionError("no page of 4 KiB is expected")


def prepared(mode: EntryMode, cmdline: str = "", ram_above_4g: int = 0, pdpe1gb: bool = False) -> Memory:
    memory = Memory()
    prepare_memory(
        memory.write,
        image_for(mode),
        3 * GIB,
        ram_above_4g,
        4,
        2_400_000,
        BootFlags.IRQCHIP | BootFlags.PIT,
        cmdline,
        pdpe1gb=pdpe1gb,
    )
    return memory


def test_boot_information() -> None:
    memory = prepared(EntryMode.PROTECTED32, "rounds=3 µ", ram_above_4g=2 * GIB)
    info = memory.writes[0x6000]
    assert len(info) == 48
    assert info[:4] == b"VMMB"
    assert struct.unpack_from("<II", info) == (0x424D4D56, 1)
    assert struct.unpack_from("<QQ", info, 8) == (3 * GIB, 2 * GIB)
    assert struct.unpack_from("<IIII", info, 24) == (4, 2_400_000, 3, 11)
    assert struct.unpack_from("<Q", info, 40) == (0x6100,)
    assert memory.writes[0x6100] == b"rounds=3 \xc2\xb5\0"


def test_segments_are_written_without_their_zeros() -> None:
    memory = prepared(EntryMode.REAL16)
    assert memory.writes[0x8000] == CODE
    assert GPA not in memory.writes


def test_gdt() -> None:
    memory = prepared(EntryMode.PROTECTED32)
    # The values every flat-model kernel uses, accessed bits set.
    expected = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF)
    assert struct.unpack("<4Q", memory.writes[0x1000]) == expected


@pytest.mark.parametrize("mode", [EntryMode.REAL16, EntryMode.PROTECTED32])
def test_no_page_tables_without_paging(mode: EntryMode) -> None:
    assert sorted(prepared(mode, ram_above_4g=GIB).writes) == [0x1000, 0x6000, 0x6100, 0x8000]


def test_vmm_stays_within_its_own_areas() -> None:
    memory = prepared(EntryMode.LONG64, "x" * (layout.CMDLINE_SIZE - 1), ram_above_4g=64 * GIB)
    areas = layout.reserved_areas(64 * GIB, paging=True)
    del memory.writes[0x8000]
    for gpa, data in memory.writes.items():
        assert any(area.start <= gpa and gpa + len(data) <= area.end for area in areas)


def test_longest_command_line() -> None:
    line = "x" * 0xDFF
    memory = prepared(EntryMode.REAL16, line)
    assert memory.writes[0x6100] == line.encode() + b"\0"
    assert 0x6100 + len(memory.writes[0x6100]) <= 0x7000


@pytest.mark.parametrize(
    ("cmdline", "sentence"),
    [
        ("x" * 0xE00, "command line: 3584 bytes, but at most 3583 fit; shorten it"),
        ("a\0b", "command line: it contains a NUL byte at 1; leave that out"),
        ("ab\ud800", "command line: character 2 is not text; leave that out"),
    ],
    ids=["long", "nul", "surrogate"],
)
def test_bad_command_line_writes_nothing(cmdline: str, sentence: str) -> None:
    memory = Memory()
    with pytest.raises(ConfigError) as caught:
        prepare_memory(memory.write, image_for(EntryMode.LONG64), GIB, 0, 1, 1, 0, cmdline)
    assert str(caught.value) == sentence
    assert memory.writes == {}


def test_undecodable_argument_bytes_reach_the_guest() -> None:
    assert prepared(EntryMode.REAL16, "a\udcff").writes[0x6100] == b"a\xff\0"


@pytest.mark.parametrize("pdpe1gb", [False, True])
@pytest.mark.parametrize("above", [0, 4096, GIB - MIB, GIB, 5 * GIB + 6 * MIB, 61 * GIB])
def test_identity_map(above: int, pdpe1gb: bool) -> None:
    memory = prepared(EntryMode.LONG64, ram_above_4g=above, pdpe1gb=pdpe1gb)
    inside = [0, 0xFFF, MIB, 3 * GIB, 0xFEE0_0000, 4 * GIB - 1]
    page = GIB if pdpe1gb else 2 * MIB
    mapped_end = 4 * GIB + -(-above // page) * page
    for start in range(4 * GIB, 4 * GIB + above, GIB):
        inside += [start, min(start + GIB, 4 * GIB + above) - 1]
    for address in inside:
        assert memory.translate(address) == address
    for address in (mapped_end, 65 * GIB, 512 * GIB, 0xFFFF_8000_0000_0000):
        assert memory.translate(address) is None


def test_page_directories_go_downward() -> None:
    tables = dict(page_tables(3 * GIB, pdpe1gb=False))
    assert sorted(tables) == [
        *(0x9000 + n * PAGE_SIZE for n in range(6)),
        0x00EF_D000,
        0x00EF_E000,
        0x00EF_F000,
    ]
    assert struct.unpack_from("<Q", tables[0x00EF_F000]) == (4 * GIB | 0x83,)


@pytest.mark.parametrize(("pdpe1gb", "most"), [(False, 256), (True, 508)])
def test_more_ram_than_the_tables_map(pdpe1gb: bool, most: int) -> None:
    assert page_tables(most * GIB, pdpe1gb=pdpe1gb)
    sentence = f"above 4 GiB, but the boot page tables map {most} GiB of it; give the guest less memory"
    with pytest.raises(ConfigError, match=sentence):
        page_tables(most * GIB + 1, pdpe1gb=pdpe1gb)


# --- registers ----------------------------------------------------------------------------------------------


def fresh() -> tuple[kvm_regs, kvm_sregs]:
    """A vCPU after reset (SDM vol. 3, "Processor State After Reset")."""
    regs = kvm_regs(rip=0xFFF0, rdx=0x600, rflags=2)
    sregs = kvm_sregs(cr0=0x6000_0010, apic_base=0xFEE0_0900)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, kvm_segment(limit=0xFFFF, type=3, present=1, s=1))
    sregs.cs.base, sregs.cs.selector, sregs.cs.type = 0xFFFF_0000, 0xF000, 0xB
    sregs.tr = kvm_segment(limit=0xFFFF, type=0xB, present=1)
    sregs.ldt = kvm_segment(limit=0xFFFF, type=2, present=1)
    sregs.gdt.limit = sregs.idt.limit = 0xFFFF
    return regs, sregs


def entered(mode: EntryMode) -> tuple[kvm_regs, kvm_sregs]:
    regs, sregs = fresh()
    apply_boot_state(regs, sregs, image_for(mode))
    return regs, sregs


def fields(segment: kvm_segment) -> dict[str, int]:
    names = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "unusable")
    return {name: getattr(segment, name) for name in names}


FLAT = {"base": 0, "limit": 0xFFFF_FFFF, "present": 1, "dpl": 0, "s": 1, "g": 1, "unusable": 0}
DATA = FLAT | {"selector": 0x10, "type": 3, "db": 1, "l": 0}


@pytest.mark.parametrize("mode", list(EntryMode))
def test_general_registers(mode: EntryMode) -> None:
    regs, sregs = entered(mode)
    assert (regs.rip, regs.rsp, regs.rflags) == (0x8000, 0x7000, 2)
    assert (regs.rdi, regs.rbx) == ((0x6000, 0) if mode is EntryMode.LONG64 else (0, 0x6000))
    assert regs.rdx == 0x600
    assert sregs.apic_base == 0xFEE0_0900
    assert fields(sregs.tr) == fields(fresh()[1].tr)


def test_real_mode() -> None:
    _, sregs = entered(EntryMode.REAL16)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        assert (segment.base, segment.selector, segment.limit, segment.db) == (0, 0, 0xFFFF, 0)
    assert (sregs.cs.type, sregs.ss.type) == (0xB, 3)
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x10, 0, 0, 0)
    assert (sregs.idt.base, sregs.idt.limit) == (0, 0xFFFF)


@pytest.mark.parametrize(
    ("mode", "code", "control"),
    [
        (EntryMode.PROTECTED32, {"selector": 0x08, "type": 0xB, "db": 1, "l": 0}, (0x11, 0, 0, 0)),
        (
            EntryMode.LONG64,
            {"selector": 0x18, "type": 0xB, "db": 0, "l": 1},
            (0x8000_0011, 0x9000, 0x20, 0x500),
        ),
    ],
    ids=["32", "64"],
)
def test_flat_modes(mode: EntryMode, code: dict[str, int], control: tuple[int, ...]) -> None:
    _, sregs = entered(mode)
    assert fields(sregs.cs) == FLAT | code
    for name in ("ds", "es", "fs", "gs", "ss"):
        assert fields(getattr(sregs, name)) == DATA
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == control
    assert (sregs.gdt.base, sregs.gdt.limit) == (0x1000, 31)
    assert (sregs.idt.base, sregs.idt.limit) == (0, 0)


@pytest.mark.parametrize("mode", [EntryMode.PROTECTED32, EntryMode.LONG64])
def test_segments_do_not_depend_on_what_they_were(mode: EntryMode) -> None:
    _, expected = entered(mode)
    regs, sregs = fresh()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        values = {"base": 1 << 40, "limit": 7, "selector": 0x1000, "dpl": 3, "l": 1, "unusable": 1}
        setattr(sregs, name, kvm_segment(**values))
    apply_boot_state(regs, sregs, image_for(mode))
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        assert fields(getattr(sregs, name)) == fields(getattr(expected, name))
