"""The synchronous client, against the server and against peers that behave in no way a server does."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmm
from tests.unit.qmp_backend import RecordingBackend, ServerThread
from vmm import sockets
from vmm.errors import PeerError
from vmm.qmp.backend import QmpError
from vmm.qmp.client import Event, QmpClient
from vmm.sockets import listen

GREETING = b'{"QMP": {"version": {"package": "test"}, "capabilities": []}}\r\n'
READY = GREETING + b'{"return": {}, "id": 1}\r\n'


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture
def client(backend: RecordingBackend, tmp_socket_dir: Path) -> Iterator[QmpClient]:
    path = tmp_socket_dir / "qmp.sock"
    with ServerThread(backend, str(path)), QmpClient.connect(path) as client:
        yield client


class Peer:
    """The other end of a client's connection, told what to say."""

    def __init__(self, *says: bytes) -> None:
        self._ours, self.theirs = socket.socketpair()
        self.say(*says)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self.theirs.close()

    def say(self, *says: bytes) -> None:
        for each in says:
            self._ours.sendall(each)

    def hang_up(self) -> None:
        self._ours.shutdown(socket.SHUT_RDWR)

    def client(self, timeout: float = 5.0) -> QmpClient:
        return QmpClient(self.theirs, "test.sock", timeout)


def test_commands(client: QmpClient, backend: RecordingBackend) -> None:
    assert client.version["package"] == f"vmm-cpr {vmm.__version__}"
    assert client.execute("query-status") == {"status": "running", "running": True}
    assert client.execute("migrate-set-parameters", {"mode": "normal"}) == {}
    assert backend.calls == [("set_migration_parameters", {"mode": "normal"})]


def test_a_refusal_is_raised_with_its_class(client: QmpClient) -> None:
    with pytest.raises(QmpError) as refusal:
        client.execute("bogus")
    assert (refusal.value.desc, refusal.value.klass) == (
        "The command bogus has not been found",
        "CommandNotFound",
    )
    assert client.execute("query-kvm") == {"enabled": True, "present": True}


def test_the_largest_reply(client: QmpClient, backend: RecordingBackend) -> None:
    reply = client.execute("x-vmm-read-memory", {"gpa": 0, "size": 1 << 20})
    assert base64.b64decode(reply["data"]) == backend.ram


def test_events_are_kept_until_wanted(client: QmpClient) -> None:
    before = time.time_ns() // 1000
    client.execute("stop")
    client.execute("cont")
    resume = client.wait_event("RESUME")
    assert (resume.name, resume.data) == ("RESUME", {})
    assert before <= resume.at_us <= time.time_ns() // 1000
    assert [event.name for event in client.events] == ["STOP"]
    assert client.wait_event("STOP").at_us <= resume.at_us


def test_an_event_yet_to_come(client: QmpClient, backend: RecordingBackend) -> None:
    timer = threading.Timer(0.05, backend.emit, ["MIGRATION", {"status": "completed"}])
    timer.start()
    assert client.wait_event("MIGRATION").data == {"status": "completed"}
    timer.join()


def test_an_event_that_does_not_come(client: QmpClient) -> None:
    begin = time.monotonic()
    with pytest.raises(PeerError, match="event MIGRATION did not come in time"):
        client.wait_event("MIGRATION", timeout=0.05)
    assert time.monotonic() - begin < 2
    assert client.execute("query-kvm") == {"enabled": True, "present": True}


@pytest.mark.parametrize("exists", [True, False])
def test_nobody_listens(tmp_socket_dir: Path, exists: bool) -> None:
    path = tmp_socket_dir / "qmp.sock"
    if exists:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    reason = "Connection refused" if exists else "No such file or directory"
    with pytest.raises(PeerError, match=f"{reason}; is the VMM running"):
        QmpClient.connect(path)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "sent what is not QMP"),
        (b'{"hello": 1}', "does not greet as a QMP server does"),
        (b"[1]", "sent what is not QMP"),
        (b"", "its greeting did not come in time"),
        (GREETING, "its reply to qmp_capabilities did not come in time"),
    ],
)
def test_a_peer_that_is_no_server(says: bytes, message: str) -> None:
    with Peer(says) as peer:
        with pytest.raises(PeerError, match=message):
            peer.client(timeout=0.05)
        assert peer.theirs.fileno() == -1, "the socket is closed"


def test_a_peer_that_hangs_up() -> None:
    with Peer(READY) as peer, peer.client() as client:
        peer.hang_up()
        with pytest.raises(PeerError, match=r"QMP at test\.sock: the VMM closed the connection"):
            client.execute("query-status")


def test_a_reply_given_up_on_is_not_taken_for_the_next() -> None:
    with Peer(READY) as peer, peer.client() as client:
        with pytest.raises(PeerError, match="its reply to stop did not come in time"):
            client.execute("stop", timeout=0.05)
        event = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}'
        peer.say(b'{"return": "late", "id": 2}', event, b'{"return": "asked for", "id": 3}')
        assert client.execute("query-status") == "asked for"
        assert client.wait_event("STOP") == Event("STOP", {}, 1_000_002)


def test_an_error_without_an_id_is_ours() -> None:
    with Peer(READY) as peer, peer.client() as client:
        peer.say(b'{"error": {"class": "GenericError", "desc": "JSON token size limit exceeded"}}')
        with pytest.raises(QmpError, match="JSON token size limit exceeded"):
            client.execute("stop")


def test_a_peer_that_takes_nothing() -> None:
    with (
        Peer(READY) as peer,
        peer.client() as client,
        pytest.raises(PeerError, match="did not take the command x-huge in time"),
    ):
        client.execute("x-huge", {"fill": "x" * 10_000_000}, timeout=0.05)


@pytest.mark.parametrize("heavy", ["asyncio", "msgspec", "dataclasses", "inspect"])
def test_importing_it_is_light(heavy: str) -> None:
    code = f"import sys, vmm.qmp.client; sys.exit({heavy!r} in sys.modules)"
    root = Path(vmm.__file__).parent.parent
    ended = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, check=False)
    assert ended.returncode == 0


def test_a_strangers_monitor_is_told_nothing(tmp_socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_socket_dir / "qmp.sock"
    with listen(str(path), "test") as stranger:
        monkeypatch.setattr(sockets, "peer", lambda _: (7, 1001))
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(PeerError, match=f"QMP at {path}: process 7, which listens there, is uid 1001"):
            QmpClient.connect(path)
        connection, _ = stranger.accept()
        with connection:
            assert connection.recv(1) == b""
