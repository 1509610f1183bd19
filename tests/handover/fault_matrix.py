"""Every step of a handover, on either side, killed, stopped, delayed, failed or cut off: who runs the guest?

A cell is one fault at one step. It starts with a guest in a VMM that received it, hands it over to a fresh
VMM, lets the fault strike, continues what was stopped, and waits until both sides have come to an end. Then
the guest's own memory must show that it runs where the VMMs say it is and nowhere else, the run token must
agree, the survivor must say what happened and hold no fd more than before, and a second handover must work.
Where that leads is where the next cell starts.

Each cell is there in both modes. By `adopt` the guest lives in a keeper: where a VMM died with it, `vmm
attach` has to find it there, and it has to go on. The keeper, too, must hold no fd more than before.

Any cell may follow any other: several workers can take them from one list, each a process with a guest, a
folder and VMMs of its own, so that what one counts as its VMM's or its keeper's fds is never another's.

`python -m tests.handover.fault_matrix` runs the whole matrix, tests/handover/test_fault_matrix.py a part.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.handover import stage
from tests.handover.stage import connect
from tests.kvm.keeping import await_end
from tests.processes import PR_SET_PDEATHSIG, ROOT, Spawn, Spawned
from vmm.errors import PeerError, UsageError
from vmm.kvm.keeper_port import KeeperPort
from vmm.machine.ports import end_stale_keeper
from vmm.qmp.backend import QmpError
from vmm.qmp.client import QmpClient
from vmm.report.results import CPU_SIZE, HEADER_SIZE, GuestState, Results, ResultsError, parse_results

MODES = ("rebuild", "adopt")
OLD, NEW, NOBODY = frozenset({"old"}), frozenset({"new"}), frozenset({"nobody"})
EITHER = OLD | NEW

SHORT_MS = {"setup": 4000, "prepare": 1000, "commit": 1000}  # where it is a deadline that ends a wait
LONG_MS = {"setup": 10_000, "prepare": 3_000, "commit": 1_500}
DELAY_MS = 40  # well within the deadlines
STOPPED_S = 7.0  # at most: longer than all the deadlines that can follow on each other
SETTLE_S = 25.0  # a cell that takes longer hangs
STARTED_S = 60.0  # within which a VMM's monitor answers; on a busy machine that is no fault of a handover
MOVING_S = 5.0  # within which a guest that runs is seen to move
STANDING_S = 0.15  # within which a guest that stands still does not
POLL_S = 0.01

RESULTS_GPA = 0x200000  # firmware/include/results.h
FINAL = frozenset({"completed", "failed", "cancelled"})
LIVES_ON = "the guest lives on in its keeper"
HANDOVER_FAILED = 10  # exit status of a new VMM that took no guest over

# --- the cells: what strikes where, and where the guest may be then ---

STEPS = {
    "outgoing": (
        "offer",
        "wait_ready",
        "connect_main",
        "pause",
        "send_state",
        "receive_prepared",
        "begin_commit",
        "release_token",
        "send_commit",
        "receive_running",
        "give_up",
    ),
    "incoming": (
        "receive_offer",
        "build",
        "listen_main",
        "receive_state",
        "load",
        "send_prepared",
        "receive_commit",
        "take_token",
        "run",
        "send_running",
    ),
}
KINDS = ("kill", "stop", "delay", "fail", "break", "hang-up", "cancel")
FAILURES = ("fail", "break")
CANNOT_FAIL = frozenset({"release_token", "give_up", "run"})
CANNOT_FAIL_AFTERWARDS = frozenset({"pause", "take_token"})  # either fails, or it has happened
CONFIRMED = "after-send_running"
BEFORE_THE_MONITOR = "receive_offer"  # the new VMM is there as soon as it starts: only a delay makes sense

# From which point on the guest is where; a point is a step, or `after-` it. The guest is in the old VMM's own
# memory alone until State is sent; the token is the old VMM's until it is released, the new one's once taken.
Points = tuple[tuple[str, frozenset[str]], ...]
WHERE: dict[str, dict[str, Points]] = {
    "outgoing": {
        "kill": (("offer", NOBODY), ("after-send_state", NEW)),
        "stop": (("offer", OLD), ("after-release_token", NEW)),
        "delay": (("offer", NEW),),
        "fail": (("offer", OLD), ("after-send_commit", EITHER), ("after-receive_running", NEW)),
        "break": (("offer", OLD), ("after-send_commit", EITHER), ("after-receive_running", NEW)),
        "hang-up": (
            ("offer", OLD),
            ("after-wait_ready", NEW),  # nothing is connected
            ("after-connect_main", OLD),
            ("after-send_state", EITHER),
            ("after-receive_running", NEW),
        ),
        "cancel": (("offer", OLD), ("after-begin_commit", NEW)),
    },
    "incoming": {
        "kill": (("receive_offer", OLD), ("after-take_token", NOBODY)),
        "stop": (("receive_offer", OLD), ("after-take_token", NEW)),
        "delay": (("receive_offer", NEW),),
        "fail": (("receive_offer", OLD), ("after-take_token", NEW)),
        "break": (("receive_offer", OLD), ("after-take_token", NEW)),
        "hang-up": (
            ("receive_offer", OLD),
            ("after-listen_main", NEW),  # nothing is connected
            ("after-receive_state", OLD),
            ("after-send_prepared", EITHER),
            ("after-take_token", NEW),
        ),
        # Cancelled before Commit is read; once it is, the new VMM's end has to wait.
        "cancel": (("receive_offer", OLD), ("after-send_prepared", EITHER), ("after-receive_commit", NEW)),
    },
}


@dataclass(frozen=True)
class Cell:
    """One fault, after a fault of the other side that leads there (`provoke`, may be empty)."""

    side: str
    point: str
    kind: str
    expected: frozenset[str]
    provoke: str = ""
    paused: bool = False

    @property
    def fault(self) -> str:
        """As VMM_FAULT has it."""
        return f"{self.side}:{self.point}:{self.kind}" + (f":{DELAY_MS}" if self.kind == "delay" else "")

    @property
    def deadlines_ms(self) -> dict[str, int]:
        """Of both sides: short where one of them stops."""
        return SHORT_MS if "stop" in (self.kind, self.provoke.rpartition(":")[2]) else LONG_MS

    def faults_of(self, side: str) -> str:
        """All that `side` is to do, as VMM_FAULT has it."""
        return ";".join(one for one in (self.provoke, self.fault) if one.startswith(f"{side}:"))

    def __str__(self) -> str:
        return " ".join(
            part
            for part in (self.fault, f"({self.provoke})" if self.provoke else "", "paused" * self.paused)
            if part
        )


def _points(steps: Iterable[str]) -> list[str]:
    return [point for step in steps for point in (step, f"after-{step}")]


def _makes_sense(point: str, kind: str) -> bool:
    step = point.removeprefix("after-")
    if kind in FAILURES and (step in CANNOT_FAIL or (step != point and step in CANNOT_FAIL_AFTERWARDS)):
        return False
    return point != BEFORE_THE_MONITOR or kind == "delay"


def _where(order: list[str], point: str, points: Points) -> frozenset[str]:
    at = order.index(point)
    return [who for start, who in points if order.index(start) <= at][-1]


def _along_the_way() -> Iterator[Cell]:
    for side, kinds in WHERE.items():
        order = _points(STEPS[side])
        for kind, points in kinds.items():
            for point in order:
                if _makes_sense(point, kind):
                    yield Cell(side, point, kind, _where(order, point, points))


# What happens once something has gone wrong, struck in its turn. The new VMM is stopped where it has all of
# the guest, so that it is there to make the mistake that the token prevents.
ON_ERROR: tuple[tuple[str, str, tuple[str, ...], dict[str, Points]], ...] = (
    (
        "incoming:send_prepared:stop",
        "outgoing",
        ("keep_token", "roll_back", "withdraw"),
        {"kill": (("keep_token", NEW), ("after-keep_token", NOBODY))},
    ),
    (
        "incoming:receive_commit:stop",
        "outgoing",
        ("ask_token", "roll_back", "withdraw"),
        {
            "kill": (("ask_token", NEW), ("after-ask_token", NOBODY)),
            "stop": (("ask_token", EITHER), ("after-ask_token", OLD)),  # free for whoever goes on first
        },
    ),
    ("outgoing:receive_prepared:fail", "incoming", ("refuse",), {}),
)


def _on_error() -> Iterator[Cell]:
    for provoke, side, steps, special in ON_ERROR:
        order = _points(steps)
        for kind in ("kill", "stop", "delay", "hang-up", "cancel"):
            for point in order:
                where = _where(order, point, special.get(kind, ((order[0], OLD),)))
                yield Cell(side, point, kind, where, provoke)


def _paused() -> Iterator[Cell]:
    """A guest that is paused is handed over paused."""
    for side, point, kind, expected in (
        ("outgoing", "pause", "kill", NOBODY),
        ("outgoing", "after-send_state", "kill", NEW),
        ("outgoing", "receive_prepared", "fail", OLD),
        ("outgoing", "after-release_token", "kill", NEW),
        ("outgoing", "after-release_token", "stop", NEW),
        ("incoming", "load", "fail", OLD),
        ("incoming", "receive_commit", "stop", OLD),
        ("incoming", "take_token", "kill", OLD),
        ("incoming", "after-take_token", "kill", NOBODY),
        ("incoming", "run", "delay", NEW),
    ):
        yield Cell(side, point, kind, expected, paused=True)


def cells() -> list[Cell]:
    """All of them."""
    return [*_along_the_way(), *_on_error(), *_paused()]


ONLY = (
    "the cells whose own fault, SIDE:STEP:KIND, has TEXT in it, not the fault in parentheses that leads to "
    "it; or the one that is called TEXT in full; or with `paused` those of a paused guest; may be repeated"
)


def choose(texts: Sequence[str]) -> list[Cell]:
    """The cells that the options `--only` name, as ONLY says; all where there are none. Raises UsageError."""
    every = cells()
    for text in texts:
        if not any(_is_meant(text, cell) for cell in every):
            raise UsageError(f"--only {text}: there is no such cell; a name is like outgoing:offer:kill")
    return [cell for cell in every if not texts or any(_is_meant(text, cell) for text in texts)]


def _is_meant(text: str, cell: Cell) -> bool:
    return text in cell.fault or text == str(cell) or (text == "paused" and cell.paused)


# --- what a cell found ---

PROBLEMS = (
    "double run",
    "lost guest",
    "hang",
    "leaked fd",
    "wrong place",
    "silence",
    "guest complaint",  # its world is not as it must be: two that run it, or a state that is not whole
    "no second handover",
)


@dataclass
class Outcome:
    """Of one cell. `who` is `keeper` where no VMM had the guest, and `vmm attach` found it in its keeper."""

    cell: Cell
    mode: str = "rebuild"
    who: str = "nobody"
    old: str = ""  # what became of each VMM, in its own words
    new: str = ""
    seconds: float = 0.0
    problems: list[tuple[str, str]] = field(default_factory=list)  # one of PROBLEMS, and what was seen

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        values["cell"]["expected"] = sorted(self.cell.expected)
        return values

    def blame(self, kind: str, text: str) -> None:
        """Note a problem."""
        assert kind in PROBLEMS
        self.problems.append((kind, text))


class Lost(Exception):
    """The guest is gone for a reason other than the cell's, or a VMM does not do what every cell needs."""


# --- the guest and the VMMs ---

_FLOCK = struct.Struct("=hh4xqqi4x")  # struct flock, x86-64


class Guest:
    """The guest as its memory shows it, and its token: read through the VMM's memfds, not through the VMM."""

    def __init__(self, pid: int) -> None:
        """Open them through a process that has them."""
        memory = _open_memfd(pid, "vmm-ram")
        self._token = _open_memfd(pid, "vmm-token")
        self._memory = mmap.mmap(
            memory, HEADER_SIZE + CPU_SIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=RESULTS_GPA
        )
        os.close(memory)

    def close(self) -> None:
        """Let go of them."""
        self._memory.close()
        os.close(self._token)

    def results(self) -> Results | None:
        """What it says of itself; None while it has not begun to."""
        try:
            return parse_results(self._memory[:])
        except ResultsError:
            return None

    def turns(self) -> int:
        """A count that only a running guest raises."""
        results = self.results()
        return results.cpus[0].turns if results is not None else 0

    def moves(self) -> bool:
        """Whether it is seen to move."""
        turns = self.turns()
        return _within(MOVING_S, lambda: self.turns() != turns)

    def stands(self) -> bool:
        """Whether it is not."""
        turns = self.turns()
        time.sleep(STANDING_S)
        return self.turns() == turns

    def complaint(self) -> str | None:
        """What it found wrong with its world."""
        results = self.results()
        if results is None:
            return "its results area is not readable any more"
        if results.errors or results.state is GuestState.VIOLATED:
            return f"it counts {results.errors} errors: {results.violation}"
        return None

    def epoch(self) -> int:
        """The token's."""
        return int.from_bytes(os.pread(self._token, 8, 0), "little")

    def token_held(self) -> bool:
        """Whether a process holds the token."""
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        return bool(_FLOCK.unpack(fcntl.fcntl(self._token, fcntl.F_OFD_GETLK, request))[0] != fcntl.F_UNLCK)


def _open_memfd(pid: int, name: str) -> int:
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        if os.readlink(path).startswith(f"/memfd:{name}"):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    raise Lost(f"process {pid} has no memfd {name}")


def open_fds(pid: int) -> list[str]:
    """What a process has open, sorted. A file that was replaced meanwhile is the file that it was."""
    return sorted(what.removesuffix(" (deleted)") for what in stage.open_fds(pid))


def _within(seconds: float, look: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            return look()
        time.sleep(POLL_S)
    return True


def _end_keeper(path: Path) -> None:
    """End the keeper that listens at `path`, and wait until it has. Raises PeerError where it has a VMM."""
    port = KeeperPort.connect(str(path))
    life = os.dup(port.lifeline)
    try:
        end_stale_keeper(port)
        assert await_end(life), f"the keeper at {path} does not end"
    finally:
        os.close(life)


class Vmm:
    """One VMM process, which may die or stop at any moment."""

    def __init__(self, process: Spawned, folder: Path, number: int) -> None:
        self.process = process
        self.main, self.cpr = folder / f"m{number}", folder / f"c{number}"
        self._monitor = folder / f"q{number}"
        self._client: QmpClient | None = None
        self.stopped_at: float | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def dead(self) -> bool:
        """Whether it has ended."""
        return self.process.popen.poll() is not None

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except FileNotFoundError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def ask(self, command: str, arguments: dict[str, Any] | None = None, timeout_s: float = 5.0) -> Any:
        """What a QMP command returns. Raises PeerError where there is no answer."""
        if self._client is None:
            self._client = connect(self.process, self._monitor, STARTED_S)
        return self._client.execute(command, arguments, timeout_s)

    def answers(self, command: str) -> dict[str, Any]:
        """What a query returns; nothing where it is dead or stopped."""
        if self.dead or self.stopped:
            return {}
        try:
            answer: dict[str, Any] = self.ask(command, timeout_s=1.0)
        except PeerError:
            return {}
        return answer

    def prepare(self, deadlines_ms: dict[str, int]) -> None:
        """Set mode and deadlines."""
        deadlines = {f"x-vmm-{name}-timeout": ms for name, ms in deadlines_ms.items()}
        self.ask("migrate-set-parameters", {"mode": "cpr-transfer", **deadlines})

    def migrate_to(self, new: Vmm) -> None:
        """`migrate`. No answer comes from one that is struck before it can give it."""
        channels = [
            {"channel-type": name, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}
            for name, path in (("main", new.main), ("cpr", new.cpr))
        ]
        try:
            self.ask("migrate", {"channels": channels}, timeout_s=1.0)
        except PeerError:
            if not _within(1.0, lambda: self.dead or self.stopped):
                raise

    @property
    def run_state(self) -> str:
        """query-status's; empty where there is no answer."""
        return str(self.answers("query-status").get("status", ""))

    @property
    def has_guest(self) -> bool:
        """Whether it says that the guest is its own."""
        return self.run_state in ("running", "paused")

    def says(self, text: str) -> bool:
        """Whether its log says so, soon."""
        return _within(2.0, lambda: text in self.process.stderr)

    def close(self) -> None:
        """Close the monitor's connection."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def end(self) -> int:
        """Ask it to quit, and reap it; its exit status."""
        if not self.dead:
            self.ask("quit")
        self.close()
        return self.process.wait()


class Matrix:
    """Runs cells, one after the other, on one guest for as long as it lives."""

    def __init__(self, folder: Path, *, mode: str, guest: str = "sentinel") -> None:
        self._spawn = Spawn(folder / "processes")
        self._folder = folder
        self._mode = mode
        self._image = guest
        self._count = 0
        self._vmms: list[Vmm] = []
        self._current: Vmm | None = None
        self._guest: Guest | None = None
        self._name = ""  # of the guest, where it has a keeper
        self._keeper = 0  # its pid
        self._fds: list[str] = []  # what a VMM that received the guest has open
        self._keepers_fds: list[str] = []  # and what the keeper has then

    def close(self) -> None:
        """End every process."""
        self._forget()
        for vmm in self._vmms:
            vmm.close()
        self._spawn.end_all()  # one that nobody has noted yet, too, for its keeper would not end otherwise
        self._reap()

    def _forget(self) -> None:
        if self._guest is not None:
            self._guest.close()
        self._guest = self._current = None

    def run(self, cells: Iterable[Cell]) -> Iterator[Outcome]:
        """The outcomes, as they come. A cell is taken from `cells` when the one before it begins, whose last
        VMM is the one that its fault strikes.
        """
        todo = iter(cells)
        following = next(todo, None)
        while following is not None:
            cell, following = following, next(todo, None)
            outcome = Outcome(cell, self._mode)
            start = time.monotonic()
            try:
                self._run_cell(cell, following, outcome)
            except (Lost, AssertionError, PeerError, QmpError) as error:
                outcome.blame("lost guest" if isinstance(error, Lost) else "hang", str(error))
                self._forget()
            outcome.seconds = round(time.monotonic() - start, 2)
            self._reap()
            yield outcome

    def _reap(self) -> None:
        """End every process but the one that has the guest."""
        for vmm in self._vmms:
            if vmm is not self._current:
                vmm.close()
                vmm.process.end()
        self._vmms = [vmm for vmm in self._vmms if vmm is self._current]
        for path in self._folder.glob("vmm/*/keeper-*.sock"):
            if self._current is None or path.parent.name != self._name:
                with suppress(PeerError):  # it is ending, or has ended
                    _end_keeper(path)

    def _start(self, *arguments: str, faults: str = "") -> Vmm:
        self._count += 1
        name = f"q{self._count}"
        env = {"VMM_FAULT": faults} if faults else {}
        if self._mode == "adopt":
            env["XDG_RUNTIME_DIR"] = str(self._folder)
        process = self._spawn.vmm(*arguments, "-v", f"--qmp=unix:{self._folder / name}", env=env)
        vmm = Vmm(process, self._folder, self._count)
        self._vmms.append(vmm)
        return vmm

    def _await_guest(self, faults: str, deadlines_ms: dict[str, int]) -> Vmm:
        number = self._count + 1
        cpr = f"cpr,addr.transport=socket,addr.type=unix,addr.path={self._folder / f'c{number}'}"
        new = self._start(
            "run",
            *self._keeping(),
            f"--incoming=unix:{self._folder / f'm{number}'}",
            f"--incoming={cpr}",
            f"--handover={self._mode}",
            faults=faults,
        )
        new.prepare(deadlines_ms)
        return new

    def _keeping(self) -> tuple[str, ...]:
        return ("--keeper", f"--name={self._name}") if self._mode == "adopt" else ("--no-keeper",)

    def _attach(self) -> Vmm:
        """A VMM for the guest that has none. Raises Lost where it does not get it."""
        vmm = self._start("attach", self._name)
        if not _within(SETTLE_S, lambda: vmm.dead or vmm.has_guest) or vmm.dead:
            raise Lost(f"{vmm.process} does not get the guest{vmm.process.output()}")
        return vmm

    def _hand_over(self, old: Vmm, new: Vmm) -> None:
        """A handover in which nothing goes wrong. Raises Lost where it does."""
        old.migrate_to(new)
        if not _within(SETTLE_S, lambda: old.dead or old.answers("query-migrate").get("status") in FINAL):
            raise Lost(f"{old.process} does not end its handover{old.process.output()}")
        if old.dead:
            raise Lost(f"{old.process} ended with {old.process.popen.returncode}{old.process.output()}")
        answer = old.answers("query-migrate")
        if answer["status"] != "completed" or "error-desc" in answer:
            raise Lost(f"{old.process}: {answer}{new.process.output()}")
        if not _within(SETTLE_S, lambda: new.has_guest):
            raise Lost(f"{new.process} is {new.run_state}{new.process.output()}")
        status = old.end()
        if status != 0:
            raise Lost(f"{old.process} ended with {status}{old.process.output()}")

    def _cold_start(self, faults: str) -> Vmm:
        """A guest that has been handed over once."""
        self._name = f"g{self._count}"
        options = ("--append=pattern=64K", "--serial=null", "--memory=32M")
        first = self._start("run", self._image, *options, *self._keeping())
        first.prepare(LONG_MS)
        self._guest = Guest(first.pid)
        if not self._guest.moves():
            raise Lost(f"{first.process}: the guest does not move{first.process.output()}")
        second = self._await_guest(faults, LONG_MS)
        self._hand_over(first, second)
        if self._mode == "adopt":
            self._keeper = second.ask("x-vmm-stats")["vm"]["process"]
        if not self._fds:
            self._fds = open_fds(second.pid)
            self._keepers_fds = self._held_by_keeper()
        return second

    def _held_by_keeper(self) -> list[str]:
        """What its keeper has open; a name that has the VMM's pid in it, without that."""
        if self._mode != "adopt":
            return []
        return sorted(re.sub(r"\d+", "N", what) for what in open_fds(self._keeper))

    def _check_leaks(self, vmm: Vmm, who: str, outcome: Outcome) -> None:
        """The VMM that has the guest has no fd more than before, nor less."""
        self._compare(who, lambda: self._fds if vmm.dead else open_fds(vmm.pid), self._fds, outcome)

    def _check_keeper(self, outcome: Outcome) -> None:
        """Nor has its keeper, once no other VMM is there."""
        self._compare("keeper", self._held_by_keeper, self._keepers_fds, outcome)

    def _compare(self, who: str, look: Callable[[], list[str]], before: list[str], outcome: Outcome) -> None:
        if not _within(1.0, lambda: look() == before):
            more, less = Counter(look()) - Counter(before), Counter(before) - Counter(look())
            outcome.blame("leaked fd", f"{who}: more: {dict(more)}, less: {dict(less)}")

    def _run_cell(self, cell: Cell, following: Cell | None, outcome: Outcome) -> None:
        old = self._current
        if old is None:
            old = self._cold_start(cell.faults_of("outgoing"))
        guest = self._guest
        assert guest is not None
        new = self._await_guest(cell.faults_of("incoming"), cell.deadlines_ms)
        if cell.paused:
            old.ask("stop")
        epoch = guest.epoch()
        old.prepare(cell.deadlines_ms)
        old.migrate_to(new)
        self._settle(old, new, outcome)
        self._look(cell, old, new, guest, epoch, outcome)
        self._listen(cell, old, new, outcome)
        self._current = None
        if outcome.who == "nobody":
            self._forget()
            return
        if outcome.who == "keeper":
            survivor, others = self._attach(), [old, new]
            self._look_again(cell, survivor, guest, outcome)
        else:
            survivor, other = (old, new) if outcome.who == "old" else (new, old)
            others = [other]
            self._check_leaks(survivor, outcome.who, outcome)
        if survivor.dead:
            raise Lost(f"{survivor.process} had the guest, and ended{survivor.process.output()}")
        if cell.paused:
            survivor.ask("cont")
        for other in others:
            if not other.dead:
                other.end()
        self._check_keeper(outcome)
        survivor.prepare(LONG_MS)
        second = self._await_guest(following.faults_of("outgoing") if following else "", LONG_MS)
        try:
            self._hand_over(survivor, second)
        except Lost as error:
            outcome.blame("no second handover", str(error))
            self._forget()
            return
        moves, complaint = guest.moves(), guest.complaint()
        if complaint is not None:
            outcome.blame("guest complaint", f"after the second handover {complaint}")
        if complaint is not None or not moves:
            outcome.blame("no second handover", f"the guest moves: {moves}{second.process.output()}")
            self._forget()
            return
        if outcome.who == "keeper":
            self._check_leaks(second, "the VMM after the one that attached", outcome)
        self._current = second

    def _look_again(self, cell: Cell, vmm: Vmm, guest: Guest, outcome: Outcome) -> None:
        """The guest goes on in the VMM that has attached, or is paused there as it was."""
        if cell.paused:
            if vmm.run_state != "paused" or not guest.stands():
                outcome.blame("guest complaint", f"it was paused, and is {vmm.run_state} now")
        elif not guest.moves():
            outcome.blame("lost guest", f"{vmm.process} has attached, and the guest does not move")
        if not guest.token_held():
            outcome.blame("double run", f"{vmm.process} has attached without the token")
        complaint = guest.complaint()
        if complaint is not None:
            outcome.blame("guest complaint", f"after the attach {complaint}")

    def _settle(self, old: Vmm, new: Vmm, outcome: Outcome) -> None:
        """Wait until both sides have come to an end; continue what was stopped once the other side has."""
        deadline = time.monotonic() + SETTLE_S
        while not (_old_settled(old) and _new_settled(new)):
            if time.monotonic() > deadline:
                outcome.blame("hang", f"{old.process.output()}{new.process.output()}")
                raise Lost(f"not settled within {SETTLE_S} s")
            for vmm, other_settled in ((old, _new_settled), (new, _old_settled)):
                if vmm.dead or not vmm.stopped:
                    continue
                other = new if vmm is old else old
                if vmm.stopped_at is None:
                    vmm.stopped_at = time.monotonic()
                if other_settled(other) or time.monotonic() - vmm.stopped_at > STOPPED_S:
                    vmm.process.signal(signal.SIGCONT)
            time.sleep(POLL_S)

    def _look(self, cell: Cell, old: Vmm, new: Vmm, guest: Guest, epoch: int, outcome: Outcome) -> None:
        """Who has the guest: by what they say, by what its memory shows, by the token."""
        having = [name for name, vmm in (("old", old), ("new", new)) if vmm.has_guest]
        outcome.who = having[0] if having else "nobody"
        if len(having) > 1:
            outcome.blame("double run", "both say that they have the guest")
        if having and not cell.paused:
            if not guest.moves():
                outcome.blame("lost guest", f"{having[0]} says that the guest runs, and it does not move")
        elif (self._mode != "adopt" or cell.paused) and not guest.stands():
            outcome.blame("double run", "the guest moves, and nobody says that it runs there")
        complaint = guest.complaint()
        if complaint is not None:
            outcome.blame("guest complaint", complaint)
        if guest.token_held() != bool(having):
            outcome.blame(
                "double run", f"{outcome.who} has the guest, and the token is held: {guest.token_held()}"
            )
        if guest.epoch() < epoch:
            outcome.blame("double run", f"the epoch went back from {epoch} to {guest.epoch()}")
        if outcome.who == "nobody" and self._mode == "adopt" and cell.expected == NOBODY:
            outcome.who = "keeper"  # as is to be seen
        elif outcome.who not in cell.expected:
            kind = "lost guest" if not having else "wrong place"
            outcome.blame(kind, f"it is with {outcome.who}, not {' or '.join(sorted(cell.expected))}")

    def _listen(self, cell: Cell, old: Vmm, new: Vmm, outcome: Outcome) -> None:
        """Whoever survived says what happened."""
        striker = old if cell.side == "outgoing" else new
        if not striker.says(f"VMM_FAULT: {cell.fault} strikes"):
            outcome.blame("silence", f"the fault did not strike{old.process.output()}{new.process.output()}")
        outcome.old = self._old_says(cell, old, outcome)
        outcome.new = self._new_says(new, outcome)

    def _old_says(self, cell: Cell, old: Vmm, outcome: Outcome) -> str:
        if outcome.who == "keeper":  # it leaves the guest to who comes next, unless it had been told more
            _within(2.0, lambda: old.dead or old.answers("query-migrate").get("status") == "completed")
        if old.dead:
            status = old.process.wait()
            if status == -signal.SIGKILL:
                return "killed"
            if self._mode == "adopt" and status == HANDOVER_FAILED and LIVES_ON in old.process.stderr:
                return "lost: the guest lives on in its keeper"
            outcome.blame("silence", f"old ended with {status}{old.process.output()}")
            return f"ended with {status}"
        answer = old.answers("query-migrate")
        status, error = answer.get("status"), answer.get("error-desc")
        wanted = {"old": ("failed", "cancelled"), "new": ("completed",), "nobody": ("failed",)}[
            "nobody" if outcome.who == "keeper" else outcome.who
        ]
        if cell.point == CONFIRMED:
            wanted = ("completed",)  # whatever became of the new VMM after it had said so
        word = {"failed": ("handover failed", "handover lost"), "cancelled": ("handover cancelled",)}
        if status not in wanted or (status != "completed" and not error):
            outcome.blame("silence", f"the guest is with {outcome.who}, and old says {answer}")
        elif not any(old.says(text) for text in word.get(status, ("handover completed",))):
            outcome.blame("silence", f"old's log does not say {status}{old.process.output()}")
        return f"{status}: {error}" if error else str(status)

    def _new_says(self, new: Vmm, outcome: Outcome) -> str:
        if not new.dead:
            answer = new.answers("query-migrate")
            if outcome.who != "new" or answer.get("status") != "completed":
                outcome.blame("silence", f"the guest is with {outcome.who}, and new says {answer}")
            error = answer.get("error-desc")
            return f"{answer.get('status')}: {error}" if error else str(answer.get("status"))
        status = new.process.wait()
        if status == -signal.SIGKILL:
            return "killed"
        reason = [line for line in new.process.stderr.splitlines() if "no guest was taken over: " in line]
        if status != HANDOVER_FAILED or not reason:
            outcome.blame("silence", f"new ended with {status}{new.process.output()}")
            return f"ended with {status}"
        return "failed: " + reason[-1].partition("no guest was taken over: ")[2]


def _old_settled(old: Vmm) -> bool:
    return old.dead or old.answers("query-migrate").get("status") in FINAL


def _new_settled(new: Vmm) -> bool:
    return new.dead or new.answers("query-migrate").get("status") == "completed"


# --- side by side ---

JOBS_MAX = 4  # that are worth it by default: a cell mostly waits, and its deadlines are seconds
INTERRUPTED = 130  # exit status
CLOSING_S = 60.0  # within which a worker that was told to end has ended its processes
WORKER = "import sys; from tests.handover.fault_matrix import work; work(int(sys.argv[1]))"


def default_jobs() -> int:
    """How many cells run at a time, unless it is said."""
    return min(2 * len(os.sched_getaffinity(0)), JOBS_MAX)


def run_matrix(
    chosen: Sequence[Cell],
    *,
    modes: Sequence[str] = MODES,
    guest: str = "sentinel",
    jobs: int = 1,
    show: Callable[[Outcome], None],
) -> list[Outcome]:
    """The outcomes of all cells, mode by mode, in the order of `chosen`; each is shown as it comes. With more
    than one job that many processes share them.
    """
    outcomes = {}
    run = _side_by_side if jobs > 1 else _in_turn
    for mode, at, outcome in run(list(chosen), list(modes), guest, jobs):
        show(outcome)
        outcomes[mode, at] = outcome
    return [outcomes[mode, at] for mode in modes for at in range(len(chosen))]


Found = tuple[str, int, Outcome]  # in which mode, of which of the chosen cells


def _in_turn(chosen: list[Cell], modes: list[str], guest: str, _: int) -> Iterator[Found]:
    for mode in modes:
        for at, outcome in _run_mode(mode, guest, enumerate(chosen)):
            yield mode, at, outcome


def _run_mode(mode: str, guest: str, places: Iterable[tuple[int, Cell]]) -> Iterator[tuple[int, Outcome]]:
    taken: list[int] = []

    def todo() -> Iterator[Cell]:
        for at, cell in places:
            taken.append(at)
            yield cell

    with tempfile.TemporaryDirectory(prefix="vmm-", dir="/tmp") as folder:  # a socket's path has to be short
        matrix = Matrix(Path(folder), mode=mode, guest=guest)
        try:
            for count, outcome in enumerate(matrix.run(todo())):
                yield taken[count], outcome
        finally:
            matrix.close()


def _side_by_side(chosen: list[Cell], modes: list[str], guest: str, jobs: int) -> Iterator[Found]:
    """A worker asks for a cell with (mode, None), and is told its place or None; what it has found is (mode,
    (place, outcome)).
    """
    left = {mode: iter(range(len(chosen))) for mode in modes}
    workers: dict[Connection, subprocess.Popen[bytes]] = {}
    try:
        for _ in range(min(jobs, len(chosen))):
            connection, worker = _start_worker()
            workers[connection] = worker
            connection.send((chosen, modes, guest))
        while workers:  # each ends by itself, once there is no cell left and its guest is ended
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                try:
                    mode, found = connection.recv()
                    if found is None:
                        connection.send(next(left[mode], None))
                        continue
                except (EOFError, OSError):  # it has done its part, or something has happened to it
                    worker = workers.pop(connection)
                    connection.close()
                    if worker.wait(CLOSING_S):
                        raise RuntimeError(f"a worker ended with {worker.returncode}, see above") from None
                    continue
                yield mode, *found
    finally:
        _end_workers(workers)


def _start_worker() -> tuple[Connection, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return Connection(ours.detach()), worker


def _end_workers(workers: dict[Connection, subprocess.Popen[bytes]]) -> None:
    """All at once, since each has processes to wait for."""
    for connection, worker in workers.items():
        connection.close()
        worker.terminate()
    for worker in workers.values():
        try:
            worker.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def work(fd: int) -> None:
    """What a worker does, in a process of its own, as is told on the socket `fd`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_once)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        with (
            Connection(fd) as connection,
            suppress(EOFError, ConnectionError),
        ):  # who gives the work has ended
            chosen, modes, guest = connection.recv()
            for mode in modes:
                for found in _run_mode(mode, guest, _ask_for(connection, mode, chosen)):
                    connection.send((mode, found))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _ask_for(connection: Connection, mode: str, chosen: list[Cell]) -> Iterator[tuple[int, Cell]]:
    connection.send((mode, None))
    while (at := connection.recv()) is not None:
        yield at, chosen[at]
        connection.send((mode, None))


def _end_once(*_: object) -> None:
    """End as with Ctrl-C, and not again while the processes are ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _nothing)
    raise KeyboardInterrupt


def _nothing(*_: object) -> None:
    """A handler, since processes that are started would inherit that a signal is ignored."""


# --- the command ---


def totals(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts over all cells."""
    problems = Counter(kind for outcome in outcomes for kind in {kind for kind, _ in outcome.problems})
    return {
        "cells": len(outcomes),
        "passed": sum(not outcome.problems for outcome in outcomes),
        "guest_with": dict(Counter(outcome.who for outcome in outcomes)),
        **{kind.replace(" ", "_"): problems[kind] for kind in PROBLEMS},
    }


def line(outcome: Outcome) -> str:
    """One cell for the terminal."""
    where = f"{outcome.mode:7} {outcome.cell!s:58} guest: {outcome.who:7}"
    words = f"{where} old: {outcome.old:.70}; new: {outcome.new:.70}"
    return "".join([words, *(f"\n    {kind.upper()}: {text}" for kind, text in outcome.problems)])


def main() -> int:
    """`python -m tests.handover.fault_matrix`: for a look at some cells; scripts/bench faults measures."""
    parser = argparse.ArgumentParser(prog="fault_matrix")
    parser.add_argument("only", nargs="*", metavar="TEXT", help=ONLY)
    parser.add_argument("--mode", choices=MODES, action="append", help="default: both")
    parser.add_argument("--guest", choices=("sentinel", "ticker"), default="sentinel")
    parser.add_argument("--jobs", type=int, default=1, help="how many cells at a time (default: 1)")
    arguments = parser.parse_args()
    outcomes = run_matrix(
        choose(arguments.only),
        modes=arguments.mode or MODES,
        guest=arguments.guest,
        jobs=arguments.jobs,
        show=lambda outcome: print(line(outcome), flush=True),  # noqa: T201
    )
    print(totals(outcomes))  # noqa: T201
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
