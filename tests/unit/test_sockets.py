"""UNIX sockets: private from birth, stale files replaced, live ones left alone, strangers refused."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from vmm import sockets
from vmm.errors import ConfigError, PeerError
from vmm.sockets import check_peer, check_server, listen, peer


@pytest.fixture
def path(tmp_socket_dir: Path) -> str:
    return str(tmp_socket_dir / "s")


def test_the_file_is_private_whatever_the_umask(path: str) -> None:
    before = os.umask(0)
    try:
        with listen(path, "test"):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    finally:
        assert os.umask(before) == 0


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_dead_listeners_file_is_replaced(path: str, kind: socket.SocketKind) -> None:
    listen(path, "test", kind).close()
    assert os.path.exists(path)
    with listen(path, "test", kind), socket.socket(socket.AF_UNIX, kind) as client:
        client.connect(path)


def test_a_live_listeners_file_is_left_alone(path: str) -> None:
    with listen(path, "test"):
        with pytest.raises(ConfigError, match=f"test: a running process listens at {path}"):
            listen(path, "test")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


def test_a_listener_with_a_full_backlog_is_alive(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)
        with pytest.raises(ConfigError, match="a running process listens"):
            listen(path, "test")


def test_a_file_that_is_no_socket_is_left_alone(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        listen(path, "test")
    assert Path(path).read_text() == "precious"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/tmp/" + "x" * 103, "has 108 bytes; a socket address holds 1 to 107"),
        ("", "has 0 bytes"),
        ("/nonexistent/s", "test: cannot listen at /nonexistent/s: No such file or directory"),
    ],
)
def test_a_path_that_cannot_be(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listen(path, "test")


def test_the_longest_path_works(tmp_socket_dir: Path) -> None:
    path = str(tmp_socket_dir / ("x" * (106 - len(str(tmp_socket_dir)))))
    assert len(path) == 107
    with listen(path, "test"):
        assert os.path.exists(path)


def test_the_peer_is_the_process_at_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer(ours) == (os.getpid(), os.geteuid())
        assert check_peer(ours, "test") == os.getpid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to connect as")
def test_another_user_is_refused(tmp_socket_dir: Path, path: str) -> None:
    with listen(path, "test") as listener:
        os.chmod(path, 0o666)
        os.chmod(tmp_socket_dir, 0o755)
        child = os.fork()
        if child == 0:
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.recv(1)
            os._exit(0)
        listener.setblocking(True)
        sock, _ = listener.accept()
        with sock:
            # the listener's own view has us as root: ask as the user that we are not
            assert peer(sock)[1] == 65534
            with pytest.raises(PeerError, match="is uid 65534; only uid 0 and root may connect"):
                check_peer(sock, "test")
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken_to"),
    [(1000, 1000, True), (1000, 0, True), (0, 1000, True), (1000, 1001, False)],
)
def test_who_may_listen_where_we_connect(
    monkeypatch: pytest.MonkeyPatch, ours: int, theirs: int, spoken_to: bool
) -> None:
    monkeypatch.setattr(sockets, "peer", lambda _: (7, theirs))
    monkeypatch.setattr(os, "geteuid", lambda: ours)
    with socket.socket(socket.AF_UNIX) as sock:
        if spoken_to:
            assert check_server(sock, "test") == 7
        else:
            with pytest.raises(PeerError, match="test: process 7, which listens there, is uid 1001"):
                check_server(sock, "test")
