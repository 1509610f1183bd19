"""KVM's own state as sections of the state memfd, and the order in which it is saved and loaded.

Each piece is one structure of the kernel, placed in the memfd: a KVM_GET ioctl of the old VMM writes straight
into it and a KVM_SET ioctl of the new VMM reads straight from it, so that nothing is copied or encoded while
the guest waits. docs/state.md has the table with the reason for each place in the order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmm.errors import StateError
from vmm.kvm import Cap, Vcpu, Vm, abi, sized
from vmm.state import Arena, Section

PIECE_VERSION = 1
XSAVE_SIZE = 4096  # the least: struct kvm_xsave
MSR_IA32_TSC = 0x10  # Intel SDM vol 4: never moved as a value; the TSC offset is (docs/design.md, Time)


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


class TscOffset(ctypes.LittleEndianStructure):
    """Guest TSC minus host TSC, in cycles modulo 2**64 (KVM_VCPU_TSC_OFFSET)."""

    _fields_ = (("cycles", ctypes.c_uint64),)


def _save_tsc_offset(vcpu: Vcpu, into: TscOffset) -> None:
    into.cycles = vcpu.tsc_offset


def _load_tsc_offset(vcpu: Vcpu, state: TscOffset) -> None:
    vcpu.tsc_offset = state.cycles


def msr_block(count: int) -> type[Any]:
    """The kernel's kvm_msrs with room for `count` entries."""
    return sized(abi.kvm_msrs, count)


@dataclass(frozen=True)
class MsrList:
    """The MSRs of a machine on this host: those that can be read and set, and those that can only be read
    (and are compared).
    """

    settable: tuple[int, ...]
    fixed: tuple[int, ...]

    @classmethod
    def of(cls, arena: Arena) -> MsrList:
        """The list that the sections of a machine's first vCPU were made from."""
        lists = []
        for name in ("vcpu/msrs", "vcpu/msrs-fixed"):
            section = arena.find(name, 0)
            if section is None:
                raise StateError(f"state section {name}/0 is missing")
            lists.append(_indices(arena.place(name, 0, msr_block(_count(section)), PIECE_VERSION)))
        return cls(*lists)

    @classmethod
    def probe(cls, vcpu: Vcpu, indices: tuple[int, ...]) -> MsrList:
        """Sort the kernel's list by trying each MSR on a vCPU that has its CPUID and has not run yet.

        Reads the fresh values and writes the same values back: nothing changes.
        """
        readable = [index for index in indices if index != MSR_IA32_TSC]
        block = _filled(readable)
        while (done := vcpu.get_msrs(block)) < len(readable):
            del readable[done]
            block = _filled(readable)
        settable, fixed, start = [], [], 0
        while start < len(readable):
            rest = _filled(readable[start:])
            ctypes.memmove(rest.entries, ctypes.addressof(block.entries[start]), ctypes.sizeof(rest.entries))
            done = vcpu.set_msrs(rest)
            settable += readable[start : start + done]
            fixed += readable[start + done : start + done + 1]
            start += done + 1
        return cls(tuple(settable), tuple(fixed))


def _filled(indices: list[int] | tuple[int, ...], block: Any = None) -> Any:
    block = block if block is not None else msr_block(len(indices))()
    block.nmsrs = len(indices)
    for entry, index in zip(block.entries, indices, strict=True):
        entry.index = index
    return block


def _indices(block: Any) -> tuple[int, ...]:
    return tuple(entry.index for entry in block.entries)


def vcpu_pieces(has: Callable[[int], int], *, xsave_size: int, in_kernel_lapic: bool) -> dict[str, VcpuPiece]:
    """Every piece of a vCPU's state that this kernel has (`has` asks for a capability), MSRs excepted."""
    pieces = [
        VcpuPiece("mp_state", abi.kvm_mp_state, Vcpu.get_mp_state, Vcpu.set_mp_state),
        VcpuPiece("regs", abi.kvm_regs, Vcpu.get_regs, Vcpu.set_regs),
        VcpuPiece("sregs2", abi.kvm_sregs2, Vcpu.get_sregs2, Vcpu.set_sregs2)
        if has(Cap.SREGS2)
        else VcpuPiece("sregs", abi.kvm_sregs, Vcpu.get_sregs, Vcpu.set_sregs),
    ]
    if has(Cap.XSAVE):
        kind = sized(abi.kvm_xsave, (xsave_size - XSAVE_SIZE) // 4)
        pieces.append(VcpuPiece("xsave", kind, Vcpu.get_xsave, Vcpu.set_xsave))
    else:
        pieces.append(VcpuPiece("fpu", abi.kvm_fpu, Vcpu.get_fpu, Vcpu.set_fpu))
    if has(Cap.XCRS):
        pieces.append(VcpuPiece("xcrs", abi.kvm_xcrs, Vcpu.get_xcrs, Vcpu.set_xcrs))
    if has(Cap.DEBUGREGS):
        pieces.append(VcpuPiece("debugregs", abi.kvm_debugregs, Vcpu.get_debugregs, Vcpu.set_debugregs))
    if in_kernel_lapic:
        pieces.append(VcpuPiece("lapic", abi.kvm_lapic_state, Vcpu.get_lapic, Vcpu.set_lapic))
    if has(Cap.VCPU_EVENTS):
        pieces.append(VcpuPiece("events", abi.kvm_vcpu_events, Vcpu.get_events, Vcpu.set_events))
    if has(Cap.VCPU_ATTRIBUTES):
        pieces.append(VcpuPiece("tsc_offset", TscOffset, _save_tsc_offset, _load_tsc_offset))
    return {piece.name: piece for piece in pieces}


# KVM_GET_MP_STATE takes a pending INIT or SIPI into account first, which changes registers and events: so it
# comes first.
SAVE_ORDER = (
    "mp_state",
    "regs",
    "sregs2",
    "sregs",
    "xsave",
    "fpu",
    "xcrs",
    "debugregs",
    "lapic",
    "msrs",
    "events",
    "tsc_offset",
)
# sregs carry the APIC base that the LAPIC needs and the CR4/EFER that MSRs and XSAVE are checked against;
# XCR0 before XSAVE; the LAPIC's timer mode before MSR_IA32_TSC_DEADLINE; events after what could clear them;
# mp_state last, for SET_SREGS may wake a BSP.
LOAD_ORDER = (
    "tsc_offset",
    "sregs2",
    "sregs",
    "regs",
    "xcrs",
    "xsave",
    "fpu",
    "debugregs",
    "lapic",
    "msrs",
    "events",
    "mp_state",
)


class VcpuState:
    """The sections of one vCPU, and saving it to and loading it from them."""

    def __init__(self, arena: Arena, vcpu: Vcpu, pieces: dict[str, VcpuPiece], msrs: MsrList) -> None:
        """Find or make the sections. Raises StateError where sections made by another VMM do not fit this
        host.
        """
        self.vcpu = vcpu
        index = vcpu.index
        for section in arena:
            known = section.name.removeprefix("vcpu/")
            if (
                section.instance == index
                and known != section.name
                and known not in pieces
                and known[:4] != "msrs"
            ):
                raise StateError(
                    f"state section {section.name}/{index}: this host's KVM has no such state; "
                    "the guest cannot move here"
                )
        placed: dict[str, Any] = {
            name: arena.place(f"vcpu/{name}", index, piece.kind, PIECE_VERSION)
            for name, piece in pieces.items()
        }
        self._msrs = _place_msrs(arena, "vcpu/msrs", index, msrs.settable, msrs.settable)
        self._fixed = _place_msrs(arena, "vcpu/msrs-fixed", index, msrs.fixed, msrs.settable + msrs.fixed)
        self._fixed_here = _filled(_indices(self._fixed))
        self.sections: dict[str, Any] = {**placed, "msrs": self._msrs}
        self._saves = [self._step(name, pieces, save=True) for name in SAVE_ORDER if name in self.sections]
        self._loads = [self._step(name, pieces, save=False) for name in LOAD_ORDER if name in self.sections]

    def _step(
        self, name: str, pieces: dict[str, VcpuPiece], *, save: bool
    ) -> tuple[Callable[..., None], Any]:
        if name == "msrs":
            return (self._save_msrs if save else self._load_msrs), self._msrs
        piece = pieces[name]
        return (piece.save if save else piece.load), self.sections[name]

    def save(self) -> None:
        """Store the vCPU's whole state. Call it on the vCPU's thread, outside KVM_RUN, with no exit half
        served.
        """
        vcpu = self.vcpu
        for step, section in self._saves:
            step(vcpu, section)

    def load(self) -> None:
        """Give the vCPU the stored state. Raises StateError for an MSR that this host cannot restore."""
        vcpu = self.vcpu
        for step, section in self._loads:
            step(vcpu, section)

    def _save_msrs(self, vcpu: Vcpu, block: Any) -> None:
        for part in (block, self._fixed):
            done = vcpu.get_msrs(part)
            if done != part.nmsrs:
                raise StateError(
                    f"vCPU {vcpu.index}: MSR {part.entries[done].index:#x} cannot be read any more"
                )

    def _load_msrs(self, vcpu: Vcpu, block: Any) -> None:
        done = vcpu.set_msrs(block)
        if done != block.nmsrs:
            entry = block.entries[done]
            raise StateError(
                f"vCPU {vcpu.index}: MSR {entry.index:#x} cannot be restored to {entry.data:#x} on this host"
            )
        vcpu.get_msrs(self._fixed_here)
        if bytes(self._fixed_here) != bytes(self._fixed):
            for here, there in zip(self._fixed_here.entries, self._fixed.entries, strict=True):
                if here.data != there.data:
                    raise StateError(
                        f"vCPU {vcpu.index}: MSR {there.index:#x} is {there.data:#x} in the guest, "
                        f"{here.data:#x} on this host, and cannot be set; the guest cannot move here"
                    )


def _count(section: Section) -> int:
    """How many entries a section of MSRs has room for."""
    count, odd = divmod(section.size - 8, ctypes.sizeof(abi.kvm_msr_entry))
    if odd or count < 0:
        raise StateError(
            f"state section {section.name}/{section.instance}: {section.size} bytes is no list of MSRs"
        )
    return count


def _place_msrs(arena: Arena, name: str, index: int, own: tuple[int, ...], allowed: tuple[int, ...]) -> Any:
    """The MSR section of that name: a new one lists `own`; one that is there must list only `allowed`
    MSRs.
    """
    section = arena.find(name, index)
    if section is None:
        return _filled(own, arena.place(name, index, msr_block(len(own)), PIECE_VERSION))
    count = _count(section)
    block = arena.place(name, index, msr_block(count), PIECE_VERSION)
    strange = [f"{msr:#x}" for msr in _indices(block) if msr not in allowed]
    if block.nmsrs != count or strange:
        raise StateError(
            f"state section {name}/{index}: MSR {', '.join(strange) or 'count'} cannot be restored here"
        )
    return block


def _chip(chip_id: int) -> tuple[Callable[[Vm, Any], None], Callable[[Vm, Any], None]]:
    def save(vm: Vm, into: Any) -> None:
        vm.get_irqchip(chip_id, into)

    def load(vm: Vm, state: Any) -> None:
        vm.set_irqchip(state)

    return save, load


def vm_pieces(*, irqchip: bool, pit: bool) -> list[VmPiece]:
    """The VM's own state in the order of loading: after every LAPIC, since loading the IOAPIC may inject into
    them.
    """
    pieces = [VmPiece("clock", abi.kvm_clock_data, Vm.get_clock, _load_clock)]
    if irqchip:
        for name, chip_id in (
            ("pic-master", abi.KVM_IRQCHIP_PIC_MASTER),
            ("pic-slave", abi.KVM_IRQCHIP_PIC_SLAVE),
            ("ioapic", abi.KVM_IRQCHIP_IOAPIC),
        ):
            pieces.append(VmPiece(name, abi.kvm_irqchip, *_chip(chip_id)))
    if pit:
        pieces.append(VmPiece("pit2", abi.kvm_pit_state2, Vm.get_pit2, Vm.set_pit2))
    return pieces


def _load_clock(vm: Vm, saved: abi.kvm_clock_data) -> None:
    """Set kvmclock so that the time of the pause has passed in it: the kernel adds what CLOCK_REALTIME gained
    since.
    """
    data = abi.kvm_clock_data.from_buffer_copy(saved)
    data.flags &= abi.KVM_CLOCK_REALTIME
    vm.set_clock(data)


class VmState:
    """The sections of the VM as a whole."""

    def __init__(self, arena: Arena, vm: Vm, pieces: list[VmPiece]) -> None:
        self._vm = vm
        self._pieces = [
            (piece, arena.place(f"vm/{piece.name}", 0, piece.kind, PIECE_VERSION)) for piece in pieces
        ]

    def save(self) -> None:
        """Store the VM's state, once every vCPU has stopped."""
        for piece, section in self._pieces:
            piece.save(self._vm, section)

    def load(self) -> None:
        """Give the VM the stored state, once every vCPU has its own."""
        for piece, section in self._pieces:
            piece.load(self._vm, section)
