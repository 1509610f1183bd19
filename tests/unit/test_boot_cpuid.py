from __future__ import annotations

from collections.abc import Iterable

import pytest

from vmm.boot.cpuid import CpuidEntry, cpuid_table, guest_cpuid, offers_1gib_pages
from vmm.errors import ConfigError
from vmm.kvm import abi

INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # "GenuineIntel" in EBX, ECX, EDX
AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)
HYGON = (0x6F67_7948, 0x656E_6975, 0x6E65_476E)
KVM = (0x4B4D_564B, 0x564B_4D56, 0x4D)

INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX


def leaf(function: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0, index: int = 0) -> CpuidEntry:
    return CpuidEntry(function, index, INDEX if index else 0, eax, ebx, ecx, edx)


def supported(vendor: tuple[int, int, int] = INTEL) -> list[CpuidEntry]:
    """A host with 16 threads in the middle of its topology, as KVM_GET_SUPPORTED_CPUID might tell it."""
    return [
        leaf(0, 0x1F, *vendor),
        leaf(1, 0xC06F2, 0x2A_10_08_07, 0x0120_2000, 0x0FAB_FBFF),
        leaf(4, 0xFC00_4121, 0x02C0_003F, 0x3F),
        leaf(4, 0xFC00_4143, 0x03C0_003F, 0x7FF, index=2),
        leaf(4, 0xFC01_C163, 0x03C0_003F, 0x7FFF, index=3),
        leaf(4, 0, index=4),
        leaf(0xB, 1, 2, 0x100, 0x2A),
        leaf(0xB, 5, 16, 0x201, 0x2A, index=1),
        leaf(0x1F, 1, 2, 0x100, 0x2A),
        leaf(0xD, 7, 0x340, 0x340),
        leaf(0x4000_0000, 0x4000_0001, *KVM),
        leaf(0x4000_0001, 0x0100_7EFB),
        leaf(0x8000_0001, 0xC06F2, 0, 0x0040_0011, 0x2C10_0800),
        leaf(0x8000_0008, 0x3030, 0x100D000, 0x0003_700F),
        leaf(0x8000_001D, 0x0000_4121, 0x02C0_003F, 0x3F),
        leaf(0x8000_001D, 0x0001_C163, 0x03C0_003F, 0x7FFF, index=3),
        leaf(0x8000_001D, 0, index=4),
        leaf(0x8000_001E, 0x2A, 0x115, 0x101),
        leaf(0x8000_0026, 1, 2, 0x100, 0x2A),
    ]


def find(entries: Iterable[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    (entry,) = [entry for entry in entries if (entry.function, entry.index) == (function, index)]
    return entry


def guest(cpu: int, cpus: int, vendor: tuple[int, int, int] = INTEL) -> tuple[CpuidEntry, ...]:
    return guest_cpuid(supported(vendor), cpu, cpus, tsc_deadline=True, tsc_khz=2_400_000)


@pytest.mark.parametrize(
    ("cpu", "cpus", "ebx", "htt"),
    [(0, 1, 0x0001_0807, 0), (2, 3, 0x0204_0807, 1), (3, 4, 0x0304_0807, 1), (254, 255, 0xFEFF_0807, 1)],
)
def test_apic_id_and_count(cpu: int, cpus: int, ebx: int, htt: int) -> None:
    features = find(guest(cpu, cpus), 1)
    assert features.ebx == ebx
    assert features.edx >> 28 & 1 == htt
    assert features.eax == 0xC06F2


@pytest.mark.parametrize("tsc_deadline", [False, True])
def test_feature_bits(tsc_deadline: bool) -> None:
    ecx = find(guest_cpuid(supported(), 0, 1, tsc_deadline=tsc_deadline), 1).ecx
    assert ecx == 0x8020_2000 | tsc_deadline << 24


@pytest.mark.parametrize("function", [0xB, 0x1F])
def test_extended_topology(function: int) -> None:
    entries = [entry for entry in guest(4, 6) if entry.function == function]
    assert entries == [
        CpuidEntry(function, 0, INDEX, 0, 1, 0x100, 4),
        CpuidEntry(function, 1, INDEX, 3, 6, 0x201, 4),
        CpuidEntry(function, 2, INDEX, 0, 0, 0x002, 4),
    ]


def test_topology_leaves_that_the_host_lacks_are_not_invented() -> None:
    entries = [entry for entry in supported() if entry.function != 0x1F]
    functions = [entry.function for entry in guest_cpuid(entries, 0, 2, tsc_deadline=False)]
    assert (functions.count(0xB), functions.count(0x1F)) == (3, 0)


@pytest.mark.parametrize("vendor", [INTEL, AMD])
def test_topology_of_the_host_does_not_show(vendor: tuple[int, int, int]) -> None:
    entries = guest(1, 2, vendor)
    assert not [entry for entry in entries if entry.function == 0x8000_0026]
    assert len({(entry.function, entry.index) for entry in entries}) == len(entries)


def test_intel_caches() -> None:
    entries = guest(0, 6)
    assert find(entries, 4).eax == 7 << 26 | 0x121
    assert find(entries, 4, 2).eax == 7 << 26 | 0x143
    assert find(entries, 4, 3).eax == 7 << 26 | 7 << 14 | 0x163
    assert find(entries, 4, 4) == leaf(4, 0, index=4)
    assert find(guest(0, 255), 4, 3).eax == 63 << 26 | 255 << 14 | 0x163
    assert find(guest(0, 1), 4, 3).eax == 0x163


def test_amd_leaves_of_an_intel_host_are_left_alone() -> None:
    for entry in supported():
        if 0x8000_0000 <= entry.function < 0x8000_0026:
            assert entry in guest(1, 2)


@pytest.mark.parametrize("vendor", [AMD, HYGON], ids=["amd", "hygon"])
def test_amd(vendor: tuple[int, int, int]) -> None:
    entries = guest(5, 6, vendor)
    assert find(entries, 0x8000_0001).ecx == 0x0040_0013
    assert find(guest(0, 1, vendor), 0x8000_0001).ecx == 0x0040_0011
    assert find(entries, 0x8000_0008) == leaf(0x8000_0008, 0x3030, 0x100D000, 0x0003_3005)
    assert find(entries, 0x8000_001D).eax == 0x121
    assert find(entries, 0x8000_001D, 3).eax == 7 << 14 | 0x163
    assert find(entries, 0x8000_001D, 4).eax == 0
    assert find(entries, 0x8000_001E) == leaf(0x8000_001E, 5, 5)
    assert find(entries, 4) in supported()


def test_kvm_leaves_are_kept_and_timing_added() -> None:
    entries = guest(0, 1)
    assert find(entries, 0x4000_0000) == leaf(0x4000_0000, 0x4000_0010, *KVM)
    assert find(entries, 0x4000_0001).eax == 0x0100_7E7B
    assert find(entries, 0x4000_0010) == leaf(0x4000_0010, 2_400_000, 1_000_000)


def test_what_cannot_be_moved_is_not_offered() -> None:
    """Shadow stacks and branch tracking; the paravirtual kick, but to a guest that has it already."""
    host = [
        *supported(),
        leaf(7, 2, 0x10, 0xFFFF_FFFF, 0xFFFF_FFFF),
        leaf(7, 5, 5, 0xFFFF_FFFF, 0xFFFF_FFFF, index=1),
        leaf(0xD, 0xF, 0, 0x1900, index=1),
        leaf(0xD, 16, 0, 1, index=11),
        leaf(0xD, 24, 0, 1, index=12),
    ]
    entries = guest_cpuid(host, 0, 1, tsc_deadline=True)
    assert find(entries, 7) == leaf(7, 2, 0x10, 0xFFFF_FF7F, 0xFFEF_FFFF)
    assert find(entries, 7, 1) in host
    assert find(entries, 0xD, 1).ecx == 0x100
    assert {entry.index for entry in entries if entry.function == 0xD} == {0, 1}
    assert find(entries, 0x4000_0001).eax == 0x0100_7E7B
    moved = guest_cpuid(host, 0, 1, tsc_deadline=True, pv_unhalt=True)
    assert find(moved, 0x4000_0001).eax == 0x0100_7EFB
    assert find(moved, 7) == find(entries, 7)


def test_timing_of_the_host_is_kept() -> None:
    own = leaf(0x4000_0010, 1, 2)
    entries = guest_cpuid([*supported(), own], 0, 1, tsc_deadline=False, tsc_khz=3)
    assert find(entries, 0x4000_0010) == own


def test_no_timing_without_a_frequency_or_without_kvm() -> None:
    assert find(guest_cpuid(supported(), 0, 1, tsc_deadline=False), 0x4000_0000).eax == 0x4000_0001
    bare = [entry for entry in supported() if entry.function != 0x4000_0000]
    assert 0x4000_0010 not in {
        entry.function for entry in guest_cpuid(bare, 0, 1, tsc_deadline=False, tsc_khz=3)
    }


@pytest.mark.parametrize(("cpu", "cpus"), [(0, 0), (1, 1), (-1, 1), (0, 256)])
def test_no_apic_id(cpu: int, cpus: int) -> None:
    sentence = f"cpus: vCPU {cpu} of {cpus} cannot have an APIC id; choose 1 to 255 vCPUs"
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        guest_cpuid(supported(), cpu, cpus, tsc_deadline=False)


def test_1gib_pages() -> None:
    assert offers_1gib_pages(supported())
    assert not offers_1gib_pages([leaf(0x8000_0001, edx=0x2810_0800), leaf(1, edx=1 << 26)])


def test_kernel_structures_in_and_out() -> None:
    table = cpuid_table(guest(1, 2))
    assert table.nent == len(table.entries) == len(guest(1, 2))
    assert isinstance(table, abi.kvm_cpuid2)
    again = guest_cpuid(table.entries, 1, 2, tsc_deadline=True, tsc_khz=2_400_000)
    assert set(again) == set(guest(1, 2))
