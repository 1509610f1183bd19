"""A handover as a QEMU user does it: two VMMs started by hand, the PyPI client `qemu.qmp` for the
commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from tests.handover.stage import TIMEOUT_S, VM_FD, Side, Stage

pytestmark = pytest.mark.kvm


@asynccontextmanager
async def monitor(path: Path) -> AsyncIterator[QMPClient]:
    """A connected QMPClient."""
    client = QMPClient("vmm")
    await client.connect(str(path))
    try:
        yield client
    finally:
        with suppress(EOFError):  # a VMM that was told to quit may hang up first
            await client.disconnect()


async def statuses(listener: EventListener, until: str) -> list[str]:
    """The names of events, MIGRATION ones with their status, up to the first that is `until`."""
    seen: list[str] = []
    while not seen or seen[-1] != until:
        event = await listener.get()
        data: dict[str, Any] = event.get("data", {})
        seen.append(f"{event['event']} {data['status']}" if event["event"] == "MIGRATION" else event["event"])
    return seen


async def operate(old_path: Path, new: Side, method: str, driven: str) -> None:
    async with asyncio.timeout(TIMEOUT_S), monitor(old_path) as old, monitor(new.monitor) as there:
        assert await there.execute("query-status") == {"status": "inmigrate", "running": False}
        assert await there.execute("query-migrate") == {}
        for client in (old, there):
            await client.execute(
                "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
            )
        assert (await old.execute("query-migrate-parameters"))["mode"] == "normal"
        await old.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
        with old.listener() as here_events, there.listener() as there_events:
            await old.execute("migrate", {"channels": new.channels})
            assert await statuses(here_events, "MIGRATION completed") == [
                "MIGRATION setup",
                "MIGRATION active",
                "STOP",
                "MIGRATION device",
                "MIGRATION completed",
            ]
            assert await statuses(there_events, "MIGRATION completed") == [
                "MIGRATION setup",
                "MIGRATION active",
                "RESUME",
                "MIGRATION completed",
            ]
        assert await old.execute("query-status") == {"status": "postmigrate", "running": False}
        assert await there.execute("query-status") == {"status": "running", "running": True}
        outcome = await old.execute("query-migrate")
        assert outcome["status"] == "completed"
        assert {"setup-time", "downtime", "total-time", "ram"} <= outcome.keys()
        assert (await there.execute("query-migrate"))["status"] == "completed"
        with pytest.raises(ExecuteError, match="handed over"):
            await old.execute("cont")
        with pytest.raises(ExecuteError, match=r"^Can't migrate the vm that was paused due to previous"):
            await old.execute("migrate", {"channels": new.channels})
        report = await old.execute("x-vmm-report")
        assert report["pids"]["new"] == new.process.pid
        assert (report["method"], report["vm-fd"]) in ((method, VM_FD[driven]), ("adopt", VM_FD["vmm"]))
        assert report["pause-us"] > 0
        await old.execute("quit")


@pytest.mark.parametrize(
    ("option", "method", "driven"), [("--keeper", "adopt", "keeper"), ("--no-keeper", "rebuild", "nobody")]
)
def test_a_handover_by_hand(stage: Stage, option: str, method: str, driven: str) -> None:
    old = stage.start(option)
    stage.hear()
    new = stage.await_guest()
    asyncio.run(operate(old.monitor, new, method, driven))
    assert old.process.wait() == 0
    at_the_handover = stage.ticks().ticks
    assert stage.hear(10) >= at_the_handover + 10


def test_the_guest_runs_while_the_new_vmm_builds(stage: Stage) -> None:
    """Between `migrate` and the pause, and again after it: three processes in a row, no tick missing."""
    first = stage.start("--memory=1G", "--cpus=2")
    second = stage.replace(first)
    stage.hear()
    third = stage.replace(second)
    stage.hear()
    assert third.client.execute("query-memory-size-summary") == {"base-memory": 1 << 30}
    assert len(third.client.execute("query-cpus-fast")) == 2


def test_json_incoming(stage: Stage, tmp_socket_dir: Path) -> None:
    """QEMU's JSON form of both channels."""
    old = stage.start()
    text = '{{"channel-type":"{}","addr":{{"transport":"socket","type":"unix","path":"{}"}}}}'
    main, cpr = tmp_socket_dir / "m", tmp_socket_dir / "c"
    new = stage.start(
        f"--incoming={text.format('main', main)}",
        f"--incoming={text.format('cpr', cpr)}",
        guest=None,
    )
    new.main, new.cpr = main, cpr
    assert stage.migrate(old, new)["status"] == "completed"
    stage.hear()
