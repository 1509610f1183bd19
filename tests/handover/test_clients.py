"""Clients of the monitor move with the guest; the one that asked for the handover stays with the old VMM."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.handover.stage import Stage, connect
from vmm.qmp.client import QmpClient

pytestmark = pytest.mark.kvm


def _channel(kind: str, path: Path) -> dict[str, Any]:
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}


@pytest.mark.parametrize("keeper", ["--no-keeper", "--keeper"])
def test_a_watching_client_sees_no_disconnect(spawn: Any, tmp_socket_dir: Path, keeper: str) -> None:
    folder = tmp_socket_dir
    old = spawn.vmm("run", "ticker", "--serial", "null", keeper, f"--qmp=unix:{folder}/a")
    operator, watcher = connect(old, folder / "a"), connect(old, folder / "a")
    new = spawn.vmm(
        "run",
        f"--incoming=unix:{folder}/main",
        f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={folder}/cpr",
        f"--qmp=unix:{folder}/b",
    )
    with operator, watcher, connect(new, folder / "b") as own:
        operator.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
        channels = [_channel("main", folder / "main"), _channel("cpr", folder / "cpr")]
        operator.execute("migrate", {"channels": channels})
        watcher.wait_event("STOP", 10)
        watcher.wait_event("RESUME", 10)
        assert watcher.execute("query-status") == {"status": "running", "running": True}
        assert operator.execute("query-status") == {"status": "postmigrate", "running": False}
        threads = watcher.execute("query-cpus-fast")
        assert threads == own.execute("query-cpus-fast")
        operator.execute("quit")
        assert old.wait(10) == 0
        assert watcher.execute("query-status") == {"status": "running", "running": True}
        watcher.execute("quit")
        assert new.wait(10) == 0


def test_the_new_vmm_is_told_before_the_guest_comes_how_it_is_to_arrive(
    spawn: Any, tmp_socket_dir: Path
) -> None:
    folder = tmp_socket_dir
    old = spawn.vmm("run", "ticker", "--serial", "null", f"--qmp=unix:{folder}/a")
    with connect(old, folder / "a") as operator:
        new = spawn.vmm(
            "run",
            f"--incoming=unix:{folder}/main",
            f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={folder}/cpr",
            f"--qmp=unix:{folder}/b",
        )
        with connect(new, folder / "b") as own:
            assert own.execute("query-status") == {"status": "inmigrate", "running": False}
            own.execute("stop")
            operator.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
            channels = [_channel("main", folder / "main"), _channel("cpr", folder / "cpr")]
            operator.execute("migrate", {"channels": channels})
            deadline = time.monotonic() + 10
            while own.execute("query-status")["status"] == "inmigrate":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert own.execute("query-status") == {"status": "paused", "running": False}
            own.execute("cont")
            assert own.execute("query-status") == {"status": "running", "running": True}
            operator.execute("quit")
            own.execute("quit")


HALF_A_REQUEST = b'{"execute": "%s' % (b"x" * 46_000)


def test_a_hundred_silent_clients_keep_nobody_out(stage: Stage) -> None:
    """The guest ticks on, an operator gets in, and a handover is possible."""
    old = stage.start()
    stage.hear()
    with ExitStack() as open_ones:
        for _ in range(100):
            sock = open_ones.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(10)
            sock.connect(str(old.monitor))
            time.sleep(0.005)  # the backlog has room for a few
        stage.hear()
        operator = open_ones.enter_context(QmpClient.connect(old.monitor, 10))
        assert operator.execute("query-status") == {"status": "running", "running": True}
        new = stage.await_guest()
        operator.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
        operator.execute("migrate", {"channels": new.channels})
        assert stage.outcome(old)["status"] == "completed"
        stage.hear()


def test_more_under_way_than_a_farewell_takes(stage: Stage) -> None:
    """Fourteen half-sent requests: who fits moves, who does not stays, and the handover is confirmed."""
    old = stage.start()
    with ExitStack() as open_ones:
        clients = [open_ones.enter_context(QmpClient.connect(old.monitor, 10)) for _ in range(14)]
        for client in clients:
            client._socket.sendall(HALF_A_REQUEST)
        time.sleep(0.5)  # until the monitor has read it
        new = stage.await_guest()
        start = time.monotonic()
        outcome = stage.migrate(old, new)
        assert outcome["status"] == "completed"
        assert "error-desc" not in outcome
        assert time.monotonic() - start < 4.0
        stage.hear()
        where = []
        for client in clients:
            client._socket.sendall(b'"}')
            assert b"CommandNotFound" in _answer(client)
            where.append(client.execute("query-status")["status"])
        assert set(where) == {"running", "postmigrate"}
        assert where.count("running") >= 5


def _answer(client: QmpClient) -> bytes:
    """Up to the reply to what was sent half before; events may come first."""
    said = b""
    while b'"error"' not in said or not said.endswith(b"\r\n"):
        part = client._socket.recv(1 << 16)
        assert part, "the connection was closed"
        said += part
    return said
