"""The only way to reach KVM: every ioctl of this package goes through a `Port`.

Linux binds a VM to the address space that created it and answers EIO to any other (`kvm->mm != current->mm`,
in virt/kvm/kvm_main.c). `DirectPort` issues the calls in this process; another port may have them carried out
in the process that owns the VM. So whatever an argument points to must be said by the protocol's own methods
(`set_user_memory`, `set_guest_memory`, `get_attr`, `get_dirty_log`), and an fd inside a structure is named
by `Ioctl.fds`.

A port must never retry a call, and never keep an argument after the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from ctypes import addressof, byref, get_errno
from typing import Any, Final, Protocol

from vmm.kvm import abi
from vmm.kvm.abi import Ioctl, sized

Argument = ctypes.Structure | ctypes.Array[Any] | bytearray | int
Bitmap = ctypes.Array[Any] | bytearray


class IoctlError(OSError):
    """An ioctl failed: `errno` is the kernel's, `request` the ioctl; EINTR and EAGAIN have subclasses."""

    def __init__(self, number: int, request: Ioctl) -> None:
        super().__init__(number, f"{request.name}: {os.strerror(number)}")
        self.request = request

    def __reduce__(self) -> tuple[Any, ...]:
        return ioctl_error, (self.errno, self.request)


class IoctlInterrupted(IoctlError, InterruptedError):
    """EINTR: a signal was pending, or `immediate_exit` was set."""


class IoctlBlocked(IoctlError, BlockingIOError):
    """EAGAIN: not now."""


def ioctl_error(number: int, request: Ioctl) -> IoctlError:
    """The exception for errno `number` of `request`, of the class that the errno has."""
    if number == errno.EINTR:
        return IoctlInterrupted(number, request)
    if number == errno.EAGAIN:
        return IoctlBlocked(number, request)
    return IoctlError(number, request)


class Port(Protocol):
    """Carries out ioctls on KVM fds. `fd`s are those of this process. All but `run` raise IoctlError."""

    def ioctl(self, fd: int, request: Ioctl, arg: Argument = 0) -> int:
        """One ioctl; returns what the kernel returned (>= 0). Of a vCPU only while it is not in `run`.

        `arg` is passed by value if an int, else by reference: the kernel may read and write all of it (the
        direction in the request's number is not to be relied on). It holds no addresses; its fds are those
        `request.fds` names.
        """
        ...

    def create(self, fd: int, request: Ioctl, arg: Argument = 0) -> int:
        """An ioctl whose result is a new fd, owned by the caller and close-on-exec."""
        ...

    def get_attr(self, fd: int, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR of a u64 attribute. ENXIO: there is no such attribute."""
        ...

    def set_attr(self, fd: int, group: int, attr: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR of a u64 attribute."""
        ...

    def has_attr(self, fd: int, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR."""
        ...

    def set_user_memory(
        self, vm_fd: int, slot: int, flags: int, gpa: int, size: int, hva: int, memfd: int, offset: int
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION; size 0 deletes the slot.

        The memory is `memfd` at `offset`, which this process has mapped at `hva`. A port whose calls happen
        in another address space maps the memfd there and ignores `hva`; `DirectPort` uses `hva` and ignores
        the other two.
        """
        ...

    def set_guest_memory(
        self, vm_fd: int, slot: int, flags: int, gpa: int, size: int, hva: int, guest_memfd: int, offset: int
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_GUEST_MEMFD; `flags` are further ones.

        As `set_user_memory`, of a guest_memfd of this VM's; `hva` is 0 where it cannot be mapped, and then no
        port maps it.
        """
        ...

    def get_dirty_log(self, vm_fd: int, slot: int, bitmap: Bitmap) -> None:
        """KVM_GET_DIRTY_LOG into `bitmap`: a bit for each page of the slot, in whole 64-bit words."""
        ...

    def admit(self, fd: int) -> None:
        """Learn of an fd that this process opened and that calls will name, until `forget`."""
        ...

    def forget(self, fd: int) -> None:
        """This process is about to close `fd`, or has no more calls to name it."""
        ...

    def store(self, name: str, index: int, fd: int) -> None:
        """What lives on without this process holds a copy of `fd` under that name, for who comes next."""
        ...

    def drop(self, name: str, index: int) -> None:
        """It closes that copy."""
        ...

    def start_vcpu(self, vcpu_fd: int, index: int) -> None:
        """A vCPU was created; it will be run."""
        ...

    def bind_thread(self, vcpu_fd: int) -> None:
        """The calling thread is the one that will `run` this vCPU: `kick` reaches it from here on."""
        ...

    def thread_id(self, vcpu_fd: int) -> int:
        """The thread that is in KVM_RUN while this vCPU runs, in whichever process: what to pin it by."""
        ...

    def run(self, vcpu_fd: int) -> bool:
        """KVM_RUN. True: an exit to serve. False: kicked (EINTR), or woken by INIT or SIPI (EAGAIN)."""
        ...

    def kick(self, vcpu_fd: int) -> None:
        """Make `run` of this vCPU return False, now or the next time it is called. From any thread."""
        ...

    def leave(self, vcpu_fd: int) -> None:
        """Make `run` return False until `go_on`, without stopping a vCPU that can run without this process.
        From any thread.
        """
        ...

    def go_on(self, vcpu_fd: int) -> None:
        """After `leave`, once `run` has returned: let the vCPU run on without this process, its last exit
        served.
        """
        ...

    def pending_exit(self, vcpu_fd: int) -> int:
        """The number of the exit that waits to be served or is being served, whoever began; 0 where there is
        none, or where nobody but this process ever could.
        """
        ...

    def waiting_ns(self, vcpu_fd: int) -> int | None:
        """How long the exit has been there that `pending_exit` names; None where there is none."""
        ...

    @property
    def outlives(self) -> bool:
        """Whether the VM lives on, and its vCPUs run on, without this process."""
        ...

    def attach(self) -> None:
        """Be the one process that drives the VM. PeerError while another does."""
        ...

    def detach(self) -> None:
        """Be it no more."""
        ...

    @property
    def process(self) -> int:
        """The pid of the process that the VM lives in."""
        ...

    @property
    def identity(self) -> int:
        """A number that tells what the VM lives in from all else that a VM ever lived in; 0 for a process
        that drives its own.
        """
        ...

    def live_on(self, orphan_timeout_s: float) -> None:
        """From here on the VM is worth keeping: where it can, it lives on without this process, for that long
        once no VMM is there (0: for ever).
        """
        ...

    @property
    def lifeline(self) -> int | None:
        """An fd that is readable once the VM has ended without this process's doing; None where that cannot
        be.
        """
        ...

    def lost(self) -> None:
        """The lifeline says so: make every `run` raise, and every call but `close`."""
        ...

    def close(self, *, for_good: bool) -> None:
        """Use the port no more; with `for_good`, end what lives on without this process. Idempotent."""
        ...

    def fd_rows(self, *, offer: bool) -> list[tuple[str, int, int]]:
        """`(name, id, fd)` of what this port drives the VM with and, on `offer`, of what the next process
        needs to reach it. What is offered is the port's to close, at `close_offer`.
        """
        ...

    def close_offer(self) -> None:
        """What was offered has been sent, or never will be: from here on only the next process has it."""
        ...


KICK: Final = signal.SIGUSR1  # blocked everywhere but within KVM_RUN, so no handler ever runs
KICKED: Final = frozenset({errno.EINTR, errno.EAGAIN})
_SIGSET_SIZE: Final = 8  # the kernel's sigset_t: bit N-1 is signal N


class DirectPort:
    """ioctl(2) in this process.

    It calls the C library through ctypes rather than `fcntl.ioctl`, which copies small arguments, keeps the
    GIL for those over 1024 bytes, and turns each kick into an exception. Here the kernel works on the
    caller's own memory, the GIL is dropped for every call, and a kick costs nothing.
    """

    def __init__(self) -> None:
        call = ctypes.CDLL(None, use_errno=True).ioctl
        call.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
        call.restype = ctypes.c_int
        self._call = call
        self._run_number = abi.KVM_RUN.number
        self._threads: dict[int, threading.Thread] = {}  # vCPU fd -> the thread that runs it

    def ioctl(self, fd: int, request: Ioctl, arg: Argument = 0) -> int:
        pointer: Any
        if isinstance(arg, int):
            pointer = arg
        elif isinstance(arg, bytearray):
            if len(arg) < request.size:
                raise ValueError(
                    f"{request.name} needs {request.size} bytes, not the {len(arg)} it was given"
                )
            pointer = byref((ctypes.c_char * len(arg)).from_buffer(arg))
        else:
            pointer = byref(arg)
        result: int = self._call(fd, request.number, pointer)
        if result < 0:
            raise ioctl_error(get_errno(), request)
        return result

    def create(self, fd: int, request: Ioctl, arg: Argument = 0) -> int:
        created = self.ioctl(fd, request, arg)
        os.set_inheritable(created, False)  # KVM_GET_STATS_FD does not give close-on-exec by itself
        return created

    def _attr(self, fd: int, request: Ioctl, group: int, attr: int, value: int) -> int:
        word = ctypes.c_uint64(value)
        self.ioctl(fd, request, abi.kvm_device_attr(0, group, attr, addressof(word)))
        return word.value

    def get_attr(self, fd: int, group: int, attr: int) -> int:
        return self._attr(fd, abi.KVM_GET_DEVICE_ATTR, group, attr, 0)

    def set_attr(self, fd: int, group: int, attr: int, value: int) -> None:
        self._attr(fd, abi.KVM_SET_DEVICE_ATTR, group, attr, value)

    def has_attr(self, fd: int, group: int, attr: int) -> bool:
        try:
            self._attr(fd, abi.KVM_HAS_DEVICE_ATTR, group, attr, 0)
        except IoctlError as error:
            if error.errno in (errno.ENXIO, errno.ENOTTY):
                return False
            raise
        return True

    def set_user_memory(
        self, vm_fd: int, slot: int, flags: int, gpa: int, size: int, hva: int, memfd: int, offset: int
    ) -> None:
        region = abi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        self.ioctl(vm_fd, abi.KVM_SET_USER_MEMORY_REGION, region)

    def set_guest_memory(
        self, vm_fd: int, slot: int, flags: int, gpa: int, size: int, hva: int, guest_memfd: int, offset: int
    ) -> None:
        region = abi.kvm_userspace_memory_region2(
            slot, flags | abi.KVM_MEM_GUEST_MEMFD, gpa, size, hva, offset, guest_memfd
        )
        self.ioctl(vm_fd, abi.KVM_SET_USER_MEMORY_REGION2, region)

    def get_dirty_log(self, vm_fd: int, slot: int, bitmap: Bitmap) -> None:
        memory = (ctypes.c_char * memoryview(bitmap).nbytes).from_buffer(bitmap)
        log = abi.kvm_dirty_log(slot=slot, dirty_bitmap=addressof(memory))
        self.ioctl(vm_fd, abi.KVM_GET_DIRTY_LOG, log)

    def admit(self, fd: int) -> None:
        """Nothing to do: the fds are this process's."""

    def forget(self, fd: int) -> None:
        """Nothing to do."""

    def store(self, name: str, index: int, fd: int) -> None:
        """Nothing to do: nothing lives on without this process."""

    def drop(self, name: str, index: int) -> None:
        """Nothing to do."""

    def start_vcpu(self, vcpu_fd: int, index: int) -> None:
        """Nothing to do: `run` is a call of this process's own threads."""

    def bind_thread(self, vcpu_fd: int) -> None:
        self._threads[vcpu_fd] = threading.current_thread()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK}) - {KICK}
        mask = sized(abi.kvm_signal_mask, _SIGSET_SIZE)(len=_SIGSET_SIZE)
        mask.sigset[:] = list(sum(1 << (number - 1) for number in blocked).to_bytes(_SIGSET_SIZE, "little"))
        self.ioctl(vcpu_fd, abi.KVM_SET_SIGNAL_MASK, mask)

    def thread_id(self, vcpu_fd: int) -> int:
        return self._threads[vcpu_fd].native_id or 0

    def run(self, vcpu_fd: int) -> bool:
        if self._call(vcpu_fd, self._run_number, None) == 0:
            return True
        number = get_errno()
        if number in KICKED:
            signal.sigtimedwait({KICK}, 0)
            return False
        raise ioctl_error(number, abi.KVM_RUN)

    def kick(self, vcpu_fd: int) -> None:
        thread = self._threads.get(vcpu_fd)
        if thread is not None:
            signal.pthread_kill(thread.ident or 0, KICK)

    def leave(self, vcpu_fd: int) -> None:
        self.kick(vcpu_fd)

    def go_on(self, vcpu_fd: int) -> None:
        """Nothing to do: a vCPU of this process does not run without it."""

    def pending_exit(self, vcpu_fd: int) -> int:
        return 0

    def waiting_ns(self, vcpu_fd: int) -> None:
        return None

    @property
    def outlives(self) -> bool:
        return False

    def attach(self) -> None:
        """Nothing to do: the VM is this process's own."""

    def detach(self) -> None:
        """Nothing to do: no other process can drive this VM."""

    @property
    def process(self) -> int:
        return os.getpid()

    @property
    def identity(self) -> int:
        return 0

    def live_on(self, orphan_timeout_s: float) -> None:
        """Nothing to do: it cannot."""

    @property
    def lifeline(self) -> None:
        return None

    def lost(self) -> None:
        """Never called: there is no lifeline."""

    def close(self, *, for_good: bool) -> None:
        """Nothing to do."""

    def fd_rows(self, *, offer: bool) -> list[tuple[str, int, int]]:
        return []

    def close_offer(self) -> None:
        """Nothing to do: nothing is offered."""
