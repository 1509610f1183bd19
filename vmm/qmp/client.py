"""A small synchronous QMP client, for the command line.

It must stay light to import (no asyncio, no msgspec: `vmm ctl` is over in a moment) and never wait longer
than it was told to. Events that arrive while something else is awaited are kept in `events`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from typing import Any, NamedTuple

from vmm.errors import PeerError
from vmm.qmp.backend import QmpError
from vmm.qmp.framing import JsonStream, Limits
from vmm.qmp.parser import JsonError
from vmm.sockets import check_server, peer

_LIMITS = Limits(value_bytes=1 << 26, tokens=1 << 21)  # QEMU's own; replies are larger than requests
_RECEIVE_BYTES = 1 << 18


class Event(NamedTuple):
    """Something that happened, and when, in microseconds since 1970."""

    name: str
    data: dict[str, Any]
    at_us: int


class QmpClient:
    """One connection, negotiated. Closed by `close` or at the end of a `with`."""

    def __init__(self, sock: socket.socket, where: str, timeout: float) -> None:
        """Take over a connected socket and negotiate. Raises PeerError, the socket closed."""
        self._socket = sock
        self._where = where
        self._timeout = timeout
        self._stream = JsonStream(_LIMITS)
        self._last_id = 0
        self.events: deque[Event] = deque()
        try:
            greeting = self._receive(time.monotonic() + timeout, "its greeting")
            if "QMP" not in greeting:
                raise PeerError(f"QMP at {where}: the peer does not greet as a QMP server does")
            self.version: dict[str, Any] = greeting["QMP"]["version"]
            self.execute("qmp_capabilities")
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout: float = 5.0) -> QmpClient:
        """Connect to the UNIX socket at `path`. `timeout` (seconds) is for this and the default elsewhere.

        Raises PeerError where nobody of ours listens there.
        """
        where = os.fspath(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(where)
        except OSError as error:  # TimeoutError is one
            sock.close()
            raise PeerError(f"QMP at {where}: {error.strerror or error}; is the VMM running?") from error
        try:
            check_server(sock, f"QMP at {where}")
        except BaseException:
            sock.close()
            raise
        return cls(sock, where, timeout)

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process that answers."""
        return peer(self._socket)[0]

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def execute(
        self, name: str, arguments: dict[str, Any] | None = None, timeout: float | None = None
    ) -> Any:
        """What the command returns. Raises QmpError if it is refused, PeerError if there is no answer."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        self._last_id += 1
        request: dict[str, Any] = {"execute": name, "id": self._last_id}
        if arguments is not None:
            request["arguments"] = arguments
        self._send(json.dumps(request).encode(), deadline, name)
        while True:
            message = self._receive(deadline, f"its reply to {name}")
            if message.get("id") == self._last_id:
                break
            if "error" in message and "id" not in message:  # it could not read a request of ours
                break
            self._keep_event(message)  # what is neither is the reply to a request given up on
        if "error" in message:
            raise QmpError(message["error"]["desc"], message["error"]["class"])
        return message["return"]

    def wait_event(self, name: str, timeout: float | None = None) -> Event:
        """The next event called `name`, taken out of `events`. Raises PeerError if none comes in time."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            for event in self.events:
                if event.name == name:
                    self.events.remove(event)
                    return event
            self._keep_event(self._receive(deadline, f"event {name}"))

    def _keep_event(self, message: dict[str, Any]) -> None:
        if "event" in message:
            at = message["timestamp"]
            at_us = at["seconds"] * 1_000_000 + at["microseconds"]
            self.events.append(Event(message["event"], message.get("data", {}), at_us))

    def _send(self, data: bytes, deadline: float, name: str) -> None:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            self._socket.sendall(data, socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise PeerError(
                f"QMP at {self._where}: the VMM did not take the command {name} in time"
            ) from None
        except OSError as error:
            raise self._gone(error.strerror) from error

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while True:
            for message in self._stream:
                if isinstance(message, JsonError) or not isinstance(message, dict):
                    raise PeerError(f"QMP at {self._where}: the peer sent what is not QMP: {message}")
                return message
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise PeerError(f"QMP at {self._where}: {what} did not come in time")
            self._socket.settimeout(remaining)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._gone(error.strerror) from error
            if not data:
                raise self._gone("end of file")
            self._stream.feed(data)

    def _gone(self, why: str | None) -> PeerError:
        return PeerError(f"QMP at {self._where}: the VMM closed the connection ({why})")
