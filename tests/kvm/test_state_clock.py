"""kvmclock from VM to VM: each new one is put on the guest's line, and the misses do not add up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from vmm.fds import FdStore
from vmm.kvm import System, Vcpu, Vm, abi
from vmm.machine import guest_clock
from vmm.machine.guest_clock import GuestClock, TimeScale
from vmm.state import Arena

pytestmark = pytest.mark.kvm

MOVES = 1000
SECOND_NS = 1_000_000_000
STARTS_AT_NS = 1234 * SECOND_NS
MISS_NS = 50_000


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


@contextmanager
def vm_with_clock(system: System, starts_at_ns: int | None = None) -> Iterator[tuple[Vm, Vcpu]]:
    with system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid(system.supported_cpuid())
        if starts_at_ns is not None:
            vm.set_clock(abi.kvm_clock_data(clock=starts_at_ns))
        yield vm, vcpu


def read(vm: Vm) -> abi.kvm_clock_data:
    clock = abi.kvm_clock_data()
    vm.get_clock(clock)
    return clock


def test_a_thousand_moves_are_off_by_less_than_a_microsecond(fds: FdStore) -> None:
    """Beside a VM that stays, whose clock drifts from the host's by whatever the kernel makes it drift."""
    arena = Arena.open(fds)
    with System() as system, vm_with_clock(system, STARTS_AT_NS) as (stays, vcpu), ExitStack() as stack:
        if not read(stays).flags & abi.KVM_CLOCK_HOST_TSC:
            pytest.skip("this host's KVM_GET_CLOCK gives no TSC: its TSC is not stable")
        khz, offset = vcpu.tsc_khz, vcpu.tsc_offset
        first = read(stays)
        vm, clock, misses = stays, GuestClock(arena, stays, khz), []
        for _ in range(MOVES):
            clock.keep_line()
            moved = ExitStack()
            new, new_vcpu = moved.enter_context(vm_with_clock(system))
            new_vcpu.tsc_offset = offset
            clock = GuestClock(arena, new, khz)
            misses.append(clock.align())
            stack.close()  # the VM before, but for the one that stays
            stack.push(moved.pop_all())
            vm = new
        scale = TimeScale.of(khz)
        here, there = read(vm), read(stays)
        assert first.clock == pytest.approx(STARTS_AT_NS, abs=SECOND_NS)
        ahead = here.clock - there.clock - scale.nanoseconds(here.host_tsc - there.host_tsc)
        assert abs(ahead) < 1000  # measured: 1
        assert max(map(abs, misses)) < 1000  # measured: 8


def test_what_a_setting_missed_by_does_not_add_up(fds: FdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host so slow that every setting misses by more than would be taken for another line."""
    arena = Arena.open(fds)
    set_clock = Vm.set_clock

    def set_late(vm: Vm, data: abi.kvm_clock_data) -> None:
        data.clock += MISS_NS
        set_clock(vm, data)

    with System() as system, vm_with_clock(system, STARTS_AT_NS) as (vm, vcpu), ExitStack() as stack:
        monkeypatch.setattr(guest_clock, "TRIES", 1)
        monkeypatch.setattr(Vm, "set_clock", set_late)
        clock = GuestClock(arena, vm, vcpu.tsc_khz)
        for _ in range(5):
            clock.keep_line()
            new, new_vcpu = stack.enter_context(vm_with_clock(system))
            new_vcpu.tsc_offset = vcpu.tsc_offset
            clock = GuestClock(arena, new, vcpu.tsc_khz)
            clock.align()
        first = GuestClock(arena, vm, vcpu.tsc_khz)
        assert abs(first.error_ns()) < MISS_NS
        new.set_clock(abi.kvm_clock_data(clock=2 * STARTS_AT_NS))
        clock.keep_line()  # now it is another one
        assert abs(clock.error_ns()) < MISS_NS


def test_a_clock_that_left_its_line_is_followed(fds: FdStore) -> None:
    """The kernel takes it elsewhere when it re-reads its own: the guest's time must not be taken back."""
    arena = Arena.open(fds)
    with System() as system, vm_with_clock(system, STARTS_AT_NS) as (vm, vcpu):
        clock = GuestClock(arena, vm, vcpu.tsc_khz)
        clock.keep_line()
        kept = bytes(clock.line)
        clock.keep_line()
        assert bytes(clock.line) == kept
        vm.set_clock(abi.kvm_clock_data(clock=2 * STARTS_AT_NS))
        clock.keep_line()
        assert clock.line.clock_ns >= 2 * STARTS_AT_NS
        with vm_with_clock(system) as (new, new_vcpu):
            new_vcpu.tsc_offset = vcpu.tsc_offset
            GuestClock(arena, new, vcpu.tsc_khz).align()
            assert read(new).clock >= 2 * STARTS_AT_NS


def test_a_clock_that_was_never_asked_for_is_left_alone(fds: FdStore) -> None:
    with System() as system, vm_with_clock(system, STARTS_AT_NS) as (vm, vcpu):
        before = read(vm).clock
        assert GuestClock(Arena.open(fds), vm, vcpu.tsc_khz).align() == 0
        assert before <= read(vm).clock < before + SECOND_NS


@pytest.mark.parametrize("here", [True, False], ids=["old-and-new", "new-only"])
def test_without_a_stable_tsc(
    here: bool, fds: FdStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """KVM gives no TSC with the clock: it moves all the same, by the clock that KVM itself goes by."""
    arena = Arena.open(fds)
    impossible = 1 << 31
    with System() as system, vm_with_clock(system, STARTS_AT_NS) as (vm, vcpu):
        if here:
            monkeypatch.setattr(guest_clock, "TSC_FLAGS", impossible)
        GuestClock(arena, vm, vcpu.tsc_khz).keep_line()
        monkeypatch.setattr(guest_clock, "TSC_FLAGS", impossible)
        with vm_with_clock(system) as (new, _):
            time.sleep(0.01)
            miss_ns = GuestClock(arena, new, vcpu.tsc_khz).align()
            ahead_ns = read(new).clock - read(vm).clock
        assert abs(miss_ns) < 100_000
        assert abs(ahead_ns) < 1_000_000  # the two readings are some microseconds apart
        assert ("no longer derived from the TSC" in caplog.text) != here
