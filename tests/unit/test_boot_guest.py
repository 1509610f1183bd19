"""What a real vCPU finds at its entry point, told by the guest itself through one port."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.unit.elfwriter import Part, note, notes, write_elf
from vmm.boot.cpuid import cpuid_table, guest_cpuid, offers_1gib_pages
from vmm.boot.image import EntryMode, parse_image
from vmm.boot.x86 import apply_boot_state, prepare_memory
from vmm.fds import FdStore
from vmm.kvm import Exit, System, Vcpu, abi
from vmm.memory.guest import GuestMemory
from vmm.units import GIB, MIB

pytestmark = pytest.mark.kvm

PORT = 0xF4
TSC_KHZ = 2_400_000
OUT = b"\xe7" + bytes([PORT])  # out PORT, eax (ax in 16-bit code)
HLT = b"\xf4"
AT = {EntryMode.REAL16: 0x7C00, EntryMode.PROTECTED32: MIB, EntryMode.LONG64: MIB}


@contextmanager
def booted(mode: EntryMode, code: bytes, size: int = 16 * MIB, cpus: int = 1) -> Iterator[Vcpu]:
    """The first vCPU of a machine at the entry point of an image that holds `code`."""
    with ExitStack() as stack:
        fds = FdStore()
        stack.callback(fds.close)
        memory = GuestMemory.map(fds, size)
        stack.callback(memory.close)
        ram = [(region.gpa, region.size) for region in memory.regions]
        data = write_elf(
            [Part(AT[mode], code), notes(note(1, struct.pack("<I", mode.value)))],
            bits=64 if mode is EntryMode.LONG64 else 32,
        )
        image = parse_image(Path("guest.elf"), data, ram=ram)
        system = stack.enter_context(System())
        vm = stack.enter_context(system.create_vm())
        vm.set_tss_address()
        vm.set_identity_map()
        vm.create_irqchip()
        for slot, region in enumerate(memory.regions):
            vm.set_memory(slot, region.gpa, region.size, region.hva, region.fd, 0)
        vcpu = stack.enter_context(vm.create_vcpu(0))
        supported = system.supported_cpuid()
        cpuid = guest_cpuid(supported.entries[: supported.nent], 0, cpus, tsc_deadline=True, tsc_khz=TSC_KHZ)
        vcpu.set_cpuid(cpuid_table(cpuid))
        below, above = ram[0][1], sum(length for _, length in ram[1:])
        prepare_memory(
            memory.write, image, below, above, cpus, TSC_KHZ, 1, "cmdline", pdpe1gb=offers_1gib_pages(cpuid)
        )
        regs, sregs = abi.kvm_regs(), abi.kvm_sregs()
        vcpu.get_regs(regs)
        vcpu.get_sregs(sregs)
        apply_boot_state(regs, sregs, image)
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)
        yield vcpu


def said(vcpu: Vcpu) -> int:
    """The next value that the guest writes to PORT."""
    assert vcpu.run()
    page = vcpu.run_page
    assert page.exit_reason == Exit.IO
    assert (page.io.port, page.io.count) == (PORT, 1)
    return int.from_bytes(vcpu.io_data(page.io.data_offset, page.io.size), "little")


BOOT_INFO_MAGIC = 0x424D4D56

MAGIC = {
    EntryMode.REAL16: b"\x66\x8b\x07" + b"\x66" + OUT,  # mov eax, [bx]
    EntryMode.PROTECTED32: b"\x8b\x03" + OUT,  # mov eax, [ebx]
    EntryMode.LONG64: b"\x8b\x07" + OUT,  # mov eax, [rdi]
}
STACK = {
    EntryMode.REAL16: b"\x9c\x9c\x58\x89\xe0" + OUT,  # pushf; pushf; pop ax; mov ax, sp
    EntryMode.PROTECTED32: b"\x9c\x9c\x58\x89\xe0" + OUT,
    EntryMode.LONG64: b"\x9c\x9c\x58\x89\xe0" + OUT,
}
WORD = {EntryMode.REAL16: 2, EntryMode.PROTECTED32: 4, EntryMode.LONG64: 8}


@pytest.mark.parametrize("mode", list(EntryMode))
def test_the_guest_reads_its_boot_information_and_has_a_stack(mode: EntryMode) -> None:
    with booted(mode, MAGIC[mode] + STACK[mode] + HLT) as vcpu:
        assert said(vcpu) == BOOT_INFO_MAGIC
        assert said(vcpu) == 0x7000 - WORD[mode]


@pytest.mark.parametrize("mode", [EntryMode.PROTECTED32, EntryMode.LONG64])
def test_segments_reload_from_the_gdt(mode: EntryMode) -> None:
    rex = b"\x48" if mode is EntryMode.LONG64 else b""
    code = b"\x8c\xd8\x8e\xd8\x8e\xd0" + OUT  # mov eax, ds; mov ds, eax; mov ss, eax
    code += b"\x8c\xc8\x50"  # mov eax, cs; push eax
    code += b"\xe8\x00\x00\x00\x00\x58"  # call .+5; pop eax: where the pop is
    code += rex + b"\x83\xc0" + bytes([6 + 2 * len(rex)])  # add eax, from the pop to behind the retf
    code += b"\x50" + rex + b"\xcb"  # push eax; retf
    code += b"\x8c\xc8" + OUT  # mov eax, cs
    with booted(mode, code) as vcpu:
        assert said(vcpu) == 0x10
        assert said(vcpu) == (0x18 if mode is EntryMode.LONG64 else 0x08)


def test_ram_above_4_gib_is_mapped() -> None:
    last = 4 * GIB + 2 * GIB - 4
    code = b"\xb8\x78\x56\x34\x12"  # mov eax, 0x12345678
    code += b"\xa3" + struct.pack("<Q", last) + b"\x31\xc0"  # mov [last], eax; xor eax, eax
    code += b"\xa1" + struct.pack("<Q", last) + OUT  # mov eax, [last]
    with booted(EntryMode.LONG64, code, size=5 * GIB) as vcpu:
        assert said(vcpu) == 0x12345678


def test_the_guest_sees_its_own_topology_and_clock() -> None:
    def ask(function: int, index: int, register: bytes) -> bytes:
        return (
            b"\xb8"
            + struct.pack("<I", function)
            + b"\xb9"
            + struct.pack("<I", index)
            + b"\x0f\xa2"
            + register
            + OUT
        )

    eax, ebx, ecx = b"", b"\x89\xd8", b"\x89\xc8"
    code = (
        ask(1, 0, ebx)
        + ask(1, 0, ecx)
        + ask(0xB, 1, ebx)
        + ask(0x4000_0000, 0, eax)
        + ask(0x4000_0010, 0, eax)
    )
    with booted(EntryMode.LONG64, code, cpus=3) as vcpu:
        assert said(vcpu) >> 16 == 0x0004  # APIC id 0, ids for 4
        assert said(vcpu) & 1 << 31
        assert said(vcpu) == 3
        assert said(vcpu) >= 0x4000_0010
        assert said(vcpu) == TSC_KHZ


@pytest.mark.parametrize("mode", [EntryMode.PROTECTED32, EntryMode.LONG64])
def test_an_early_exception_is_a_triple_fault(mode: EntryMode) -> None:
    with booted(mode, b"\x0f\x0b") as vcpu:  # ud2
        assert vcpu.run()
        assert vcpu.run_page.exit_reason == Exit.SHUTDOWN
