"""The CPUID that each vCPU shows its guest: what KVM supports, in the machine's topology, not the host's.

Follows Intel SDM vol. 2 (CPUID), AMD APM vol. 3 appendix E, and for the hypervisor leaves Linux
Documentation/virt/kvm/x86/cpuid.rst. KVM_GET_SUPPORTED_CPUID (KVM API 4.46) leaves APIC ids and topology to
its caller: they are those of whichever host CPU answered, or zeros. The topology here is one package of
single-threaded cores, one a vCPU, whose APIC ids are the vCPU indices. It never offers a CPU feature that KVM
did not, nor one whose state KVM gives nobody to move: shadow stacks (the shadow stack pointer), KVM's
paravirtual kick (one that is sent to a vCPU before it halts is kept where no ioctl reads it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

from vmm.errors import ConfigError
from vmm.kvm import abi

MAX_CPUS = 255  # an xAPIC id has 8 bits, and 255 is the broadcast
KVM_APIC_BUS_KHZ = 1_000_000  # what KVM emulates unless KVM_CAP_X86_APIC_BUS_CYCLES_NS says otherwise

SIGNIFICANT_INDEX = 1 << 0  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX of asm/kvm.h

VENDOR_LEAF = 0x0
FEATURES_LEAF = 0x1
CACHE_LEAF = 0x4
TOPOLOGY_LEAVES = (0xB, 0x1F)
KVM_SIGNATURE_LEAF = 0x4000_0000
KVM_FEATURES_LEAF = 0x4000_0001
STRUCTURED_FEATURES_LEAF = 0x7
XSAVE_LEAF = 0xD
TIMING_LEAF = 0x4000_0010  # VMware's, by QEMU also used with KVM's signature: TSC and APIC bus kHz
EXTENDED_FEATURES_LEAF = 0x8000_0001
AMD_SIZES_LEAF = 0x8000_0008
AMD_CACHE_LEAF = 0x8000_001D
AMD_TOPOLOGY_LEAF = 0x8000_001E
AMD_EXTENDED_TOPOLOGY_LEAF = 0x8000_0026  # never offered: absent, it reads as zeros, and leaf 0xB says it all

HOST_TOPOLOGY = (*TOPOLOGY_LEAVES, AMD_EXTENDED_TOPOLOGY_LEAF)  # dropped as they come from KVM

KVM_SIGNATURE = (0x4B4D_564B, 0x564B_4D56, 0x4D)  # "KVMKVMKVM" in EBX, ECX, EDX
AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")

# Feature bits: leaf 1 ECX, leaf 1 EDX, leaf 0x80000001 ECX, leaf 0x80000001 EDX
TSC_DEADLINE = 1 << 24
HYPERVISOR = 1 << 31
HTT = 1 << 28  # the package may hold several logical processors, so leaf 1 EBX[23:16] counts
CMP_LEGACY = 1 << 1  # AMD: those logical processors are cores
PDPE1GB = 1 << 26
SHADOW_STACKS, BRANCH_TRACKING = 1 << 7, 1 << 20  # CET: leaf 7 ECX, EDX
CET_STATES = (11, 12)  # sub-leaves of leaf 0xD, and bits of ECX of its sub-leaf 1
PV_UNHALT = 1 << 7  # leaf 0x40000001 EAX

SMT_LEVEL = 1  # level types of leaves 0xB and 0x1F, ECX[15:8]
CORE_LEVEL = 2


class CpuidFields(Protocol):
    """What is read of an entry: kvm_cpuid_entry2's fields."""

    @property
    def function(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def eax(self) -> int: ...
    @property
    def ebx(self) -> int: ...
    @property
    def ecx(self) -> int: ...
    @property
    def edx(self) -> int: ...


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """kvm_cpuid_entry2 as a value."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


@dataclass(frozen=True)
class _Cpu:
    """One vCPU among its machine's, as the entries' edits need it."""

    apic_id: int
    cpus: int
    tsc_deadline: bool
    pv_unhalt: bool

    @property
    def id_bits(self) -> int:
        """Bits of an APIC id that tell the cores of the package apart."""
        return (self.cpus - 1).bit_length()

    @property
    def last_id(self) -> int:
        """The highest core number those bits can hold."""
        return (1 << self.id_bits) - 1


def guest_cpuid(
    supported: Iterable[CpuidFields],
    vcpu_index: int,
    cpus: int,
    *,
    tsc_deadline: bool,
    tsc_khz: int | None = None,
    apic_bus_khz: int = KVM_APIC_BUS_KHZ,
    pv_unhalt: bool = False,
) -> tuple[CpuidEntry, ...]:
    """The entries for KVM_SET_CPUID2 of vCPU `vcpu_index` of `cpus`, from those of KVM_GET_SUPPORTED_CPUID.

    `supported` is what counts of a kvm_cpuid2: `table.entries[: table.nent]`.
    `tsc_deadline` says that the kernel has KVM_CAP_TSC_DEADLINE_TIMER and the machine an in-kernel local
    APIC. With `tsc_khz`, the guest can read both frequencies from leaf 0x40000010. With `pv_unhalt` the
    paravirtual kick is offered if KVM does: not to new guests. Raises ConfigError for a vCPU that no xAPIC id
    can name.
    """
    if not 0 <= vcpu_index < cpus <= MAX_CPUS:
        raise ConfigError(
            f"cpus: vCPU {vcpu_index} of {cpus} cannot have an APIC id; choose 1 to {MAX_CPUS} vCPUs"
        )
    entries = [_value(entry) for entry in supported]
    cpu = _Cpu(vcpu_index, cpus, tsc_deadline, pv_unhalt)
    edits = _edits(amd=_is_amd(entries))
    guest = [
        edits.get(entry.function, _unchanged)(entry, cpu)
        for entry in entries
        if entry.function not in HOST_TOPOLOGY and not _is_cet_state(entry)
    ]
    for function in TOPOLOGY_LEAVES:
        if any(entry.function == function for entry in entries):
            guest += _topology(function, cpu)
    return tuple(guest if tsc_khz is None else _with_timing(guest, tsc_khz, apic_bus_khz))


def cpuid_table(entries: Sequence[CpuidEntry]) -> abi.kvm_cpuid2:
    """The entries as KVM_SET_CPUID2 takes them."""
    table = abi.sized(abi.kvm_cpuid2, len(entries))(nent=len(entries))
    for slot, entry in zip(table.entries, entries, strict=True):
        for field in fields(entry):
            setattr(slot, field.name, getattr(entry, field.name))
    return table


def offers_1gib_pages(entries: Iterable[CpuidFields]) -> bool:
    """Whether a CPUID offers 1 GiB pages (leaf 0x80000001 EDX[26])."""
    return any(entry.function == EXTENDED_FEATURES_LEAF and entry.edx & PDPE1GB for entry in entries)


def _value(entry: CpuidFields) -> CpuidEntry:
    return CpuidEntry(entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx)


def _is_amd(entries: Iterable[CpuidEntry]) -> bool:
    for entry in entries:
        if entry.function == VENDOR_LEAF:
            vendor = b"".join(word.to_bytes(4, "little") for word in (entry.ebx, entry.edx, entry.ecx))
            return vendor in AMD_VENDORS
    return False


def _with(value: int, mask: int, present: bool) -> int:
    return value | mask if present else value & ~mask


def _with_field(value: int, high: int, low: int, field: int) -> int:
    """`value` with its bits `high`..`low` replaced by `field`, or by the most that they hold."""
    most = (1 << (high - low + 1)) - 1
    return value & ~(most << low) | min(field, most) << low


def _features(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    ebx = _with_field(entry.ebx, 31, 24, cpu.apic_id)
    ebx = _with_field(ebx, 23, 16, cpu.last_id + 1)
    ecx = _with(entry.ecx | HYPERVISOR, TSC_DEADLINE, cpu.tsc_deadline)
    return replace(entry, ebx=ebx, ecx=ecx, edx=_with(entry.edx, HTT, cpu.cpus > 1))


def _structured_features(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    if entry.index:
        return entry
    return replace(entry, ecx=entry.ecx & ~SHADOW_STACKS, edx=entry.edx & ~BRANCH_TRACKING)


def _extended_states(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    """Leaf 0xD, sub-leaf 1: ECX has the states that IA32_XSS may enable."""
    if entry.index != 1:
        return entry
    return replace(entry, ecx=entry.ecx & ~sum(1 << state for state in CET_STATES))


def _is_cet_state(entry: CpuidEntry) -> bool:
    return entry.function == XSAVE_LEAF and entry.index in CET_STATES


def _kvm_features(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    return entry if cpu.pv_unhalt else replace(entry, eax=entry.eax & ~PV_UNHALT)


def _cache_sharing(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    """EAX of leaves 4 and 0x8000001D: [4:0] type (0: no cache), [7:5] level, [25:14] its sharers less one."""
    if entry.eax & 0x1F == 0:
        return entry
    level = entry.eax >> 5 & 7
    return replace(entry, eax=_with_field(entry.eax, 25, 14, cpu.last_id if level >= 3 else 0))


def _intel_cache(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    """Leaf 4 also holds the cores of the package less one, in EAX[31:26]."""
    if entry.eax & 0x1F == 0:
        return entry
    shared = _cache_sharing(entry, cpu)
    return replace(shared, eax=_with_field(shared.eax, 31, 26, cpu.last_id))


def _amd_extended_features(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    return replace(entry, ecx=_with(entry.ecx, CMP_LEGACY, cpu.cpus > 1))


def _amd_sizes(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    """Leaf 0x80000008: cores less one in ECX[7:0], the id bits that tell them apart in ECX[15:12]."""
    ecx = _with_field(entry.ecx, 7, 0, cpu.cpus - 1)
    return replace(entry, ecx=_with_field(ecx, 15, 12, cpu.id_bits))


def _amd_topology(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    """Leaf 0x8000001E: APIC id; core number, one thread each; node 0, the only one."""
    return replace(entry, eax=cpu.apic_id, ebx=cpu.apic_id, ecx=0, edx=0)


def _topology(function: int, cpu: _Cpu) -> list[CpuidEntry]:
    """Leaf 0xB or 0x1F by level: threads of a core, cores of the package, end.

    EAX: x2APIC id bits up to this level, EBX: logical processors in it, ECX: type and index, EDX: x2APIC id.
    """
    levels = ((0, 1, SMT_LEVEL), (cpu.id_bits, cpu.cpus, CORE_LEVEL), (0, 0, 0))
    return [
        CpuidEntry(function, index, SIGNIFICANT_INDEX, shift, count, level << 8 | index, cpu.apic_id)
        for index, (shift, count, level) in enumerate(levels)
    ]


def _with_timing(entries: list[CpuidEntry], tsc_khz: int, apic_bus_khz: int) -> list[CpuidEntry]:
    """Adds the timing leaf, within the range that KVM's signature gives, unless KVM has filled it itself."""
    if any(entry.function == TIMING_LEAF for entry in entries):
        return entries
    timing = CpuidEntry(TIMING_LEAF, 0, 0, tsc_khz, apic_bus_khz, 0, 0)
    for at, entry in enumerate(entries):
        if entry.function == KVM_SIGNATURE_LEAF and (entry.ebx, entry.ecx, entry.edx) == KVM_SIGNATURE:
            signature = replace(entry, eax=max(entry.eax, TIMING_LEAF))
            return [*entries[:at], signature, *entries[at + 1 :], timing]
    return entries


def _unchanged(entry: CpuidEntry, cpu: _Cpu) -> CpuidEntry:
    return entry


def _edits(*, amd: bool) -> dict[int, Callable[[CpuidEntry, _Cpu], CpuidEntry]]:
    """Leaf -> what becomes of its entries. A leaf that is only the other vendor's is left alone."""
    common = {
        FEATURES_LEAF: _features,
        STRUCTURED_FEATURES_LEAF: _structured_features,
        XSAVE_LEAF: _extended_states,
        KVM_FEATURES_LEAF: _kvm_features,
    }
    if amd:
        return {
            **common,
            EXTENDED_FEATURES_LEAF: _amd_extended_features,
            AMD_SIZES_LEAF: _amd_sizes,
            AMD_CACHE_LEAF: _cache_sharing,
            AMD_TOPOLOGY_LEAF: _amd_topology,
        }
    return {**common, CACHE_LEAF: _intel_cache}
