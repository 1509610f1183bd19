"""May this process drive the VM whose fd it received? Asked of the kernel, never guessed (docs/adr/0001)."""

from __future__ import annotations

import errno

from vmm.fds import FdKind, FdStore, identify
from vmm.kvm import Cap, DirectPort, System, abi


def probe_received_vm(fds: FdStore) -> str:
    """What the kernel says to KVM_CHECK_EXTENSION on the received VM fd: `ok`, an errno's name, or `not
    received`.

    The received VM and vCPU fds are closed afterwards: held open they would keep the old VM alive.
    """
    fd = fds.find("vm")
    if fd is None:
        return "not received"
    try:
        if identify(fd).kind is not FdKind.KVM_VM:
            return "not a VM fd"
        DirectPort().ioctl(fd, abi.KVM_CHECK_EXTENSION, Cap.USER_MEMORY)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    finally:
        for name, index, _ in list(fds.items()):
            if name in ("vm", "vcpu"):
                fds.remove(name, index)
    return "ok"


def kvm_api_version() -> int:
    """What /dev/kvm answers to KVM_GET_API_VERSION. Raises HostError where there is no KVM to use."""
    with System() as system:
        return system.api_version
