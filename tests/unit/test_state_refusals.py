"""State that this host cannot take is refused, with what is wrong named; state that it can is not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from vmm.boot.cpuid import CpuidEntry
from vmm.errors import StateError, VmmError
from vmm.fds import FdStore
from vmm.kvm import Cap, Vcpu, Vm
from vmm.machine.cpuid_state import can_nest, check_cpuid, keep_cpuid, kept_cpuid
from vmm.machine.msr_state import MsrList, MsrState
from vmm.machine.tsc_state import TscState
from vmm.state import Arena

INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # EBX, ECX, EDX of leaf 0
OFFERED = (
    CpuidEntry(0x0, 0, 0, 0x16, *INTEL),
    CpuidEntry(0x1, 0, 0, 0x906EA, 0x10800, 0x8000_0201, 0x178B_FBFF),
    CpuidEntry(0x7, 0, 1, 0, 0x0000_0018, 0, 0),
    CpuidEntry(0xD, 0, 1, 7, 0, 0, 0),
    CpuidEntry(0xD, 2, 1, 256, 576, 0, 0),
    CpuidEntry(0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0),
    CpuidEntry(0x8000_0001, 0, 0, 0, 0, 0x21, 0x2C10_0800),
    CpuidEntry(0x8000_0002, 0, 0, 1, 2, 3, 4),
)


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


def but(leaf: int, **changed: int) -> tuple[CpuidEntry, ...]:
    """OFFERED with one leaf changed."""
    return tuple(replace(entry, **changed) if entry.function == leaf else entry for entry in OFFERED)


# --- CPUID ---


def test_cpuid_is_kept_as_it_was_made(fds: FdStore) -> None:
    arena = Arena.open(fds)
    keep_cpuid(arena, 3, OFFERED)
    kept = kept_cpuid(arena, 3)
    assert kept.nent == len(OFFERED)
    assert [entry.function for entry in kept.entries] == [entry.function for entry in OFFERED]
    assert (kept.entries[7].eax, kept.entries[7].edx) == (1, 4)
    check_cpuid(3, kept.entries, OFFERED)


def test_what_is_no_feature_may_differ() -> None:
    check_cpuid(0, but(0x8000_0002, eax=99), OFFERED)
    check_cpuid(0, but(0x1, eax=0x806EA), OFFERED)


def test_a_guest_may_have_less_than_is_offered() -> None:
    check_cpuid(0, but(0x7, ebx=0x8), OFFERED)
    check_cpuid(0, [entry for entry in OFFERED if entry.function != 0x7], OFFERED)


@pytest.mark.parametrize(
    ("guest", "says"),
    [
        (but(0x7, ebx=0x0001_0018), r"CPUID 0x7\.0\.EBX bits 0x10000"),
        (but(0x1, ecx=0x8000_0601), r"CPUID 0x1\.0\.ECX bits 0x400"),
        (but(0x4000_0001, eax=0x0100_7FFF), r"CPUID 0x40000001\.0\.EAX bits 0x104"),
        (but(0x0, ebx=0x6874_7541), r"CPUID 0x0\.0\.EBX is 0x68747541 there and 0x756e6547 here"),
        (but(0xD, eax=512), r"CPUID 0xd\.0\.EAX bits 0x200; CPUID 0xd\.2\.EAX is 0x200 there and 0x100 here"),
        ((*OFFERED, CpuidEntry(0x19, 0, 0, 0, 1, 0, 0)), r"CPUID 0x19\.0\.EBX bits 0x1"),
    ],
    ids=["feature", "leaf-1", "kvm", "vendor", "xsave", "leaf"],
)
def test_what_the_guest_would_miss_is_listed(guest: tuple[CpuidEntry, ...], says: str) -> None:
    with pytest.raises(StateError, match=f"vCPU 5: .*{says}.*cannot move here"):
        check_cpuid(5, guest, OFFERED)


def test_a_long_list_ends() -> None:
    everything = [
        replace(entry, eax=2**32 - 1, ebx=2**32 - 1, ecx=2**32 - 1, edx=2**32 - 1) for entry in OFFERED
    ]
    with pytest.raises(StateError, match=r"and \d+ more; the guest"):
        check_cpuid(0, everything, OFFERED)


@pytest.mark.parametrize(
    ("entries", "nests"),
    [
        (OFFERED, False),
        (but(0x1, ecx=1 << 5), True),
        (but(0x8000_0001, ecx=1 << 2), True),
        ((), False),
    ],
    ids=["neither", "vmx", "svm", "nothing"],
)
def test_who_can_nest(entries: tuple[CpuidEntry, ...], nests: bool) -> None:
    assert can_nest(entries) == nests


def test_cpuid_that_is_missing_or_none(fds: FdStore) -> None:
    arena = Arena.open(fds)
    with pytest.raises(StateError, match="vcpu/cpuid/0 is missing"):
        kept_cpuid(arena, 0)
    arena.place("vcpu/cpuid", 1, ctypes.c_ubyte * 50, 1)
    with pytest.raises(StateError, match="50 bytes are no CPUID table"):
        kept_cpuid(arena, 1)
    keep_cpuid(arena, 2, OFFERED)
    kept_cpuid(arena, 2).nent = 200
    with pytest.raises(StateError, match="counts 200 entries and has room for 8"):
        kept_cpuid(arena, 2)


# --- MSRs ---


class MsrVcpu:
    """A vCPU that is nothing but MSRs; `stuck` cannot be set to anything else than they are."""

    index = 7

    def __init__(self, values: dict[int, int], stuck: tuple[int, ...] = ()) -> None:
        self.values = values
        self.stuck = stuck

    def get_msrs(self, block: Any) -> int:
        for number, entry in enumerate(block.entries):
            if entry.index not in self.values:
                return number
            entry.data = self.values[entry.index]
        return len(block.entries)

    def set_msrs(self, block: Any) -> int:
        for number, entry in enumerate(block.entries):
            if entry.index not in self.values or entry.index in self.stuck:
                return number
            self.values[entry.index] = entry.data
        return len(block.entries)


class LittleRam:
    """RAM up to 0x1008, so that not all of what lies at 0x1000 and is longer can be read."""

    def __init__(self) -> None:
        self.content = bytearray(0x1008)

    def read(self, gpa: int, length: int) -> bytes:
        if gpa + length > len(self.content):
            raise VmmError("this is no RAM")
        return bytes(self.content[gpa : gpa + length])

    def write(self, gpa: int, data: bytes) -> None:
        assert gpa + len(data) <= len(self.content)
        self.content[gpa : gpa + len(data)] = data


RAM = LittleRam()


def msr_vcpu(values: dict[int, int], stuck: tuple[int, ...] = ()) -> Vcpu:
    return cast(Vcpu, MsrVcpu(values, stuck))


def test_msrs_are_sorted_by_trying() -> None:
    vcpu = msr_vcpu({0x10: 1, 0x174: 2, 0x8B: 3, 0x277: 4}, stuck=(0x8B,))
    assert MsrList.probe(vcpu, (0x10, 0x174, 0xDEAD, 0x8B, 0xBEEF, 0x277)) == MsrList((0x174, 0x277), (0x8B,))


def test_msrs_move(fds: FdStore) -> None:
    arena = Arena.open(fds)
    old, new = msr_vcpu({0x174: 2, 0x277: 4, 0x8B: 1}), msr_vcpu({0x174: 0, 0x277: 0, 0x8B: 1}, stuck=(0x8B,))
    msrs = MsrList((0x174, 0x277), (0x8B,))
    MsrState(arena, 7, msrs, RAM).save(old)
    MsrState(arena, 7, msrs, RAM).load(new)
    assert cast(MsrVcpu, new).values == {0x174: 2, 0x277: 4, 0x8B: 1}
    assert MsrState(arena, 0, msrs, RAM) is not None
    assert MsrList.of(arena) == msrs


class WallClockVcpu(MsrVcpu):
    """One whose KVM writes to RAM when told to."""

    def __init__(self, index: int, ram: LittleRam) -> None:
        super().__init__({0x174: 0, 0x11: 0, 0x277: 0, 0x4B56_4D00: 0})
        self.index = index
        self.ram = ram

    def set_msrs(self, block: Any) -> int:
        for entry in block.entries:
            if entry.index in (0x11, 0x4B56_4D00) and entry.data < len(self.ram.content):
                self.ram.content[entry.data : entry.data + 8] = b"new time"
        return super().set_msrs(block)


@pytest.mark.parametrize("address", [0x1000, 0x800, 2**63])
@pytest.mark.parametrize("index", [0, 1])
def test_setting_the_wall_clock_changes_no_ram(address: int, index: int, fds: FdStore) -> None:
    """It is the VM's, so the first vCPU's to set, and needs not be in RAM."""
    ram, values = LittleRam(), {0x174: 2, 0x11: address, 0x277: 4, 0x4B56_4D00: address}
    ram.content[:] = bytes(n % 251 for n in range(len(ram.content)))
    before = bytes(ram.content)
    state = MsrState(Arena.open(fds), index, MsrList(tuple(values), ()), ram)
    state.save(msr_vcpu(values))
    new = WallClockVcpu(index, ram)
    state.load(cast(Vcpu, new))
    assert bytes(ram.content) == before
    assert new.values == (values if index == 0 else {**values, 0x11: 0, 0x4B56_4D00: 0})


def test_an_msr_that_this_host_has_not_got_is_named(fds: FdStore) -> None:
    arena = Arena.open(fds)
    MsrState(arena, 7, MsrList((0x174, 0x123, 0x124), ()), RAM)
    with pytest.raises(StateError, match=r"vCPU 7: this host's KVM has no MSR 0x123, 0x124"):
        MsrState(arena, 7, MsrList((0x174,), ()), RAM)


def test_an_msr_that_cannot_be_restored_is_named(fds: FdStore) -> None:
    arena = Arena.open(fds)
    state = MsrState(arena, 7, MsrList((0x174, 0x277), ()), RAM)
    state.save(msr_vcpu({0x174: 2, 0x277: 0x0606}))
    with pytest.raises(StateError, match=r"vCPU 7: MSR 0x277 cannot be restored to 0x606 on this host"):
        state.load(msr_vcpu({0x174: 0, 0x277: 0}, stuck=(0x277,)))


def test_a_fixed_msr_that_differs_is_named(fds: FdStore) -> None:
    arena = Arena.open(fds)
    state = MsrState(arena, 7, MsrList((), (0x8B, 0xCE)), RAM)
    state.save(msr_vcpu({0x8B: 1, 0xCE: 5}))
    state.load(msr_vcpu({0x8B: 1, 0xCE: 5}))
    with pytest.raises(StateError, match=r"MSR 0xce is 0x5 in the guest and 0x6 on this host"):
        state.load(msr_vcpu({0x8B: 1, 0xCE: 6}))


def test_an_msr_that_cannot_be_read_any_more_is_named(fds: FdStore) -> None:
    arena = Arena.open(fds)
    state = MsrState(arena, 7, MsrList((0x174, 0x277), ()), RAM)
    with pytest.raises(StateError, match="MSR 0x277 cannot be read any more"):
        state.save(msr_vcpu({0x174: 2}))


@pytest.mark.parametrize(
    ("size", "count", "says"), [(9, 0, "9 bytes is no list"), (24, 9, "counts 9 MSRs and has room for 1")]
)
def test_a_section_that_is_no_list_of_msrs(fds: FdStore, size: int, count: int, says: str) -> None:
    arena = Arena.open(fds)
    raw = arena.place("vcpu/msrs", 0, ctypes.c_ubyte * size, 1)
    raw[0] = count
    with pytest.raises(StateError, match=says):
        MsrState(arena, 0, MsrList((0x174,), ()), RAM)


def test_without_sections_there_is_no_list(fds: FdStore) -> None:
    arena = Arena.open(fds)
    with pytest.raises(StateError, match="vcpu/msrs/0 is missing"):
        MsrList.of(arena)


# --- the TSC ---


class TscVcpu:
    index = 2

    def __init__(self, khz: int) -> None:
        self.tsc_khz = khz
        self.tsc_offset = 0

    def set_tsc_khz(self, khz: int) -> None:
        self.tsc_khz = khz


class TscVm:
    def __init__(self, *caps: Cap) -> None:
        self.caps = caps

    def check(self, cap: int) -> int:
        return cap in (*self.caps, Cap.GET_TSC_KHZ)


def tsc_of(arena: Arena, khz: int, offset: int) -> TscState:
    vcpu = TscVcpu(khz)
    vcpu.tsc_offset = offset
    state = TscState(arena, cast(Vcpu, vcpu))
    state.save(cast(Vm, TscVm(Cap.VCPU_ATTRIBUTES)), cast(Vcpu, vcpu))
    return state


def test_the_tsc_moves_to_the_cycle(fds: FdStore) -> None:
    arena = Arena.open(fds)
    vcpu = TscVcpu(2_500_000)
    tsc_of(arena, 2_500_000, 2**64 - 12345).prepare(cast(Vm, TscVm()), cast(Vcpu, vcpu))
    assert vcpu.tsc_offset == 2**64 - 12345


def test_another_frequency_is_scaled_where_kvm_can(fds: FdStore) -> None:
    arena = Arena.open(fds)
    vcpu = TscVcpu(3_000_000)
    tsc_of(arena, 2_500_000, 1).prepare(cast(Vm, TscVm(Cap.TSC_CONTROL)), cast(Vcpu, vcpu))
    assert (vcpu.tsc_khz, vcpu.tsc_offset) == (2_500_000, 1)


def test_another_frequency_is_refused_where_kvm_cannot(fds: FdStore) -> None:
    arena = Arena.open(fds)
    with pytest.raises(
        StateError, match=r"vCPU 2: the guest's TSC runs at 2500000 kHz, this host's at 3000000"
    ):
        tsc_of(arena, 2_500_000, 1).prepare(cast(Vm, TscVm()), cast(Vcpu, TscVcpu(3_000_000)))


def test_a_host_without_offsets_is_not_asked_for_them(fds: FdStore) -> None:
    arena = Arena.open(fds)
    vcpu = TscVcpu(2_500_000)
    state = TscState(arena, cast(Vcpu, vcpu))
    state.save(cast(Vm, TscVm()), cast(Vcpu, vcpu))
    vcpu.tsc_offset = 5
    state.load(cast(Vcpu, vcpu))
    assert vcpu.tsc_offset == 5


def test_state_that_nobody_asked_for_is_listed(fds: FdStore) -> None:
    old = Arena.open(fds)
    old.place("vcpu/future", 1, ctypes.c_uint64, 1)
    keep_cpuid(old, 0, OFFERED)
    received = Arena.open(fds)
    kept_cpuid(received, 0)
    assert [section.name for section in received.unplaced()] == ["vcpu/future"]
