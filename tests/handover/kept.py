"""Named guests whose VMMs are killed: started, looked at and given a new VMM, as a user would."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.handover.stage import connect, ended, wait_for
from tests.processes import Spawn, Spawned
from vmm.errors import PeerError
from vmm.kvm.keeper_port import KeeperPort
from vmm.qmp.client import QmpClient

NAME = "one"


def repeats(said: bytes, first: int = 1) -> int:
    """How many bytes came twice in what a ticker said from tick `first` on. All else must be there once."""
    told = said.count(b"\n")
    expected = b"".join(b"tick %d\r\n" % number for number in range(first, first + told + 1))
    twice = at = 0
    for index, byte in enumerate(said):
        if byte == expected[at]:
            at += 1
        elif index and byte == said[index - 1]:
            twice += 1
        else:
            raise AssertionError(f"{said[: index + 20][-60:]!r} where {expected[: at + 20][-60:]!r} was due")
    return twice


class KeptGuest:
    """A named guest in a keeper, its VMMs, and `out`, where its serial line goes unless told otherwise."""

    def __init__(self, spawn: Spawn, runtime: Path) -> None:
        self.folder = runtime / "vmm" / NAME
        self.out = runtime / "out"
        self._spawn = spawn
        self._env = {"XDG_RUNTIME_DIR": str(runtime)}
        self.faults: str | None = None  # for the VMMs that are started from now on, by whomever
        self.kills = 0  # each may make one byte of the console's come twice (docs/keeper.md)
        self.vmm: Spawned
        self.client: QmpClient | None = None

    def verb(self, *arguments: str) -> Spawned:
        faults = {} if self.faults is None else {"VMM_FAULT": self.faults}
        return self._spawn.vmm(*arguments, env={**self._env, **faults})

    def run(self, *options: str, guest: str = "ticker", append: str = "rate=20") -> Spawned:
        """`vmm run`; it answers."""
        serial = f"--serial=file:{self.out}"
        arguments = [guest, f"--append={append}", "--memory=64M", serial, f"--name={NAME}", "-v", *options]
        return self._answering(self.verb("run", "--keeper", *arguments))

    def attach(self, *options: str) -> Spawned:
        """`vmm attach`; it answers, and the guest is its own."""
        return self._answering(self.verb("attach", "-v", NAME, *options))

    def _answering(self, vmm: Spawned) -> Spawned:
        self.vmm = vmm
        self.hang_up()
        self.client = connect(vmm, self._monitor(vmm.pid))
        if vmm.argv[-1] != "-S":
            wait_for("the guest", lambda: self.state != "inmigrate")
        return vmm

    def _monitor(self, pid: int) -> Path:
        return self.folder / f"qmp-{pid}.sock"

    def connect_to(self, pid: int) -> None:
        """Speak to the VMM `pid`, which answers."""
        self.hang_up()
        self.client = QmpClient.connect(self._monitor(pid), 20)

    def kill_process(self, pid: int) -> None:
        """SIGKILL to a VMM that nobody here has started."""
        self.hang_up()
        self.kills += 1
        os.kill(pid, signal.SIGKILL)
        wait_for(f"the end of VMM {pid}", lambda: ended(pid))

    def hang_up(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None

    def kill(self) -> None:
        """SIGKILL to the VMM."""
        self.kills += 1
        self.vmm.signal(signal.SIGKILL)
        self.vmm.popen.wait()
        self.hang_up()

    @property
    def state(self) -> str:
        assert self.client is not None
        status: str = self.client.execute("query-status")["status"]
        return status

    @property
    def keeper(self) -> int:
        """The pid of the one keeper that there is."""
        assert self.client is not None
        pid: int = self.client.execute("x-vmm-stats")["vm"]["process"]
        return pid

    def said(self) -> bytes:
        return self.out.read_bytes() if self.out.exists() else b""

    def hear(self, more: int = 3) -> None:
        """Wait for `more` ticks; none is missing or wrong."""
        before = self.said().count(b"\n")
        wait_for("the guest's ticks", lambda: self.said().count(b"\n") >= before + more)
        assert repeats(self.said()) <= self.kills

    def quit(self) -> None:
        """The guest ends with its VMM; nothing of it is left."""
        assert self.client is not None
        keeper = self.keeper
        self.client.execute("quit")
        assert self.vmm.wait() == 0, self.vmm.output()
        wait_for("the keeper's end", lambda: ended(keeper), 1.0)
        assert not list(self.folder.glob("*.sock")), list(self.folder.iterdir())

    def close(self) -> None:
        """Whatever is left of the guest ends."""
        self.hang_up()
        for monitor in self.folder.glob("qmp-*.sock"):
            pid = int(monitor.stem.removeprefix("qmp-"))
            if not ended(pid) and not any(pid == spawned.pid for spawned in self._spawn.spawned):
                os.kill(pid, signal.SIGTERM)
                wait_for(f"the end of VMM {pid}", lambda pid=pid: ended(pid))  # type: ignore[misc]
        self._spawn.end_all()
        for path in self.folder.glob("keeper-*.sock"):
            try:
                port = KeeperPort.connect(str(path))
            except PeerError:
                continue  # it is ending
            port.attach()
            port.close(for_good=True)
