"""Which of the monitor's clients move with the guest, where there is not room for all."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.unit.qmp_backend import RecordingBackend, ServerThread
from vmm.cpr.protocol import LARGEST_BODY, Farewell, encode
from vmm.qmp.moving import LeavingClients
from vmm.qmp.server import CLIENTS_MAX, ConnectionState

HALF_A_REQUEST = b'{"execute": "%s' % (b"x" * 46_000)


def negotiated(path: str, more: bytes = b"") -> socket.socket:
    """A client that has negotiated, and then sent `more`."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    replies = sock.makefile("rb")
    with replies:
        replies.readline()
        sock.sendall(b'{"execute": "qmp_capabilities"}')
        assert json.loads(replies.readline()) == {"return": {}}
    sock.sendall(more)
    return sock


@pytest.fixture
def monitor(tmp_socket_dir: Path) -> Iterator[ServerThread]:
    with ServerThread(RecordingBackend(), str(tmp_socket_dir / "s")) as server:
        yield server


def least_under_way(monitor: ServerThread) -> int:
    return min(len(each.state().stream.undecoded) for each in monitor.server.connections)


@pytest.mark.parametrize("count", [14, CLIENTS_MAX])
def test_who_does_not_fit_stays(
    monitor: ServerThread, tmp_socket_dir: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """The last message takes what it takes: the others are served on where they are."""
    clients = [negotiated(str(tmp_socket_dir / "s"), HALF_A_REQUEST) for _ in range(count)]
    try:
        deadline = time.monotonic() + 10
        while monitor.call(lambda: least_under_way(monitor)) < len(HALF_A_REQUEST):
            assert time.monotonic() < deadline
        leaving = monitor.call(lambda: LeavingClients(monitor.server))
        assert len(leaving.rows()) == count
        with caplog.at_level(logging.WARNING):
            left = monitor.call(leaving.leave)
        leaving.close()
        assert len(encode(Farewell(left))) <= LARGEST_BODY
        assert 0 < len(left) < count
        assert caplog.text.count(" stays here: it has ") == count - len(left)
        for _, encoded in left:
            state = msgspec.json.decode(encoded, type=ConnectionState)
            assert state.negotiated
            assert state.stream.undecoded.replace(b" ", b"") == HALF_A_REQUEST.replace(b" ", b"")
        stays = clients[len(left)]
        stays.sendall(b'"}')
        assert "CommandNotFound" in stays.recv(4096).decode()
    finally:
        for client in clients:
            client.close()
