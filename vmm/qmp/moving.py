"""Clients of the monitor that move with the guest: their sockets go with the fd table, what is under way on
them goes in the old VMM's last message, and they see no disconnect.

The client that asked for the handover stays: it is the operator's, who has yet to hear how it went and to end
this VMM. All loop's thread.
"""

from __future__ import annotations

import logging
import os
import socket

import msgspec

from vmm.cpr.protocol import LARGEST_FAREWELL
from vmm.errors import VmmError
from vmm.fds import FdStore
from vmm.qmp.server import Connection, ConnectionState, QmpServer

log = logging.getLogger(__name__)

LARGEST_STATE = 1 << 16  # bytes of what is under way on one connection; a client with more is not moved
ROW_BYTES = 16  # at most, of a client in a Farewell, besides its state: brackets, commas, quotes, id


def _size_of_row(state: bytes) -> int:
    """Bytes of one client in a Farewell: its id, and its state in base64."""
    return ROW_BYTES + 4 * -(-len(state) // 3)


class LeavingClients:
    """Those of the old VMM's clients that will move, from the offer to the farewell."""

    def __init__(self, server: QmpServer) -> None:
        """Choose them: all that have negotiated, but the one whose command is being carried out."""
        self._server = server
        self._clients: dict[int, tuple[Connection, int]] = {}
        for connection in server.connections:
            if connection.negotiated and not connection.in_turn:
                self._clients[len(self._clients)] = connection, os.dup(connection.fileno())

    def rows(self) -> list[tuple[str, int, int]]:
        """Their part of the fd table."""
        return [("qmp", index, fd) for index, (_, fd) in self._clients.items()]

    def leave(self) -> list[tuple[int, bytes]]:
        """Stop serving them; `(id, state as JSON)` of those that are still there and can go. Who is in a
        command, or has more under way than the last message takes, stays.
        """
        left: list[tuple[int, bytes]] = []
        room = LARGEST_FAREWELL
        for index, (connection, _) in self._clients.items():
            if connection not in self._server.connections or connection.in_turn:
                continue
            encoded = msgspec.json.encode(connection.state())
            size = _size_of_row(encoded)
            if len(encoded) > LARGEST_STATE or size > room:
                log.warning(
                    "QMP: the client with pid %d stays here: it has %d bytes under way",
                    connection.peer_pid,
                    len(encoded),
                )
                continue
            room -= size
            sock, _ = self._server.export_connection(connection)
            sock.close()  # the new VMM has its own
            left.append((index, encoded))
        return left

    def close(self) -> None:
        """Give the copies of their sockets back."""
        for _, fd in self._clients.values():
            os.close(fd)
        self._clients.clear()


class ArrivingClients:
    """Those that come to the new VMM: sockets at first, clients once the old VMM has said what is under
    way on them.
    """

    def __init__(self, fds: FdStore) -> None:
        """Take their sockets out of the received fds."""
        ids = [index for name, index, _ in fds.items() if name == "qmp"]
        self._sockets = {index: socket.socket(fileno=fds.take("qmp", index)) for index in ids}

    def arrive(self, server: QmpServer, states: list[tuple[int, bytes]]) -> None:
        """Serve those that have a state, close the others."""
        for index, encoded in states:
            sock = self._sockets.pop(index, None)
            if sock is None:
                log.warning("QMP: the old VMM speaks of a client %d that did not come", index)
                continue
            try:
                server.serve_connection(sock, msgspec.json.decode(encoded, type=ConnectionState))
            except (VmmError, msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning("QMP: a client that came with the guest cannot be served: %s", error)
                sock.close()
        self.close()

    def close(self) -> None:
        """Close those that never became clients."""
        while self._sockets:
            self._sockets.popitem()[1].close()
