"""May this process drive the VM whose fd it received? Asked of the kernel, never guessed (docs/adr/0001)."""

from __future__ import annotations

import errno

from vmm.fds import FdKind, FdStore, identify
from vmm.kvm import Cap, DirectPort, abi

WORKS = "ok"
NOT_RECEIVED = "not received"
# what is bound to the old VM or its keeper, and of no use to a VMM that builds a VM of its own
OLD_VM_FDS = frozenset(
    {"vm", "vcpu", "guest-memfd", "kvm-stats", "kvm-slots", "kvm-go", "kvm-done", "keeper"}
)


def probe_received_vm(fds: FdStore) -> str:
    """What the kernel says to KVM_CHECK_EXTENSION on the received VM fd: `ok`, an errno's name, or that
    none came.
    """
    fd = fds.find("vm")
    if fd is None:
        return NOT_RECEIVED
    if identify(fd).kind is not FdKind.KVM_VM:
        return "not a VM fd"
    try:
        DirectPort().ioctl(fd, abi.KVM_CHECK_EXTENSION, Cap.USER_MEMORY)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return WORKS


def drop_old_vm(fds: FdStore) -> None:
    """Close what belongs to the old VM: held open here, it would keep that VM alive."""
    for name, index, _ in list(fds.items()):
        if name in OLD_VM_FDS:
            fds.remove(name, index)
