"""The keeper: a small process that owns a VM, so that the VM outlives the VMM that serves it.

Linux binds a VM to the address space of the process that created it. That process is the keeper: it creates
the VM, runs one thread for each vCPU, issues the ioctls that the attached VMM asks for, and holds every fd of
the machine. It has no device model, no policy, and no parser beyond the fixed messages below. It is run by
its path with `python -I -S`, imports nothing of vmm, and must stay readable in one sitting.

A message is one packet of a SOCK_SEQPACKET socket: REQUEST and up to PAYLOAD_MAX bytes, answered by REPLY and
bytes; fds travel by SCM_RIGHTS. `fd` is always an fd number of the keeper's own. Nothing in a message is a
path or code.

A vCPU's thread and the VMM meet in a slot of shared memory, `called` and `returned`, with an eventfd each
way:

    VMM     called += 1, write go      ───▶   keeper   KVM_RUN
    VMM     serves the exit in kvm_run ◀───   keeper   result, returned = called, write done

called > returned: the vCPU runs, and needs nobody. called == returned with result 0: its exit waits for a
VMM, this one or the next. So a VMM may come, go or be killed at any time; the slot says what is to be done.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from errno import EAGAIN, EBADF, EBUSY, EEXIST, EINVAL, ENOSPC, EPERM
from typing import NamedTuple, TypeAlias

PROTOCOL = 1  # of the messages and of the slots; a VMM that knows another one must not attach
HELLO = struct.Struct("=IIQ")  # protocol, pid, identity

REQUEST = struct.Struct("=IiQQQQQ")  # op, fd, request number, four arguments
REPLY = struct.Struct("=iiI")  # result, errno, flags
PAYLOAD_MAX = 1 << 16
MESSAGE_MAX = REQUEST.size + PAYLOAD_MAX
NAME = struct.Struct("=32sII")  # name, id, the keeper's fd
MEMORY = struct.Struct("=IIQ")  # fds of what is mapped and of a guest_memfd, or NO_FD; offset in that
FDS_MAX = 4096  # fds the keeper will hold, as far as its limit of open files allows
FDS_SPARE = 64  # of that limit: its own, its clients', and those of one message
CLIENTS_MAX = 16
AT_ONCE_S = 0.001  # as an orphan timeout, of which 0 is for ever
ORPHAN_MAX_MS = 1 << 30  # some 12 days; what a poll can wait for
FDS_PER_MESSAGE = 250  # below the kernel's SCM_MAX_FD
# linux/prctl.h, linux/seccomp.h, linux/capability.h, asm/unistd_64.h
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SYS_CAPSET, SYS_LANDLOCK_RESTRICT_SELF, CAPABILITY_VERSION_3 = 126, 446, 0x20080522

NEEDED = frozenset({b"kvm-slots", b"kvm-go", b"kvm-done"})  # names that the keeper itself gave, and uses

# a vCPU's slot in u64 words: called, returned, result (0 an exit, else errno), when it returned
# (CLOCK_MONOTONIC, ns), how long either side looks at the slot before it sleeps (ns; the VMM decides), and
# the thread that is in KVM_RUN
SLOT = 64
CALLED, RETURNED, RESULT, SINCE, SPIN, THREAD = range(6)
SLOTS = 1024
SLOTS_SIZE = SLOT * SLOTS
LARGEST_WORD = (1 << 64) - 1
KICK = signal.SIGUSR1
BLOCKED = {KICK, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE}  # they end VMMs, not us
SPIN_MAX_NS = 1_000_000

OP_HELLO = 0  # HELLO, and a pidfd of the keeper's
OP_IOCTL = 1  # fd, number, argument or payload -> payload
OP_CREATE = 2  # the same; the new fd is held and sent back with its number in the reply's payload; one VM
OP_MEMORY = 3  # the VM's own fd; slot | flags << 32, gpa, size, offset in what is mapped; payload MEMORY
OP_ATTRIBUTE = 4  # number GET/SET/HAS_DEVICE_ATTR; group, attribute, value -> value
OP_DIRTY_LOG = 5  # the VM's own fd; slot, bytes -> payload
OP_VCPU = 6  # fd of the vCPU; its slot: starts its thread; sends go and done
OP_KICK = 7  # slot
OP_STORE = 8  # payload NAME, one fd: held under that name; the reply's payload is the keeper's number
OP_DROP = 9  # payload NAME; EBUSY while it is a slot's memory, EBADF for the VM and its vCPUs
OP_TABLE = 10  # from row n: rows of NAME, with their fds
OP_ATTACH = 11  # be the one VMM; EBUSY while another is attached and alive
OP_DETACH = 12  # be it no more
OP_SUCCESSOR = 13  # one fd, a socket: a VMM that will attach later speaks through it
OP_ORPHAN = 14  # milliseconds to live once no VMM is connected; 0: for ever
OP_QUIT = 15  # end; the guest ends with it
ANYBODY = frozenset({OP_HELLO, OP_ATTACH, OP_TABLE})
NEED_NO_ATTACH = ANYBODY | {OP_ORPHAN}  # of a VMM that was attached, or announced by one that is

KVM_CREATE_VM = 0xAE01
KVM_RUN = 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
KVM_GET_DIRTY_LOG = 0x4010AE42
KVM_SET_SIGNAL_MASK = 0x4004AE8B
DEVICE_ATTRIBUTES = frozenset({0x4018AEE1, 0x4018AEE2, 0x4018AEE3})  # SET, GET, HAS
CREATES = frozenset({KVM_CREATE_VM, 0xAE41, 0xAECE, 0xC040AED4})  # VM, VCPU, STATS_FD, GUEST_MEMFD
# ioctls whose argument counts its own elements in the first u32: (bytes of one element)
COUNTED = {
    0xC008AE88: 16,  # GET_MSRS
    0x4008AE89: 16,  # SET_MSRS
    0xC008AE05: 40,  # GET_SUPPORTED_CPUID
    0xC008AE91: 40,  # GET_CPUID2
    0x4008AE90: 40,  # SET_CPUID2
    0xC004AE02: 4,  # GET_MSR_INDEX_LIST
    0xC004AE0A: 4,  # GET_MSR_FEATURE_INDEX_LIST
    0x4008AE6A: 48,  # SET_GSI_ROUTING
}
# What is passed through: integers, and structures without a pointer in them. All else is refused.
PASSED = frozenset({
    # /dev/kvm: API version, capabilities, size of a run page, lists of CPUID leaves and of MSRs
    0xAE00, 0xAE03, 0xAE04, 0xC008AE05, 0xC004AE02, 0xC004AE0A,
    # a VM: capabilities, KVM's own pages, chips, lines, routes, eventfds, coalesced I/O, clock
    0x4068AEA3, 0xAE47, 0x4008AE48, 0xAE60, 0x4040AE77, 0xC208AE62,
    0x8208AE63, 0x8070AE9F, 0x4070AEA0, 0x4008AE61, 0x4020AEA5, 0x4008AE6A, 0x4020AE76, 0x4040AE79,
    0x4010AE67, 0x4010AE68, 0x4030AE7B, 0x8030AE7C,
    # a vCPU: registers, FPU, LAPIC, MSRs, CPUID, events, debug and nested state, interrupts, TSC rate
    0x8090AE81, 0x4090AE82, 0x8138AE83, 0x4138AE84, 0x8140AECC, 0x4140AECD, 0x81A0AE8C, 0x41A0AE8D,
    0x9000AEA4, 0x5000AEA5, 0x9000AECF, 0x8188AEA6, 0x4188AEA7, 0x8400AE8E, 0x4400AE8F, 0xC008AE88,
    0x4008AE89, 0x4008AE90, 0xC008AE91, 0x8004AE98, 0x4004AE99, 0x8040AE9F, 0x4040AEA0, 0x8080AEA1,
    0x4080AEA2, 0x4048AE9B, 0xC080AEBE, 0x4080AEBF, 0xC018AE85, 0x4004AE86, 0xAE9A, 0xAEA2,
    0xAEA3, 0xC040AED5,
})  # fmt: skip
KVM_ENABLE_CAP = 0x4068AEA3
ENABLED = frozenset({121, 164, 218})  # SPLIT_IRQCHIP, EXCEPTION_PAYLOAD, X86_TRIPLE_FAULT_EVENT: no pointers
# fds of the keeper's within the argument: request -> (offset of its number, whether there may be none)
INNER_FDS = {
    0x4020AE76: ((0, False), (12, True)),  # IRQFD: fd, resamplefd
    0x4040AE79: ((20, False),),  # IOEVENTFD: fd
}
NO_FD = 0xFFFFFFFF
MAP_NORESERVE = 0x4000  # asm-generic/mman-common.h

_libc_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_libc_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def ioctl(fd: int, request: int, argument: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    """ioctl(2). Unlike `fcntl.ioctl` it never keeps the interpreter's lock, whatever the argument's size."""
    pointer = argument if isinstance(argument, (int, bytes)) else ctypes.addressof(argument)
    result: int = _libc_ioctl(fd, request, pointer)
    if result < 0:
        raise OSError(ctypes.get_errno(), "ioctl")
    return result


Answer: TypeAlias = tuple[bytes, Sequence[int], int]  # the reply's payload, its fds, the result
DONE: Answer = (b"", (), 0)


class Message(NamedTuple):
    """One message, who sent it, and the fds that came with it: closed at the end, unless they are held."""

    sock: socket.socket
    fd: int
    request: int
    arguments: list[int]
    payload: bytes
    fds: array.array[int]


class Refused(Exception):
    """A message that is not carried out; the reply has the errno, and what the call has written."""

    def __init__(self, number: int, written: bytes = b"") -> None:
        super().__init__(number)
        self.errno = number
        self.written = written


def spin(words: memoryview, *, equal: bool) -> bool:
    """Whether `called` and `returned` are soon no longer equal, or no longer different."""
    if not words[SPIN]:
        return False
    until = time.monotonic_ns() + min(words[SPIN], SPIN_MAX_NS)
    while (words[CALLED] == words[RETURNED]) is equal:
        if time.monotonic_ns() > until:
            return False
    return True


class VcpuRunner:
    """The thread of one vCPU."""

    def __init__(self, fd: int, slot: int, words: memoryview) -> None:
        self.fd = fd
        self.go = os.eventfd(0, os.EFD_CLOEXEC)
        self.done = os.eventfd(0, os.EFD_CLOEXEC)
        self.words = words[slot * SLOT // 8 : (slot + 1) * SLOT // 8]
        self.thread = threading.Thread(target=self._main, daemon=True)

    @property
    def busy(self) -> bool:
        """Whether KVM_RUN is called and has not returned: then no other ioctl may go to this vCPU."""
        return self.words[CALLED] != self.words[RETURNED]

    def _main(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK})
        words, fd, go, done = self.words, self.fd, self.go, self.done
        read, write = os.eventfd_read, os.eventfd_write
        while True:
            if not spin(words, equal=True):
                read(go)
            while (turn := words[CALLED]) != words[RETURNED]:
                words[RESULT] = _run(fd)
                words[SINCE] = time.monotonic_ns()
                words[RETURNED] = turn
                write(done, 1)


def _run(fd: int) -> int:
    """KVM_RUN: 0 for an exit, else its errno. What INIT or SIPI has woken (EAGAIN) runs on."""
    while True:
        try:
            ioctl(fd, KVM_RUN, 0)
        except OSError as error:
            if error.errno == EAGAIN:
                continue
            signal.sigtimedwait({KICK}, 0)
            return error.errno or EINVAL
        return 0


class Mapping(NamedTuple):
    """The memory of one slot, as it is mapped here."""

    memfd: int
    offset: int
    size: int
    mapping: mmap.mmap
    address: int


class Keeper:
    """Everything the process is."""

    def __init__(self, listener: socket.socket | None, first: socket.socket) -> None:
        self._poll = select.poll()
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}
        self._attached: socket.socket | None = None
        self._vmms = {first}  # who has been attached or was announced, while they are connected
        self._life = -1
        self._identity = int.from_bytes(os.urandom(8), sys.byteorder)
        self._names: dict[tuple[bytes, int], int] = {}
        self._held: set[int] = set()
        self._vm = -1  # one, for good, by one number: what is known of its slots is then the kernel's view
        self._mappings: dict[int, Mapping] = {}  # by slot
        self._most_fds = min(FDS_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FDS_SPARE)
        self._buffer = ctypes.create_string_buffer(PAYLOAD_MAX)
        self._slots_fd = os.memfd_create("vmm-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._slots_fd, SLOTS_SIZE)
        fcntl.fcntl(
            self._slots_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        self._words = memoryview(mmap.mmap(self._slots_fd, SLOTS_SIZE)).cast("Q")
        self._runners: dict[int, VcpuRunner] = {}
        self._by_fd: dict[int, VcpuRunner] = {}
        self._orphan_s = AT_ONCE_S  # until OP_ORPHAN says otherwise, nobody will come
        self._alone_since = time.monotonic()
        self._over = False
        self._names[b"kvm-slots", 0] = self._slots_fd
        self._held.add(self._slots_fd)
        if listener is not None:
            self._poll.register(listener, select.POLLIN)
        self._admit(first)
        self._operations = (  # by number
            *(self._hello, self._ioctl, self._create, self._memory, self._attribute, self._dirty_log),
            *(self._vcpu, self._kick, self._store, self._drop, self._table),
            *(self._attach, self._detach, self._successor, self._orphan, self._quit),
        )

    # --- who speaks to us ---

    def serve(self) -> None:
        """Serve until the attached VMM says OP_QUIT, or nobody came for the orphan timeout."""
        while not self._over:
            wait_ms = None
            if not self._vmms and self._orphan_s:
                left = self._alone_since + self._orphan_s - time.monotonic()
                if left <= 0:
                    return
                wait_ms = left * 1000 + 1
            for fd, _ in self._poll.poll(wait_ms):
                if self._listener is not None and fd == self._listener.fileno():
                    try:
                        sock, _ = self._listener.accept()
                    except OSError:  # it went again
                        continue
                    if not self._admit(sock):
                        sock.close()
                elif fd in self._clients and not self._over:
                    self._serve_one(self._clients[fd])

    def _admit(self, sock: socket.socket) -> bool:
        """Listen to `sock` from here on, unless it is a stranger's or there are too many."""
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.geteuid(), 0) or len(self._clients) >= CLIENTS_MAX:
            return False
        sock.setblocking(False)  # a VMM that does not take its answers cannot stop us
        self._clients[sock.fileno()] = sock
        self._poll.register(sock, select.POLLIN)
        return True

    def _expect(self, vmm: socket.socket) -> None:
        self._vmms.add(vmm)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _dismiss(self, sock: socket.socket) -> None:
        self._poll.unregister(sock)
        del self._clients[sock.fileno()]
        if sock is self._attached:
            self._attached = None
        if sock in self._vmms:
            self._vmms.discard(sock)
            self._alone_since = time.monotonic()
            if not self._vmms:
                signal.sigtimedwait({signal.SIGTERM}, 0)  # what has come was the VMM's to follow
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        sock.close()

    def stop_listening(self) -> None:
        """Be found no more: remove the listening socket's file, which the first VMM made."""
        if self._listener is None:
            return
        try:
            os.unlink(self._listener.getsockname())
        except OSError:  # somebody has cleaned up
            pass
        self._poll.unregister(self._listener)
        self._listener.close()
        self._listener = None

    def _serve_one(self, sock: socket.socket) -> None:
        fds = array.array("i")
        try:
            data, ancillary, flags, _ = sock.recvmsg(
                MESSAGE_MAX, socket.CMSG_SPACE(4 * 8), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:  # whoever had this number before had something to say
            return
        except OSError:
            self._dismiss(sock)
            return
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % 4])
        payload, result, number = b"", 0, 0
        sent: Sequence[int] = ()
        try:
            if not data:
                self._dismiss(sock)
                return
            if len(data) < REQUEST.size or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Refused(EINVAL)
            op, fd, request, *arguments = REQUEST.unpack_from(data)
            if op not in (NEED_NO_ATTACH if sock in self._vmms else ANYBODY) and sock is not self._attached:
                raise Refused(EPERM)
            if op >= len(self._operations):
                raise Refused(EINVAL)
            message = Message(sock, fd, request, arguments, data[REQUEST.size :], fds)
            payload, sent, result = self._operations[op](message)
        except Refused as refusal:
            result, number, payload = -1, refusal.errno, refusal.written
        except OSError as error:
            result, number = -1, error.errno or EINVAL
        except Exception:  # noqa: BLE001 -- a payload of the wrong shape; no message ends the guest
            result, number = -1, EINVAL
        finally:
            for one in fds:
                if one not in self._held and one not in self._clients:
                    os.close(one)
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent))] if sent else []
            sock.sendmsg([REPLY.pack(result, number, 0), payload], rights)
        except OSError:
            self._dismiss(sock)

    # --- operations ---

    def _hello(self, message: Message) -> Answer:
        if self._life < 0:
            self._life = os.pidfd_open(os.getpid())
            self._held.add(self._life)
        return HELLO.pack(PROTOCOL, os.getpid(), self._identity), [self._life], 0

    def _room(self) -> None:
        """Room for one more fd. (A mapping has one, too.)"""
        if len(self._held) + len(self._mappings) >= self._most_fds:
            raise Refused(ENOSPC)

    def _owned(self, fd: int) -> int:
        if fd not in self._held:
            raise Refused(EBADF)
        runner = self._by_fd.get(fd)
        if runner is not None and runner.busy:
            raise Refused(EBUSY)
        return fd

    def _argument(self, request: int, payload: bytes) -> ctypes.Array[ctypes.c_char]:
        """The payload in a buffer larger than anything the kernel writes for it."""
        unit = COUNTED.get(request)
        if unit is not None:
            if len(payload) < 4 or 8 + struct.unpack_from("=I", payload)[0] * unit > PAYLOAD_MAX:
                raise Refused(EINVAL)
        elif len(payload) < request >> 16 & 0x3FFF:
            raise Refused(EINVAL)
        if request == KVM_ENABLE_CAP and struct.unpack_from("=I", payload)[0] not in ENABLED:
            raise Refused(EPERM)
        for offset, optional in INNER_FDS.get(request, ()):
            (inner,) = struct.unpack_from("=I", payload, offset)
            if inner not in self._held and not (optional and inner in (0, NO_FD)):
                raise Refused(EBADF)
        ctypes.memmove(self._buffer, payload + bytes(PAYLOAD_MAX - len(payload)), PAYLOAD_MAX)
        return self._buffer

    def _call(self, message: Message) -> tuple[int, bytes]:
        fd, request, payload = self._owned(message.fd), message.request, message.payload
        if bool(payload) != bool(request >> 16 & 0x3FFF):
            raise Refused(EINVAL)
        if not payload:
            return ioctl(fd, request, message.arguments[0]), b""
        buffer = self._argument(request, payload)
        try:
            result = ioctl(fd, request, buffer)
        except OSError as error:  # some say what they would have needed: KVM_GET_MSR_INDEX_LIST and E2BIG
            raise Refused(error.errno or EINVAL, buffer.raw[: len(payload)]) from None
        return result, buffer.raw[: len(payload)]

    def _ioctl(self, message: Message) -> Answer:
        if message.request not in PASSED:
            raise Refused(EPERM)
        result, out = self._call(message)
        return out, (), result

    def _create(self, message: Message) -> Answer:
        if message.request not in CREATES:
            raise Refused(EPERM)
        if message.request == KVM_CREATE_VM and self._vm >= 0:
            raise Refused(EEXIST)
        self._room()
        created, _ = self._call(message)
        os.set_inheritable(created, False)
        self._held.add(created)
        if message.request == KVM_CREATE_VM:
            self._vm = created
        return struct.pack("=I", created), [created], 0

    def _memory(self, message: Message) -> Answer:
        slot_flags, gpa, size, offset = message.arguments
        memfd, guest_memfd, guest_offset = MEMORY.unpack(message.payload)
        slot, flags = slot_flags & 0xFFFFFFFF, slot_flags >> 32
        if message.fd != self._vm:
            raise Refused(EBADF)
        mapped = self._map(slot, memfd, size, offset) if size and memfd != NO_FD else None
        region = struct.pack("=IIQQQ", slot, flags, gpa, size, mapped.address if mapped else 0)
        if guest_memfd != NO_FD:
            region += struct.pack("=QI", guest_offset, self._owned(guest_memfd)) + bytes(4 + 14 * 8)
            number = KVM_SET_USER_MEMORY_REGION2
        else:
            number = KVM_SET_USER_MEMORY_REGION
        ioctl(self._owned(self._vm), number, region)
        self._mappings.pop(slot, None)  # unmapped, unless the slot is the same one, changed
        if mapped is not None:
            self._mappings[slot] = mapped
        return DONE

    def _map(self, slot: int, memfd: int, size: int, offset: int) -> Mapping:
        known = self._mappings.get(slot)
        if known is not None and (known.memfd, known.offset, known.size) == (memfd, offset, size):
            return known
        self._room()
        mapping = mmap.mmap(self._owned(memfd), size, mmap.MAP_SHARED | MAP_NORESERVE, offset=offset)
        return Mapping(memfd, offset, size, mapping, ctypes.addressof(ctypes.c_char.from_buffer(mapping)))

    def _attribute(self, message: Message) -> Answer:
        if message.request not in DEVICE_ATTRIBUTES:
            raise Refused(EPERM)
        word = ctypes.c_uint64(message.arguments[2])
        group, attribute = message.arguments[0] & 0xFFFFFFFF, message.arguments[1]
        block = struct.pack("=IIQQ", 0, group, attribute, ctypes.addressof(word))
        result = ioctl(self._owned(message.fd), message.request, block)
        return struct.pack("=Q", word.value), (), result

    def _dirty_log(self, message: Message) -> Answer:
        slot, size = message.arguments[:2]
        mapped = self._mappings.get(slot) if message.fd == self._vm else None
        # the kernel writes by the slot's size, whatever we say
        if mapped is None or size != -(-mapped.size // (64 * mmap.PAGESIZE)) * 8 or size > PAYLOAD_MAX:
            raise Refused(EINVAL)
        bitmap = ctypes.create_string_buffer(size)
        argument = struct.pack("=IIQ", slot, 0, ctypes.addressof(bitmap))
        ioctl(self._owned(message.fd), KVM_GET_DIRTY_LOG, argument)
        return bitmap.raw, (), 0

    def _vcpu(self, message: Message) -> Answer:
        fd, slot = message.fd, message.arguments[0]
        if slot >= SLOTS or slot in self._runners or fd in self._by_fd:
            raise Refused(EINVAL)
        self._room()
        unblocked = ~(1 << (KICK - 1)) & LARGEST_WORD
        ioctl(self._owned(fd), KVM_SET_SIGNAL_MASK, struct.pack("=IQ", 8, unblocked))
        runner = VcpuRunner(fd, slot, self._words)
        try:
            runner.thread.start()
        except RuntimeError:  # no more threads for this user
            os.close(runner.go)
            os.close(runner.done)
            raise Refused(EAGAIN) from None
        runner.words[THREAD] = runner.thread.native_id or 0
        self._runners[slot] = self._by_fd[fd] = runner
        for name, one in ((b"kvm-go", runner.go), (b"kvm-done", runner.done)):
            self._names[name, slot] = one
            self._held.add(one)
        return b"", [runner.go, runner.done], 0

    def _kick(self, message: Message) -> Answer:
        runner = self._runners.get(message.arguments[0])
        if runner is None:
            raise Refused(EINVAL)
        signal.pthread_kill(runner.thread.ident or 0, KICK)
        return DONE

    def _store(self, message: Message) -> Answer:
        name, index, _ = NAME.unpack(message.payload)
        key = (name.rstrip(b"\0"), index)
        if key in self._names:
            raise Refused(EEXIST)
        self._room()
        stored = message.fds[0] if message.fds else self._owned(message.fd)
        self._names[key] = stored
        self._held.add(stored)
        return struct.pack("=I", stored), (), 0

    def _drop(self, message: Message) -> Answer:
        name, index, _ = NAME.unpack(message.payload)
        key = (name.rstrip(b"\0"), index)
        fd = self._names.get(key, -1)
        if fd in (-1, self._vm) or key[0] in NEEDED or fd in self._by_fd:
            raise Refused(EBADF)
        if any(mapped.memfd == fd for mapped in self._mappings.values()):
            raise Refused(EBUSY)
        del self._names[key]
        if fd not in self._names.values():
            self._held.discard(fd)
            os.close(fd)
        return DONE

    def _table(self, message: Message) -> Answer:
        self._expect(message.sock)  # it is about to attach
        rows = list(self._names.items())
        part = rows[message.arguments[0] :][:FDS_PER_MESSAGE]
        packed = b"".join(NAME.pack(name, index, fd) for (name, index), fd in part)
        return packed, [fd for _, fd in part], len(rows)

    def _attach(self, message: Message) -> Answer:
        if self._attached not in (None, message.sock) and not _hung_up(self._attached):
            raise Refused(EBUSY)
        self._attached = message.sock
        self._expect(message.sock)
        return DONE

    def _detach(self, message: Message) -> Answer:
        self._attached = None
        return DONE

    def _successor(self, message: Message) -> Answer:
        if len(message.fds) != 1:
            raise Refused(EINVAL)
        sock = socket.socket(fileno=message.fds[0])
        message.fds.pop()  # the socket's from here on
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET) or not self._admit(sock):
            sock.close()
            raise Refused(EINVAL)
        self._expect(sock)
        return DONE

    def _orphan(self, message: Message) -> Answer:
        if message.arguments[0] > ORPHAN_MAX_MS:
            raise Refused(EINVAL)
        self._orphan_s = message.arguments[0] / 1000
        return DONE

    def _quit(self, message: Message) -> Answer:
        self.stop_listening()
        self._over = True
        return DONE


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def confine(program: bytes, ruleset: int) -> None:
    """Gain no privilege and have no capability, for good; open and remove no file but as `ruleset` allows
    (Landlock; -1: any); make no system call but those of `program` (seccomp; empty: any).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program) or 1)
    filters = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    results = [
        libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))),
        libc.syscall(SYS_CAPSET, struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)),
        libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0) if ruleset >= 0 else 0,
        libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters) if program else 0,
    ]
    if any(results):
        raise OSError(ctypes.get_errno(), f"the keeper cannot confine itself: {results}")


def main() -> None:
    """`keeper.py FIRST LISTENER RULESET`: fds of the first VMM's connection, of the listening socket and of a
    Landlock ruleset, -1 for none; on stdin a seccomp filter, or nothing.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    threading.stack_size(256 * 1024)
    sys.setswitchinterval(0.0005)
    first, listening, ruleset = (int(word) for word in sys.argv[1:])
    for fd in {first, listening, ruleset} - {-1}:
        os.set_inheritable(fd, False)
    listener = socket.socket(fileno=listening) if listening >= 0 else None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    keeper = Keeper(listener, socket.socket(fileno=first))
    confine(sys.stdin.buffer.read(), ruleset)
    if ruleset >= 0:
        os.close(ruleset)
    keeper.serve()
    keeper.stop_listening()
    os._exit(0)  # the threads are in KVM_RUN; the VM goes with the process


if __name__ == "__main__":
    main()
