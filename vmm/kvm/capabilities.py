"""What this package asks of a host's KVM, by name: what each capability is for, and what is lost without it.

`probe` only asks; what to do about an answer is for the caller to decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmm.errors import HostError
from vmm.kvm.abi import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, Cap
from vmm.kvm.system import System

LOADABLE: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED  # a guest_memfd that can be written

# The first with KVM_CAP_IMMEDIATE_EXIT, the youngest of the required ones. A keeper, and `vmm handover`, need
# pidfds as well (5.4).
_OLDEST_LINUX: Final = "4.11"


@dataclass(frozen=True, slots=True)
class Capability:
    """One KVM_CAP_*. Without a required one no guest can run; without another, only what `without` says."""

    number: Cap
    required: bool
    purpose: str
    without: str

    @property
    def name(self) -> str:
        """The kernel's name for it."""
        return f"KVM_CAP_{self.number.name}"


@dataclass(frozen=True, slots=True)
class CapabilityReport:
    """One answer of KVM_CHECK_EXTENSION on /dev/kvm: 0 is absent, and the rest depends on the capability."""

    capability: Capability
    value: int

    @property
    def present(self) -> bool:
        return self.value != 0


def _required(number: Cap, purpose: str) -> Capability:
    return Capability(number, True, purpose, "no guest runs")


def _optional(number: Cap, purpose: str, without: str) -> Capability:
    return Capability(number, False, purpose, without)


_NO_REBUILD: Final = "a handover that rebuilds the VM cannot move it"

CAPABILITIES: Final = (
    _required(Cap.USER_MEMORY, "guest RAM is memory of the VMM's own"),
    _required(Cap.SET_TSS_ADDR, "room for KVM's own pages in the guest's address space"),
    _required(Cap.IMMEDIATE_EXIT, "a vCPU is stopped without losing the request"),
    _optional(Cap.IRQCHIP, "PIC, IOAPIC and LAPICs in the kernel", "no interrupts, one vCPU"),
    _optional(Cap.PIT2, "the i8254 timer in the kernel", "no PIT"),
    _optional(Cap.SPLIT_IRQCHIP, "LAPICs in the kernel alone (Linux 4.4)", "no --irqchip split"),
    _optional(Cap.SET_IDENTITY_MAP_ADDR, "where KVM keeps its page table", "the page is at 0xFFFBC000"),
    _optional(Cap.IRQ_ROUTING, "interrupt lines and MSIs by GSI", "no irqfd for an MSI"),
    _optional(Cap.SIGNAL_MSI, "message-signalled interrupts", "no MSI from the VMM"),
    _optional(Cap.IRQFD, "interrupts raised through an eventfd", "each costs the VMM an ioctl"),
    _optional(Cap.IOEVENTFD, "doorbells that signal an eventfd", "each doorbell costs an exit"),
    _optional(Cap.COALESCED_MMIO, "memory writes queued in a ring", "each such write costs an exit"),
    _optional(Cap.COALESCED_PIO, "port writes queued in a ring", "each such write costs an exit"),
    _optional(Cap.USER_NMI, "NMIs from the VMM", "no NMI can be injected"),
    _optional(Cap.READONLY_MEM, "read-only memory slots", "no ROM that the guest cannot write"),
    _optional(Cap.MP_STATE, "whether a vCPU runs, halts or waits for SIPI, as state", _NO_REBUILD),
    _optional(Cap.VCPU_EVENTS, "pending exceptions, interrupts and NMIs, as state", _NO_REBUILD),
    _optional(Cap.DEBUGREGS, "debug registers, as state", _NO_REBUILD),
    _optional(Cap.XSAVE, "extended registers, as state", "x87 and SSE registers are all there are"),
    _optional(Cap.XCRS, "XCR0, as state", "there is none"),
    _optional(Cap.PIT_STATE2, "the PIT, as state", _NO_REBUILD),
    _optional(Cap.ADJUST_CLOCK, "kvmclock, as state", "kvmclock jumps in a handover that rebuilds the VM"),
    _optional(
        Cap.VCPU_ATTRIBUTES, "the TSC offset, as state (Linux 5.16)", "the TSC jumps in such a handover"
    ),
    _optional(Cap.GET_TSC_KHZ, "the TSC's frequency", "the guest is not told it"),
    _optional(Cap.TSC_CONTROL, "guests with a TSC of another frequency", "such a guest cannot come here"),
    _optional(Cap.TSC_DEADLINE_TIMER, "LAPIC timers that go by the TSC", "one-shot and periodic ones only"),
    _optional(
        Cap.GET_MSR_FEATURES, "MSRs that describe features, as state (Linux 4.17)", "they are not compared"
    ),
    _optional(
        Cap.EXCEPTION_PAYLOAD,
        "what a pending exception will write, as state (Linux 4.20)",
        "it is written early",
    ),
    _optional(Cap.X86_TRIPLE_FAULT_EVENT, "a pending triple fault, as state (Linux 6.1)", "it happens again"),
    _optional(Cap.SREGS2, "PAE page-directory pointers, as state (Linux 5.14)", "KVM reads them again"),
    _optional(Cap.XSAVE2, "extended registers over 4096 bytes, as state (Linux 5.17)", "no AMX in the guest"),
    _optional(Cap.NESTED_STATE, "a guest that runs guests, as state", "such a guest cannot be handed over"),
    _optional(Cap.SET_GUEST_DEBUG, "breakpoints and single steps", "no debugging of the guest"),
    _optional(Cap.BINARY_STATS_FD, "KVM's own counters (Linux 5.14)", "no statistics"),
    _optional(Cap.USER_MEMORY2, "memory slots of guest_memfd (Linux 6.8)", "no guest_memfd"),
    _optional(Cap.GUEST_MEMFD, "memory bound to a VM (Linux 6.8)", "no guest_memfd"),
    _optional(
        Cap.GUEST_MEMFD_FLAGS, "such memory that a VMM can map (Linux 6.18)", "no guest in guest_memfd"
    ),
    _optional(
        Cap.PRE_FAULT_MEMORY,
        "second-stage mappings made before a pause (Linux 6.11)",
        "each page faults once more after it",
    ),
)


def probe(system: System) -> tuple[CapabilityReport, ...]:
    """Asks /dev/kvm for each of CAPABILITIES, in order."""
    return tuple(CapabilityReport(capability, system.check(capability.number)) for capability in CAPABILITIES)


def missing_required(reports: Iterable[CapabilityReport]) -> tuple[Capability, ...]:
    """The required capabilities that `reports` says are absent."""
    return tuple(r.capability for r in reports if r.capability.required and not r.present)


def require(system: System) -> None:
    """Raises HostError if a required capability is absent."""
    missing = missing_required(probe(system))
    if missing:
        lacks = ", ".join(f"{capability.name} ({capability.purpose})" for capability in missing)
        raise HostError(f"{system.path} lacks {lacks}; use Linux {_OLDEST_LINUX} or later")


def require_guest_memfd(system: System) -> None:
    """Raises HostError where this host's KVM has no guest_memfd that a VMM can load a guest into."""
    asked = (Cap.GUEST_MEMFD, Cap.USER_MEMORY2)
    lacks = [f"KVM_CAP_{cap.name}" for cap in asked if not system.check(cap)]
    flags = system.check(Cap.GUEST_MEMFD_FLAGS)
    if not lacks and flags & LOADABLE != LOADABLE:
        lacks = [f"GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS is {flags:#x})"]
    if lacks:
        raise HostError(
            f"guest-memfd: {system.path} lacks {' and '.join(lacks)}, so no VMM can load a guest into such "
            "memory; use Linux 6.18 or later, or the memory backend memfd"
        )
