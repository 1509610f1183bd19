"""All state of a vCPU and a VM, moved to another VM: what comes out of that one is what went in."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from typing import Any

import pytest

from tests.kvm.real_mode import Machine, machine_on, machine_with, ram_of, with_chips
from vmm.kvm import Exit, IoctlError, MpState, abi, sized

pytestmark = pytest.mark.kvm

HLT = b"\xf4"
# again: inc ax; mov dx, 0x3f8; out dx, ax; jmp again
COUNTER = b"\x40\xba\xf8\x03\xef\xeb\xf9"
# Intel SDM volume 1, 13.4: 32-bit words of the XSAVE area.
MXCSR, XMM0, XSTATE_BV = 6, 40, 128
MSR_KERNEL_GS_BASE = 0xC000_0102
MSR_LSTAR = 0xC000_0082


def vcpu_state(machine: Machine) -> dict[str, Any]:
    """A structure for each part that is restored bit for bit, filled by the getter of that name."""
    state: dict[str, Any] = {
        "mp_state": abi.kvm_mp_state(),
        "regs": abi.kvm_regs(),
        "sregs": abi.kvm_sregs(),
        "sregs2": abi.kvm_sregs2(),
        "fpu": abi.kvm_fpu(),
        "xsave": abi.kvm_xsave(),
        "xcrs": abi.kvm_xcrs(),
        "debugregs": abi.kvm_debugregs(),
        "lapic": abi.kvm_lapic_state(),
        "events": abi.kvm_vcpu_events(),
    }
    for name, structure in state.items():
        getattr(machine.vcpu, f"get_{name}")(structure)
    return state


def load(machine: Machine, state: dict[str, Any]) -> None:
    """In the order that the dependencies ask for: events after regs, lapic after sregs, mp_state last."""
    order = ("sregs", "sregs2", "regs", "xcrs", "xsave", "fpu", "debugregs", "lapic", "events", "mp_state")
    assert set(order) == set(state)
    for name in order:
        getattr(machine.vcpu, f"set_{name}")(state[name])


def disturb(machine: Machine) -> None:
    """Values that no fresh vCPU has, in every part."""
    vcpu = machine.vcpu
    names = [name for name, *_ in abi.kvm_regs._fields_]
    regs = abi.kvm_regs(**{name: 0x1111_0000_0000 + number for number, name in enumerate(names)})
    regs.rip, regs.rflags = 0x4321, 0x202
    vcpu.set_regs(regs)
    sregs = abi.kvm_sregs()
    vcpu.get_sregs(sregs)
    sregs.cr2, sregs.cr8, sregs.gdt.base, sregs.idt.limit = 0xABCDE000, 5, 0x7000, 0x3FF
    sregs.fs.base = 0x1230
    vcpu.set_sregs(sregs)
    xsave = abi.kvm_xsave()
    vcpu.get_xsave(xsave)
    xsave.region[XSTATE_BV] |= 3  # x87 and SSE are in use, or KVM reports them as after reset
    xsave.region[MXCSR] = 0x1FA0
    for word in range(64):
        xsave.region[XMM0 + word] = 0x0101_0101 * word
    vcpu.set_xsave(xsave)
    debugregs = abi.kvm_debugregs()
    vcpu.get_debugregs(debugregs)
    debugregs.db[1] = 0x7654
    vcpu.set_debugregs(debugregs)
    lapic = abi.kvm_lapic_state()
    vcpu.get_lapic(lapic)
    lapic.regs[0xF1] = 1  # spurious-interrupt vector register, bit 8: APIC enabled
    vcpu.set_lapic(lapic)
    vcpu.nmi()  # queued, and seen in events as pending


def test_vcpu_state_round_trip() -> None:
    with ram_of(HLT) as ram, machine_on(ram, with_chips) as old, machine_on(ram, with_chips) as new:
        fresh = vcpu_state(new)
        disturb(old)
        saved = vcpu_state(old)
        expected_to_differ = set(saved) - {"xcrs", "mp_state"}
        differing = {name for name in saved if bytes(fresh[name]) != bytes(saved[name])}
        assert expected_to_differ <= differing
        load(new, saved)
        loaded = vcpu_state(new)
        assert [name for name in saved if bytes(saved[name]) != bytes(loaded[name])] == []


def test_the_kernel_writes_into_the_callers_own_mapping() -> None:
    """As state in a memfd: no copy between the mapping and the ioctl."""
    memfd = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, mmap.PAGESIZE)
        with machine_with(HLT) as machine:
            regs = abi.kvm_regs.from_buffer(mmap.mmap(memfd, mmap.PAGESIZE), 64)
            machine.vcpu.set_regs(abi.kvm_regs(rbx=0x1234_5678_9ABC, rflags=2))
            machine.vcpu.get_regs(regs)
        stored = os.pread(memfd, ctypes.sizeof(abi.kvm_regs), 64)
        assert bytes(regs) == stored
        assert stored[8:16] == (0x1234_5678_9ABC).to_bytes(8, "little")
    finally:
        os.close(memfd)


def test_a_guest_goes_on_in_another_vm() -> None:
    """Its counter neither skips nor repeats, though the first VM stops between an exit and its completion."""
    seen: list[int] = []

    def count(machine: Machine, turns: int) -> None:
        for _ in range(turns):
            assert machine.next_exit() == Exit.IO
            seen.append(int.from_bytes(machine.io_data(), "little"))

    with ram_of(COUNTER) as ram:
        with machine_on(ram) as old:
            old.enter_at()
            count(old, 5)
            old.vcpu.immediate_exit = True
            assert not old.vcpu.run()
            regs, sregs = abi.kvm_regs(), abi.kvm_sregs()
            old.vcpu.get_regs(regs)
            old.vcpu.get_sregs(sregs)
        with machine_on(ram) as new:
            new.vcpu.set_sregs(sregs)
            new.vcpu.set_regs(regs)
            count(new, 5)
    assert seen == list(range(1, 11))


@pytest.mark.parametrize(
    "chip_id", [abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC]
)
def test_irqchip_round_trip(chip_id: int) -> None:
    with ram_of(HLT) as ram, machine_on(ram, with_chips) as old, machine_on(ram, with_chips) as new:
        saved, loaded, fresh = abi.kvm_irqchip(), abi.kvm_irqchip(), abi.kvm_irqchip()
        old.vm.get_irqchip(chip_id, saved)
        if chip_id == abi.KVM_IRQCHIP_IOAPIC:
            saved.chip.ioapic.redirtbl[5].fields.vector = 0x45
            saved.chip.ioapic.id = 3
        else:
            saved.chip.pic.irq_base = 0x20
            saved.chip.pic.imr = 0xAA
        new.vm.get_irqchip(chip_id, fresh)
        new.vm.set_irqchip(saved)
        new.vm.get_irqchip(chip_id, loaded)
        assert bytes(loaded) == bytes(saved)
        assert bytes(loaded) != bytes(fresh)
        assert loaded.chip_id == chip_id


def test_pit_round_trip() -> None:
    with ram_of(HLT) as ram, machine_on(ram, with_chips) as old, machine_on(ram, with_chips) as new:
        saved, loaded = abi.kvm_pit_state2(), abi.kvm_pit_state2()
        old.vm.get_pit2(saved)
        saved.channels[2].count, saved.channels[2].mode, saved.channels[2].gate = 0x1234, 3, 1
        new.vm.set_pit2(saved)
        new.vm.get_pit2(loaded)
        for channel in (*saved.channels, *loaded.channels):
            channel.count_load_time = 0  # when that VM began to count
        assert bytes(loaded) == bytes(saved)
        assert loaded.channels[2].count == 0x1234


def test_msrs_say_how_many_were_processed() -> None:
    with ram_of(HLT) as ram, machine_on(ram) as machine:
        machine.vcpu.set_cpuid(machine.system.supported_cpuid())
        block = sized(abi.kvm_msrs, 3)(nmsrs=3)
        block.entries[0] = abi.kvm_msr_entry(index=MSR_KERNEL_GS_BASE, data=0x1234_5000)
        block.entries[1] = abi.kvm_msr_entry(index=MSR_LSTAR, data=0x6789_A000)
        block.entries[2] = abi.kvm_msr_entry(index=0xDEAD_BEEF)
        assert machine.vcpu.set_msrs(block) == 2
        for entry in block.entries:
            entry.data = 0
        assert machine.vcpu.get_msrs(block) == 2
        assert [entry.data for entry in block.entries] == [0x1234_5000, 0x6789_A000, 0]


@pytest.mark.parametrize("missing", [None, 100, 255, 699])
def test_any_number_of_msrs(missing: int | None) -> None:
    """KVM itself takes fewer than 256 at once."""
    with ram_of(HLT) as ram, machine_on(ram) as machine:
        machine.vcpu.set_cpuid(machine.system.supported_cpuid())
        block = sized(abi.kvm_msrs, 700)(nmsrs=700)
        for at, entry in enumerate(block.entries):
            entry.index = MSR_LSTAR if at != missing else 0xDEAD_BEEF
            entry.data = 0x1000 + at
        processed = 700 if missing is None else missing
        assert machine.vcpu.set_msrs(block) == processed
        assert machine.vcpu.get_msrs(block) == processed
        assert {entry.data for entry in block.entries[:processed]} == {0x1000 + processed - 1}
        assert [entry.data for entry in block.entries[processed:]] == [
            0x1000 + at for at in range(processed, 700)
        ]


def test_cpuid_round_trip() -> None:
    with ram_of(HLT) as ram, machine_on(ram) as machine:
        given = machine.system.supported_cpuid()
        machine.vcpu.set_cpuid(given)
        kept = sized(abi.kvm_cpuid2, 256)(nent=256)
        machine.vcpu.get_cpuid(kept)
        assert kept.nent == given.nent
        leaves = [(entry.function, entry.index) for entry in kept.entries[: kept.nent]]
        assert leaves == [(entry.function, entry.index) for entry in given.entries[: given.nent]]


def test_tsc_offset_is_moved_exactly() -> None:
    with ram_of(HLT) as ram, machine_on(ram) as machine:
        if machine.vcpu.tsc_offset == 0:
            pytest.skip("this KVM gives every guest the host's own TSC: a new vCPU's does not start at 0")
        for offset in (0, 0x1234_5678_9ABC, 2**64 - 0x1_0000_0000):
            machine.vcpu.tsc_offset = offset
            assert machine.vcpu.tsc_offset == offset


def test_tsc_attributes_and_frequency() -> None:
    with ram_of(HLT) as ram, machine_on(ram) as machine:
        assert machine.vcpu.tsc_khz > 0
        machine.vcpu.set_tsc_khz(machine.vcpu.tsc_khz)
        assert machine.vcpu.port.has_attr(machine.vcpu.fd, abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET)
        assert not machine.vcpu.port.has_attr(machine.vcpu.fd, abi.KVM_VCPU_TSC_CTRL, 1)


def test_clock_goes_on_from_where_it_was_set() -> None:
    second = 1_000_000_000
    with ram_of(HLT) as ram, machine_on(ram) as machine:
        clock = abi.kvm_clock_data()
        started = time.monotonic_ns()
        machine.vm.set_clock(abi.kvm_clock_data(clock=1000 * second))
        machine.vm.get_clock(clock)
        elapsed = time.monotonic_ns() - started
        assert 1000 * second <= clock.clock <= 1000 * second + elapsed + second // 100


def test_sipi_state() -> None:
    """With an in-kernel irqchip only vCPU 0 is runnable at first."""
    with ram_of(HLT) as ram, machine_on(ram, with_chips) as machine, machine.vm.create_vcpu(1) as second:
        state = abi.kvm_mp_state()
        machine.vcpu.get_mp_state(state)
        assert state.mp_state == MpState.RUNNABLE
        second.get_mp_state(state)
        assert state.mp_state == MpState.UNINITIALIZED
        second.immediate_exit = True
        assert not second.run()


def test_xsave_has_the_size_that_the_vm_says() -> None:
    with ram_of(HLT) as ram, machine_on(ram) as machine:
        size = machine.vm.xsave_size
        plain = abi.kvm_xsave()
        extended = sized(abi.kvm_xsave, (size - ctypes.sizeof(plain)) // 4 + 1)()  # over 4096: KVM_GET_XSAVE2
        machine.vcpu.get_xsave(plain)
        machine.vcpu.get_xsave(extended)
        assert bytes(extended)[: ctypes.sizeof(plain)] == bytes(plain)
        machine.vcpu.set_xsave(extended)


def test_state_of_a_chip_that_is_not_there() -> None:
    with machine_with(HLT) as machine, pytest.raises(IoctlError, match="KVM_GET_LAPIC") as caught:
        machine.vcpu.get_lapic(abi.kvm_lapic_state())
    assert caught.value.errno == errno.EINVAL


def test_statistics_fds() -> None:
    with machine_with(HLT) as machine:
        for create in (machine.vm.stats_fd, machine.vcpu.stats_fd):
            fd = create()
            try:
                assert not os.get_inheritable(fd)
                header = abi.kvm_stats_header.from_buffer_copy(
                    os.read(fd, ctypes.sizeof(abi.kvm_stats_header))
                )
                assert header.num_desc > 0
                descriptor = sized(abi.kvm_stats_desc, header.name_size)
                first = descriptor.from_buffer_copy(
                    os.pread(fd, ctypes.sizeof(descriptor), header.desc_offset)
                )
                assert first.name.decode().isidentifier()
            finally:
                os.close(fd)
