"""A UNIX socket on which one console client at a time can join and leave. Output while nobody is there is
dropped.

A client is whoever connects with our uid or as root (SO_PEERCRED); a second one is told so in one line and
closed. End of input is a client's way to leave: it must keep its sending half open for as long as it wants to
see output.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import stat

from vmm.devices.chardev.interface import Reactor
from vmm.devices.chardev.stream import Phase, Stream
from vmm.errors import PeerError
from vmm.fds import FdStore
from vmm.sockets import check_peer, listen

log = logging.getLogger(__name__)

BUSY = b"vmm: this console is in use by another client\r\n"
STRANGER = b"vmm: this console belongs to another user\r\n"


class UnixServer(Stream):
    """Fd `serial-listen/N` and, while there is a client, `serial/N`; changed on the loop's thread only."""

    def __init__(self, reactor: Reactor, fds: FdStore, index: int, path: str) -> None:
        """Listen at `path`, or go on with the received socket and client.

        Raises ConfigError for a bad path, PeerError for a received client of another user.
        """
        self._fds = fds
        self._index = index
        self._path = path
        self._listener = listener(fds, index, path)
        self._watched_listener = False
        self._deaf = False
        client = fds.find("serial", index)
        if client is not None:
            with socket.socket(fileno=os.dup(client)) as sock:
                check_peer(sock, f"fd serial/{index}")
        super().__init__(f"unix:{path}", reactor, client, client)

    def _tidy(self) -> None:
        try:
            if self._is_at_path():
                os.unlink(self._path)
        except FileNotFoundError:
            log.debug("%s: was removed before", self.label)
        except PermissionError:  # it came with the guest, from a VMM that could reach it
            log.warning(
                "%s: its socket lies where the sandbox lets nothing be removed; remove it", self.label
            )

    def _is_at_path(self) -> bool:
        """Whether the path is the socket's: a VMM that sent the one may have named any for the other."""
        with socket.socket(fileno=os.dup(self._listener)) as listener:
            name = listener.getsockname()
        return bool(name == self._path) and stat.S_ISSOCK(os.lstat(self._path).st_mode)

    def _sync(self) -> None:
        super()._sync()
        wanted = self._phase is Phase.RUNNING and not self._deaf
        if wanted == self._watched_listener:
            return
        if wanted:
            self._reactor.add_reader(self._listener, self._joining)
        else:
            self._reactor.remove_reader(self._listener)
        self._watched_listener = wanted

    def _joining(self) -> None:
        with self.lock:
            if self._phase is Phase.RUNNING:
                self._accept()
            self._sync()

    def _accept(self) -> None:
        listener = socket.socket(fileno=self._listener)
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # who knocked is gone
        except OSError as error:
            log.error("%s: takes no more clients until the next handover: %s", self.label, error.strerror)
            self._deaf = True
            return
        finally:
            listener.detach()  # the fd is the FdStore's
        with client:
            try:
                check_peer(client, "serial")
            except PeerError as error:
                log.warning("%s", error)
                _turn_away(client, STRANGER)
                return
            if self._input is not None and _left(self._input):
                self._drop()  # and its last input: a guest that reads none must not keep the console taken
            if self._input is not None:
                _turn_away(client, BUSY)
                return
            client.setblocking(False)
            fd = self._fds.add("serial", self._index, client.detach())
        self._connect(fd, fd)
        log.info("%s: a client joined", self.label)

    def _input_ended(self) -> None:
        if self._phase is Phase.RUNNING:
            self._drop()

    def _drop(self) -> None:
        self._connect(None, None)
        super()._sync()  # no watch may outlive the fd
        self._fds.remove("serial", self._index)
        log.info("%s: the client left", self.label)
        if self._writing:
            self._drain()


def listener(fds: FdStore, index: int, path: str) -> int:
    """The listening socket. Raises ConfigError for a bad path."""
    return fds.get_or_open("serial-listen", index, lambda: listen(path, "serial").detach())


def _left(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, 0)  # POLLHUP, both directions shut, is reported unasked; poll(2)
    return bool(poller.poll(0))


def _turn_away(client: socket.socket, reason: bytes) -> None:
    client.setblocking(False)
    try:
        client.send(reason)
    except OSError as error:
        log.debug("a client was turned away unheard: %s", error.strerror)
