"""SIGKILL at random moments: of the VMM that serves the guest, and in a handover of the old one, the new one
and both, the VM staying in its keeper (adopt) or moving into another one (rebuild). The guest must live
through each and find nothing wrong.
"""

from __future__ import annotations

import argparse
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import host

from vmm.cli.handover import add_timeout, unix_channel
from vmm.cli.launch import LaunchedVmm
from vmm.cli.series import POLL_S, Series
from vmm.errors import GuestCrash, PeerError, VmmError
from vmm.report.table import table
from vmm.units import parse_size

KILL_WITHIN_S = 0.05  # of a VMM that serves the guest: after at most so long
HANDOVER_KILL_WITHIN_S = {"adopt": 0.15, "rebuild": 0.3}  # of a handover, from `migrate` on
NEW_WAITS_MS = 2000  # for an old VMM that has been killed


class Victim(Enum):
    """Who is killed."""

    SERVING = "the VMM that serves"
    OLD = "the old VMM of a handover"
    NEW = "the new VMM of a handover"
    BOTH = "both VMMs of a handover"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="of a serving VMM, default 300")
    parser.add_argument(
        "--handover-kills", type=int, default=20, metavar="N", help="of each kind in a handover, default 20"
    )
    parser.add_argument(
        "--rebuild-share",
        type=float,
        default=0.5,
        metavar="X",
        help="how many of the handovers move the guest into another keeper, 0 to 1, default 0.5",
    )
    parser.add_argument(
        "--handovers",
        type=int,
        default=0,
        metavar="N",
        help="by adopt, with nobody killed, before, default 0",
    )
    parser.add_argument(
        "--memory-backend",
        choices=("memfd", "guest-memfd"),
        default="memfd",
        help="what guest RAM is; a guest-memfd is never moved into another keeper (default memfd)",
    )
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="vCPUs of the guest, default 2")
    parser.add_argument("--memory", default="128M", metavar="SIZE", help="guest RAM, default 128M")
    parser.add_argument("--seed", type=int, help="of the random moments; printed, to try the same again")
    add_timeout(parser, host.TIMEOUT)


class CrashSeries(Series):
    """A series whose VMMs are killed."""

    def kill(self, victims: Iterable[LaunchedVmm]) -> None:
        """Kill them, all before the first is waited for."""
        victims = list(victims)
        for victim in victims:
            victim.process.send_signal(signal.SIGKILL)
        for victim in victims:
            victim.process.wait()

    def attach(self) -> None:
        """A fresh VMM for the guest in its keeper."""
        directory = self.directory
        self.client.close()
        self.vmm = LaunchedVmm(
            [directory.name, "-v"],
            verb="attach",
            monitor=lambda pid: directory.path / f"qmp-{pid}.sock",
            log=directory.log,
        )
        self.client = self.vmm.connect(self.deadline())
        self.wait_running()

    def wait_running(self) -> None:
        """Wait until the guest runs in this VMM. Raises GuestCrash where it never does."""
        deadline = self.deadline()
        while not self.client.execute("query-status")["running"]:
            if time.monotonic() > deadline:
                raise GuestCrash("the guest does not run in the VMM that took it")
            time.sleep(POLL_S)

    def migrate(self, mode: str) -> LaunchedVmm:
        """Begin a handover by `mode` to a new VMM, which is returned; nobody waits for it to end."""
        directory = self.directory
        main, cpr = directory.path / "main", directory.path / "cpr"
        for path in (main, cpr):
            path.unlink(missing_ok=True)
        new = LaunchedVmm(
            [
                f"--name={directory.name}",
                "-v",
                f"--handover={mode}",
                f"--incoming=unix:{main}",
                f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={cpr}",
            ],
            monitor=lambda pid: directory.path / f"qmp-{pid}.sock",
            log=directory.log,
        )
        with new.connect(self.deadline()) as client:
            client.execute("migrate-set-parameters", {"x-vmm-setup-timeout": NEW_WAITS_MS})
        _wait_for(cpr, self.deadline())
        self.client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
        self.client.execute("migrate", {"channels": [unix_channel("main", main), unix_channel("cpr", cpr)]})
        return new

    def find(self, candidates: Iterable[LaunchedVmm]) -> str:
        """Whoever of `candidates` has the guest serves it from here on; where none has, a fresh VMM does,
        while one that has given it away is still there. The others are ended. Who it was.
        """
        living = [vmm for vmm in candidates if vmm.process.poll() is None]
        lingering = []
        deadline = self.deadline()
        while living:
            for vmm in list(living):
                try:
                    client = vmm.connect(deadline)
                    status = client.execute("query-status")
                except VmmError:
                    if vmm.process.poll() is not None:
                        living.remove(vmm)
                    continue
                if status["running"]:
                    for other in (*living, *lingering):
                        if other is not vmm:
                            other.end()
                    self.client.close()
                    self.vmm, self.client = vmm, client
                    return "survivor"
                client.close()
                if status["status"] == "postmigrate":
                    lingering.append(vmm)
                    living.remove(vmm)
            if time.monotonic() > deadline:
                raise GuestCrash("two VMMs live and neither says that it runs the guest")
            time.sleep(POLL_S)
        self.attach()
        for vmm in lingering:
            vmm.end()
        return "attached"

    def check(self) -> int:
        """See that the guest takes turns; the errors that it has found."""
        before = self.results()
        deadline = self.deadline()
        while (now := self.results()).cpus[0].turns == before.cpus[0].turns:
            if time.monotonic() > deadline:
                raise GuestCrash("the guest stands still")
            time.sleep(POLL_S)
        return now.errors

    def violation(self) -> str:
        """What the guest has found first: the check, and what it saw."""
        results = self.results()
        names = {check.id: check.name for check in results.checks}
        found = results.violation
        return "" if found is None else f"{names[found.check]}: {found}"


def _wait_for(path: Path, deadline: float) -> None:
    while not path.exists():
        if time.monotonic() > deadline:
            raise PeerError(f"{path} does not appear")
        time.sleep(POLL_S)


def _strike(series: CrashSeries, victim: Victim, mode: str, random_: random.Random) -> str:
    """One kill, in a handover by `mode`, and what follows; who has the guest then."""
    if victim is Victim.SERVING:
        time.sleep(random_.uniform(0, KILL_WITHIN_S))
        series.kill([series.vmm])
        series.attach()
        return "attached"
    old, new = series.vmm, series.migrate(mode)
    time.sleep(random_.uniform(0, HANDOVER_KILL_WITHIN_S[mode]))
    series.kill({Victim.OLD: [old], Victim.NEW: [new], Victim.BOTH: [old, new]}[victim])
    return series.find([old, new])


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 32)
    random_ = random.Random(seed)
    plan = [Victim.SERVING] * arguments.kills
    plan += [
        victim for victim in (Victim.OLD, Victim.NEW, Victim.BOTH) for _ in range(arguments.handover_kills)
    ]
    random_.shuffle(plan)
    kills: Counter[Victim] = Counter()
    outcomes: Counter[tuple[Victim, str]] = Counter()
    memory = parse_size(arguments.memory, "--memory")
    bound = arguments.memory_backend == "guest-memfd"
    share = 0.0 if bound else arguments.rebuild_share
    modes: Counter[str] = Counter()
    with CrashSeries(
        "sentinel",
        mode="adopt",
        memory=memory,
        cpus=arguments.cpus,
        options=[f"--memory-backend={arguments.memory_backend}"],
        timeout_s=arguments.timeout,
    ) as series:
        for _ in range(arguments.handovers):
            series.replace()
            if errors := series.check():
                raise GuestCrash(f"the guest found {errors} errors after a handover")
        for number, victim in enumerate(plan, 1):
            mode = "rebuild" if random_.random() < share else "adopt"
            outcomes[victim, _strike(series, victim, mode, random_)] += 1
            kills[victim] += 1
            modes[mode] += victim is not Victim.SERVING
            if errors := series.check():
                raise GuestCrash(
                    f"the guest found {errors} errors after kill {number}, of {victim.value} ({mode}): "
                    f"{series.violation()}"
                )
            if number % 20 == 0:
                host.say(f"{number} of {len(plan)} kills")
        record = series.finish()
    rows = [
        [
            victim.value,
            str(kills[victim]),
            str(outcomes[victim, "survivor"]),
            str(outcomes[victim, "attached"]),
        ]
        for victim in Victim
    ]
    result = {
        "benchmark": "crash",
        "host": host.description(),
        "seed": seed,
        "memory_backend": arguments.memory_backend,
        "handovers": arguments.handovers,
        "kills_by_mode": dict(modes),
        "kills": {victim.name.lower(): kills[victim] for victim in Victim},
        "outcomes": {
            victim.name.lower(): {how: outcomes[victim, how] for how in ("survivor", "attached")}
            for victim in Victim
        },
        "alive": sum(kills.values()),
        "guest": record.as_dict()["guest"],
    }
    text = [
        *table(("killed", "times", "a VMM had the guest", "a fresh one attached"), rows),
        f"guests alive: {sum(kills.values())} of {len(plan)}",
        f"errors found by the guest: {record.ending.errors}",
    ]
    return result, text, record.good
