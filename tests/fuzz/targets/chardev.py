"""Console clients that come, send, stop reading and go, in any order, while the guest writes and handovers
freeze and thaw: nothing raises or blocks, one client at a time is served, no fd stays open.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.reading import Reader, open_fds
from vmm.devices.chardev import open_chardev, parse_serial
from vmm.fds import FdStore
from vmm.state import Arena

MOST_CLIENTS = 4
TURNS = 4
JOIN, SEND, SHUT, LEAVE, HEAR, GUEST_WRITES, GUEST_READS, HOLD, FREEZE, THAW, TURN = range(11)


class Reactor:
    """An event loop that turns when it is told to."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], object]] = {}
        self.writers: dict[int, Callable[[], object]] = {}
        self.due: list[Callable[[], object]] = []

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> None:
        os.fstat(fd)  # no watch on an fd that is closed
        self.readers[fd] = callback

    def remove_reader(self, fd: int, /) -> None:
        del self.readers[fd]

    def add_writer(self, fd: int, callback: Callable[[], object], /) -> None:
        os.fstat(fd)
        self.writers[fd] = callback

    def remove_writer(self, fd: int, /) -> None:
        del self.writers[fd]

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> None:
        self.due.append(callback)

    def turn(self) -> None:
        """What is due, then who is ready."""
        due, self.due = self.due, []
        for callback in due:
            callback()
        poll = select.poll()
        for fd in self.readers.keys() | self.writers.keys():
            os.fstat(fd)
            poll.register(fd, select.POLLIN * (fd in self.readers) | select.POLLOUT * (fd in self.writers))
        for fd, event in poll.poll(0):
            if event & ~select.POLLOUT and fd in self.readers:
                self.readers[fd]()
            if event & ~select.POLLIN and fd in self.writers:
                self.writers[fd]()


class Guest:
    """The device in front: takes as much input as it has room for, keeps output that is not taken."""

    def __init__(self, stage: Stage) -> None:
        self.room = 0
        self.output = b""
        self._stage = stage

    def on_readable(self) -> None:
        chardev = self._stage.chardev
        data = chardev.read(min(self.room, 16))
        assert len(data) <= min(self.room, 16)
        self.room -= len(data)
        if not self.room:
            chardev.want_read(False)

    def on_writable(self) -> None:
        chardev = self._stage.chardev
        taken = chardev.write(self.output)
        assert 0 <= taken <= len(self.output)
        self.output = self.output[taken:]
        if self.output:
            chardev.want_write()


class Stage:
    """A console on a UNIX socket, its clients, its guest."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmm-fuzz-"))
        self.path = str(self.folder / "console")
        self.fds = FdStore()
        self.reactor = Reactor()
        self.chardev = open_chardev(
            parse_serial(f"unix:{self.path}"), self.fds, Arena.open(self.fds), self.reactor
        )
        self.guest = Guest(self)
        self.chardev.attach(self.guest.on_readable, self.guest.on_writable)
        self.chardev.start()
        self.frozen = False
        self.clients: list[socket.socket] = []

    def step(self, reader: Reader) -> None:
        """Somebody does something."""
        what = reader.number() % 16
        if what == JOIN and len(self.clients) < MOST_CLIENTS:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                client.connect(self.path)
                self.clients.append(client)
            except BlockingIOError:  # while a handover holds it, the backlog fills up
                client.close()
        elif what in (SEND, SHUT, LEAVE, HEAR) and self.clients:
            self._client_acts(what, reader.choice(self.clients), reader)
        elif what == GUEST_WRITES:
            with self.chardev.lock:
                self.guest.output = (self.guest.output + b"x" * reader.number(2))[: 1 << 17]
                self.guest.on_writable()
        elif what == GUEST_READS:
            with self.chardev.lock:
                self.guest.room = reader.number() % 64
                self.chardev.want_read(self.guest.room > 0)
        elif what == HOLD and not self.frozen:
            self.chardev.hold()
        elif what == FREEZE:
            self.chardev.freeze()
            self.frozen = True
        elif what == THAW:
            self.chardev.thaw()
            self.frozen = False
        for _ in range(TURNS if what >= TURN else 1):
            self.reactor.turn()
        assert len([name for name, _, _ in self.fds.items() if name == "serial"]) <= 1

    def _client_acts(self, what: int, client: socket.socket, reader: Reader) -> None:
        try:
            if what == SEND:
                client.send(reader.bytes(reader.number()) or b"\0", socket.MSG_NOSIGNAL)
            elif what == HEAR:
                client.recv(1 << 12)
            elif what == SHUT:
                client.shutdown(reader.choice((socket.SHUT_RD, socket.SHUT_WR)))
        except BlockingIOError:
            return
        except OSError:
            what = LEAVE  # it was turned away
        if what == LEAVE:
            self.clients.remove(client)
            client.close()

    def end(self) -> None:
        """The guest ends."""
        self.chardev.close()
        self.reactor.turn()
        assert not self.reactor.readers
        assert not self.reactor.writers
        self.fds.close()
        for client in self.clients:
            client.close()
        shutil.rmtree(self.folder)


def one(data: bytes) -> None:
    """Steps."""
    reader = Reader(data)
    before = open_fds()
    stage = Stage()
    try:
        while reader:
            stage.step(reader)
    finally:
        stage.end()
    left = {fd: what for fd, what in open_fds().items() if fd not in before}
    assert not left, left


def seeds() -> Iterator[bytes]:
    """A client that talks and leaves; one that never reads; two at once; a handover that fails, and one that
    does not.
    """
    yield (
        bytes((JOIN, TURN, GUEST_READS, 60, SEND, 0, 5))
        + b"hello"
        + bytes((TURN, GUEST_WRITES, 9, 0, HEAR, 0, LEAVE, 0, TURN))
    )
    yield bytes((JOIN, TURN)) + bytes((GUEST_WRITES, 0xFF, 0xFF)) * 8 + bytes((TURN, LEAVE, 0, TURN))
    yield bytes((JOIN, JOIN, TURN, SEND, 1, 1, 65, TURN, SHUT, 0, 0, TURN, JOIN, TURN, SHUT, 0, 1, TURN))
    yield bytes((JOIN, TURN, HOLD, LEAVE, 0, TURN, FREEZE, JOIN, TURN, THAW, TURN, GUEST_WRITES, 9, 0, TURN))
    yield bytes((JOIN, TURN, HOLD, GUEST_WRITES, 255, 255, FREEZE, SEND, 0, 1, 65, TURN))
