"""A VMM that sends its keeper any messages with any fds: the keeper ends by OP_QUIT alone, leaks no fd, and
issues no ioctl but those of its table, on fds that it holds; it makes one VM, whose slots have to do with one
number alone.
"""

from __future__ import annotations

import array
import ctypes
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

from tests.fuzz.reading import Reader, open_fds
from vmm.fds import sealed_memfd
from vmm.kvm import abi, keeper

OPERATIONS = range(keeper.OP_QUIT + 1)
REQUESTS = sorted({each.number for each in vars(abi).values() if isinstance(each, abi.Ioctl)})
SPECIAL = (0, 0xAE00, 0xAEFF, 0x5421, 0xC008AEBA, 0xC00CAEE0, 0xFFFFFFFFFFFFFFFF)
ALLOWED = (
    keeper.PASSED
    | keeper.CREATES
    | keeper.DEVICE_ATTRIBUTES
    | {  # and what the keeper does by itself
        keeper.KVM_SET_SIGNAL_MASK,
        keeper.KVM_SET_USER_MEMORY_REGION,
        keeper.KVM_SET_USER_MEMORY_REGION2,
        keeper.KVM_GET_DIRTY_LOG,
    }
)
OF_SLOTS = {
    keeper.KVM_SET_USER_MEMORY_REGION,
    keeper.KVM_SET_USER_MEMORY_REGION2,
    keeper.KVM_GET_DIRTY_LOG,
}
KINDS: tuple[Callable[[], int], ...] = (
    lambda: sealed_memfd("ram", 1 << 16),
    lambda: os.eventfd(0, os.EFD_NONBLOCK),
    lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach(),
    lambda: os.open("/", os.O_PATH | os.O_CLOEXEC),
)
NAMES = (b"vm", b"vcpu", b"kvm-slots", b"kvm-go", b"ram", b"x" * 32)


class FakeRunner:
    """A vCPU's thread that is none; busy while called and returned differ, as in the real one."""

    def __init__(self, fd: int, slot: int, words: memoryview) -> None:
        self.fd = fd
        self.go = os.eventfd(0)
        self.done = os.eventfd(0)
        self.words = memoryview(bytearray(keeper.SLOT)).cast("Q")
        self.thread = SimpleNamespace(start=lambda: None, ident=-1, native_id=-1 & keeper.LARGEST_WORD)
        self.busy = bool(slot & 1)


class Stage:
    """A keeper, the fake kernel under it, and the ends of its sockets that are a VMM's."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.keeper = keeper.Keeper(None, theirs)
        self.vmms = [ours]
        self.errno = 0
        self.numbers = [0]
        self.vm = -1
        self._wrong: list[str] = []

    def ioctl(self, fd: int, request: int, argument: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
        """ioctl(2): refuses as told, makes an fd where KVM would, writes all over the argument."""
        what = f"ioctl {request:#x} on fd {fd}"
        self._expect(fd in self.keeper._held, f"{what}, which is not held")
        self._expect(request in ALLOWED, f"{what} got through")
        self._expect(request not in OF_SLOTS or fd == self.vm, f"{what}; the VM is {self.vm}")
        if self.errno:
            raise OSError(self.errno, "fake")
        if request == keeper.KVM_CREATE_VM:
            self._expect(self.vm < 0, "a second VM")
            self.vm = os.eventfd(0)
            return self.vm
        if isinstance(argument, ctypes.Array):
            self._expect(len(argument) == keeper.PAYLOAD_MAX, f"{what} with a short buffer")
            ctypes.memset(argument, 0xA5, 1 << 14)
        return os.eventfd(0) if request in keeper.CREATES else 1

    def _expect(self, holds: bool, otherwise: str) -> None:
        """Kept for the end of the turn: what is raised here is a refusal to the keeper."""
        if not holds:
            self._wrong.append(otherwise)

    def send(self, reader: Reader) -> bool:
        """One message, and the keeper's turn; False once it ends."""
        vmm = reader.choice(self.vmms)
        fds = [reader.choice(KINDS)() for _ in range(reader.choice((0, 0, 1, 1, 2, 9)))]
        op = reader.choice(OPERATIONS)
        self.errno = reader.choice((0, 0, 0, 7, 22))
        request = reader.choice((*REQUESTS, *SPECIAL))
        words = [reader.choice((reader.number, lambda: reader.number(8)))() for _ in range(4)]
        number = reader.choice((*self.numbers, -1, 1 << 20))
        payload = self._payload(op, reader)
        data = keeper.REQUEST.pack(op, number, request, *words) + payload
        cut = reader.number(2) if reader.number() == 1 else len(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            vmm.sendmsg([data[:cut] or b"\0"], rights)
        finally:
            for fd in fds:
                os.close(fd)
        on = self.turn()
        self.hear(vmm, op)
        return on

    def _payload(self, op: int, reader: Reader) -> bytes:
        if op in (keeper.OP_STORE, keeper.OP_DROP):
            return keeper.NAME.pack(reader.choice(NAMES), reader.number() % 3, 0)
        if op == keeper.OP_MEMORY:
            memfd = reader.choice((*self.numbers, keeper.NO_FD))
            return memfd.to_bytes(4, "little") + reader.bytes(4).ljust(4, b"\xff") + bytes(8)
        size = reader.choice((0, 0, 4, 8, 32, 64, 560, 4096, 0xFFFF))
        return reader.bytes(min(size, 64)).ljust(size, b"\0")

    def turn(self) -> bool:
        """The keeper serves who has something for it."""
        for fd, _ in self.keeper._poll.poll(0):
            if fd in self.keeper._clients:
                self.keeper._serve_one(self.keeper._clients[fd])
                assert not self._wrong, self._wrong
            if self.keeper._over:
                return False
        return True

    def hear(self, vmm: socket.socket, op: int) -> None:
        """Take the answer, where there is one; every message gets one at most."""
        try:
            answer, extra, flags, _ = vmm.recvmsg(
                1 << 17, socket.CMSG_SPACE(4 * 253), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, ConnectionResetError):
            answer, extra, flags = b"", [], 0
        received = array.array("i")
        for _, _, content in extra:
            received.frombytes(content)
        for fd in received:
            os.close(fd)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        if answer:
            result, number, _ = keeper.REPLY.unpack_from(answer)
            assert (result < 0) == (number != 0), (op, result, number)
            if op in (keeper.OP_CREATE, keeper.OP_STORE) and not number:
                self.numbers.append(int.from_bytes(answer[keeper.REPLY.size :], "little"))
            if op in (keeper.OP_DROP, keeper.OP_QUIT) and len(self.numbers) > 64:
                del self.numbers[:32]

    def end(self) -> None:
        """Close all that the keeper holds, each once: it must be there."""
        assert self.vm in (-1, *self.keeper._held), "the VM's fd is closed"
        for fd in self.keeper._held:
            os.close(fd)
        for sock in [*self.keeper._clients.values(), *self.vmms]:
            sock.close()
        for mapped in self.keeper._mappings.values():
            assert not mapped.mapping.closed
        for named in self.keeper._names.values():
            assert named in self.keeper._held, f"fd {named} has a name and is not held"
        self.keeper._operations = ()  # a cycle, which would keep the slots mapped


def one(data: bytes) -> None:
    """Byte 0: attached or not; then messages."""
    reader = Reader(data)
    before = open_fds()
    stage = Stage()
    with (
        mock.patch.object(keeper, "ioctl", stage.ioctl),
        mock.patch.object(keeper, "VcpuRunner", FakeRunner),
        mock.patch.object(signal, "pthread_kill"),
        mock.patch.object(signal, "pthread_sigmask"),  # ours stays as it is
    ):
        if reader.number() & 1:
            stage.vmms[0].send(keeper.REQUEST.pack(keeper.OP_ATTACH, 0, 0, 0, 0, 0, 0))
            assert stage.turn()
            stage.hear(stage.vmms[0], keeper.OP_ATTACH)
        while reader and stage.keeper._clients and stage.send(reader):
            pass
    stage.end()
    del stage
    left = {fd: what for fd, what in open_fds().items() if fd not in before}
    assert not left, left


def message(
    op: int,
    request: int = 0,
    number: int = 0,
    fds: bytes = b"\x00",
    payload: bytes = b"\x00",
    words: tuple[int, ...] = (0, 0, 0, 0),
) -> bytes:
    """The bytes that `Stage.send` reads as that message; `fds`: how many (an index), and their kinds."""
    which = REQUESTS.index(request) if request in REQUESTS else 0
    said = b"".join(b"\x01" + word.to_bytes(8, "little") for word in words)
    return bytes((0,)) + fds + bytes((op, 0, which)) + said + bytes((number,)) + payload + bytes((0,))


def seeds() -> Iterator[bytes]:
    """A VMM's usual words; and some that no VMM says."""
    name = b"\x04\x00"
    store = message(keeper.OP_STORE, fds=b"\x02\x00", payload=name)
    yield b"\x01" + store + message(keeper.OP_TABLE) + message(keeper.OP_DROP, payload=name)
    memory, memory_size = b"\x01" + b"\xff" * 4, 1 << 16
    for vm in (2, 1):  # by its number, by another one
        yield (
            b"\x01"
            + store
            + message(keeper.OP_CREATE, keeper.KVM_CREATE_VM, 1) * 2
            + message(keeper.OP_STORE, number=2, payload=b"\x00\x00")
            + message(keeper.OP_MEMORY, number=2, payload=memory, words=(0, 0, memory_size, 0))
            + message(keeper.OP_MEMORY, number=vm, payload=memory)
            + message(keeper.OP_MEMORY, number=2, payload=memory, words=(0, 0, memory_size, 0))
            + message(keeper.OP_DIRTY_LOG, number=vm, words=(0, 8, 0, 0))
            + message(keeper.OP_DROP, payload=b"\x00\x00")
        )
    yield b"\x01" + message(keeper.OP_SUCCESSOR, fds=b"\x02\x03") + message(keeper.OP_DETACH) + store
    yield b"\x01" + message(keeper.OP_SUCCESSOR, fds=b"\x02\x02") + message(keeper.OP_TABLE)
    for op in OPERATIONS:
        yield b"\x01" + store + message(op, number=1, payload=b"\x01" + bytes(8)) * 2
        yield b"\x00" + message(op, number=1)
    for request in REQUESTS:
        yield (
            b"\x01"
            + store
            + message(keeper.OP_CREATE, request, 1)
            + message(keeper.OP_IOCTL, request, 1, payload=b"\x05")
        )
