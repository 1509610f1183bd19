"""What this host can give a machine: KVM's capabilities, clocks, memory. It is only asked, never changed.

A VM with one vCPU is made for what only a VM can say, and ended again; no guest runs.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import HostError
from vmm.fds import RAM_SEALS, sealed_memfd
from vmm.kvm import Cap, CapabilityReport, System, abi, missing_required, probe
from vmm.memory.guest import HUGE_PAGES
from vmm.units import MIB

CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
HUGE_PAGE_POOLS = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True)
class TimeFacts:
    """Clocks: the TSC's frequency, and how well a handover that rebuilds the VM keeps the guest's."""

    tsc_khz: int
    tsc_moves: bool  # the TSC offset can be read and set
    tsc_scales: bool  # a guest's TSC may have another frequency than the host's
    kvmclock_from_tsc: (
        bool  # kvmclock is a line over the TSC: it moves to some nanoseconds, else to microseconds
    )
    clocksource: str


@dataclass(frozen=True)
class HugePages:
    """One pool of huge pages; counts are pages."""

    size: str
    total: int
    free: int


@dataclass(frozen=True)
class KvmFacts:
    """What /dev/kvm says."""

    api_version: int
    capabilities: tuple[CapabilityReport, ...]
    time: TimeFacts | None  # None where a required capability is missing and no VM was made

    @property
    def usable(self) -> bool:
        """Whether what a guest needs is there."""
        return not missing_required(self.capabilities)


@dataclass(frozen=True)
class HostReport:
    """All of it. `kvm_error` says why there is no `kvm`."""

    kvm: KvmFacts | None
    kvm_error: str | None
    sealed_memfd: bool
    huge_pages: tuple[HugePages, ...]

    @property
    def usable(self) -> bool:
        """Whether a machine can be made."""
        return self.kvm is not None and self.kvm.usable and self.sealed_memfd


def examine() -> HostReport:
    """Ask this host."""
    kvm, error = None, None
    try:
        kvm = _kvm()
    except HostError as refused:
        error = str(refused)
    return HostReport(kvm, error, _seals(), tuple(_pool(size) for size in HUGE_PAGES))


def _kvm() -> KvmFacts:
    with System() as system:
        capabilities = probe(system)
        time = None if missing_required(capabilities) else _time(system)
        return KvmFacts(system.api_version, capabilities, time)


def _time(system: System) -> TimeFacts:
    try:
        clocksource = CLOCKSOURCE.read_text().strip()
    except OSError:
        clocksource = "unknown"
    with system.create_vm() as vm:
        vm.set_tss_address()
        vm.set_identity_map()
        with vm.create_vcpu(0) as vcpu:
            clock = abi.kvm_clock_data()
            if vm.check(Cap.ADJUST_CLOCK):
                vm.set_clock(clock)  # KVM looks at the TSC's stability only then
                vm.get_clock(clock)
            return TimeFacts(
                tsc_khz=vcpu.tsc_khz if vm.check(Cap.GET_TSC_KHZ) else 0,
                tsc_moves=vm.check(Cap.VCPU_ATTRIBUTES) != 0,
                tsc_scales=vm.check(Cap.TSC_CONTROL) != 0,
                kvmclock_from_tsc=bool(clock.flags & abi.KVM_CLOCK_HOST_TSC),
                clocksource=clocksource,
            )


def _seals() -> bool:
    """Whether a memfd can be sealed against shrinking and growing."""
    try:
        fd = sealed_memfd("vmm-doctor", 4096)
    except OSError:
        return False
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & RAM_SEALS == RAM_SEALS
    finally:
        os.close(fd)


def _pool(size: str) -> HugePages:
    folder = HUGE_PAGE_POOLS / f"hugepages-{HUGE_PAGES[size][0] * 1024 // MIB}kB"

    def count(name: str) -> int:
        try:
            return int((folder / name).read_text())
        except OSError:
            return 0  # a size that this processor or kernel has not got

    return HugePages(size, count("nr_hugepages"), count("free_hugepages"))
