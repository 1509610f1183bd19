"""VMM processes for a test of the handover, as an operator would start them, and the guest's output."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.patience import at_most
from tests.processes import Spawn, Spawned
from vmm.errors import PeerError
from vmm.qmp.client import QmpClient
from vmm.report.ticks import Ticks

TIMEOUT_S = 20.0  # of a test that has no other
POLL_S = 0.01
T = TypeVar("T")
# What a report says of the VM fd that came, by who drives that VM on. (No kernel lets another process do so,
# see docs/adr/0001; one that did would say `ok`.)
VM_FD = {
    "nobody": {"received": True, "probe": "EIO", "driven": "nobody"},
    "keeper": {"received": True, "probe": "EIO", "driven": "keeper"},
    "vmm": {"received": True, "probe": "ok", "driven": "vmm"},
}


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = TIMEOUT_S) -> T:
    """The first thing that `look` finds; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + at_most(timeout_s)
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what}: not within {at_most(timeout_s):g} s"
        time.sleep(POLL_S)
    return found


def ended(pid: int) -> bool:
    """Whether no process `pid` runs (one that is not waited for yet runs no more)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@dataclass
class Side:
    """One VMM process, and a connection to its monitor."""

    process: Spawned
    monitor: Path
    client: QmpClient
    main: Path
    cpr: Path

    @property
    def state(self) -> str:
        """Its run state."""
        status: str = self.client.execute("query-status")["status"]
        return status

    def channel(self, kind: str, **changed: Any) -> dict[str, Any]:
        """This side's `main` or `cpr`, as an entry of `channels`."""
        path = {"main": self.main, "cpr": self.cpr}[kind]
        return {
            "channel-type": kind,
            "addr": {"transport": "socket", "type": "unix", "path": str(path), **changed},
        }

    @property
    def channels(self) -> list[dict[str, Any]]:
        """Both."""
        return [self.channel("main"), self.channel("cpr")]


class Stage:
    """The VMMs of one test, their sockets in one folder, and `out`, where the guest's serial line goes."""

    def __init__(self, spawn: Spawn, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.sides: list[Side] = []
        self._spawn = spawn

    def start(self, *options: str, guest: str | None = "ticker", serial: str | None = None) -> Side:
        """A VMM with a new guest: ticker, twenty ticks a second, unless said otherwise."""
        inputs = [] if guest is None else [guest, "--append=rate=20"]
        return self._run(*inputs, f"--serial={serial or f'file:{self.out}'}", *options)

    def await_guest(self, *options: str) -> Side:
        """A VMM that waits for a guest."""
        number = len(self.sides)
        main, cpr = self.folder / f"m{number}", self.folder / f"c{number}"
        return self._run(
            f"--incoming=unix:{main}",
            f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={cpr}",
            *options,
        )

    def _run(self, *arguments: str) -> Side:
        number = len(self.sides)
        monitor = self.folder / f"q{number}"
        process = self._spawn.vmm("run", "-v", f"--qmp=unix:{monitor}", *arguments)
        side = Side(
            process,
            monitor,
            connect(process, monitor),
            self.folder / f"m{number}",
            self.folder / f"c{number}",
        )
        self.sides.append(side)
        return side

    def close(self) -> None:
        """Close the connections; the processes are the fixture's to end."""
        for side in self.sides:
            side.client.close()

    # --- the handover ---

    def migrate(self, old: Side, new: Side) -> dict[str, Any]:
        """Hand the guest over; the last query-migrate of the old one."""
        old.client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
        old.client.execute("migrate", {"channels": new.channels})
        return self.outcome(old)

    def outcome(self, old: Side) -> dict[str, Any]:
        """query-migrate once the handover has ended, well or not."""

        def look() -> dict[str, Any] | None:
            answer: dict[str, Any] = old.client.execute("query-migrate")
            return answer if answer["status"] in ("completed", "failed", "cancelled") else None

        return wait_for("the handover's end", look)

    def replace(self, old: Side, *options: str) -> Side:
        """A good handover to a new process, the old one ended."""
        new = self.await_guest(*options)
        outcome = self.migrate(old, new)
        assert outcome["status"] == "completed", outcome
        wait_for("the guest in the new VMM", lambda: new.state == "running")
        old.client.execute("quit")
        assert old.process.wait() == 0
        return new

    # --- the guest ---

    def ticks(self) -> Ticks:
        """What the guest has said so far."""
        ticks = Ticks()
        for _ in ticks.feed(self.out.read_bytes() if self.out.exists() else b""):
            pass
        return ticks

    def hear(self, more: int = 3) -> int:
        """Wait for `more` ticks; the last one's number. Nothing that came before may be missing or
        doubled.
        """
        before = self.ticks().ticks
        wait_for("the guest's ticks", lambda: self.ticks().ticks >= before + more)
        ticks = self.ticks()
        assert (ticks.lost, ticks.errors) == (0, 0)
        assert ticks.last == ticks.ticks
        return ticks.ticks


def connect(process: Spawned, monitor: Path, timeout_s: float = TIMEOUT_S) -> QmpClient:
    """A connection to the monitor of a VMM that has just been started."""

    def look() -> QmpClient | None:
        try:
            return QmpClient.connect(monitor, at_most(TIMEOUT_S))
        except PeerError:
            assert process.popen.poll() is None, f"{process} has ended{process.output()}"
            return None

    return wait_for(f"an answer at {monitor}", look, timeout_s)


def open_fds(pid: int) -> list[str]:
    """What the open fds of a process are, sorted, without what differs from process to process."""
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile
        links.append(re.sub(r":\[\d+\]$|(?<=processes/)\d+", "", link))
    return sorted(links)
