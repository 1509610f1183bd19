"""Which state a vCPU is given first, by one that only notes what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmm.fds import FdStore
from vmm.kvm import System, Vcpu, abi
from vmm.machine.kvm_state import VcpuFacts, VcpuState
from vmm.machine.msr_state import IA32_DEBUGCTL, MsrList, guest_msrs
from vmm.state import Arena


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


def noting() -> Any:
    told: list[Any] = []
    return SimpleNamespace(
        index=0,
        fd=-1,
        told=told,
        run_page=abi.kvm_run(),
        _ioctl=lambda fd, request, state: told.append(request),
        set_msrs=lambda block: block.nmsrs,
        get_msrs=lambda block: 0,
    )


def state_of(fds: FdStore, vcpu: Any, nested_size: int) -> VcpuState:
    facts = VcpuFacts(has=lambda cap: 1, xsave_size=4096, in_kernel_lapic=False, nested_size=nested_size)
    return VcpuState(Arena.open(fds), vcpu, facts, MsrList((), ()), cast(Any, None))


def test_a_new_vcpu_is_allowed_to_nest_first(fds: FdStore) -> None:
    vcpu = noting()
    state_of(fds, vcpu, 0x1080).load()
    assert vcpu.told[0] is abi.KVM_SET_SREGS2
    assert abi.KVM_SET_NESTED_STATE in vcpu.told


def test_a_reset_leaves_nested_state_first(fds: FdStore) -> None:
    """In VMX operation CR4.VMXE cannot be cleared."""
    vcpu = noting()
    state_of(fds, vcpu, 0x1080).load_birth()
    assert vcpu.told[:2] == [abi.KVM_SET_NESTED_STATE, abi.KVM_SET_SREGS2]


def test_a_reset_of_a_guest_that_cannot_nest(fds: FdStore) -> None:
    vcpu = noting()
    state_of(fds, vcpu, 0).load_birth()
    assert abi.KVM_SET_NESTED_STATE not in vcpu.told


def test_cr8_is_in_the_run_page_too(fds: FdStore) -> None:
    vcpu = noting()
    state = state_of(fds, vcpu, 0)
    state.sections["sregs2"].cr8 = 7
    state.load()
    assert vcpu.run_page.cr8 == 7


def test_debug_control_need_not_be_listed() -> None:
    system = SimpleNamespace(msr_index_list=tuple, msr_feature_list=tuple, check=lambda cap: 1)
    assert IA32_DEBUGCTL in guest_msrs(cast(System, system), cast(Vcpu, noting()))
