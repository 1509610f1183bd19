"""KVM's own state as sections of the state memfd, and the order in which it is saved and loaded.

Each piece is one structure of the kernel, placed in the memfd: a KVM_GET ioctl of the old VMM writes straight
into it and a KVM_SET ioctl of the new VMM reads straight from it, so that nothing is copied or encoded while
the guest waits. docs/state.md has the table of all state, with the reason for each place in the order and the
check that would notice a loss.

What a guest cannot change, or changes hardly ever, is not here: CPUID (cpuid_state.py), the TSC
(tsc_state.py) and kvmclock (guest_clock.py) are given to the new VM before the guest is stopped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmm.kvm import Cap, Vcpu, Vm, abi, sized
from vmm.machine.lapic_state import LapicSection, load_lapic, look_at_timer, save_lapic
from vmm.machine.msr_state import MsrList, MsrState, Ram
from vmm.machine.pit_state import load_pit
from vmm.state import Arena

PIECE_VERSION = 1
XSAVE_SIZE = 4096  # the least: struct kvm_xsave


@dataclass(frozen=True)
class VcpuPiece:
    """One structure of a vCPU: its section's name, type, and the calls that save and load it."""

    name: str
    kind: type[Any]
    save: Callable[[Vcpu, Any], None]
    load: Callable[[Vcpu, Any], None]


@dataclass(frozen=True)
class VmPiece:
    """One structure of the VM as a whole."""

    name: str
    kind: type[Any]
    save: Callable[[Vm, Any], None]
    load: Callable[[Vm, Any], None]


# What a vCPU's state cannot do without. (XSAVE and XCRS are missing only where the processor has neither.)
STATE_NEEDS = (Cap.MP_STATE, Cap.VCPU_EVENTS, Cap.DEBUGREGS)


@dataclass(frozen=True)
class VcpuFacts:
    """What decides which state a machine's vCPUs have here."""

    has: Callable[[int], int]  # asks for a capability
    xsave_size: int  # bytes
    in_kernel_lapic: bool
    nested_size: int  # bytes; 0: the guest runs no guests of its own


# KVM_GET_MP_STATE takes in a waiting INIT or SIPI, which changes all other state: so it comes first. Events
# before what delivering a pending exception would change (CR2, DR6, on kernels without
# KVM_CAP_EXCEPTION_PAYLOAD). The rest in any order.
SAVE_ORDER = (
    "mp_state",
    "events",
    "regs",
    "sregs2",
    "sregs",
    "xcrs",
    "xsave",
    "fpu",
    "debugregs",
    "msrs",
    "nested",
    "lapic",
)
# Control registers, EFER and the APIC base decide what all else is checked against. The LAPIC's timer mode
# comes before MSR_IA32_TSC_DEADLINE, which is ignored in the others; nested state after EFER.SVME, CR4.VMXE
# and the MSRs that enable it; events after the registers, which drop a pending exception; MP state last, for
# control registers may wake the first vCPU.
LOAD_ORDER = (
    "sregs2",
    "sregs",
    "regs",
    "xcrs",
    "xsave",
    "fpu",
    "debugregs",
    "lapic",
    "msrs",
    "nested",
    "events",
    "mp_state",
)
# What comes before all that in a reset: nested state of a vCPU that has not run ends VMX operation, in which
# CR4.VMXE cannot be cleared, and the guest's own guest, whose descriptor tables would be set (SVM).
LEAVE_ORDER = ("nested",)


def vcpu_pieces(facts: VcpuFacts) -> dict[str, VcpuPiece]:
    """Every piece of a vCPU's state that this kernel has, LAPIC and MSRs excepted."""
    has = facts.has
    kind: type[Any]
    pieces = [
        VcpuPiece("regs", abi.kvm_regs, Vcpu.get_regs, Vcpu.set_regs),
        VcpuPiece("sregs2", abi.kvm_sregs2, Vcpu.get_sregs2, Vcpu.set_sregs2)
        if has(Cap.SREGS2)
        else VcpuPiece("sregs", abi.kvm_sregs, Vcpu.get_sregs, Vcpu.set_sregs),
    ]
    if has(Cap.MP_STATE):
        pieces.append(VcpuPiece("mp_state", abi.kvm_mp_state, Vcpu.get_mp_state, Vcpu.set_mp_state))
    if has(Cap.XSAVE):
        kind = sized(abi.kvm_xsave, (facts.xsave_size - XSAVE_SIZE) // 4)
        pieces.append(VcpuPiece("xsave", kind, Vcpu.get_xsave, Vcpu.set_xsave))
    else:
        pieces.append(VcpuPiece("fpu", abi.kvm_fpu, Vcpu.get_fpu, Vcpu.set_fpu))
    if has(Cap.XCRS):
        pieces.append(VcpuPiece("xcrs", abi.kvm_xcrs, Vcpu.get_xcrs, Vcpu.set_xcrs))
    if has(Cap.DEBUGREGS):
        pieces.append(VcpuPiece("debugregs", abi.kvm_debugregs, Vcpu.get_debugregs, Vcpu.set_debugregs))
    if has(Cap.VCPU_EVENTS):
        pieces.append(VcpuPiece("events", abi.kvm_vcpu_events, Vcpu.get_events, Vcpu.set_events))
    if facts.nested_size:
        kind = sized(abi.kvm_nested_state, facts.nested_size - ctypes.sizeof(abi.kvm_nested_state))
        pieces.append(VcpuPiece("nested", kind, _save_nested, Vcpu.set_nested_state))
    return {piece.name: piece for piece in pieces}


def _save_nested(vcpu: Vcpu, into: Any) -> None:
    into.size = ctypes.sizeof(into)  # in: room; out: what there is
    vcpu.get_nested_state(into)


class VcpuState:
    """The sections of one vCPU, and saving it to and loading it from them."""

    def __init__(self, arena: Arena, vcpu: Vcpu, facts: VcpuFacts, msrs: MsrList, ram: Ram) -> None:
        """Find or make the sections. Raises StateError where sections made by another VMM do not fit this
        host.
        """
        self.vcpu = vcpu
        pieces, msr_state = vcpu_pieces(facts), MsrState(arena, vcpu.index, msrs, ram)
        self.sections: dict[str, Any] = {
            name: arena.place(f"vcpu/{name}", vcpu.index, piece.kind, PIECE_VERSION)
            for name, piece in pieces.items()
        }
        saves: dict[str, Callable[[Vcpu, Any], None]] = {name: piece.save for name, piece in pieces.items()}
        loads: dict[str, Callable[[Vcpu, Any], None]] = {name: piece.load for name, piece in pieces.items()}
        self.sections["msrs"] = msr_state.values
        saves["msrs"] = lambda vcpu, _: msr_state.save(vcpu)
        loads["msrs"] = lambda vcpu, _: msr_state.load(vcpu)
        if facts.in_kernel_lapic:
            self.sections["lapic"] = arena.place("vcpu/lapic", vcpu.index, LapicSection, PIECE_VERSION)
            saves["lapic"] = save_lapic
            loads["lapic"] = load_lapic
        self._saves = [(saves[name], self.sections[name]) for name in SAVE_ORDER if name in saves]
        self._loads = [(loads[name], self.sections[name]) for name in LOAD_ORDER if name in loads]
        self._leaves = [(loads[name], self.sections[name]) for name in LEAVE_ORDER if name in loads]

    def look(self, settle: Callable[[], object], run_on: Callable[[], object] | None) -> None:
        """On the vCPU's thread, when it has just stopped and others may still run: what cannot be seen later.
        See `look_at_timer`.
        """
        if (lapic := self.sections.get("lapic")) is not None:
            look_at_timer(self.vcpu, lapic, settle, run_on)

    def save(self) -> None:
        """Store the vCPU's whole state. Call it on the vCPU's thread, outside KVM_RUN, with no exit half
        served, and every vCPU stopped and looked at; one that has never run needs no look.
        """
        vcpu = self.vcpu
        for step, section in self._saves:
            step(vcpu, section)

    def load(self) -> None:
        """Give the vCPU the stored state. Raises StateError for an MSR that this host cannot restore."""
        vcpu = self.vcpu
        for step, section in self._loads:
            step(vcpu, section)

    def load_birth(self) -> None:
        """As `load`, of state that no guest has run with, into a vCPU that has run."""
        vcpu = self.vcpu
        for step, section in self._leaves:
            step(vcpu, section)
        self.load()


def _chip(chip_id: int) -> tuple[Callable[[Vm, Any], None], Callable[[Vm, Any], None]]:
    def save(vm: Vm, into: Any) -> None:
        vm.get_irqchip(chip_id, into)

    def load(vm: Vm, state: Any) -> None:
        vm.set_irqchip(state)

    return save, load


def vm_pieces(*, irqchip: bool, pit: bool) -> list[VmPiece]:
    """The VM's own state in the order of loading: the IOAPIC may inject into the LAPICs, and the PIT, which
    starts to count when it is loaded, into both.
    """
    pieces = []
    if irqchip:
        for name, chip_id in (
            ("pic-master", abi.KVM_IRQCHIP_PIC_MASTER),
            ("pic-slave", abi.KVM_IRQCHIP_PIC_SLAVE),
            ("ioapic", abi.KVM_IRQCHIP_IOAPIC),
        ):
            pieces.append(VmPiece(name, abi.kvm_irqchip, *_chip(chip_id)))
    if pit:
        pieces.append(VmPiece("pit2", abi.kvm_pit_state2, Vm.get_pit2, load_pit))
    return pieces


class VmState:
    """The sections of the VM as a whole."""

    def __init__(self, arena: Arena, vm: Vm, pieces: list[VmPiece]) -> None:
        self._vm = vm
        self._pieces = [
            (piece, arena.place(f"vm/{piece.name}", 0, piece.kind, PIECE_VERSION)) for piece in pieces
        ]

    def save(self) -> None:
        """Store the VM's state: once every vCPU has stopped, and before any LAPIC is read. An interrupt that
        comes in between is then in a LAPIC, and not in a chip alone that was read before.
        """
        for piece, section in self._pieces:
            piece.save(self._vm, section)

    def load(self) -> None:
        """Give the VM the stored state, once every vCPU has its own."""
        for piece, section in self._pieces:
            piece.load(self._vm, section)
