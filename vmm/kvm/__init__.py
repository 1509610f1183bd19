"""Typed bindings for /dev/kvm, usable without the rest of `vmm`: docs/kvm-library.md begins with an example.

The ctypes structures, constants and ioctl numbers are in `vmm.kvm.abi`. This module must never do anything
but name what is public.
"""

from __future__ import annotations

from vmm.kvm import abi
from vmm.kvm.abi import Cap, Exit, InternalError, Ioctl, MpState, SystemEvent, sized
from vmm.kvm.capabilities import (
    CAPABILITIES,
    Capability,
    CapabilityReport,
    missing_required,
    probe,
    require,
)
from vmm.kvm.port import DirectPort, IoctlBlocked, IoctlError, IoctlInterrupted, Port
from vmm.kvm.system import System
from vmm.kvm.vcpu import Vcpu
from vmm.kvm.vm import Vm, irqchip_route, msi_route

__all__ = [
    "CAPABILITIES",
    "Cap",
    "Capability",
    "CapabilityReport",
    "DirectPort",
    "Exit",
    "InternalError",
    "Ioctl",
    "IoctlBlocked",
    "IoctlError",
    "IoctlInterrupted",
    "MpState",
    "Port",
    "System",
    "SystemEvent",
    "Vcpu",
    "Vm",
    "abi",
    "irqchip_route",
    "missing_required",
    "msi_route",
    "probe",
    "require",
    "sized",
]
