"""The port to a VM that a keeper owns: the same calls as `DirectPort`, carried out in the keeper's process.

KVM_RUN needs no message: a vCPU's slot in shared memory and two eventfds do it (see `keeper`). Everything
else is one request and one reply on a socket, one at a time. This module must never decide what an exit
means, and holds no state that a VMM which comes after a crash would need.

A keeper may be an older one, or one that has been taken over. An answer of a shape that its question does not
have, and an fd that is not what was asked for, is a PeerError; nothing is asked of that keeper any more.
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

from vmm.errors import HostError, PeerError
from vmm.kvm import abi, keeper
from vmm.kvm.abi import Ioctl
from vmm.kvm.port import KICKED, Argument, Bitmap, IoctlError, ioctl_error
from vmm.sockets import check_peer

ANSWER_TIMEOUT_S = 10.0
STARTING_TIMEOUT_S = 60.0  # for a new one to come up; one that cannot ends, and is noticed at once
ATTACH_TIMEOUT_S = 1.0  # for the kernel to close the connection of a VMM that has just been killed
ENDING_TIMEOUT_S = 10.0  # from the keeper's last word to its end
NAP_S = 0.01
SPIN_NS = 20_000
NO_FD = -1
NUMBER_SIZE, WORD_SIZE = 4, 8  # of an fd's number, and of an attribute, in an answer
MAX_ERRNO = 4095  # linux/err.h
MAX_FD = MAX_PID = (1 << 31) - 1
MAX_WORD = (1 << 64) - 1

# What /proc/self/fd says of what KVM and the keeper make, and this process maps, reads or writes
_ANON = "anon_inode:"
KINDS = {
    "vm": re.compile(_ANON + "kvm-vm"),
    "vcpu": re.compile(_ANON + r"kvm-vcpu(:\d+)?"),
    "guest-memfd": re.compile(_ANON + r"\[kvm-gmem\]|/\[kvm-gmem\] \(deleted\)"),  # the latter from 6.19 on
    "kvm-slots": re.compile(r"/memfd:.*"),
    "kvm-go": re.compile(_ANON + r"\[eventfd\]"),
    "kvm-done": re.compile(_ANON + r"\[eventfd\]"),
}

KEEPER_NAME, SLOTS_NAME, GO_NAME, DONE_NAME = "keeper", "kvm-slots", "kvm-go", "kvm-done"
GUEST_MEMFD_NAME = "guest-memfd"  # given to what KVM_CREATE_GUEST_MEMFD makes, in its order
ADMITTED_NAME = "admitted"  # what has no other name; of no use to the next VMM
# What is made by these is mapped, or owned by a VM
CREATED = {
    abi.KVM_CREATE_VM: "vm",
    abi.KVM_CREATE_VCPU: "vcpu",
    abi.KVM_CREATE_GUEST_MEMFD: GUEST_MEMFD_NAME,
}
# All that a keeper ever issues, the most frequent one first
ISSUED = (
    keeper.KVM_RUN,
    *sorted(keeper.PASSED | keeper.CREATES | keeper.DEVICE_ATTRIBUTES),
    keeper.KVM_SET_SIGNAL_MASK,
    keeper.KVM_SET_USER_MEMORY_REGION,
    keeper.KVM_SET_USER_MEMORY_REGION2,
    keeper.KVM_GET_DIRTY_LOG,
)


@dataclass(frozen=True)
class HeldFd:
    """One row of the keeper's table: what it is called, and this process's copy of it."""

    name: str
    id: int
    keepers_fd: int
    fd: int


class _Runner:
    """This process's end of one vCPU's slot."""

    def __init__(self, words: memoryview, slot: int, go: int, done: int) -> None:
        self.slot = slot
        self.words = words[slot * keeper.SLOT // 8 : (slot + 1) * keeper.SLOT // 8]
        self.go = go
        self.done = done
        self.leaving = False
        self.server = 0  # this process's thread that serves the exits
        self.given = 0  # which of KVM_RUN's returns the caller was told of last: it has served that exit

    @property
    def exit(self) -> int:
        """The number of the exit that waits to be served, or is being served; 0 where there is none."""
        called, returned, result = (self.words[at] for at in (keeper.CALLED, keeper.RETURNED, keeper.RESULT))
        return int(returned) if called == returned and result == 0 else 0

    def proceed(self, *, unheard: bool = False) -> None:
        """Have the keeper call KVM_RUN, unless it has been told to already or has come back with what the
        caller does not know yet: an exit, or a kick (which alone may go `unheard`). What is there is looked
        at once: it may come at any moment of this.
        """
        called, returned, result = (self.words[at] for at in (keeper.CALLED, keeper.RETURNED, keeper.RESULT))
        if called == returned and (returned == self.given or (unheard and result in KICKED)):
            self.words[keeper.CALLED] = (called + 1) & MAX_WORD
            os.eventfd_write(self.go, 1)


class KeeperPort:
    """A `Port` over one connection to a keeper. `attach` before anything but `table` is asked of it."""

    OWN_NAMES: ClassVar[frozenset[str]] = frozenset({SLOTS_NAME, GO_NAME, DONE_NAME})

    def __init__(
        self,
        sock: socket.socket,
        *,
        findable: bool = True,
        spin: bool | None = None,
        starting_s: float | None = None,
    ) -> None:
        """Ask who is there, which one that is `starting_s` may take so long to say. Raises PeerError where
        that is no keeper, or one of another version.
        """
        sock.settimeout(starting_s or ANSWER_TIMEOUT_S)
        self.pid = -1
        self._identity = 0
        self._findable = findable
        self._spin = spin  # None: where there are cores to spare
        self._sock = sock
        self._lock = threading.RLock()  # of one question and its answer, and of `_broken`
        self._broken: str | None = None  # why nothing can be asked of the keeper any more
        self._numbers: dict[int, int] = {}  # this process's fd -> the keeper's
        self._names: dict[tuple[str, int], int] = {}  # what the keeper holds -> this process's fd, or NO_FD
        self._attached = False
        self._runners: dict[int, _Runner] = {}
        self._words: memoryview | None = None
        self._slots_fd = -1
        self._events: dict[int, tuple[int, int]] = {}  # vCPU index -> its go and done eventfds
        self._offered: socket.socket | None = None
        self._life = -1
        self._is_child = False
        try:
            self._greet()
            sock.settimeout(ANSWER_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        _, payload, fds = self._do(keeper.OP_HELLO, "say who it is", more=True)
        if len(fds) != 1 or len(payload) != keeper.HELLO.size or not _is_pidfd(fds[0]):
            _close_all(fds)
            raise PeerError("what answers is no keeper")
        (self._life,) = fds
        protocol, self.pid, self._identity = keeper.HELLO.unpack(payload)
        if protocol != keeper.PROTOCOL:
            raise PeerError(
                f"the keeper, process {self.pid}, speaks protocol {protocol}, this VMM {keeper.PROTOCOL}; "
                "use 'vmm handover --mode rebuild' to move the guest into a new keeper"
            )

    @classmethod
    def start(
        cls,
        listener: socket.socket | None = None,
        program: Callable[[int], bytes] = lambda _: b"",
        ruleset: int = -1,
        spin: bool | None = None,
    ) -> KeeperPort:
        """Start a keeper process and attach to it; `listener` is where VMMs that come later will find it.

        It confines itself to the seccomp filter `program(its pid)` and the Landlock ruleset of that fd, where
        given. Raises HostError.
        """
        _require_pidfds()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [theirs.fileno(), -1 if listener is None else listener.fileno(), ruleset]
        command = [sys.executable, "-I", "-S", "-B", keeper.__file__, *map(str, given)]
        with theirs:
            try:
                process = subprocess.Popen(
                    command,
                    pass_fds=[fd for fd in given if fd >= 0],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
            except OSError as error:
                ours.close()
                raise HostError(f"the keeper process cannot be started: {error.strerror}") from error
        process.returncode = 0  # it outlives this process, unless `close` ends it for good
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as stdin:  # one that has ended is noticed below
            stdin.write(program(process.pid))
        try:
            port = cls(ours, findable=listener is not None, spin=spin, starting_s=STARTING_TIMEOUT_S)
        except PeerError as error:
            raise HostError(f"the keeper process does not start: {error}") from error
        port._is_child = True
        try:
            if port.pid != process.pid or not _is_pidfd(port.lifeline, of_child=True):
                raise HostError(f"the keeper process {process.pid} does not say who it is")
            port.attach()
        except BaseException:
            port.close()
            raise
        return port

    @classmethod
    def connect(cls, path: str) -> KeeperPort:
        """A connection to the keeper that listens at `path`; not attached yet. Raises PeerError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)
            check_peer(sock, "keeper")
        except OSError as error:
            sock.close()
            raise PeerError(f"no keeper answers at {path}: {error.strerror}") from error
        except PeerError:
            sock.close()
            raise
        return cls(sock)

    def take_over(self, rows: Iterable[HeldFd], fds: Mapping[tuple[str, int], int]) -> None:
        """Be the port of a VMM that goes on with the keeper's VM; `attach` when the guest is its own.

        `rows` are the keeper's table, `fds` this process's own copies, by name and id; those of OWN_NAMES
        are the port's from here on. Raises PeerError where the keeper has no such machine.
        """
        known = {(row.name, row.id): row.keepers_fd for row in rows}
        missing = [
            f"{name}/{index}" for name, index in fds if name in ("vm", "vcpu") and (name, index) not in known
        ]
        if missing:
            raise PeerError(f"the keeper, process {self.pid}, does not have {', '.join(missing)}")
        own: list[tuple[str, int]] = [(SLOTS_NAME, 0)]
        vcpus = {index: fd for (name, index), fd in fds.items() if name == "vcpu"}
        for index in vcpus:
            own += [(GO_NAME, index), (DONE_NAME, index)]
        slotted = {key for key in fds if key[0] in self.OWN_NAMES}
        if slotted != set(own) or any(index >= keeper.SLOTS for index in vcpus):
            raise self._senseless(f"other slots than those of vCPUs {sorted(vcpus)}")
        for name, index in own:
            self._check(name, index, fds[name, index])
        self._map_slots(fds[SLOTS_NAME, 0])
        self._numbers = {fd: known[key] for key, fd in fds.items() if key in known}
        self._names = {key: fds.get(key, NO_FD) for key in known}
        for index, fd in vcpus.items():
            self._add_runner(fd, index, fds[GO_NAME, index], fds[DONE_NAME, index])

    # --- one message ---

    def _ask(
        self,
        op: int,
        fd: int = -1,
        request: int = 0,
        arguments: Iterable[int] = (),
        payload: bytes = b"",
        fds: Iterable[int] = (),
        *,
        size: int = 0,
        refusal: int = 0,
        made: int = 0,
        more: bool = False,
    ) -> tuple[int, int, bytes, list[int]]:
        """Result, errno, payload and fds of the answer. Its payload has `size` bytes, or none or `refusal`
        where there is an errno; it brings `made` fds. With `more` the caller looks at both. Raises PeerError.
        """
        words = [*arguments, 0, 0, 0, 0][:4]
        data = keeper.REQUEST.pack(op, fd, request, *words) + payload
        rights = array.array("i", fds)
        ancillary: list[Any] = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        received = array.array("i")
        with self._lock:
            if self._broken is not None:
                raise PeerError(self._broken)
            try:
                self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
                answer, extra, flags, _ = self._sock.recvmsg(
                    keeper.REPLY.size + keeper.PAYLOAD_MAX,
                    socket.CMSG_SPACE(4 * 253),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except OSError as error:
                # an answer that comes yet would be taken for that to the next question
                raise self._break(f"does not answer: {error}") from error
            for level, kind, content in extra:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received.frombytes(content[: len(content) - len(content) % 4])
            if not answer:
                _close_all(received)
                raise self._break("has ended")
            if len(answer) < keeper.REPLY.size or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                _close_all(received)
                raise self._senseless("a message that is not whole")
            result, number, _ = keeper.REPLY.unpack_from(answer)
            content = answer[keeper.REPLY.size :]
            sizes, count = ((0, refusal), 0) if number else ((size,), made)
            fits = (more and not number) or (len(content) in sizes and len(received) == count)
            if not fits or not 0 <= number <= MAX_ERRNO or (result < 0) != (number != 0):
                _close_all(received)
                raise self._senseless(
                    f"result {result}, errno {number}, {len(content)} bytes, {len(received)} fds "
                    f"to message {op}"
                )
        return result, number, content, list(received)

    def _break(self, why: str) -> PeerError:
        """Ask no more of the keeper, and end every `run`; the error that says so. The first reason stays."""
        with self._lock:
            self._broken = self._broken or f"the keeper, process {self.pid}, {why}"
            for runner in list(self._runners.values()):
                _wake(runner.done)
            return PeerError(self._broken)

    def _senseless(self, what: str) -> PeerError:
        """The error for an answer that no keeper gives. What comes after it would make no sense either."""
        return self._break(f"answers what makes no sense: {what}")

    def _check(self, name: str, index: int, fd: int) -> None:
        """That an fd of the keeper's is what was asked for, before this process maps it or waits for it.
        Raises PeerError.
        """
        target = os.readlink(f"/proc/self/fd/{fd}")
        if not KINDS[name].fullmatch(target):
            raise self._senseless(f"{name}/{index} is {target!a}")
        if name == SLOTS_NAME and not _is_fixed(fd, keeper.SLOTS_SIZE):
            raise self._senseless(f"{name}/{index} is not sealed, or has another size")

    def _do(self, op: int, what: str, **arguments: Any) -> tuple[int, bytes, list[int]]:
        result, number, payload, fds = self._ask(op, **arguments)
        if number:
            raise PeerError(f"the keeper, process {self.pid}, refuses to {what}: {os.strerror(number)}")
        return result, payload, fds

    def _number(self, fd: int) -> int:
        number = self._numbers.get(fd)
        if number is None:
            raise PeerError(f"the keeper, process {self.pid}, does not have fd {fd}")
        return number

    def _new_number(self, payload: bytes) -> int:
        """One of the keeper's fds, as it names them. Raises PeerError."""
        number = int.from_bytes(payload, sys.byteorder)
        if number > MAX_FD:
            raise self._senseless(f"{number} for an fd")
        return number

    # --- attaching, and the fds that the keeper holds ---

    def attach(self) -> None:
        """Be the VMM that the keeper serves. Raises PeerError while another one is attached and alive."""
        deadline = time.monotonic() + ATTACH_TIMEOUT_S
        while (number := self._ask(keeper.OP_ATTACH)[1]) == errno.EBUSY and time.monotonic() < deadline:
            time.sleep(NAP_S)
        if number:
            raise PeerError(
                f"the keeper, process {self.pid}, serves another VMM that lives: {os.strerror(number)}"
            )
        self._attached = True
        for runner in self._runners.values():
            runner.leaving = False
            _wake(runner.go)  # who was here before may have died before it came to that

    def detach(self) -> None:
        """Be it no more. The guest runs on; its exits wait."""
        self._do(keeper.OP_DETACH, "let this VMM go")
        self._attached = False

    @property
    def outlives(self) -> bool:
        """See `Port.outlives`."""
        return True

    def fd_rows(self, *, offer: bool) -> list[tuple[str, int, int]]:
        """See `Port.fd_rows`: the slots, each vCPU's eventfds and, on `offer`, a new connection to the keeper
        for the next VMM. While a copy of that is here the keeper cannot see that the next VMM ends.
        """
        rows = [(SLOTS_NAME, 0, self._slots_fd)]
        for index, (go, done) in self._events.items():
            rows += [(GO_NAME, index, go), (DONE_NAME, index, done)]
        if offer:
            self.close_offer()
            self._offered = self.make_successor()
            rows.append((KEEPER_NAME, 0, self._offered.fileno()))
        return rows

    def close_offer(self) -> None:
        """See `Port.close_offer`."""
        if self._offered is not None:
            self._offered.close()
            self._offered = None

    def make_successor(self) -> socket.socket:
        """A connection for a VMM that will attach once this one has detached."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._do(keeper.OP_SUCCESSOR, "take a successor", fds=[theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return ours

    @property
    def process(self) -> int:
        """See `Port.process`: the keeper's pid."""
        return self.pid

    @property
    def identity(self) -> int:
        """See `Port.identity`: a random number of the keeper's."""
        return self._identity

    def live_on(self, orphan_timeout_s: float) -> None:
        """See `Port.live_on`. A guest that nobody could find does not wait for anybody."""
        self.set_orphan_timeout(orphan_timeout_s if self._findable else keeper.AT_ONCE_S)

    def set_orphan_timeout(self, seconds: float) -> None:
        """How long the keeper, and the guest with it, lives once no VMM is connected; 0: for ever."""
        self._do(keeper.OP_ORPHAN, "take a timeout", arguments=[round(seconds * 1000)])

    @property
    def lifeline(self) -> int:
        """See `Port.lifeline`: a pidfd of the keeper."""
        return self._life

    def lost(self) -> None:
        """See `Port.lost`."""
        self._break("has ended")

    def close(self, *, for_good: bool = False) -> None:
        """Close the connection, which the keeper takes as a detach, or end the keeper, and the guest with
        it. Idempotent. Raises PeerError, with everything closed, where the keeper lives on all the same.
        """
        alive = self._end() if for_good and self._life >= 0 else None
        with self._lock:  # nobody is woken any more
            self._broken = self._broken or "the connection to the keeper is closed"
            self._runners.clear()
            self._words = None  # unmapped once no thread is in `run` any more
            fds = [self._life, self._slots_fd, *(fd for pair in self._events.values() for fd in pair)]
            self._events.clear()
            self._life = self._slots_fd = -1
        _close_all(fd for fd in fds if fd >= 0)
        self.close_offer()
        self._sock.close()
        if alive is not None:
            raise PeerError(
                f"{alive}; it lives on, and the guest in it: 'vmm attach' gives it a VMM, "
                f"'kill -9 {self.pid}' ends both"
            )

    def _end(self) -> str | None:
        """Have the keeper end, and leave no zombie. Returns why it lives on, where it does."""
        end, connection = select.poll(), select.poll()
        end.register(self._life, select.POLLIN)
        connection.register(self._sock, 0)
        try:
            self._do(keeper.OP_QUIT, "end")
        except PeerError as error:
            ending = connection.poll(0)  # it has hung up: what is left is the kernel's
            return None if end.poll(ENDING_TIMEOUT_S * 1000 if ending else 0) else str(error)
        if self._is_child:
            if not end.poll(ENDING_TIMEOUT_S * 1000):
                return f"the keeper, process {self.pid}, has not ended within {ENDING_TIMEOUT_S:g} s"
            os.waitid(os.P_PIDFD, self._life, os.WEXITED)
        return None

    def store(self, name: str, index: int, fd: int) -> None:
        """Have the keeper hold a copy of `fd` under that name, for whoever attaches after this process. What
        the keeper has made it holds already.
        """
        if self._names.get((name, index)) == fd:
            return
        payload = keeper.NAME.pack(name.encode(), index, 0)
        _, payload, _ = self._do(
            keeper.OP_STORE, f"hold {name}/{index}", payload=payload, fds=[fd], size=NUMBER_SIZE
        )
        self._numbers[fd] = self._new_number(payload)
        self._names[name, index] = fd

    def _name(self, name: str, index: int, fd: int) -> None:
        """Give a name to what the keeper has made."""
        payload = keeper.NAME.pack(name.encode(), index, 0)
        self._do(
            keeper.OP_STORE, f"name {name}/{index}", fd=self._number(fd), payload=payload, size=NUMBER_SIZE
        )
        self._names[name, index] = fd

    def drop(self, name: str, index: int) -> None:
        """Have the keeper close its copy."""
        self._do(keeper.OP_DROP, f"drop {name}/{index}", payload=keeper.NAME.pack(name.encode(), index, 0))
        self._numbers.pop(self._names.pop((name, index)), None)  # the next fd opened may have that number

    def table(self) -> list[HeldFd]:
        """Everything the keeper holds under a name, with new copies of the fds for this process. Each name is
        there once. Raises PeerError.
        """
        rows: dict[tuple[str, int], HeldFd] = {}
        opened: list[int] = []
        deadline = time.monotonic() + ANSWER_TIMEOUT_S  # for all of it
        try:
            while True:
                total, payload, fds = self._do(
                    keeper.OP_TABLE, "say what it holds", arguments=[len(rows)], more=True
                )
                opened += fds
                for (raw, index, number), fd in zip(keeper.NAME.iter_unpack(payload), fds, strict=True):
                    name = raw.rstrip(b"\0").decode("ascii")
                    if number > MAX_FD or not name.isprintable() or (name, index) in rows:
                        raise ValueError
                    rows[name, index] = HeldFd(name, index, number, fd)
                if len(rows) >= total:
                    return list(rows.values())
                if not fds or total > keeper.FDS_MAX or time.monotonic() > deadline:
                    raise ValueError
        except BaseException as error:
            _close_all(opened)
            if isinstance(error, (ValueError, struct.error)):
                raise self._break("sends a table that is none") from error
            raise

    # --- Port ---

    def admit(self, fd: int) -> None:
        """Have the keeper hold a copy of `fd`, which calls will name."""
        if fd not in self._names.values():
            self.store(ADMITTED_NAME, self._free(ADMITTED_NAME), fd)

    def forget(self, fd: int) -> None:
        """See `Port.forget`."""
        self._numbers.pop(fd, None)
        for (name, index), known in list(self._names.items()):
            if known == fd:
                self._names[name, index] = NO_FD
                if name == ADMITTED_NAME and self._attached and self._broken is None:
                    self.drop(name, index)

    def ioctl(self, fd: int, request: Ioctl, arg: Argument = 0) -> int:
        """See `Port.ioctl`."""
        return self._ioctl(keeper.OP_IOCTL, fd, request, arg)[0]

    def create(self, fd: int, request: Ioctl, arg: Argument = 0) -> int:
        """See `Port.create`; the keeper holds the new fd, and this process a copy."""
        _, payload, (made,) = self._ioctl(keeper.OP_CREATE, fd, request, arg, size=NUMBER_SIZE, made=1)
        try:
            if request in CREATED:
                self._check(CREATED[request], 0, made)
            self._numbers[made] = self._new_number(payload)
            if request is abi.KVM_CREATE_VM:
                self._name("vm", 0, made)
            elif request is abi.KVM_CREATE_GUEST_MEMFD:
                self._name(GUEST_MEMFD_NAME, self._free(GUEST_MEMFD_NAME), made)
        except BaseException:
            self._numbers.pop(made, None)
            os.close(made)
            raise
        return made

    def _free(self, name: str) -> int:
        return next(index for index in count() if (name, index) not in self._names)

    def _ioctl(
        self, op: int, fd: int, request: Ioctl, arg: Argument, *, size: int | None = None, made: int = 0
    ) -> tuple[int, bytes, list[int]]:
        """`size`: of the payload that a good answer has, where that is not what the kernel has written."""
        if isinstance(arg, int):
            result, number, payload, fds = self._ask(
                op, self._number(fd), request.number, [arg % (1 << 64)], size=size or 0, made=made
            )
        else:
            sent = self._with_keepers_fds(request, arg)
            result, number, payload, fds = self._ask(
                op,
                self._number(fd),
                request.number,
                payload=sent,
                size=len(sent) if size is None else size,
                refusal=len(sent),
                made=made,
            )
            if payload and op == keeper.OP_IOCTL and not request.fds:
                memoryview(arg).cast("B")[:] = payload
        if number:
            raise ioctl_error(number, request)
        return result, payload, fds

    def _with_keepers_fds(self, request: Ioctl, arg: Any) -> bytes:
        if not request.fds:
            return bytes(arg)
        copy = type(arg).from_buffer_copy(arg)
        for name in request.fds:
            fd = getattr(copy, name)
            if name == request.fds[0] or fd in self._numbers:  # the others may be unused
                setattr(copy, name, self._number(fd))
        return bytes(copy)

    def _attribute(self, fd: int, request: Ioctl, group: int, attr: int, value: int) -> int:
        _, number, payload, _ = self._ask(
            keeper.OP_ATTRIBUTE, self._number(fd), request.number, [group, attr, value], size=WORD_SIZE
        )
        if number:
            raise ioctl_error(number, request)
        return int.from_bytes(payload, sys.byteorder)

    def get_attr(self, fd: int, group: int, attr: int) -> int:
        """See `Port.get_attr`."""
        return self._attribute(fd, abi.KVM_GET_DEVICE_ATTR, group, attr, 0)

    def set_attr(self, fd: int, group: int, attr: int, value: int) -> None:
        """See `Port.set_attr`."""
        self._attribute(fd, abi.KVM_SET_DEVICE_ATTR, group, attr, value)

    def has_attr(self, fd: int, group: int, attr: int) -> bool:
        """See `Port.has_attr`."""
        try:
            self._attribute(fd, abi.KVM_HAS_DEVICE_ATTR, group, attr, 0)
        except IoctlError as error:
            if error.errno in (errno.ENXIO, errno.ENOTTY):
                return False
            raise
        return True

    def set_user_memory(
        self, vm_fd: int, slot: int, flags: int, gpa: int, size: int, hva: int, memfd: int, offset: int
    ) -> None:
        """See `Port.set_user_memory`; the keeper maps the memfd in its own address space."""
        self.admit(memfd)
        payload = keeper.MEMORY.pack(self._number(memfd), keeper.NO_FD, 0)
        self._memory(abi.KVM_SET_USER_MEMORY_REGION, vm_fd, [slot | flags << 32, gpa, size, offset], payload)

    def set_guest_memory(
        self, vm_fd: int, slot: int, flags: int, gpa: int, size: int, hva: int, guest_memfd: int, offset: int
    ) -> None:
        """See `Port.set_guest_memory`; the keeper maps the guest_memfd in its own address space."""
        number = self._number(guest_memfd)
        payload = keeper.MEMORY.pack(number if hva else keeper.NO_FD, number, offset)
        flags |= abi.KVM_MEM_GUEST_MEMFD
        self._memory(abi.KVM_SET_USER_MEMORY_REGION2, vm_fd, [slot | flags << 32, gpa, size, offset], payload)

    def _memory(self, request: Ioctl, vm_fd: int, arguments: list[int], payload: bytes) -> None:
        _, number, _, _ = self._ask(keeper.OP_MEMORY, self._number(vm_fd), 0, arguments, payload)
        if number:
            raise ioctl_error(number, request)

    def get_dirty_log(self, vm_fd: int, slot: int, bitmap: Bitmap) -> None:
        """See `Port.get_dirty_log`."""
        view = memoryview(bitmap).cast("B")
        _, number, payload, _ = self._ask(
            keeper.OP_DIRTY_LOG, self._number(vm_fd), 0, [slot, view.nbytes], size=view.nbytes
        )
        if number:
            raise ioctl_error(number, abi.KVM_GET_DIRTY_LOG)
        view[:] = payload

    # --- vCPUs ---

    def start_vcpu(self, vcpu_fd: int, index: int) -> None:
        """See `Port.start_vcpu`: the keeper starts the thread, which waits for the first `run`."""
        self._name("vcpu", index, vcpu_fd)
        _, _, (go, done) = self._do(
            keeper.OP_VCPU, f"run vCPU {index}", fd=self._number(vcpu_fd), arguments=[index], made=2
        )
        try:
            self._check(GO_NAME, index, go)
            self._check(DONE_NAME, index, done)
            self._slots()
        except BaseException:
            _close_all((go, done))
            raise
        self._add_runner(vcpu_fd, index, go, done)
        self._decide_spin()

    def _add_runner(self, vcpu_fd: int, index: int, go: int, done: int) -> None:
        self._events[index] = go, done
        self._runners[vcpu_fd] = _Runner(self._slots(), index, go, done)

    def _decide_spin(self) -> None:
        """Whether both sides look at a slot before they sleep, the same for every vCPU: only where there is a
        core to spare for both sides of each. It stands once the last vCPU is made, for VMMs that come later
        as well: in a handover those may be kept off some cores.
        """
        enough = len(os.sched_getaffinity(0)) > 2 * len(self._runners)
        for runner in self._runners.values():
            runner.words[keeper.SPIN] = SPIN_NS if self._spin or (self._spin is None and enough) else 0

    def bind_thread(self, vcpu_fd: int) -> None:
        """See `Port.bind_thread`: the thread that is kicked is the keeper's."""
        self._runners[vcpu_fd].server = threading.get_native_id()

    def thread_id(self, vcpu_fd: int) -> int:
        """See `Port.thread_id`. Of a keeper too old to say, it is the thread that serves the exits."""
        runner = self._runners[vcpu_fd]
        return runner.words[keeper.THREAD] & MAX_PID or runner.server

    def _slots(self) -> memoryview:
        if self._words is None:
            rows = {(row.name, row.id): row.fd for row in self.table()}
            fd = rows.pop((SLOTS_NAME, 0), NO_FD)
            _close_all(rows.values())
            if fd == NO_FD:
                raise PeerError(f"the keeper, process {self.pid}, has no slots")
            try:
                self._check(SLOTS_NAME, 0, fd)
                self._map_slots(fd)
            except BaseException:
                os.close(fd)
                raise
        assert self._words is not None
        return self._words

    def _map_slots(self, fd: int) -> None:
        """Own the slots' memfd, which has been checked."""
        self._words = memoryview(mmap.mmap(fd, keeper.SLOTS_SIZE)).cast("Q")
        self._slots_fd = fd

    def run(self, vcpu_fd: int) -> bool:
        """See `Port.run`. What came while nobody was here is returned first."""
        runner = self._runners[vcpu_fd]
        words = runner.words
        runner.proceed()
        keeper.spin(words, equal=False)
        while self._broken is not None or words[keeper.CALLED] != words[keeper.RETURNED]:
            if runner.leaving:
                return False
            if self._broken is not None:
                raise PeerError(self._broken)
            try:
                os.eventfd_read(runner.done)
            except BlockingIOError as error:
                raise self._senseless("an eventfd that does not wait") from error
        runner.given = words[keeper.RETURNED]
        result = words[keeper.RESULT]
        if result == 0:
            return True
        if result in KICKED:
            return False
        if result > MAX_ERRNO:
            raise self._senseless(f"errno {result} of KVM_RUN")
        raise ioctl_error(result, abi.KVM_RUN)

    def kick(self, vcpu_fd: int) -> None:
        """See `Port.kick`."""
        try:
            if self._broken is None:  # else `run` has been woken, and raises by itself
                self._do(keeper.OP_KICK, "kick a vCPU", arguments=[self._runners[vcpu_fd].slot])
        except PeerError:
            if self._broken is None:
                raise

    def leave(self, vcpu_fd: int) -> None:
        """See `Port.leave`."""
        runner = self._runners[vcpu_fd]
        runner.leaving = True
        _wake(runner.done)

    def go_on(self, vcpu_fd: int) -> None:
        """See `Port.go_on`."""
        runner = self._runners[vcpu_fd]
        runner.leaving = False
        runner.proceed(unheard=True)

    def pending_exit(self, vcpu_fd: int) -> int:
        """See `Port.pending_exit`."""
        return self._runners[vcpu_fd].exit

    def waiting_ns(self, vcpu_fd: int) -> int | None:
        """See `Port.waiting_ns`."""
        runner = self._runners[vcpu_fd]
        return max(time.monotonic_ns() - runner.words[keeper.SINCE], 0) if runner.exit else None


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _is_pidfd(fd: int, *, of_child: bool = False) -> bool:
    """Whether it is a pidfd, of this process's child if that is asked."""
    try:
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return not of_child
    except OSError:
        return False
    return True


def _require_pidfds() -> None:
    """Raises HostError where this kernel has no pidfds, or none that can be waited for."""
    error = os.strerror(errno.ENOSYS)
    try:
        fd = os.pidfd_open(os.getpid())
    except OSError as failure:
        error, known = failure.strerror or error, False
    else:
        known = _is_pidfd(fd)
        os.close(fd)
    if not known:
        raise HostError(f"a keeper needs pidfds ({error}); use Linux 5.4 or later, or --no-keeper")


def _is_fixed(fd: int, size: int) -> bool:
    """Whether it is a memfd of that size for ever: a page that is taken away would be a SIGBUS."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals and os.fstat(fd).st_size == size
    except OSError:
        return False  # no memfd


def _wake(eventfd: int) -> None:
    """Make an eventfd readable. One that counts no further is, and a write to it would wait."""
    poll = select.poll()
    poll.register(eventfd, select.POLLOUT)
    if poll.poll(0):
        os.eventfd_write(eventfd, 1)
