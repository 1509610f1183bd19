"""The PIT in a handover, and what its API leaves out.

KVM_SET_PIT2 starts every channel anew with its whole count (Linux arch/x86/kvm/i8254.c). For channels 1 and 2
KVM_GET_PIT2 says when they were started, so one that counts down once is loaded with what it has left. For
channel 0, whose interrupts matter, KVM keeps that to itself: its next interrupt comes up to one period late.
docs/state.md says what this means to a guest.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import Final

from vmm.kvm import Vm, abi

PIT_HZ: Final = 1_193_182
SECOND_NS: Final = 1_000_000_000
COUNT_ONCE: Final = frozenset({0, 1, 4, 5})  # Intel 8254 data sheet: these modes do not reload by themselves


def load_pit(vm: Vm, saved: abi.kvm_pit_state2) -> None:
    """Give the VM the PIT as it is by now."""
    state = abi.kvm_pit_state2.from_buffer_copy(saved)
    advance(state, monotonic_ns())
    vm.set_pit2(state)


def advance(state: abi.kvm_pit_state2, now_ns: int) -> None:
    """Take what channels 1 and 2 have counted until `now_ns` (CLOCK_MONOTONIC) off their counts.

    One that has reached zero keeps a count of 1: its output is then what it was, its count is not.
    """
    for channel in list(state.channels)[1:]:
        if channel.mode in COUNT_ONCE:
            counted = max(now_ns - channel.count_load_time, 0) * PIT_HZ // SECOND_NS
            channel.count = max(channel.count - counted, 1)
