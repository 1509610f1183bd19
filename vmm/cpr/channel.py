"""Sockets of a handover: framing, fds by SCM_RIGHTS, deadlines and cancellation, and a look at who the peer
is.

Nothing here blocks for longer than its deadline, and nothing received is used before it was bounded. Fds that
arrive in a message that turns out to be unusable are closed, whatever the error.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from vmm.cpr import protocol
from vmm.cpr.protocol import FDS_PER_BATCH, HEADER, MOST_FDS, Message, decode_body, decode_header, encode
from vmm.errors import ConfigError, HandoverError, PeerError, StateError
from vmm.sockets import check_peer, listen, peer


class Cancelled(HandoverError):
    """`migrate_cancel`: whoever waits on a channel gives up."""


class CancelSwitch:
    """Lets one thread end the waits of another: an eventfd that every wait of a channel looks at too."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._guard = threading.Lock()
        self._reason: str | None = None
        self._disarmed = False

    def set(self, reason: str) -> bool:
        """End every wait, present and future, with Cancelled(reason). False where it is too late: the commit
        has begun.
        """
        with self._guard:
            if self._disarmed:
                return False
            self._reason = reason
            os.eventfd_write(self.fd, 1)
            return True

    def check(self) -> None:
        """Raise Cancelled where `set` was called."""
        if self._reason is not None:
            raise Cancelled(self._reason)

    def disarm(self) -> None:
        """From here on `set` does nothing: the commit begins. Raises Cancelled where `set` came first."""
        with self._guard:
            self.check()
            self._disarmed = True

    def close(self) -> None:
        """Close the eventfd; from here on `set` does nothing."""
        with self._guard:
            self._disarmed = True
            os.close(self.fd)


class Listener:
    """A listening UNIX socket, mode 0600; its file goes when it is closed."""

    def __init__(self, path: str) -> None:
        """Bind and listen. A file left by a dead listener is replaced, a live listener is an error."""
        self.path = path
        try:
            self._sock = listen(path, "handover")
        except ConfigError as error:
            raise HandoverError(str(error)) from error

    def accept(self, timeout_s: float | None, cancel: CancelSwitch) -> Channel:
        """The first peer of the same user. Raises PeerError at the deadline, Cancelled."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            _wait(self._sock, select.POLLIN, deadline, cancel, f"nobody connected to {self.path}")
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            try:
                check_peer(sock, "handover")
            except PeerError:
                sock.close()
                continue
            return Channel(sock, cancel)

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        if self._sock.fileno() >= 0:
            self._sock.close()
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                return  # somebody cleaned up first; the aim is reached


def connect(path: str, cancel: CancelSwitch) -> Channel:
    """A channel to the listener at `path`. Raises PeerError with QEMU's text where there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
        check_peer(sock, "handover")
    except OSError as error:
        sock.close()
        raise PeerError(f"Failed to connect to '{path}': {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return Channel(sock, cancel)


def _wait(sock: socket.socket, events: int, deadline: float | None, cancel: CancelSwitch, what: str) -> None:
    poll = select.poll()
    poll.register(sock, events)
    poll.register(cancel.fd, select.POLLIN)
    while True:
        cancel.check()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if any(fd != cancel.fd for fd, _ in poll.poll(None if left is None else left * 1000 + 1)):
            return
        if deadline is not None and time.monotonic() >= deadline:
            cancel.check()
            raise PeerError(f"{what} within the time allowed")


class Channel:
    """One connected socket of a handover. Used by one thread at a time.

    `version` is the protocol's that is spoken on it: the newest until the peer's first message says that it
    speaks an older one.
    """

    def __init__(self, sock: socket.socket, cancel: CancelSwitch) -> None:
        sock.setblocking(False)
        self.version = protocol.VERSION
        self._sock = sock
        self._cancel = cancel
        self._buffer = bytearray()
        self._fds: list[int] = []

    @property
    def peer_pid(self) -> int:
        """The pid of the process that connected or listened."""
        return peer(self._sock)[0]

    def send(self, message: Message, fds: Sequence[int] = (), timeout_s: float | None = 5.0) -> None:
        """Send `message` and behind it `fds`. Raises PeerError where the peer is gone or does not read in
        time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        data = memoryview(encode(message, len(fds), self.version))
        while data:
            data = data[self._sendmsg(data, (), deadline) :]
        for at in range(0, len(fds), FDS_PER_BATCH):
            self._sendmsg(memoryview(b"F"), fds[at : at + FDS_PER_BATCH], deadline)

    def _sendmsg(self, data: memoryview, fds: Sequence[int], deadline: float | None) -> int:
        rights: list[Any] = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            self._cancel.check()
            try:
                return self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                _wait(
                    self._sock,
                    select.POLLOUT,
                    deadline,
                    self._cancel,
                    "the peer does not read: nothing could be sent",
                )
            except (BrokenPipeError, ConnectionResetError) as error:
                raise PeerError(f"the peer is gone: {error.strerror}") from error
            except OSError as error:
                raise PeerError(f"nothing can be sent to the peer: {error.strerror}") from error

    def receive(self, timeout_s: float | None) -> tuple[Any, list[int]]:
        """The next message and its fds, which are the caller's to close.

        Raises PeerError on hang-up and at the deadline, StateError for what is no message, Cancelled.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            version, length, count = decode_header(self._read(HEADER.size, deadline))
            self.version = min(self.version, version)
            message = decode_body(self._read(length, deadline))
            batches = -(-count // FDS_PER_BATCH)
            self._read(batches, deadline)
            if len(self._fds) != count:
                raise PeerError(f"the peer announced {count} fds and sent {len(self._fds)}")
        except BaseException:
            self._drop_fds()
            raise
        fds, self._fds = self._fds, []
        return message, fds

    def _read(self, size: int, deadline: float | None) -> bytes:
        while len(self._buffer) < size:
            if not self._fill(deadline):
                raise PeerError(
                    "the peer hung up" if not self._buffer else "the peer hung up in the middle of a message"
                )
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _fill(self, deadline: float | None) -> bool:
        """Read what is there, waiting for it; False at the peer's hang-up."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    65536, socket.CMSG_SPACE(4 * 253), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                _wait(self._sock, select.POLLIN, deadline, self._cancel, "the peer did not answer")
                continue
            except ConnectionResetError:
                return False
            except OSError as error:
                raise PeerError(f"the peer cannot be heard: {error.strerror}") from error
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % received.itemsize])
                    self._fds.extend(received)
            if len(self._fds) > MOST_FDS:
                raise StateError(f"the peer sent more than {MOST_FDS} fds")
            if flags & socket.MSG_CTRUNC:
                raise PeerError(
                    "more fds arrived than this process may hold (RLIMIT_NOFILE); raise the limit"
                )
            self._buffer += data
            return bool(data)

    def wait_hang_up(self, timeout_s: float | None) -> Any | None:
        """Wait for the peer to close; None then. A message that comes instead is returned."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._buffer and not self._fill(deadline):
            return None
        message, fds = self.receive(None if deadline is None else max(0.0, deadline - time.monotonic()))
        for fd in fds:
            os.close(fd)
        return message

    def say_last(self, message: Message) -> bool:
        """Send `message`, cancelled or not, if the peer takes it at once, and close. False where it did
        not.
        """
        data = encode(message, version=self.version)
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL) == len(data)
        except OSError:
            return False
        finally:
            self.close()

    def hang_up(self) -> None:
        """Shut the connection down for both peers; it is still to be closed."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def _drop_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def close(self) -> None:
        """Close the socket and every fd that arrived and nobody took."""
        self._drop_fds()
        self._sock.close()
