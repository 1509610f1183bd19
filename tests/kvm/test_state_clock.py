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
        vm, misses = stays, []
        for _ in range(MOVES):
            GuestClock(arena, vm, khz).keep_line()
            moved = ExitStack()
            new, new_vcpu = moved.enter_context(vm_with_clock(system))
            new_vcpu.tsc_offset = offset
            misses.append(GuestClock(arena, new, khz).align())
            stack.close()  # the VM before, but for the one that stays
            stack.push(moved.pop_all())
            vm = new
        scale = TimeScale.of(khz)
        here, there = read(vm), read(stays)
        assert first.clock == pytest.approx(STARTS_AT_NS, abs=SECOND_NS)
        ahead = here.clock - there.clock - scale.nanoseconds(here.host_tsc - there.host_tsc)
        assert abs(ahead) < 1000  # measured: 1
        assert max(map(abs, misses)) < 1000  # measured: 8


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
