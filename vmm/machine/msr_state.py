"""The MSRs of a vCPU: which ones there are, asked of the kernel, and their two sections in the state memfd.

There is no list of MSRs here. KVM_GET_MSR_INDEX_LIST and KVM_GET_MSR_FEATURE_INDEX_LIST give one, without
those that a CPU counts itself (memory type ranges, machine check banks, errata) and a few more: of these the
vCPU is asked.
Each MSR is tried. One that this host cannot give the guest is named, and the guest stays where it is.

Setting an MSR is not to change the guest's RAM: until the commit that is the old VMM's. One does, KVM's wall
clock, so it is set apart from the others and once, and what it wrote is put back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vmm.errors import StateError, VmmError
from vmm.kvm import System, Vcpu, abi, sized
from vmm.state import Arena, Section

VERSION = 1
SETTABLE, FIXED = "vcpu/msrs", "vcpu/msrs-fixed"  # sections
IA32_TSC = 0x10  # Intel SDM vol. 4: never moved as a value, for its offset is (tsc_state.py)
# Intel SDM vol. 4, table 2-2
IA32_MTRRCAP, IA32_MTRR_PHYSBASE0, IA32_MTRR_DEF_TYPE = 0xFE, 0x200, 0x2FF
IA32_MTRR_FIX = (0x250, 0x258, 0x259, *range(0x268, 0x270))
MTRRCAP_FIX = 1 << 8
IA32_MCG_CAP, IA32_MC0_CTL, IA32_MC0_CTL2 = 0x179, 0x400, 0x280
COUNT = 0xFF  # how many variable ranges, how many banks
OSVW = (0xC001_0140, 0xC001_0141)  # OS visible workarounds: AMD64 APM vol. 2, appendix A
IA32_DEBUGCTL = 0x1D9
UNLISTED = (*OSVW, IA32_DEBUGCTL)  # by some kernels
# Linux Documentation/virt/kvm/x86/msr.rst; both are one value of the VM's, where KVM writes the time
WALL_CLOCKS = (0x11, 0x4B56_4D00)
WALL_CLOCK_SIZE = 12  # struct pvclock_wall_clock
_HEADER_SIZE = ctypes.sizeof(abi.kvm_msrs)


class Ram(Protocol):
    """The guest's RAM; VmmError where there is none."""

    def read(self, gpa: int, length: int, /) -> bytes: ...

    def write(self, gpa: int, data: bytes, /) -> None: ...


def guest_msrs(system: System, vcpu: Vcpu) -> tuple[int, ...]:
    """Every MSR that the kernel calls guest state, those that describe features and may differ by vCPU, and
    those that KVM keeps and does not list.
    """
    state = system.msr_index_list()
    features = system.msr_feature_list() if system.check(abi.Cap.GET_MSR_FEATURES) else ()
    return tuple(dict.fromkeys((*state, *features, *_counted(vcpu), *UNLISTED)))


def _counted(vcpu: Vcpu) -> Iterable[int]:
    """MSRs of which a CPU has as many as another MSR says. KVM keeps them for the guest and lists none
    (kvm_set_msr_common and msrs_to_save_all, arch/x86/kvm/x86.c).
    """
    if (mtrr_cap := _read(vcpu, IA32_MTRRCAP)) is not None:
        yield IA32_MTRRCAP
        yield from range(IA32_MTRR_PHYSBASE0, IA32_MTRR_PHYSBASE0 + 2 * (mtrr_cap & COUNT))
        yield from IA32_MTRR_FIX if mtrr_cap & MTRRCAP_FIX else ()
        yield IA32_MTRR_DEF_TYPE  # enables the others
    if (mcg_cap := _read(vcpu, IA32_MCG_CAP)) is not None:
        banks = mcg_cap & COUNT
        yield IA32_MCG_CAP
        yield from range(IA32_MC0_CTL, IA32_MC0_CTL + 4 * banks)
        yield from range(IA32_MC0_CTL2, IA32_MC0_CTL2 + banks)


def _read(vcpu: Vcpu, index: int) -> int | None:
    """That MSR's value, if the vCPU has it."""
    block = _listing((index,))
    return int(block.entries[0].data) if vcpu.get_msrs(block) else None


@dataclass(frozen=True)
class MsrList:
    """A machine's MSRs on this host: those that can be read and set, and those that can only be read, which
    are compared.
    """

    settable: tuple[int, ...]
    fixed: tuple[int, ...]

    @classmethod
    def of(cls, arena: Arena) -> MsrList:
        """The list that the sections of a machine's first vCPU were made from."""
        return cls(*(_indices(_find(arena, name, 0)) for name in (SETTABLE, FIXED)))

    @classmethod
    def probe(cls, vcpu: Vcpu, indices: Iterable[int]) -> MsrList:
        """Sort `indices` by trying each on a vCPU that has its CPUID and has not run yet.

        Reads the values at birth and writes the same ones back: nothing changes.
        """
        readable = [index for index in indices if index != IA32_TSC]
        block = _listing(readable)
        while (done := vcpu.get_msrs(block)) < len(readable):
            del readable[done]
            block = _listing(readable)
        settable, fixed, start = [], [], 0
        while start < len(readable):
            rest = _listing(readable[start:])
            ctypes.memmove(rest.entries, ctypes.addressof(block.entries[start]), ctypes.sizeof(rest.entries))
            done = vcpu.set_msrs(rest)
            settable += readable[start : start + done]
            fixed += readable[start + done : start + done + 1]
            start += done + 1
        return cls(tuple(settable), tuple(fixed))


class MsrState:
    """The MSRs of one vCPU in the state memfd."""

    def __init__(self, arena: Arena, index: int, here: MsrList, ram: Ram) -> None:
        """Find the sections or make them. Raises StateError for one that lists an MSR this host lacks."""
        self._ram = ram
        self.values = _place(arena, SETTABLE, index, here.settable, here.settable)
        self._fixed = _place(arena, FIXED, index, here.fixed, here.settable + here.fixed)
        self._fixed_here = _listing(_indices(self._fixed))
        indices = _indices(self.values)
        self._wall_clocks = [at for at, msr in enumerate(indices) if msr in WALL_CLOCKS]
        self._others = _listing([msr for msr in indices if msr not in WALL_CLOCKS])

    def save(self, vcpu: Vcpu) -> None:
        """Read every MSR. Raises StateError naming one that cannot be read any more."""
        for block in (self.values, self._fixed):
            done = vcpu.get_msrs(block)
            if done != block.nmsrs:
                raise StateError(
                    f"vCPU {vcpu.index}: MSR {block.entries[done].index:#x} cannot be read any more; "
                    "the guest cannot be handed over now"
                )

    def load(self, vcpu: Vcpu) -> None:
        """Set every MSR that can be set, compare the others. Raises StateError naming the first that
        differs.
        """
        self._copy_others()
        _set(vcpu, self._others)
        if vcpu.index == 0:
            self._load_wall_clock(vcpu)
        if not self._fixed.nmsrs:
            return
        vcpu.get_msrs(self._fixed_here)
        for here, there in zip(self._fixed_here.entries, self._fixed.entries, strict=True):
            if here.data != there.data:
                raise StateError(
                    f"vCPU {vcpu.index}: MSR {there.index:#x} is {there.data:#x} in the guest and "
                    f"{here.data:#x} on this host, where it cannot be set; the guest cannot move here"
                )

    def _copy_others(self) -> None:
        """Everything but the wall clock, to be set at once."""
        size, start, to = ctypes.sizeof(abi.kvm_msr_entry), 0, ctypes.addressof(self._others.entries)
        for end in (*self._wall_clocks, len(self.values.entries)):
            ctypes.memmove(to, ctypes.addressof(self.values.entries) + start * size, (end - start) * size)
            to, start = to + (end - start) * size, end + 1

    def _load_wall_clock(self, vcpu: Vcpu) -> None:
        """On one vCPU, for it is the VM's: KVM has what it wrote there put back."""
        for at in self._wall_clocks:
            single = _listing((self.values.entries[at].index,))
            single.entries[0].data = gpa = self.values.entries[at].data
            there = self._read_ram(gpa) if gpa else b""
            try:
                _set(vcpu, single)
            finally:
                if there:
                    self._ram.write(gpa, there)

    def _read_ram(self, gpa: int) -> bytes:
        """As much as there is of what KVM may write."""
        for size in range(WALL_CLOCK_SIZE, 0, -1):
            try:
                return self._ram.read(gpa, size)
            except VmmError:
                continue
        return b""


def _set(vcpu: Vcpu, block: Any) -> None:
    done = vcpu.set_msrs(block)
    if done != block.nmsrs:
        entry = block.entries[done]
        raise StateError(
            f"vCPU {vcpu.index}: MSR {entry.index:#x} cannot be restored to {entry.data:#x} on this host; "
            "the guest cannot move here"
        )


def _kind(count: int) -> type[Any]:
    return sized(abi.kvm_msrs, count)


def _listing(indices: Sequence[int], block: Any = None) -> Any:
    block = _kind(len(indices))() if block is None else block
    block.nmsrs = len(indices)
    for entry, index in zip(block.entries, indices, strict=True):
        entry.index = index
    return block


def _indices(block: Any) -> tuple[int, ...]:
    return tuple(entry.index for entry in block.entries)


def _find(arena: Arena, name: str, index: int) -> Any:
    section = arena.find(name, index)
    if section is None:
        raise StateError(f"state section {name}/{index} is missing")
    return _placed(arena, section)


def _placed(arena: Arena, section: Section) -> Any:
    label = f"state section {section.name}/{section.instance}"
    count, odd = divmod(section.size - _HEADER_SIZE, ctypes.sizeof(abi.kvm_msr_entry))
    if odd or count < 0:
        raise StateError(f"{label}: {section.size} bytes is no list of MSRs")
    block = arena.place(section.name, section.instance, _kind(count), VERSION)
    if block.nmsrs != count:
        raise StateError(f"{label}: it counts {block.nmsrs} MSRs and has room for {count}")
    return block


def _place(arena: Arena, name: str, index: int, own: Sequence[int], allowed: Sequence[int]) -> Any:
    """The section of that name. A new one lists `own`; one that is there may list only `allowed`."""
    section = arena.find(name, index)
    if section is None:
        return _listing(own, arena.place(name, index, _kind(len(own)), VERSION))
    block = _placed(arena, section)
    strange = [f"{msr:#x}" for msr in _indices(block) if msr not in allowed]
    if strange:
        raise StateError(
            f"vCPU {index}: this host's KVM has no MSR {', '.join(strange)}; the guest cannot move here"
        )
    return block
