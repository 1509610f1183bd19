"""The guest's CPUID, which is its own for life: made once at its birth, kept in the state memfd.

A newer VMM or kernel may have more to offer, and must not change what the guest has seen. One that has less
to offer than the guest was promised must not take it: what is missing is listed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from vmm.boot.cpuid import CpuidEntry, CpuidFields, cpuid_table
from vmm.errors import StateError
from vmm.kvm import abi, sized
from vmm.state import Arena

SECTION, VERSION = "vcpu/cpuid", 1
MOST_NAMED = 8  # words of a difference that an error lists

# Where each bit is a feature of its own: {(leaf, subleaf): registers}. Intel SDM vol. 2 (CPUID), AMD APM
# vol. 3 appendix E, and for 0x40000001 Linux Documentation/virt/kvm/x86/cpuid.rst.
FEATURES: Final[Mapping[tuple[int, int], tuple[str, ...]]] = {
    (0x1, 0): ("ecx", "edx"),
    (0x6, 0): ("eax",),
    (0x7, 0): ("ebx", "ecx", "edx"),
    (0x7, 1): ("eax", "ebx", "ecx", "edx"),
    (0x7, 2): ("edx",),
    (0xD, 0): ("eax", "edx"),  # the states that XCR0 may enable
    (0xD, 1): ("eax", "ecx", "edx"),
    (0x12, 0): ("eax",),
    (0x14, 0): ("ebx", "ecx"),
    (0x19, 0): ("ebx",),
    (0x24, 0): ("ebx",),
    (0x4000_0001, 0): ("eax",),
    (0x8000_0001, 0): ("ecx", "edx"),
    (0x8000_0007, 0): ("ebx", "edx"),
    (0x8000_0008, 0): ("ebx",),
    (0x8000_000A, 0): ("edx",),
    (0x8000_001B, 0): ("eax",),
    (0x8000_001F, 0): ("eax",),
    (0x8000_0021, 0): ("eax", "ecx"),
    (0x8000_0022, 0): ("eax",),
}
# What must be the very same: the vendor, whose rules the kernel then plays by, and where each extended state
# lies in the XSAVE area.
VENDOR: Final = ((0x0, 0), ("ebx", "ecx", "edx"))
XSAVE_LEAF: Final = 0xD
FIRST_EXTENDED_STATE: Final = 2
XSAVE_PLACE: Final = ("eax", "ebx")  # size, offset

# Linux: virtualisation of the guest's own.
VMX: Final = ((0x1, 0), "ecx", 1 << 5)
SVM: Final = ((0x8000_0001, 0), "ecx", 1 << 2)


def keep_cpuid(arena: Arena, index: int, entries: Sequence[CpuidEntry]) -> None:
    """Write what vCPU `index` shows its guest into the state memfd, at the guest's birth."""
    table = cpuid_table(entries)
    kept = arena.place(SECTION, index, type(table), VERSION)
    ctypes.memmove(ctypes.addressof(kept), ctypes.addressof(table), ctypes.sizeof(table))


def kept_cpuid(arena: Arena, index: int) -> Any:
    """The kvm_cpuid2 that vCPU `index` shows its guest. Raises StateError where there is no good one."""
    label = f"state section {SECTION}/{index}"
    section = arena.find(SECTION, index)
    if section is None:
        raise StateError(f"{label} is missing")
    count, odd = divmod(section.size - ctypes.sizeof(abi.kvm_cpuid2), ctypes.sizeof(abi.kvm_cpuid_entry2))
    if odd or count < 0:
        raise StateError(f"{label}: {section.size} bytes are no CPUID table")
    table = arena.place(SECTION, index, sized(abi.kvm_cpuid2, count), VERSION)
    if table.nent != count:
        raise StateError(f"{label}: it counts {table.nent} entries and has room for {count}")
    return table


def check_cpuid(index: int, kept: Iterable[CpuidFields], offered: Iterable[CpuidFields]) -> None:
    """Raises StateError, with the differences, where this host and VMM offer less than `kept` promised."""
    missing = _missing(_by_leaf(kept), _by_leaf(offered))
    if missing:
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise StateError(
            f"vCPU {index}: the guest has CPU features that this host does not offer: "
            f"{'; '.join(missing[:MOST_NAMED])}{more}; the guest cannot move here"
        )


def can_nest(entries: Iterable[CpuidFields]) -> bool:
    """Whether a guest that sees these entries can run guests of its own (VMX or SVM)."""
    leaves = _by_leaf(entries)
    return any(leaf in leaves and _word(leaves, leaf, register) & bit for leaf, register, bit in (VMX, SVM))


_Leaves = Mapping[tuple[int, int], CpuidFields]


def _by_leaf(entries: Iterable[CpuidFields]) -> _Leaves:
    return {(entry.function, entry.index): entry for entry in entries}


def _word(leaves: _Leaves, leaf: tuple[int, int], register: str) -> int:
    """A register of a leaf; 0 where the leaf is not there, as KVM itself has it."""
    value: int = getattr(leaves[leaf], register) if leaf in leaves else 0
    return value


def _missing(kept: _Leaves, offered: _Leaves) -> list[str]:
    found = []
    for leaf, registers in FEATURES.items():
        for register in registers:
            lost = _word(kept, leaf, register) & ~_word(offered, leaf, register)
            if lost:
                found.append(f"{_name(leaf)}.{register.upper()} bits {lost:#x}")
    same = [VENDOR] + [
        (leaf, XSAVE_PLACE)
        for leaf in kept
        if leaf[0] == XSAVE_LEAF and leaf[1] >= FIRST_EXTENDED_STATE and leaf in offered
    ]
    for leaf, registers in same:
        for register in registers:
            ours, theirs = _word(offered, leaf, register), _word(kept, leaf, register)
            if ours != theirs:
                found.append(f"{_name(leaf)}.{register.upper()} is {theirs:#x} there and {ours:#x} here")
    return found


def _name(leaf: tuple[int, int]) -> str:
    return f"CPUID {leaf[0]:#x}.{leaf[1]}"
