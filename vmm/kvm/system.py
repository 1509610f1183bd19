"""/dev/kvm itself: is KVM usable here, what can it do, and new VMs.

It must never change the host, nor assume a vendor: what is asked is KVM's API alone.
"""

from __future__ import annotations

import errno
import os
from typing import Final, Self

from vmm.errors import HostError
from vmm.kvm import abi
from vmm.kvm.abi import Ioctl, sized
from vmm.kvm.port import DirectPort, IoctlError, Port
from vmm.kvm.vm import Vm

_FIRST_CPUID_COUNT: Final = 128
_MAX_CPUID_COUNT: Final = 4096  # KVM itself stops at 256 (KVM_MAX_CPUID_ENTRIES)
_MAX_MSR_COUNT: Final = 4096  # KVM has some 500 (msrs_to_save_all, arch/x86/kvm/x86.c)

_LOAD: Final = "run `modprobe kvm_intel` or `modprobe kvm_amd`"
_OPEN_FAILURES: Final = {
    errno.ENOENT: f"does not exist; enable virtualisation (in a VM: nested virtualisation) and {_LOAD}",
    errno.EACCES: "may not be opened by this user; run `sudo usermod -aG kvm $USER` and log in again",
    errno.ENXIO: f"has no driver behind it; {_LOAD}",
}
_OPEN_FAILURES_ALIKE: Final = {
    errno.EPERM: errno.EACCES,
    errno.ENODEV: errno.ENXIO,
    errno.ENOTDIR: errno.ENOENT,
}


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        reason = _OPEN_FAILURES.get(_OPEN_FAILURES_ALIKE.get(number, number))
        raise HostError(f"{path} {reason or f'cannot be opened: {os.strerror(number)}'}") from error


class System:
    """An open /dev/kvm. Raises HostError if there is none to use; later failures are IoctlErrors."""

    def __init__(self, path: str | os.PathLike[str] = "/dev/kvm", port: Port | None = None) -> None:
        self.port: Final[Port] = DirectPort() if port is None else port
        self.path: Final = os.fspath(path)
        self.fd = _open(self.path)
        try:
            self.port.admit(self.fd)
            self.api_version = self._api_version()
            self.mmap_size = self.port.ioctl(
                self.fd, abi.KVM_GET_VCPU_MMAP_SIZE
            )  # bytes of a vCPU fd's mapping
        except BaseException:
            self.close()
            raise

    def _api_version(self) -> int:
        try:
            version = self.port.ioctl(self.fd, abi.KVM_GET_API_VERSION)
        except IoctlError as error:
            raise HostError(
                f"{self.path} is not a KVM device ({error}); give the path of /dev/kvm"
            ) from error
        if version != abi.KVM_API_VERSION:
            raise HostError(
                f"{self.path} speaks KVM API version {version}, not {abi.KVM_API_VERSION}; "
                "use a Linux kernel of 2.6.22 or later"
            )
        return version

    def check(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if absent, else 1 or what the capability says of itself."""
        return self.port.ioctl(self.fd, abi.KVM_CHECK_EXTENSION, cap)

    def supported_cpuid(self) -> abi.kvm_cpuid2:
        """KVM_GET_SUPPORTED_CPUID: what host and KVM can give a guest; the first `nent` entries count."""
        count = _FIRST_CPUID_COUNT
        while True:
            cpuid = sized(abi.kvm_cpuid2, count)(nent=count)
            try:
                self.port.ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, cpuid)
            except IoctlError as error:
                if error.errno != errno.E2BIG or count >= _MAX_CPUID_COUNT:
                    raise
                count *= 2
            else:
                return cpuid

    def msr_index_list(self) -> tuple[int, ...]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that are guest state, to be saved and restored."""
        return self._msr_list(abi.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_list(self) -> tuple[int, ...]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that describe features (KVM_CAP_GET_MSR_FEATURES)."""
        return self._msr_list(abi.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _msr_list(self, request: Ioctl) -> tuple[int, ...]:
        count = abi.kvm_msr_list()  # too short, so the kernel says E2BIG and how many there are
        try:
            self.port.ioctl(self.fd, request, count)
        except IoctlError as error:
            if error.errno != errno.E2BIG:
                raise
        if count.nmsrs > _MAX_MSR_COUNT:  # it need not be the kernel that has said so
            raise HostError(f"{request.name} counts {count.nmsrs} MSRs, where {_MAX_MSR_COUNT} are too many")
        indices = sized(abi.kvm_msr_list, count.nmsrs)(nmsrs=count.nmsrs)
        self.port.ioctl(self.fd, request, indices)
        return tuple(indices.indices[: indices.nmsrs])

    def create_vm(self, vm_type: int = 0) -> Vm:
        """KVM_CREATE_VM; it belongs to this process's address space (or to that of the port's other end)."""
        return Vm(self.port.create(self.fd, abi.KVM_CREATE_VM, vm_type), self.port, self.mmap_size)

    def close(self) -> None:
        """Idempotent. VMs already created are not affected."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            try:
                self.port.forget(fd)
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
