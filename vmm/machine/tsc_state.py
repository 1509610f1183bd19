"""The guest's TSC in a handover: its distance from the host's TSC and its frequency stay what they are.

Both VMMs are on one host and so on one TSC. What moves is KVM's offset, never a value, so the guest's counter
goes on to the cycle, the pause included.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

from vmm.errors import StateError
from vmm.kvm import Cap, Vcpu, Vm
from vmm.state import Arena

SECTION = "vcpu/tsc"


class TscSection(ctypes.LittleEndianStructure):
    """Guest TSC minus host TSC in cycles, modulo 2**64 (KVM_VCPU_TSC_OFFSET), and the guest's kHz, 0 where
    KVM does not tell.
    """

    VERSION: ClassVar[int] = 1

    _fields_ = (("offset", ctypes.c_uint64), ("khz", ctypes.c_uint32), ("has_offset", ctypes.c_uint32))


class TscState:
    """The TSC of one vCPU, in the state memfd."""

    def __init__(self, arena: Arena, vcpu: Vcpu) -> None:
        self.section = arena.place(SECTION, vcpu.index, TscSection)

    def save(self, vm: Vm, vcpu: Vcpu) -> None:
        """Keep offset and frequency, at the guest's birth."""
        self.section.khz = _khz(vm, vcpu)
        self.section.has_offset = vm.check(Cap.VCPU_ATTRIBUTES) != 0
        self.save_offset(vcpu)

    def save_offset(self, vcpu: Vcpu) -> None:
        """Keep the offset, which a guest changes by writing to its TSC. Out of KVM_RUN, or this waits."""
        if self.section.has_offset:
            self.section.offset = vcpu.tsc_offset

    def prepare(self, vm: Vm, vcpu: Vcpu) -> None:
        """Give a new vCPU the guest's frequency and offset, before anything else that counts time.

        Raises StateError where this host's TSC has another frequency and KVM cannot scale it.
        """
        wanted, here = self.section.khz, _khz(vm, vcpu)
        if wanted != here:
            if not vm.check(Cap.TSC_CONTROL):
                raise StateError(
                    f"vCPU {vcpu.index}: the guest's TSC runs at {wanted} kHz, this host's at {here} kHz, "
                    "and its KVM cannot scale it (KVM_CAP_TSC_CONTROL); the guest cannot move here"
                )
            vcpu.set_tsc_khz(wanted)
        self.load(vcpu)

    def load(self, vcpu: Vcpu) -> None:
        """The same for what the guest has changed since: its offset, by writing to the TSC."""
        if self.section.has_offset and vcpu.tsc_offset != self.section.offset:
            vcpu.tsc_offset = self.section.offset


def _khz(vm: Vm, vcpu: Vcpu) -> int:
    """0 where KVM does not tell."""
    return vcpu.tsc_khz if vm.check(Cap.GET_TSC_KHZ) else 0
