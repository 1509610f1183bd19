"""Each check of sentinel notices that what it guards was damaged, and says what and where."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.guests.conftest import Run
from tests.guests.running import DeviceModel, RunningGuest
from vmm.kvm import MpState, abi, sized
from vmm.report.results import HEADER_SIZE, CpuLayout

pytestmark = pytest.mark.kvm

CPU1 = 0x200000 + HEADER_SIZE + ctypes.sizeof(CpuLayout)
LVT_TIMER, INITIAL_COUNT, LDR, SPURIOUS = 0x320, 0x380, 0xD0, 0xF0
LVT_PERIODIC = 1 << 17
SLOW_COUNT = 80_000_000  # bus cycles of 1 ns: four periods of the timer check
LVT_MASKED, APIC_ENABLED = 1 << 16, 1 << 8
TSC_DEADLINE, PAT, STAR, FIXED_MTRR = 0x6E0, 0x277, 0xC0000081, 0x250
IPI_VECTOR, SHADOW_VECTOR, MSI_ADDRESS = 0x41, 0x42, 0xFEE00000
WALL_CLOCK = 0x4B564D00
RFLAGS_TF = 1 << 8
MTRR_NUMBER = 25


def set_msr(guest: RunningGuest, msr: int, value: int) -> None:
    block = sized(abi.kvm_msrs, 1)(nmsrs=1)
    block.entries[0].index, block.entries[0].data = msr, value
    assert guest.vcpus[0].set_msrs(block) == 1


def change_lapic(guest: RunningGuest, register: int, change: Callable[[int], int]) -> None:
    state = abi.kvm_lapic_state()
    guest.vcpus[0].get_lapic(state)
    value = change(int.from_bytes(bytes(state.regs[register : register + 4]), "little"))
    state.regs[register : register + 4] = list(value.to_bytes(4, "little"))
    guest.vcpus[0].set_lapic(state)


def change_chip(guest: RunningGuest, chip: int, change: Callable[[abi.Chip], None]) -> None:
    state = abi.kvm_irqchip(chip_id=chip)
    guest.vm.get_irqchip(chip, state)
    change(state.chip)
    guest.vm.set_irqchip(state)


def hold_the_other(guest: RunningGuest) -> None:
    guest.held = (1,)


def set_the_other_ahead(guest: RunningGuest) -> None:
    guest.held = (1,)
    guest.add(CPU1 + CpuLayout.last_tsc.offset, 1 << 40)


def send_an_ipi_too_many(guest: RunningGuest) -> None:
    """While none is under way: the LAPIC would take two for one."""
    received = guest.symbol("check_ipi.c", "ipis")
    guest.stop_when(lambda: guest.load(received) == guest.load(received + 8))
    guest.vm.signal_msi(MSI_ADDRESS, IPI_VECTOR)


def lose_ipis(guest: RunningGuest) -> None:
    change_lapic(guest, SPURIOUS, lambda value: value & ~APIC_ENABLED)


def mask_irq0(guest: RunningGuest) -> None:
    change_chip(guest, 0, lambda chip: setattr(chip.pic, "imr", chip.pic.imr | 1))


def change_pit_mode(guest: RunningGuest) -> None:
    state = abi.kvm_pit_state2()
    guest.vm.get_pit2(state)
    state.channels[0].mode = 3
    guest.vm.set_pit2(state)


def change_pit_count(guest: RunningGuest, factor: float) -> None:
    state = abi.kvm_pit_state2()
    guest.vm.get_pit2(state)
    state.channels[0].count = int(state.channels[0].count * factor)
    guest.vm.set_pit2(state)


def lose_timer(guest: RunningGuest) -> None:
    change_lapic(guest, LVT_TIMER, lambda value: value | LVT_MASKED)


def slow_down_periodic_timer(guest: RunningGuest) -> None:
    """While it is periodic; each of its interrupts is in time then, but they are too few."""
    state = abi.kvm_lapic_state()

    def periodic() -> bool:
        guest.vcpus[0].get_lapic(state)
        return bool(int.from_bytes(bytes(state.regs[LVT_TIMER : LVT_TIMER + 4]), "little") & LVT_PERIODIC)

    guest.stop_when(periodic)
    change_lapic(guest, INITIAL_COUNT, lambda _: SLOW_COUNT)


def wake_without_interrupt(guest: RunningGuest) -> None:
    state = abi.kvm_mp_state()

    def halted() -> bool:
        guest.vcpus[0].get_mp_state(state)
        return bool(state.mp_state == MpState.HALTED)

    guest.stop_when(halted)
    state.mp_state = MpState.RUNNABLE
    guest.vcpus[0].set_mp_state(state)


def change_debug_register(guest: RunningGuest) -> None:
    state = abi.kvm_debugregs()
    guest.vcpus[0].get_debugregs(state)
    state.db[2] ^= 0x1000
    guest.vcpus[0].set_debugregs(state)


def change_dr7(guest: RunningGuest) -> None:
    state = abi.kvm_debugregs()
    guest.vcpus[0].get_debugregs(state)
    state.dr7 = 0x400
    guest.vcpus[0].set_debugregs(state)


def set_clock_back(guest: RunningGuest) -> None:
    now = abi.kvm_clock_data()
    guest.vm.get_clock(now)
    guest.vm.set_clock(abi.kvm_clock_data(clock=max(1, now.clock - 100_000_000)))


def write_wall_clock(guest: RunningGuest) -> None:
    """Have KVM write the time once more, where the guest has something else by now."""
    set_msr(guest, WALL_CLOCK, guest.symbol("check_kvmclock.c", "wall_clock"))


def change_frames(guest: RunningGuest) -> None:
    guest.add(guest.symbol("check_paging.c", "frames"), 1)
    guest.add(guest.symbol("check_paging.c", "frames") + 4096, 1)


def double_a_byte(guest: RunningGuest) -> None:
    assert guest.device is not None
    guest.device.port_out(DeviceModel.STREAM, 0)


def lose_a_read(guest: RunningGuest) -> None:
    assert guest.device is not None
    guest.device.reads += 1


def double_a_store(guest: RunningGuest) -> None:
    assert guest.device is not None
    guest.device.latch_writes += 1


def double_a_posted_write(guest: RunningGuest) -> None:
    assert guest.device is not None
    guest.device.posted += 1


def change_a_posted_write(guest: RunningGuest) -> None:
    assert guest.device is not None
    guest.device.posted_sum ^= 1


def double_a_read(guest: RunningGuest) -> None:
    assert guest.device is not None
    guest.device.register_reads += 1


def lose_an_nmi(guest: RunningGuest) -> None:
    """One more is said to have been sent than has been."""
    guest.add(guest.symbol("check_nmi.c", "expected"), 1)


def change_port(guest: RunningGuest, port: int) -> None:
    guest.registers[port] ^= 2


def change_control_word(guest: RunningGuest) -> None:
    state = abi.kvm_fpu()
    guest.vcpus[0].get_fpu(state)
    state.fcw = 0x37F
    guest.vcpus[0].set_fpu(state)


def change_mxcsr(guest: RunningGuest) -> None:
    state = abi.kvm_xsave()
    guest.vcpus[0].get_xsave(state)
    state.region[24 // 4] = 0x1F80
    guest.vcpus[0].set_xsave(state)


def change_x87_stack(guest: RunningGuest) -> None:
    state = abi.kvm_fpu()
    guest.vcpus[0].get_fpu(state)
    state.fpr[5][0] ^= 1
    guest.vcpus[0].set_fpu(state)


def change_xmm(guest: RunningGuest) -> None:
    state = abi.kvm_fpu()
    guest.vcpus[0].get_fpu(state)
    for register in state.xmm:
        register[9] ^= 1
    guest.vcpus[0].set_fpu(state)


def change_r15(guest: RunningGuest) -> None:
    """While nothing but registers_hold() relies on it."""
    start = guest.symbol("registers.S", "registers_hold")
    regs = abi.kvm_regs()

    def counting_down() -> bool:
        guest.vcpus[0].get_regs(regs)
        return start < regs.rip < start + 0x200 and regs.rcx in range(1, 9) and regs.rsi - regs.rbp == 0x4444

    guest.stop_when(counting_down)
    regs.r15 ^= 1 << 40
    guest.vcpus[0].set_regs(regs)


def change_cr2(guest: RunningGuest) -> None:
    state = abi.kvm_sregs()
    guest.vcpus[0].get_sregs(state)
    state.cr2 ^= 0x1000
    guest.vcpus[0].set_sregs(state)


def change_task_priority(guest: RunningGuest) -> None:
    change_lapic(guest, 0x80, lambda value: value ^ 0x10)


def change_idt_limit(guest: RunningGuest) -> None:
    state = abi.kvm_sregs()
    guest.vcpus[0].get_sregs(state)
    state.idt.limit += 16
    guest.vcpus[0].set_sregs(state)


def change_what_cpuid_said(guest: RunningGuest) -> None:
    """KVM refuses other CPUID entries once a vCPU has run, so what the guest remembers is changed."""
    for leaf in range(16):
        guest.add(guest.symbol("check_cpuid.c", "held") + 8 + 8 * leaf, 1)


def step_once_more(guest: RunningGuest) -> None:
    """An exception that nothing in the guest has raised."""
    regs = abi.kvm_regs()
    guest.vcpus[0].get_regs(regs)
    regs.rflags |= RFLAGS_TF
    guest.vcpus[0].set_regs(regs)


def send_what_is_to_wait(guest: RunningGuest) -> None:
    """Once more, while none waits: the LAPIC would take two for one."""
    count = guest.symbol("check_shadow.c", "interrupts")
    guest.stop_when(lambda: guest.load(count) == guest.load(count + 16))
    guest.vm.signal_msi(MSI_ADDRESS, SHADOW_VECTOR)


def mask_irq13(guest: RunningGuest) -> None:
    change_chip(guest, 1, lambda chip: setattr(chip.pic, "imr", chip.pic.imr ^ 0x20))


def change_elcr(guest: RunningGuest) -> None:
    change_chip(guest, 1, lambda chip: setattr(chip.pic, "elcr", 0))


def change_redirections(guest: RunningGuest) -> None:
    def clear(chip: abi.Chip) -> None:
        for pin in range(24):
            chip.ioapic.redirtbl[pin].bits = LVT_MASKED

    change_chip(guest, 2, clear)


@dataclass(frozen=True)
class Damage:
    number: int
    checks: str
    change: Callable[[RunningGuest], None]
    where: int | None = None
    cpus: int = 1


DAMAGES = {
    "a vCPU stands still": Damage(4, "cpus", hold_the_other, where=1, cpus=2),
    "a TSC ahead": Damage(5, "tscsync", set_the_other_ahead, where=1, cpus=2),
    "an IPI too many": Damage(6, "ipi", send_an_ipi_too_many),
    "IPIs lost": Damage(6, "ipi", lose_ipis),
    "IRQ 0 masked": Damage(7, "pit", mask_irq0, where=1),
    "PIT mode": Damage(7, "pit", change_pit_mode, where=2),
    "PIT faster": Damage(7, "pit", lambda guest: change_pit_count(guest, 1 / 16), where=0),
    "PIT slower": Damage(7, "pit", lambda guest: change_pit_count(guest, 2.5), where=4),
    "LAPIC timer masked": Damage(8, "timer", lose_timer),
    "LAPIC timer slower": Damage(8, "timer", slow_down_periodic_timer, where=3),
    "MP state": Damage(9, "timer,hlt", wake_without_interrupt),
    "STAR": Damage(10, "msr", lambda guest: set_msr(guest, STAR, 0), where=STAR),
    "PAT": Damage(10, "msr", lambda guest: set_msr(guest, PAT, 0x0007040600070406), where=PAT),
    "DR2": Damage(11, "debug", change_debug_register, where=2),
    "DR7": Damage(11, "debug", change_dr7, where=7),
    "kvmclock": Damage(12, "kvmclock", set_clock_back, where=0),
    "wall clock lost": Damage(12, "kvmclock", lambda guest: set_msr(guest, WALL_CLOCK, 0), where=4),
    "wall clock written": Damage(12, "kvmclock", write_wall_clock, where=5),
    "frames": Damage(13, "paging", change_frames),
    "a byte written twice": Damage(14, "pio", double_a_byte, where=1),
    "a byte read and lost": Damage(14, "pio", lose_a_read, where=0),
    "a store done twice": Damage(15, "mmio", double_a_store, where=8),
    "a read done twice": Damage(15, "mmio", double_a_read, where=4),
    "a posted write done twice": Damage(28, "posted", double_a_posted_write, where=0),
    "a posted write changed": Damage(28, "posted", change_a_posted_write, where=1),
    "an NMI lost": Damage(26, "nmi", lose_an_nmi, cpus=2),
    "an exception too many": Damage(29, "exception", step_once_more),
    "an interrupt too many": Damage(30, "shadow", send_what_is_to_wait, where=0),
    "an interrupt lost": Damage(30, "shadow", lose_ipis, where=0),
    "scratch register": Damage(27, "ports", lambda guest: change_port(guest, 0x3FF), where=0x3FF),
    "modem control": Damage(27, "ports", lambda guest: change_port(guest, 0x3FC), where=0x3FC),
    "reset control": Damage(27, "ports", lambda guest: change_port(guest, 0xCF9), where=0xCF9),
    "x87 control word": Damage(16, "x87", change_control_word, where=0),
    "MXCSR": Damage(16, "x87", change_mxcsr, where=24),
    "x87 stack": Damage(16, "x87", change_x87_stack, where=32 + 5 * 16),
    "XMM": Damage(17, "xmm", change_xmm),
    "R15": Damage(19, "registers", change_r15, where=0),
    "CR2": Damage(20, "control", change_cr2, where=2),
    "CR8": Damage(20, "control", change_task_priority, where=8),
    "IDTR": Damage(20, "control", change_idt_limit, where=11),
    "CPUID": Damage(21, "cpuid", change_what_cpuid_said),
    "LDR": Damage(22, "lapic", lambda guest: change_lapic(guest, LDR, lambda ldr: ldr ^ 1 << 24), where=LDR),
    "PIC mask": Damage(23, "pic", mask_irq13, where=0xA1),
    "ELCR": Damage(23, "pic", change_elcr, where=0x4D1),
    "redirection entries": Damage(24, "ioapic", change_redirections),
    "MTRR": Damage(MTRR_NUMBER, "mtrr", lambda guest: set_msr(guest, FIXED_MTRR, 0), where=FIXED_MTRR),
}


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in DAMAGES.items()])
def test_damage_is_noticed(run: Run, damage: Damage) -> None:
    guest = run("sentinel", f"checks={damage.checks} stall_ms=300 gap_us=5000", cpus=damage.cpus)
    guest.wait_for(
        lambda results: (
            all(
                check.count > 30 or check.id in (7, 8, 9)
                for check in results.checks
                if check.id == damage.number
            )
            and results.cpus[0].turns > 200
        )
    )
    assert guest.status_after(lambda: damage.change(guest)) == damage.number << 1 | 1
    violation = guest.results().violation
    assert violation is not None
    assert violation.check == damage.number
    if damage.where is not None:
        assert violation.where == damage.where
