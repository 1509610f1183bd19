"""Keepers for tests of the library: started, spoken to, and seen to end."""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmm.kvm import keeper
from vmm.kvm.keeper_port import KeeperPort

ENDING_S = 5.0
Answer = tuple[int, int, bytes, list[int]]  # result, errno, payload, fds


def await_end(pidfd: int, timeout_s: float = ENDING_S) -> bool:
    """Whether the process of `pidfd` ends in time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


@contextmanager
def keeper_port(path: Path | None = None) -> Iterator[KeeperPort]:
    """A port to a new keeper, which listens at `path` if that is given; its process has ended afterwards."""
    listener = None
    if path is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(str(path))
        listener.listen()
    try:
        port = KeeperPort.start(listener)
    finally:
        if listener is not None:
            listener.close()
    pidfd = os.dup(port.lifeline)
    try:
        yield port
        port.close(for_good=True)
        assert await_end(pidfd), f"the keeper, process {port.pid}, does not end"
    finally:
        port.close(for_good=True)
        os.close(pidfd)


class RawVmm:
    """A VMM's end of a connection, on which a test may say anything."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(ENDING_S)
        self.sock = sock

    @classmethod
    def connect(cls, path: Path) -> RawVmm:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(path))
        return cls(sock)

    def ask(
        self,
        op: int,
        fd: int = -1,
        request: int = 0,
        arguments: Iterable[int] = (),
        payload: bytes = b"",
        fds: Iterable[int] = (),
    ) -> Answer:
        """A message of the right shape."""
        words = [*arguments, 0, 0, 0, 0][:4]
        return self.say(keeper.REQUEST.pack(op, fd, request, *words) + payload, fds)

    def say(self, data: bytes, fds: Iterable[int] = ()) -> Answer:
        """These bytes, and the answer to them; its fds are closed."""
        rights = array.array("i", fds)
        self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else [])
        return self.hear()

    def hear(self) -> Answer:
        answer, extra, flags, _ = self.sock.recvmsg(
            keeper.MESSAGE_MAX, socket.CMSG_SPACE(4 * 253), socket.MSG_CMSG_CLOEXEC
        )
        received = array.array("i")
        for _, _, content in extra:
            received.frombytes(content)
        for fd in received:
            os.close(fd)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        assert answer, "the keeper has closed the connection"
        result, number, _ = keeper.REPLY.unpack_from(answer)
        return result, number, answer[keeper.REPLY.size :], list(received)

    def close(self) -> None:
        self.sock.close()
