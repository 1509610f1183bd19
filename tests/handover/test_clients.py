"""Clients of the monitor move with the guest; the one that asked for the handover stays with the old VMM."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from vmm.qmp.client import QmpClient

pytestmark = pytest.mark.kvm


def _connect(path: Path) -> QmpClient:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
    return QmpClient.connect(path)


def _channel(kind: str, path: Path) -> dict[str, Any]:
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}


@pytest.mark.parametrize("keeper", ["--no-keeper", "--keeper"])
def test_a_watching_client_sees_no_disconnect(spawn: Any, tmp_socket_dir: Path, keeper: str) -> None:
    folder = tmp_socket_dir
    old = spawn.vmm("run", "ticker", "--serial", "null", keeper, f"--qmp=unix:{folder}/a")
    operator, watcher = _connect(folder / "a"), _connect(folder / "a")
    new = spawn.vmm(
        "run",
        f"--incoming=unix:{folder}/main",
        f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={folder}/cpr",
        f"--qmp=unix:{folder}/b",
    )
    with operator, watcher, _connect(folder / "b") as own:
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
    spawn.vmm("run", "ticker", "--serial", "null", f"--qmp=unix:{folder}/a")
    with _connect(folder / "a") as operator:
        spawn.vmm(
            "run",
            f"--incoming=unix:{folder}/main",
            f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={folder}/cpr",
            f"--qmp=unix:{folder}/b",
        )
        with _connect(folder / "b") as own:
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
