"""A local APIC in the state memfd, and the time that its timer counts meanwhile.

KVM_GET_LAPIC says how much a one-shot or periodic timer has left, KVM_SET_LAPIC starts it with what it is
told is left (Linux 5.8, arch/x86/kvm/lapic.c): the time in between would be lost each time. So the moment of
reading is kept with the registers, and what has passed since is taken off before they are loaded.

A timer that expires while the vCPU is out of KVM_RUN is only noted by KVM, where no ioctl reads it. So the
timer is looked at right after the vCPU stopped, when all that expired until then must have requested its
interrupt; from there on its expiries are reckoned and not read. `settle` makes sure of it for a periodic
timer: it enters KVM_RUN with a signal pending, which turns a note into a request. A one-shot timer that has
expired without its interrupt being requested may have been served long ago, or not be noticed yet: so the
vCPU goes on for a moment (`run_on`), until the guest has armed the timer again or the request is there. Where
that does not come, the interrupt comes once more, as KVM itself has it: better one too many than none.

A timer in TSC-deadline mode needs none of this: its deadline is an MSR, which stays until the interrupt is
requested.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from time import monotonic_ns
from typing import Final

from vmm.boot.cpuid import KVM_APIC_BUS_KHZ
from vmm.kvm import Vcpu, abi

# Registers by offset in the APIC page (Intel SDM vol. 3, 11.4.1).
SPURIOUS: Final = 0xF0
IN_SERVICE: Final = 0x100
TRIGGER_MODE: Final = 0x180
REQUEST: Final = 0x200
LVT_TIMER: Final = 0x320
INITIAL_COUNT: Final = 0x380
CURRENT_COUNT: Final = 0x390
DIVIDE: Final = 0x3E0

SOFTWARE_ENABLE: Final = 1 << 8  # of SPURIOUS
MASKED: Final = 1 << 16  # of LVT_TIMER
BUS_CYCLE_NS: Final = 1_000_000 // KVM_APIC_BUS_KHZ

IN_STEP_NS: Final = 200_000
NEVER_NS: Final = 1 << 64
MOST_READINGS: Final = 8
NEAR_NS: Final = 50_000  # a reading that took longer is repeated: when in it the kernel looked is unknown


class TimerMode(IntEnum):
    """LVT_TIMER[18:17]."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2


class LapicSection(ctypes.LittleEndianStructure):
    """The registers, when they were read, and when the timer expires, on CLOCK_MONOTONIC."""

    taken_ns: int
    expires_ns: int
    _fields_ = (
        ("registers", abi.kvm_lapic_state),
        ("taken_ns", ctypes.c_uint64),
        ("expires_ns", ctypes.c_uint64),
    )


def read_register(state: abi.kvm_lapic_state, offset: int) -> int:
    """A 32-bit register."""
    return int.from_bytes(bytes(state.regs[offset : offset + 4]), "little")


def write_register(state: abi.kvm_lapic_state, offset: int, value: int) -> None:
    """Change a 32-bit register."""
    ctypes.c_uint32.from_buffer(state, offset).value = value


def timer_mode(state: abi.kvm_lapic_state) -> TimerMode | None:
    """What the timer counts by; None where it does not count at all."""
    mode = read_register(state, LVT_TIMER) >> 17 & 3
    if mode == TimerMode.TSC_DEADLINE:
        return TimerMode.TSC_DEADLINE
    if not read_register(state, INITIAL_COUNT):
        return None
    return TimerMode.PERIODIC if mode == TimerMode.PERIODIC else TimerMode.ONE_SHOT


def _unit_ns(state: abi.kvm_lapic_state) -> int:
    divide = read_register(state, DIVIDE)
    shift = (divide & 3 | divide >> 1 & 4) + 1 & 7  # 0b000 is 2, 0b110 is 128, 0b111 is 1
    return BUS_CYCLE_NS << shift


def remaining_ns(state: abi.kvm_lapic_state) -> int:
    """Until the timer expires next, in ns; 0: it has expired, and if periodic nobody has noticed yet."""
    return read_register(state, CURRENT_COUNT) * _unit_ns(state)


def look_at_timer(
    vcpu: Vcpu,
    section: LapicSection,
    settle: Callable[[], object],
    run_on: Callable[[], object] | None,
) -> None:
    """On the thread of a vCPU that just stopped: what its timer has left, into `section` for `save_lapic`.

    `run_on` is None for a guest that is paused.
    """
    registers = section.registers
    quiet_until_ns = 0  # every expiry has requested its interrupt, and the next comes no earlier
    for _ in range(MOST_READINGS):
        section.taken_ns = monotonic_ns()
        vcpu.get_lapic(registers)
        now_ns = monotonic_ns()
        mode, left_ns = timer_mode(registers), remaining_ns(registers)
        if mode is TimerMode.ONE_SHOT and not left_ns and not _is_requested(registers):
            if quiet_until_ns:
                return
            if run_on is None:
                quiet_until_ns = NEVER_NS
                settle()
            else:
                run_on()
        elif mode is TimerMode.PERIODIC and left_ns and now_ns >= quiet_until_ns:
            quiet_until_ns = section.taken_ns + left_ns
            settle()
        elif now_ns - section.taken_ns <= NEAR_NS:
            return


def save_lapic(vcpu: Vcpu, section: LapicSection) -> None:
    """Read the LAPIC, once every vCPU has stopped and the chips have been read."""
    registers = abi.kvm_lapic_state()
    vcpu.get_lapic(registers)
    if _counts_alike(registers, section.registers):
        write_register(registers, CURRENT_COUNT, read_register(section.registers, CURRENT_COUNT))
    section.registers = registers
    _keep_step(section)


def _keep_step(section: LapicSection) -> None:
    """Where the timer is almost in step with what the last handover left, put it into step: each handover is
    off by some microseconds, and they must not add up.
    """
    registers = section.registers
    mode, left_ns = timer_mode(registers), remaining_ns(registers)
    if not left_ns and mode is not TimerMode.PERIODIC:
        return  # a periodic one has expired, at some time before it was read, and goes on
    expires_ns = section.taken_ns + left_ns
    off_ns = expires_ns - section.expires_ns
    if mode is TimerMode.PERIODIC:
        period_ns = read_register(registers, INITIAL_COUNT) * _unit_ns(registers)
        off_ns = (off_ns + period_ns // 2) % period_ns - period_ns // 2
    if abs(off_ns) > IN_STEP_NS:
        off_ns = 0
    section.taken_ns -= off_ns
    section.expires_ns = expires_ns - off_ns


def _counts_alike(state: abi.kvm_lapic_state, other: abi.kvm_lapic_state) -> bool:
    """Whether the timers are one: an INIT of another vCPU, say, would have stopped it."""
    return all(
        read_register(state, offset) == read_register(other, offset)
        for offset in (LVT_TIMER, INITIAL_COUNT, DIVIDE)
    )


def load_lapic(vcpu: Vcpu, section: LapicSection) -> None:
    """Give the vCPU the LAPIC, its timer where it is by now."""
    for _ in range(MOST_READINGS):
        registers = abi.kvm_lapic_state.from_buffer_copy(section.registers)
        now_ns = monotonic_ns()
        advance(registers, now_ns - section.taken_ns)
        vcpu.set_lapic(registers)
        if monotonic_ns() - now_ns <= NEAR_NS:
            return


def advance(state: abi.kvm_lapic_state, elapsed_ns: int) -> None:
    """Let a one-shot or periodic timer count for `elapsed_ns` more.

    Expiries of a periodic timer become an interrupt request, several of them one, as in KVM. A one-shot timer
    whose interrupt is requested or in service gets an initial count of 0, or KVM would start it once more.
    """
    mode, unit_ns = timer_mode(state), _unit_ns(state)
    left_ns = remaining_ns(state) - elapsed_ns
    if mode is TimerMode.ONE_SHOT:
        if not read_register(state, CURRENT_COUNT):
            if _is_requested(state) or _is_in_service(state):
                write_register(state, INITIAL_COUNT, 0)
            return
        write_register(state, CURRENT_COUNT, max(left_ns // unit_ns, 1))
    elif mode is TimerMode.PERIODIC:
        if left_ns <= 0:
            _request(state)
            period_ns = read_register(state, INITIAL_COUNT) * unit_ns
            left_ns = left_ns % period_ns or period_ns
        write_register(state, CURRENT_COUNT, max(left_ns // unit_ns, 1))


def _vector(state: abi.kvm_lapic_state) -> tuple[int, int]:
    """The timer's vector as the offset of its 32-bit register in a 256-bit one, and its bit there."""
    vector = read_register(state, LVT_TIMER) & 0xFF
    return vector // 32 * 0x10, 1 << vector % 32


def _is_requested(state: abi.kvm_lapic_state) -> bool:
    """Whether the timer's interrupt is requested; as good as that where it is masked."""
    at, bit = _vector(state)
    return bool(read_register(state, LVT_TIMER) & MASKED or read_register(state, REQUEST + at) & bit)


def _is_in_service(state: abi.kvm_lapic_state) -> bool:
    at, bit = _vector(state)
    return bool(read_register(state, IN_SERVICE + at) & bit)


def _request(state: abi.kvm_lapic_state) -> None:
    """Request the timer's interrupt, where it is not masked."""
    if read_register(state, LVT_TIMER) & MASKED or not read_register(state, SPURIOUS) & SOFTWARE_ENABLE:
        return
    at, bit = _vector(state)
    write_register(state, REQUEST + at, read_register(state, REQUEST + at) | bit)
    write_register(state, TRIGGER_MODE + at, read_register(state, TRIGGER_MODE + at) & ~bit)  # edge
