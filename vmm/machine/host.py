"""What this host's KVM says of itself, for those who only want to know; nothing here makes a VM."""

from __future__ import annotations

from typing import Final

from vmm.kvm import System

HOST_DEVICES: Final = ("/dev/kvm",)  # what a machine opens by its path


def kvm_api_version() -> int:
    """What /dev/kvm answers to KVM_GET_API_VERSION. Raises HostError where there is no KVM to use."""
    with System() as system:
        return system.api_version
