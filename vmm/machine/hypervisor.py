"""The KVM side of a machine: its VM, its vCPUs, its RAM and KVM's state, made anew or gone on with.

Three origins, one shape. NEW: a VM made for a new guest. REBUILT: a VM made for a guest that another VMM
stopped, to be loaded from the state memfd. ADOPTED: the very VM of that guest, driven on through the port
that the machine is given.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from enum import Enum
from typing import ClassVar, cast

from vmm.boot.cpuid import guest_cpuid, offers_1gib_pages
from vmm.errors import HostError
from vmm.fds import FdStore, check_received, sealed_memfd
from vmm.kvm import Cap, Port, System, Vcpu, Vm, abi
from vmm.kvm.capabilities import LOADABLE, probe, require, require_guest_memfd
from vmm.machine.config import MachineConfig
from vmm.machine.cpuid_state import can_nest, check_cpuid, keep_cpuid, kept_cpuid
from vmm.machine.guest_clock import GuestClock
from vmm.machine.kvm_state import STATE_NEEDS, XSAVE_SIZE, VcpuFacts, VcpuState, VmState, vm_pieces
from vmm.machine.msr_state import MsrList, guest_msrs
from vmm.machine.tsc_state import TscState
from vmm.memory import GuestMemory
from vmm.state import Arena
from vmm.state.arena import SIZE as ARENA_SIZE

log = logging.getLogger(__name__)

CHANGES_GUEST = (Cap.ADJUST_CLOCK, Cap.VCPU_ATTRIBUTES)  # without them a rebuilt guest's clocks jump
PREFAULT_S = 1.0
MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, Linux 5.14


class Origin(Enum):
    """Where the machine's VM comes from."""

    NEW = "new"
    REBUILT = "rebuilt"
    ADOPTED = "adopted"


class HypervisorFacts(ctypes.LittleEndianStructure):
    """What a VMM that adopts the VM must know of it without asking KVM: its vCPUs may be running."""

    VERSION: ClassVar[int] = 1
    _fields_ = (
        ("tsc_khz", ctypes.c_uint32),
        ("gigabyte_pages", ctypes.c_uint32),
        ("host_khz", ctypes.c_uint32),
    )


class Hypervisor:
    """The VM, its vCPUs, and their state's way into and out of the state memfd."""

    def __init__(
        self,
        config: MachineConfig,
        fds: FdStore,
        memory: GuestMemory | None,
        arena: Arena,
        port: Port,
        origin: Origin,
    ) -> None:
        """Make the VM, or take its fds. `memory` is None where RAM is the VM's own, and comes with it.

        Raises HostError, StateError; then nothing is left open.
        """
        self.origin = origin
        self.port = port
        self._config = config
        self._arena = arena
        self._bound = memory is None
        if memory is not None:
            self.memory = memory
        self._opened = ExitStack()
        try:
            self._build(fds)
        except BaseException:
            self._opened.close()
            raise

    def _build(self, fds: FdStore) -> None:
        arena, port, origin = self._arena, self.port, self.origin
        self.facts = arena.place("hypervisor", 0, HypervisorFacts)
        if origin is Origin.ADOPTED:
            self._system = self._opened.enter_context(System())
            self._take(fds)
        else:
            self._system = self._opened.enter_context(System(port=port))
            require(self._system)
            if self._bound:
                self._require_guest_memfd()
            self._make(fds)
            if self.vm.check(Cap.BINARY_STATS_FD):
                fds.get_or_open("kvm-stats", 0, self.vm.stats_fd)
        self.tscs = [TscState(arena, vcpu) for vcpu in self.vcpus]
        if origin is Origin.NEW:
            for vcpu, tsc in zip(self.vcpus, self.tscs, strict=True):
                tsc.save(self.vm, vcpu)
            self.facts.tsc_khz = self.facts.host_khz = self.tscs[0].section.khz
        has_clock = self._system.check(Cap.ADJUST_CLOCK) != 0
        self.clock = GuestClock(arena, self.vm, self.facts.host_khz) if has_clock else None
        if origin is Origin.REBUILT:
            self._set_time()
        self._open_states(fds)
        if origin is Origin.NEW:
            self._say_what_is_lost()

    def _say_what_is_lost(self) -> None:
        for one in probe(self._system):
            if not one.present:
                level = logging.WARNING if one.capability.number in CHANGES_GUEST else logging.INFO
                log.log(level, "%s: without it, %s", one.capability.name, one.capability.without)
        if lacking := self.cannot_be_saved():
            log.warning(
                "this guest cannot be handed over to a new VM: this host's KVM has no %s", ", ".join(lacking)
            )

    # --- made anew ---

    def _require_guest_memfd(self) -> None:
        require_guest_memfd(self._system)
        if not self.port.outlives:
            log.warning(
                "guest-memfd: this memory is bound to the VM, and the VM to this process, so this guest "
                "cannot be handed over; start it with a keeper to be able to"
            )

    def _make(self, fds: FdStore) -> None:
        self.vm = vm = self._opened.enter_context(self._system.create_vm())
        if self._bound:
            self.memory = GuestMemory.map_guest_memfd(
                fds, self._config.memory, lambda size: vm.create_guest_memfd(size, LOADABLE)
            )
        give = vm.set_guest_memory if self._bound else vm.set_memory
        vm.set_tss_address()
        vm.set_identity_map()
        for capability in (Cap.EXCEPTION_PAYLOAD, Cap.X86_TRIPLE_FAULT_EVENT):
            if vm.check(capability):
                vm.enable_cap(capability, 0, 1)
        for slot, region in enumerate(self.memory.regions):
            give(slot, region.gpa, region.size, region.hva, region.fd, 0)
        self._make_chips()
        block = self._system.supported_cpuid()
        supported = block.entries[: block.nent]
        self.vcpus = [self._make_vcpu(index, supported) for index in range(self._config.cpus)]
        if self.origin is Origin.NEW:
            self.facts.gigabyte_pages = offers_1gib_pages(supported)
        elif not self.port.outlives:
            self._prefault()

    def _prefault(self) -> None:
        """Make the mappings of the memory that the guest uses while it still runs in its old VM: this
        process's, and the VM's own where KVM can. As many as `PREFAULT_S` allows; the guest makes the rest.
        """
        deadline = time.monotonic() + PREFAULT_S
        of_vm = self.vm.check(Cap.PRE_FAULT_MEMORY) != 0
        for region, offset, size in self.memory.populated():
            assert region.mapping is not None
            try:
                region.mapping.madvise(MADV_POPULATE_WRITE, offset, size)
                if of_vm:
                    self.vcpus[0].pre_fault(region.gpa + offset, size)
            except OSError as error:  # an old kernel, or no memory for page tables: faults do it
                log.info("memory is not mapped ahead: %s", error.strerror)
                return
            if time.monotonic() > deadline:
                return

    def _make_chips(self) -> None:
        irqchip = self._config.irqchip
        needed = {"kernel": Cap.IRQCHIP, "split": Cap.SPLIT_IRQCHIP}.get(irqchip)
        if needed is not None and not self.vm.check(needed):
            raise HostError(
                f"irqchip: this host's KVM has no KVM_CAP_{needed.name}, so '{irqchip}' cannot be had; "
                "use --irqchip none, or a newer kernel"
            )
        if irqchip == "kernel":
            self.vm.create_irqchip()
            if self.vm.check(Cap.PIT2):
                self.vm.create_pit()
        elif irqchip == "split":
            self.vm.enable_cap(Cap.SPLIT_IRQCHIP, 0, abi.KVM_IOAPIC_NUM_PINS)

    def _make_vcpu(self, index: int, supported: Sequence[abi.kvm_cpuid_entry2]) -> Vcpu:
        vcpu = self._opened.enter_context(self.vm.create_vcpu(index))
        deadline = bool(self.vm.check(Cap.TSC_DEADLINE_TIMER)) and self._config.irqchip != "none"
        offered = guest_cpuid(
            supported,
            index,
            self._config.cpus,
            tsc_deadline=deadline,
            tsc_khz=vcpu.tsc_khz,
            pv_unhalt=self.origin is not Origin.NEW,  # who was born with it keeps it
        )
        if self.origin is Origin.NEW:
            keep_cpuid(self._arena, index, offered)
        kept = kept_cpuid(self._arena, index)
        check_cpuid(index, kept.entries, offered)
        vcpu.set_cpuid(kept)
        return vcpu

    def _set_time(self) -> None:
        """Give the new VM the guest's TSC and kvmclock, before the guest is stopped."""
        for vcpu, tsc in zip(self.vcpus, self.tscs, strict=True):
            tsc.prepare(self.vm, vcpu)
        if self.clock is not None:
            self.clock.align()

    # --- gone on with ---

    def _take(self, fds: FdStore) -> None:
        wanted = [("vm", 0), *(("vcpu", index) for index in range(self._config.cpus))]
        for name, index in wanted:
            check_received(name, index, fds.get(name, index))
        vm_fd, *vcpu_fds = (cast(int, fds.take(name, index)) for name, index in wanted)
        self.vm = self._opened.enter_context(Vm(vm_fd, self.port, self._system.mmap_size))
        if self._bound:
            self.memory = GuestMemory.map_guest_memfd(fds, self._config.memory, None)
        self.vcpus = []
        for index, fd in enumerate(vcpu_fds):
            vcpu = Vcpu(fd, index, self.port, self._system.mmap_size)
            self.vcpus.append(self._opened.enter_context(vcpu))
            kept_cpuid(self._arena, index)  # the guest's own, for a VMM that rebuilds it later

    # --- state ---

    def _open_states(self, fds: FdStore) -> None:
        """The sections that state goes to, and a second set in a memfd of its own: the state of the VM at
        birth, which a reset goes back to.
        """
        lapic, chips = self._config.irqchip != "none", self._config.irqchip == "kernel"
        if self.origin is Origin.NEW:
            self.has_pit = chips and self.vm.check(Cap.PIT2) != 0
        else:
            self.has_pit = self._arena.find("vm/pit2", 0) is not None
        if self.origin is Origin.ADOPTED:
            section = self._arena.find("vcpu/xsave", 0)
            has, xsave_size = self._system.check, XSAVE_SIZE if section is None else section.size
            msrs = MsrList.of(self._arena)
        else:
            has, xsave_size = self.vm.check, self.vm.xsave_size
            msrs = MsrList.probe(self.vcpus[0], guest_msrs(self._system, self.vcpus[0]))
        nests = can_nest(kept_cpuid(self._arena, 0).entries)
        self._needs = (
            *STATE_NEEDS,
            *([Cap.PIT_STATE2] if self.has_pit else []),
            *([Cap.NESTED_STATE] if nests else []),
        )
        facts = VcpuFacts(
            has=has,
            xsave_size=xsave_size,
            in_kernel_lapic=lapic,
            nested_size=has(Cap.NESTED_STATE) if nests else 0,
        )
        of_vm = vm_pieces(irqchip=chips, pit=self.has_pit)
        born = fds.find("fresh") is None
        fd = fds.get_or_open("fresh", 0, lambda: sealed_memfd("vmm-fresh", ARENA_SIZE))
        check_received("fresh", 0, fd, ARENA_SIZE)
        fresh = Arena(fd, create=born)
        self._fresh_vcpus = [VcpuState(fresh, vcpu, facts, msrs, self.memory) for vcpu in self.vcpus]
        self._fresh_vm = VmState(fresh, self.vm, of_vm)
        if born:
            for state in self._fresh_vcpus:
                state.save()
            self._fresh_vm.save()
        self.vcpu_states = [VcpuState(self._arena, vcpu, facts, msrs, self.memory) for vcpu in self.vcpus]
        self.vm_state = VmState(self._arena, self.vm, of_vm)

    def announce(self) -> None:
        """A handover is about to be offered: have what the new VM is given before the guest is stopped."""
        if self.clock is not None:
            self.clock.keep_line()

    def cannot_be_saved(self) -> list[str]:
        """What this host's KVM would have to have for the guest to move to another VM; usually nothing."""
        return [f"KVM_CAP_{cap.name}" for cap in self._needs if not self._system.check(cap)]

    def save_chips(self) -> None:
        """Store what is the VM's and not a vCPU's. Every vCPU has stopped, and none of them is saved yet."""
        self.vm_state.save()

    def save_vcpu(self, index: int) -> None:
        """Store a vCPU's whole state, the chips being saved. On the vCPU's thread."""
        self.tscs[index].save_offset(self.vcpus[index])
        self.vcpu_states[index].save()

    def load_vcpu(self, index: int) -> None:
        """Give a vCPU the stored state. Raises StateError."""
        self.tscs[index].load(self.vcpus[index])
        self.vcpu_states[index].load()

    def load_chips(self) -> None:
        """Give the VM the stored state, once every vCPU has its own."""
        self.vm_state.load()

    def restore_birth_state(self) -> None:
        """Give vCPUs and VM the state they had before the guest first ran; its clocks go on."""
        for state in self._fresh_vcpus:
            state.load_birth()
        self._fresh_vm.load()

    def stats_id(self, fds: FdStore) -> str | None:
        """The kernel's name of the VM, the same wherever it is asked; None where this KVM has no counters."""
        fd = fds.find("kvm-stats")
        if fd is None:
            return None
        header = abi.kvm_stats_header.from_buffer_copy(os.pread(fd, ctypes.sizeof(abi.kvm_stats_header), 0))
        return os.pread(fd, header.name_size, header.id_offset).split(b"\0")[0].decode()

    def close(self, *, for_good: bool) -> None:
        """Close the fds; with `for_good` the VM ends even where it could live on. No vCPU may be in `run`."""
        try:
            self._opened.close()
        finally:
            self.port.close(for_good=for_good)
