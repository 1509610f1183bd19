"""The monitor's sockets: sessions served on one asyncio loop, events to all, and connections that outlive the
process.

Nothing here may block or grow without bound, whatever a client does: a client whose replies pile up is not
read until it takes them, one that takes no events is dropped, a flood of requests takes turns with everything
else on the loop, and who connects and says nothing makes room for who comes later. Only this user and root
may connect, by SO_PEERCRED, and the socket file is 0600 from the moment it exists.

QEMU serves one client and lets others wait; here several are served at once, each command carried out whole.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from vmm.errors import PeerError, StateError
from vmm.qmp.backend import Backend
from vmm.qmp.commands import COMMANDS, Command
from vmm.qmp.framing import Limits
from vmm.qmp.session import Session, SessionState, encode
from vmm.sockets import check_peer, listen, peer

RECEIVE_BYTES = 1 << 14  # at once: some 15 ms of lexing at the worst
COMMANDS_PER_TURN = 16  # of one client, before the loop gets to do something else
HIGH_WATER_BYTES = 1 << 18  # of unsent output: no further command of this client is carried out
UNSENT_BYTES_MAX = 1 << 22  # of unsent output: the client is dropped; the largest reply has 1.4 MB
UNDECODED_BYTES_MAX = 2 * Limits().value_bytes  # of a connection handed over
CLIENTS_MAX = 32
QUEUED_EVENTS_MAX = 1024  # between two turns of the loop
ACCEPT_PAUSE_S = 1.0  # where the process is out of fds


log = logging.getLogger(__name__)


class ConnectionState(SessionState, frozen=True, kw_only=True):
    """What a connection is besides its socket, for another process to go on with it; msgspec can write it."""

    unsent: bytes = b""


class Connection:
    """One client: its socket, its session, and the output that it has not taken yet. QmpServer makes them."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        session: Session,
        unsent: bytes,
        before_reply: Callable[[], None],
        on_end: Callable[[Connection], None],
    ) -> None:
        self.peer_pid, _ = peer(sock)
        self._loop = loop
        self._socket = sock
        self._session = session
        self._unsent = bytearray(unsent)
        self._before_reply = before_reply
        self._on_end = on_end
        self._turn_due = False
        self._reading = self._writing = False
        self._in_turn = False
        self._no_more_input = False
        self._serving = True

    @property
    def negotiated(self) -> bool:
        """Whether it is sent events."""
        return self._session.negotiated

    @property
    def in_turn(self) -> bool:
        """Whether one of its commands is being carried out."""
        return self._in_turn

    def fileno(self) -> int:
        """Its socket's fd."""
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        """How much output waits for the client."""
        return len(self._unsent)

    def start(self) -> None:
        """Begin to serve."""
        self._flush()
        self._arrange()

    def send(self, data: bytes) -> None:
        """Send what the socket takes, keep the rest; drop the client if the rest is too much."""
        if not self._serving:
            return
        waiting = bool(self._unsent)
        self._unsent += data
        if not waiting:
            self._flush()
        if len(self._unsent) > UNSENT_BYTES_MAX:
            self.close(f"it leaves {len(self._unsent)} bytes unread")
        self._arrange()

    def close(self, why: str | None = None) -> None:
        """End it, sending first what the socket takes; a reason goes to the log."""
        if not self._serving:
            return
        if why is not None:
            log.warning("QMP: dropping the client with pid %d: %s", self.peer_pid, why)
        self._flush()
        if self._serving:  # and has not gone away meanwhile
            self._leave().close()

    def state(self) -> ConnectionState:
        """What is under way on it; not from within one of its own commands."""
        session = self._session.export()
        return ConnectionState(
            negotiated=session.negotiated, oob=session.oob, stream=session.stream, unsent=bytes(self._unsent)
        )

    def export(self) -> tuple[socket.socket, ConnectionState]:
        """Stop serving it; the socket stays open, and what is not done yet is in the state."""
        if self._in_turn or not self._serving:
            raise RuntimeError("QMP: a connection that has ended, or is in a command, cannot be exported")
        state = self.state()
        return self._leave(), state

    def _leave(self) -> socket.socket:
        self._serving = False
        self._arrange()
        self._on_end(self)
        return self._socket

    def _arrange(self) -> None:
        """Have the loop call what there is to do, and nothing else."""
        if self._in_turn and self._serving:
            return
        choked = len(self._unsent) > HIGH_WATER_BYTES
        work = self._serving and self._session.has_input and not choked
        reads = self._serving and not self._session.has_input and not choked and not self._no_more_input
        writes = self._serving and bool(self._unsent)
        if work and not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._take_turn)
        if reads != self._reading:
            self._reading = reads
            if reads:
                self._loop.add_reader(self._socket, self._on_readable)
            else:
                self._loop.remove_reader(self._socket)
        if writes != self._writing:
            self._writing = writes
            if writes:
                self._loop.add_writer(self._socket, self._on_writable)
            else:
                self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(error)
            return
        if data:
            self._session.feed(data)
            self._take_turn()
        else:
            self._no_more_input = True
            self._end_if_done()

    def _on_writable(self) -> None:
        self._flush()
        self._end_if_done()

    def _take_turn(self) -> None:
        """Carry out a few requests; none if there is a reason by now not to."""
        self._turn_due = False
        self._in_turn = True
        for _ in range(COMMANDS_PER_TURN):
            if not self._serving or len(self._unsent) > HIGH_WATER_BYTES:
                break
            reply = self._session.next_reply()
            if reply is None:
                break
            self._before_reply()
            self.send(reply)
        self._in_turn = False
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._no_more_input and not self._unsent and not self._session.has_input:
            self.close()
        self._arrange()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent, socket.MSG_NOSIGNAL)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        level = logging.INFO if self.negotiated else logging.DEBUG  # many only look whether one listens here
        log.log(level, "QMP: the client with pid %d went away: %s", self.peer_pid, error.strerror)
        self._unsent.clear()
        self._leave().close()


class QmpServer:
    """The monitor. Every method but `emit` belongs to the loop's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, backend: Backend, commands: Iterable[Command] = COMMANDS
    ) -> None:
        self._loop = loop
        self._backend = backend
        self._commands = tuple(commands)
        self._listeners: list[socket.socket] = []
        self._connections: dict[Connection, None] = {}
        self._lock = threading.Lock()
        self._events: list[bytes] = []
        self._lost_events = 0

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Those being served, oldest first."""
        return tuple(self._connections)

    def listen_unix(self, path: str) -> None:
        """Make a socket at `path` and serve who connects. Raises ConfigError."""
        self.listen(listen(path, "QMP socket"))

    def listen(self, listener: socket.socket) -> None:
        """Serve who connects to a listening UNIX socket; `close` removes its file, whoever made it."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._on_connection, listener)

    def release_listeners(self) -> list[socket.socket]:
        """Stop accepting; the sockets stay open and their files in place, for another process to go on."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            self._loop.remove_reader(listener)
        return listeners

    def serve_connection(self, sock: socket.socket, state: ConnectionState | None = None) -> Connection:
        """Serve a connected socket from the greeting on or, after another process, from `state` on.

        Raises PeerError, leaving the socket alone, for a peer that is neither this user nor root, and
        StateError for a state that no VMM exports.
        """
        check_peer(sock, "QMP")
        if state is None:
            session = Session(self._backend, self._commands)
            unsent = session.greeting()
        else:
            if len(state.unsent) > UNSENT_BYTES_MAX or len(state.stream.undecoded) > UNDECODED_BYTES_MAX:
                raise StateError("QMP: a connection's state is larger than any VMM exports")
            session = Session(self._backend, self._commands, state=state)
            unsent = state.unsent
        sock.setblocking(False)
        connection = Connection(
            self._loop,
            sock,
            session,
            unsent,
            self.send_events,
            lambda ended: self._connections.pop(ended, None),
        )
        self._connections[connection] = None
        connection.start()
        return connection

    def export_connection(self, connection: Connection) -> tuple[socket.socket, ConnectionState]:
        """Stop serving `connection` without its client noticing, for `serve_connection` to go on elsewhere.

        Not from within one of its own commands: RuntimeError.
        """
        return connection.export()

    def emit(self, event: str, data: dict[str, Any] | None = None, at: float | None = None) -> None:
        """Send an event to every client that has negotiated. From any thread, in the order of the calls.

        `at` is when it happened, in seconds since 1970; by default now. What is emitted while a command is
        carried out goes out before its reply.
        """
        seconds, microseconds = divmod(round((time.time() if at is None else at) * 1_000_000), 1_000_000)
        message: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
            "event": event,
        }
        if data is not None:
            message["data"] = data
        encoded = encode(message)
        with self._lock:
            if len(self._events) == QUEUED_EVENTS_MAX:
                self._lost_events += 1
                return
            self._events.append(encoded)
            first = len(self._events) == 1
        if first:
            self._loop.call_soon_threadsafe(self.send_events)

    def close(self) -> None:
        """End every connection, sending what the sockets take, and remove the listeners with their files."""
        self.send_events()
        for connection in self.connections:
            connection.close()
        for listener in self.release_listeners():
            name = listener.getsockname()
            if isinstance(name, str) and name:  # neither abstract nor without a name: unix(7)
                _unlink(name)
            listener.close()

    def send_events(self) -> None:
        """Send what `emit` was given so far."""
        with self._lock:
            events, self._events = self._events, []
            lost, self._lost_events = self._lost_events, 0
        if lost:
            log.warning("QMP: %d events lost, as %d waited to be sent", lost, QUEUED_EVENTS_MAX)
        for encoded in events:
            for connection in self.connections:
                if connection.negotiated:
                    connection.send(encoded)

    def _on_connection(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.error("QMP: cannot accept a client now: %s", error.strerror)
            self._loop.remove_reader(listener)
            self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again, listener)
            return
        try:
            if len(self._connections) >= CLIENTS_MAX:
                self._make_room()
            self.serve_connection(sock)
        except PeerError as error:
            log.warning("%s", error)
            sock.close()

    def _make_room(self) -> None:
        """Drop who has been here longest without a word: it must not keep others out. Raises PeerError where
        all have negotiated.
        """
        silent = next((each for each in self.connections if not each.negotiated and not each.in_turn), None)
        if silent is None:
            raise PeerError(f"QMP: {CLIENTS_MAX} clients are connected already")
        silent.close("it has not negotiated yet, and there is no room for another client")

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._on_connection, listener)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
