"""A keeper that answers anything, with any fds: its VMM gets an error of ours or of an ioctl, waits no longer
than for one answer, loses no fd, and maps nothing that could be taken away.
"""

from __future__ import annotations

import array
import mmap
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any
from unittest import mock

from tests.fuzz.reading import Reader, open_fds
from vmm import fds as vmm_fds
from vmm.errors import HostError, PeerError, StateError
from vmm.fds import FdIdentity, FdKind, FdStore, sealed_memfd
from vmm.kvm import System, abi, keeper, keeper_port
from vmm.kvm.keeper_port import KeeperPort
from vmm.machine import ports

ENDS = (PeerError, HostError, StateError, OSError)
ANSWER_S, ATTACH_S, SLOWEST_S = 0.02, 0.02, 2.0
RECV_SIZE = 1 << 17
FULL = (1 << 64) - 2  # what an eventfd counts to
# Without /dev/kvm: what stands for the fds of KVM
OF_KVM = {
    "vm": ("/dev/null", FdKind.KVM_VM),
    "vcpu": ("/dev/zero", FdKind.KVM_VCPU),
    "guest-memfd": ("/dev/full", FdKind.GUEST_MEMFD),
}
KINDS = keeper_port.KINDS | {name: re.compile(path) for name, (path, _) in OF_KVM.items()}
REQUEST_MAKES = {
    abi.KVM_CREATE_VM.number: "/dev/null",
    abi.KVM_CREATE_VCPU.number: "/dev/zero",
    abi.KVM_CREATE_GUEST_MEMFD.number: "/dev/full",
    abi.KVM_GET_STATS_FD.number: "/dev/null",
}
Answer = tuple[int, int, bytes, list[int]]  # result, errno, payload, fds


def _device(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _unsealed() -> int:
    fd = os.memfd_create("vmm-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, keeper.SLOTS_SIZE)
    return fd


def _full_eventfd() -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(fd, FULL)
    return fd


WRONG: tuple[Callable[[], int], ...] = (
    lambda: os.eventfd(0),
    _full_eventfd,
    lambda: os.eventfd(0, os.EFD_NONBLOCK),
    lambda: sealed_memfd("vmm-slots", 4096),
    _unsealed,
    lambda: sealed_memfd("vmm-slots", keeper.SLOTS_SIZE),
    lambda: os.open("/", os.O_PATH | os.O_CLOEXEC),
    lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach(),
    lambda: os.pidfd_open(os.getpid()),
    *(lambda path=path: _device(path) for path, _ in OF_KVM.values()),
)


class Wire(socket.socket):
    """The VMM's end of the connection; the keeper answers while a message is sent."""

    answer: Callable[[], None]
    cut = False  # whether there is room for one fd only

    def sendmsg(self, *arguments: Any) -> int:
        size = super().sendmsg(*arguments)
        self.answer()
        return size

    def recvmsg(self, size: int, ancillary: int = 0, flags: int = 0) -> Any:
        return super().recvmsg(size, socket.CMSG_LEN(4) if self.cut else ancillary, flags)


class Liar:
    """A keeper that mostly answers as it should."""

    def __init__(self, reader: Reader) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire = Wire(fileno=ours.detach())
        self.wire.answer = self.answer
        self._reader = reader
        self.rows = {
            ("kvm-slots", 0): sealed_memfd("vmm-slots", keeper.SLOTS_SIZE),
            ("vm", 0): _device("/dev/null"),
            ("vcpu", 0): _device("/dev/zero"),
            ("kvm-go", 0): os.eventfd(0),
            ("kvm-done", 0): os.eventfd(0),
            ("ram", 0): sealed_memfd("ram", 4096),
            ("admitted", 0): _device("/dev/full"),
        }
        self.slots = mmap.mmap(self.rows["kvm-slots", 0], keeper.SLOTS_SIZE)
        self._number = 100
        self._lies: tuple[Callable[[Answer], Answer | None], ...] = (
            *(self._errno, self._raw, self._payload, self._payload, self._resized, self._fewer, self._more),
            *(self._other, self._nothing, self._hung_up, self._twice, self._result, self._cut, self._words),
        )

    def close(self) -> None:
        for fd in self.rows.values():
            os.close(fd)
        self.slots.close()
        self.sock.close()
        self.wire.close()
        del self.wire.answer, self._lies  # cycles

    def answer(self) -> None:
        """To the message that has just been sent."""
        if self.sock.fileno() < 0:
            return
        data, extra, _, _ = self.sock.recvmsg(RECV_SIZE, socket.CMSG_SPACE(4 * 253), socket.MSG_CMSG_CLOEXEC)
        for _, _, content in extra:
            for fd in array.array("i", content):
                os.close(fd)
        op, _, request, *arguments = keeper.REQUEST.unpack_from(data)
        said: Answer | None = self._honest(op, request, arguments, data[keeper.REQUEST.size :])
        for _ in range(self._reader.choice((0, 0, 0, 0, 1, 1, 2))):
            if said is not None:
                said = self._reader.choice(self._lies)(said)
        if said is not None:
            self._say(said)

    def _say(self, answer: Answer, *, last: bool = True) -> None:
        result, number, payload, fds = answer
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendmsg([keeper.REPLY.pack(result, number, 0) + payload], rights)
        if last:
            self._drop(fds)

    def _drop(self, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)

    def _honest(self, op: int, request: int, arguments: list[int], payload: bytes) -> Answer:
        if op == keeper.OP_HELLO:
            pid = os.getpid()
            return 0, 0, keeper.HELLO.pack(keeper.PROTOCOL, pid, 7), [os.pidfd_open(pid)]
        if op == keeper.OP_CREATE:
            self._number += 1
            return 0, 0, self._number.to_bytes(4, "little"), [_device(REQUEST_MAKES[request])]
        if op == keeper.OP_STORE:
            self._number += 1
            return 0, 0, self._number.to_bytes(4, "little"), []
        if op == keeper.OP_VCPU:
            return 0, 0, b"", [os.dup(self.rows[name, 0]) for name in ("kvm-go", "kvm-done")]
        if op == keeper.OP_TABLE:
            part = list(self.rows.items())[arguments[0] :][: 1 + self._reader.number() % 8]
            packed = b"".join(keeper.NAME.pack(name.encode(), index, fd) for (name, index), fd in part)
            return len(self.rows), 0, packed, [os.dup(fd) for _, fd in part]
        if op == keeper.OP_DIRTY_LOG:
            return 0, 0, bytes(arguments[1]), []
        if op == keeper.OP_ATTRIBUTE:
            return 0, 0, bytes(8), []
        if op == keeper.OP_IOCTL:
            written = self._reader.bytes(min(len(payload), 8)).ljust(len(payload), b"\0")
            version = request == abi.KVM_GET_API_VERSION.number
            return abi.KVM_API_VERSION if version else 0, 0, written, []
        return 0, 0, b"", []

    # --- lies ---

    def _errno(self, said: Answer) -> Answer:
        number = self._reader.choice((16, 22, 7, 4, 11, 25, -5, 1 << 30, 0))
        return self._reader.choice((-1, -1, 0)), number, self._reader.choice((b"", said[2])), said[3]

    def _raw(self, said: Answer) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self.sock.send(self._reader.bytes(self._reader.number() % 64))
        self._drop(said[3])

    def _payload(self, said: Answer) -> Answer:
        content = bytearray(said[2])
        at = self._reader.number(2) % (len(content) + 1)
        new = self._reader.bytes(self._reader.choice((1, 4, 8)))
        content[at : at + len(new)] = new
        return said[0], said[1], bytes(content[: max(len(said[2]), 1)]), said[3]

    def _resized(self, said: Answer) -> Answer:
        size = self._reader.choice((0, 1, 4, 5, 8, 16, 40, 80, 4096, keeper.PAYLOAD_MAX, 70_000))
        return said[0], said[1], said[2][:size].ljust(size, b"\xff"), said[3]

    def _fewer(self, said: Answer) -> Answer:
        keep = self._reader.number() % (len(said[3]) + 1)
        self._drop(said[3][keep:])
        return *said[:3], said[3][:keep]

    def _more(self, said: Answer) -> Answer:
        count = self._reader.choice((1, 1, 2, 100))
        more = [self._reader.choice(WRONG)() for _ in range(count)] if len(said[3]) < 100 else []
        return *said[:3], [*said[3], *more]

    def _other(self, said: Answer) -> Answer:
        if not said[3]:
            return said
        at = self._reader.number() % len(said[3])
        os.close(said[3][at])
        return *said[:3], [*said[3][:at], self._reader.choice(WRONG)(), *said[3][at + 1 :]]

    def _nothing(self, said: Answer) -> None:
        self._drop(said[3])

    def _hung_up(self, said: Answer) -> None:
        self._drop(said[3])
        self.sock.close()

    def _twice(self, said: Answer) -> Answer:
        self._say(said, last=False)
        return said

    def _result(self, said: Answer) -> Answer:
        result = self._reader.choice((1, -1, 250, 4096, 4097, (1 << 31) - 1, -1 << 31))
        return result, *said[1:]

    def _cut(self, said: Answer) -> Answer:
        self.wire.cut = not self.wire.cut
        return said

    def _words(self, said: Answer) -> Answer:
        self.scribble()
        return said

    def scribble(self) -> None:
        """Nonsense in the words of the first slot."""
        word = self._reader.choice((0, 1, 2, 4, 4096, 1 << 31, 1 << 63, (1 << 64) - 1))
        at = self._reader.choice(range(keeper.CALLED, keeper.THREAD + 1))
        self.slots[8 * at : 8 * at + 8] = word.to_bytes(8, "little")


class Driver:
    """What a VMM asks of its keeper, in any order."""

    def __init__(self, port: KeeperPort, liar: Liar, reader: Reader, vcpus: Mapping[int, int]) -> None:
        self._port, self._liar, self._reader = port, liar, reader
        self._vm = -1
        self._vcpus = dict(vcpus)  # fd -> index, of those that are started
        self._opened: list[int] = []
        self._memfd = self._own(sealed_memfd("ram", 4096))
        self._event = self._own(os.eventfd(0))
        self._stored: list[tuple[str, int]] = []
        self._asks: tuple[Callable[[], object], ...] = (
            *(self._table, self._attach, self._ioctl, self._ioctl, self._create, self._create, self._vcpu),
            *(self._attributes, self._memory, self._irqfd, self._log, self._run, self._run, self._store),
            *(self._successor, self._system, self._orphan),
        )

    def _own(self, fd: int) -> int:
        self._opened.append(fd)
        return fd

    def ask(self) -> None:
        """One question."""
        started = time.monotonic()
        with suppress(*ENDS):
            self._reader.choice(self._asks)()
        assert time.monotonic() - started < SLOWEST_S

    def end(self) -> None:
        for fd in self._opened:
            with suppress(*ENDS):
                self._port.forget(fd)
            os.close(fd)
        self._asks = ()  # a cycle, which would keep the slots mapped

    def _table(self) -> None:
        rows = self._port.table()
        assert len(rows) <= keeper.FDS_MAX + keeper.FDS_PER_MESSAGE
        for row in rows:
            os.close(row.fd)

    def _attach(self) -> None:
        if self._reader.number() & 1:
            self._port.detach()
        self._port.attach()

    def _ioctl(self) -> None:
        clock = abi.kvm_clock_data()
        self._port.admit(self._event)
        assert self._port.ioctl(self._event, abi.KVM_GET_CLOCK, clock) >= 0
        assert self._port.ioctl(self._event, abi.KVM_CHECK_EXTENSION, 1) >= 0

    def _create(self) -> None:
        self._port.admit(self._event)
        request = self._reader.choice((abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU, abi.KVM_GET_STATS_FD))
        fd = self._own(self._port.create(self._vm if self._vm >= 0 else self._event, request, 0))
        if request is abi.KVM_CREATE_VM:
            self._vm = fd
            memory = abi.kvm_create_guest_memfd(4096, 0)
            self._own(self._port.create(fd, abi.KVM_CREATE_GUEST_MEMFD, memory))

    def _vcpu(self) -> None:
        self._port.admit(self._event)
        fd = self._own(self._port.create(self._event, abi.KVM_CREATE_VCPU, 0))
        index = len(self._vcpus)
        if index == 0 or self._reader.number() & 1:
            self._port.start_vcpu(fd, index)
            self._vcpus[fd] = index

    def _attributes(self) -> None:
        self._port.admit(self._event)
        self._port.has_attr(self._event, 0, 0)
        self._port.set_attr(self._event, 0, 0, 1)
        assert 0 <= self._port.get_attr(self._event, 0, 0) < 1 << 64

    def _memory(self) -> None:
        self._port.admit(self._event)
        self._port.set_user_memory(self._event, 0, 0, 0, 4096, 1, self._memfd, 0)
        self._port.admit(self._memfd)
        self._port.set_guest_memory(self._event, 0, 0, 0, 4096, 1, self._memfd, 0)

    def _irqfd(self) -> None:
        self._port.admit(self._event)
        self._port.ioctl(self._event, abi.KVM_IRQFD, abi.kvm_irqfd(fd=self._event, gsi=1))

    def _log(self) -> None:
        self._port.admit(self._event)
        self._port.get_dirty_log(self._event, 0, bytearray(8))

    def _run(self) -> None:
        """Of a vCPU that is left, so that nothing waits for ever."""
        for fd in self._vcpus:
            self._liar.scribble()
            self._port.leave(fd)
            with suppress(*ENDS):
                self._port.run(fd)
            assert 0 <= self._port.pending_exit(fd) < 1 << 64
            waiting_ns = self._port.waiting_ns(fd)
            assert waiting_ns is None or 0 <= waiting_ns < 1 << 63
            self._port.go_on(fd)
            self._port.kick(fd)

    def _store(self) -> None:
        if self._stored and self._reader.number() & 1:
            self._port.drop(*self._stored.pop())
        else:
            key = ("serial", len(self._stored))
            self._port.store(*key, self._event)
            self._stored.append(key)

    def _successor(self) -> None:
        self._port.make_successor().close()
        self._port.fd_rows(offer=True)

    def _system(self) -> None:
        with System("/dev/null", self._port) as system:
            system.supported_cpuid()
            system.msr_index_list()

    def _orphan(self) -> None:
        self._port.live_on(1.0)
        if self._reader.number() == 1:
            self._port.lost()


def _identify(fd: int) -> FdIdentity:
    target = os.readlink(f"/proc/self/fd/{fd}")
    for path, kind in OF_KVM.values():
        if target == path:
            return FdIdentity(kind, 0, 0)
    return IDENTIFY(fd)


IDENTIFY = vmm_fds.identify


def _come(way: int, liar: Liar, fds: FdStore) -> KeeperPort:
    """A new VM's keeper, one that an old VMM has offered, or one that was found."""
    if way == 0:
        return KeeperPort(liar.wire)
    if way == 1:
        for name in ("ram", "vm", "vcpu", "kvm-slots", "kvm-go", "kvm-done"):
            fds.add(name, 0, os.dup(liar.rows[name, 0]))
        port = ports.adopt_from_keeper(fds, findable=True)
    else:
        port = ports.find_keeper("", fds)
    assert isinstance(port, KeeperPort)
    return port


def one(data: bytes) -> None:
    """Byte 0: how the VMM comes to its keeper; then its questions, and what is wrong with the answers."""
    reader = Reader(data)
    before = open_fds()
    _play(reader)
    left = {fd: what for fd, what in open_fds().items() if fd not in before}
    assert not left, left


def _play(reader: Reader) -> None:
    way = reader.number() % 3
    liar, fds = Liar(reader), FdStore()
    with (
        mock.patch.multiple(
            keeper_port,
            KINDS=KINDS,
            ANSWER_TIMEOUT_S=ANSWER_S,
            ATTACH_TIMEOUT_S=ATTACH_S,
            ENDING_TIMEOUT_S=ANSWER_S,
            NAP_S=0.001,
        ),
        mock.patch.object(vmm_fds, "identify", _identify),
        mock.patch.object(ports, "take_keeper", return_value=liar.wire),
        mock.patch.object(KeeperPort, "connect", side_effect=lambda _: KeeperPort(liar.wire)),
    ):
        try:
            port = _come(way, liar, fds)
        except ENDS:
            port = None
        if port is not None:
            vcpus = {fd: index for name, index, fd in fds.items() if name == "vcpu"}
            driver = Driver(port, liar, reader, vcpus)
            while reader and port._broken is None:
                driver.ask()
            with suppress(PeerError):
                port.close(for_good=True)
            port.close()
            driver.end()
    fds.close()
    liar.close()


def seeds() -> Iterator[bytes]:
    """Every question of a keeper that does not lie, and of one that tells each lie once."""
    questions, lies = range(17), range(14)
    come = {0: b"\x00\x00", 1: b"\x01\x00\x07\x00", 2: b"\x02\x00\x07\x00"}
    for way, start in come.items():
        yield start + bytes(byte for ask in questions for byte in (ask, *bytes(12)))
        for lie in lies:
            yield bytes((way, 4, lie, 1, 2, 3))  # to HELLO
            yield bytes((way, 0, 7, 4, lie, 1, 2, 3))  # to the table
    for ask in questions:
        for lie in lies:
            yield come[0] + bytes((ask, 4, lie, 1, 2, 3, 4, 5, 6))
        yield come[1] + bytes((ask, 0, 4, ask % 14, 1, 2, 3, 4, 5, 6)) * 2
