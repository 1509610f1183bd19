"""A series of handovers of one guest, each to a new VMM process, with what the host and the guest saw of
each.

The VM is an ordinary named one (`vmm list`, `vmm ctl` and `vmm console` know it meanwhile); its console is
held here from before the first instruction to after the last, over one connection. Whatever happens, no
process and no file of the series is left behind once it is closed.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from vmm.cli.handover import TIMEOUT_S, hand_over, quit_and_wait
from vmm.cli.launch import LaunchedVmm
from vmm.cli.rundir import RunDir
from vmm.cli.signals import uninterrupted
from vmm.errors import GuestCrash, HandoverError, PeerError, VmmError
from vmm.machine.native import executes_avx
from vmm.qmp.client import QmpClient
from vmm.report.pause import ClockPoint, Quantiles, Window, handover_window, largest_gap_us, plain, quantiles
from vmm.report.results import (
    CPU_SIZE,
    HEADER_SIZE,
    CheckState,
    GuestState,
    Results,
    ResultsError,
    parse_results,
)
from vmm.report.ticks import Ticks

POLL_S = 0.02
STALL_MS = 10_000  # sentinel's own patience (firmware/README.md)
DEATH_S = 2.0  # from a VMM's last word, or none, to its end
SETTLE_S = 0.1  # after a window, for the guest to have noted the gap that it is in
CONTROL_AFTER_S = (0.05, 0.25)  # the control window begins somewhere in here
GUEST_ENDED_WELL = 1  # (0 << 1) | 1, the debug-exit port's code 0


@dataclass(frozen=True)
class Manners:
    """How a prebuilt guest is run in a series, asked for output, and ended."""

    append: str
    ask: bytes
    end: bytes


GUESTS = {
    # ticker speaks by itself; spinning, it sees every pause as a gap between two readings of its TSC
    "ticker": Manners(append="wait=spin", ask=b"", end=b"q"),
    # with all its checks a turn can take 0.2 ms, which is no gap; too many of those would push others out
    "sentinel": Manners(append="gap_us=500", ask=b"r", end=b"x"),
}


@dataclass(frozen=True)
class Step:
    """One handover. Microseconds; `control_us` is of a window as long as the handover's, without one,
    `stalls_us` how long each exit waited that came while nobody served the guest.
    """

    report: dict[str, Any]
    window: Window
    guest_us: float
    control_us: float
    stalls_us: tuple[float, ...] = ()

    @property
    def host_us(self) -> float:
        """The pause as the host saw it."""
        return self.window.length_ns / 1000


@dataclass(frozen=True)
class Ending:
    """What became of the guest: its own count of rounds and ticks, what was lost of those, what was wrong,
    which checks it was to make and could not, and what it found first, in its own words (JSON).
    """

    rounds: int
    ticks: int
    lost: int
    errors: int
    unavailable: tuple[str, ...] = ()
    violation: str | None = None


@dataclass(frozen=True)
class VmIdentity:
    """Which VM it is: the process it lives in, and what the kernel calls it (None where it does not tell)."""

    process: int
    id: str | None


@dataclass(frozen=True)
class Record:
    """A whole series; `as_dict` is what `vmm demo --json` prints of it. `vms` are those that the guest was
    in, in order, each once: with `adopt` that is one.
    """

    mode: str
    image: str
    memory_bytes: int
    cpus: int
    steps: tuple[Step, ...]
    vms: tuple[VmIdentity, ...]
    ending: Ending

    @property
    def good(self) -> bool:
        """Whether nothing was lost and nothing was wrong, with every check made that was to be, and the VM
        stayed the same where it was to.
        """
        unchanged = self.mode != "adopt" or len(self.vms) == 1
        ending = self.ending
        return ending.lost == 0 and ending.errors == 0 and not ending.unavailable and unchanged

    @property
    def pids(self) -> list[int]:
        """Every VMM process that the guest was in, in order."""
        pids = [step.report["pids"] for step in self.steps]
        return [pids[0]["old"], *(each["new"] for each in pids)] if pids else []

    @property
    def probe(self) -> str:
        """What the kernel said of the VM fd that each new VMM received."""
        return ", ".join(sorted({step.report["vm-fd"]["probe"] for step in self.steps}))

    @property
    def driven(self) -> str:
        """Who drives on the VM that the received fd is of."""
        return ", ".join(sorted({step.report["vm-fd"]["driven"] for step in self.steps}))

    def pauses(self) -> dict[str, Quantiles | None]:
        """Quantiles in microseconds: as the host saw it, as the guest did, the control window's, and how long
        those exits waited that came meanwhile.
        """
        return {
            "host": quantiles(step.host_us for step in self.steps),
            "guest": quantiles(step.guest_us for step in self.steps),
            "control": quantiles(step.control_us for step in self.steps),
            "exit": quantiles(us for step in self.steps for us in step.stalls_us),
        }

    def phases(self) -> dict[str, Quantiles | None]:
        """Quantiles in microseconds of each phase, over the handovers that had it."""
        reports = [step.report["phases-us"] for step in self.steps]
        names = dict.fromkeys(name for report in reports for name in report)
        return {name: quantiles(report[name] for report in reports if name in report) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "mode": self.mode,
            "handovers": len(self.steps),
            "pids": self.pids,
            "memory_bytes": self.memory_bytes,
            "cpus": self.cpus,
            "guest": {
                "image": self.image,
                "rounds": self.ending.rounds,
                "ticks": self.ending.ticks,
                "lost": self.ending.lost,
                "errors": self.ending.errors,
                "unavailable": list(self.ending.unavailable),
                "violation": self.ending.violation,
            },
            "pause_us": {name: plain(figures) for name, figures in self.pauses().items()},
            "phases_us": {name: plain(figures) for name, figures in self.phases().items()},
            "vm_fd": {
                "received": all(step.report["vm-fd"]["received"] for step in self.steps),
                "probe": self.probe,
                "driven": self.driven,
            },
            "vms": [asdict(vm) for vm in self.vms],
        }


class Console:
    """The guest's serial line: a thread that follows it, and keys to send."""

    def __init__(self, sock: socket.socket, on_line: Callable[[str], None]) -> None:
        self.ticks = Ticks()
        self.lines = 0
        self.last_line = ""
        self._socket = sock
        self._on_line = on_line
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while data := self._receive():
            for line in self.ticks.feed(data):
                self._on_line(line)
                with self._news:
                    self.lines += 1
                    self.last_line = line
                    self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(4096)
        except ConnectionResetError:
            return b""

    def ask(self, keys: bytes, timeout_s: float) -> None:
        """Press keys, none where the guest speaks by itself, and wait for the next line. Raises PeerError."""
        with self._news:
            seen = self.lines
            self.send(keys)
            if not self._news.wait_for(lambda: self.lines > seen or self._closed, timeout_s):
                raise PeerError(f"the guest said nothing for {timeout_s:g} s")
            if self.lines == seen:
                raise PeerError("the guest's console was closed")

    def send(self, keys: bytes) -> None:
        """Press keys. Raises PeerError where nobody is there any more."""
        try:
            self._socket.sendall(keys)
        except OSError as error:
            raise PeerError(f"the guest's console is gone: {error.strerror}") from error

    def wait_closed(self, timeout_s: float) -> None:
        """Wait for the end of the line. Raises PeerError where it does not come."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise PeerError(f"the guest's console is still open after {timeout_s:g} s")

    def close(self) -> None:
        """Leave."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._closed = True  # the VMM has left first
        self._thread.join()
        self._socket.close()


class Series:
    """A context: the guest runs from entering it to leaving it or to `finish`.

    Each thing that is waited for has `timeout_s`: a VMM's start, a handover, a word of the guest's, an end.
    """

    def __init__(
        self,
        guest: str,
        *,
        mode: str,
        memory: int,
        cpus: int,
        append: str | None = None,
        options: Sequence[str] = (),
        timeout_s: float = TIMEOUT_S,
        on_line: Callable[[str], None] = lambda _: None,
        on_handover: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.guest = guest
        self.manners = GUESTS[guest]
        self.mode = mode
        self.timeout_s = timeout_s
        self.directory = RunDir(f"series-{os.getpid()}")
        self._memory = memory
        self._cpus = cpus
        self._more_options = options
        self._append = self._options() if append is None else append
        self._on_line = on_line
        self._on_handover = on_handover
        self._steps: list[Step] = []
        self.vms: list[VmIdentity] = []
        self._ticks = 0
        self._lost = 0

    def __enter__(self) -> Self:
        self.directory.make()
        try:
            self._start()
        except BaseException as error:
            self._clean_up(keep_log=isinstance(error, VmmError))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.close()
        self.client.close()
        why = self._explain(error)
        self._clean_up(keep_log=kind is not None and issubclass(kind, VmmError))
        if why:
            raise why from error

    def _explain(self, error: BaseException | None) -> VmmError | None:
        """What the guest found, or what the VMM ended with, where that is why it does not answer."""
        if isinstance(error, VmmError) and (violation := _violation(self.console.last_line)):
            return GuestCrash(f"{self.guest} ended itself, having found: {violation}")
        if isinstance(error, PeerError):
            with suppress(PeerError):  # it has not ended
                return self.vmm.failure(self.vmm.wait(DEATH_S))
        return None

    def _start(self) -> None:
        directory = self.directory
        self.vmm = LaunchedVmm(
            [
                self.guest,
                "-S",
                "--keeper" if self.mode == "adopt" else "--no-keeper",
                f"--name={directory.name}",
                f"--memory={self._memory}",
                f"--cpus={self._cpus}",
                f"--append={self._append}",
                "--serial=unix",
                "--testdev",
                *self._more_options,
            ],
            monitor=lambda pid: directory.path / f"qmp-{pid}.sock",
            log=directory.log,
        )
        try:
            self.client = self.vmm.connect(self.deadline())
            console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            console.connect(str(directory.console))
            self.console = Console(console, self._on_line)
        except BaseException:
            self.vmm.end()
            raise
        try:
            self.client.execute("cont")
            self.results_area = self._find_results()
            self._look_at_vm()
        except BaseException as error:
            self.console.close()
            self.client.close()
            why = self._explain(error)
            self.vmm.end()
            if why:
                raise why from error
            raise

    def deadline(self) -> float:
        """When what begins now must have happened, on time.monotonic."""
        return time.monotonic() + self.timeout_s

    def _options(self) -> str:
        """The guest's own, and sentinel's checks of vector registers where guests can have them here.

        Sentinel waits for what must come as much longer than usual as this side does: from a vCPU whose exit
        is served once there is a VMM again, say.
        """
        options = [self.manners.append]
        if self.guest == "sentinel" and executes_avx():
            options.append("fpu=1")
        if self.guest == "sentinel" and self.timeout_s > TIMEOUT_S:
            options.append(f"stall_ms={round(STALL_MS * self.timeout_s / TIMEOUT_S)}")
        return " ".join(filter(None, options))

    def _find_results(self) -> tuple[int, int]:
        """Where the guest keeps its results area: (gpa, bytes to read), once the guest has made it."""
        from vmm.boot.image import find_image, load_image
        from vmm.memory import layout

        results = load_image(find_image(self.guest), ram=layout(self._memory)).results
        assert results is not None
        self.results_area = results[0], min(results[1], HEADER_SIZE + self._cpus * CPU_SIZE)
        deadline = self.deadline()
        while True:
            try:
                if self.results().state is GuestState.RUNNING:
                    return self.results_area
            except ResultsError as error:
                if time.monotonic() > deadline:
                    raise GuestCrash(f"{self.guest} does not start: {error}") from error
            time.sleep(POLL_S)

    def _clean_up(self, *, keep_log: bool) -> None:
        """End the guest, in the VMM that has it, should it answer or not, or in a keeper that nobody serves;
        remove the files.
        """
        from vmm.machine.ports import end_keeper

        directory = self.directory
        if pid := directory.served_by():
            has_ended = False
            with suppress(PeerError, ProcessLookupError), QmpClient.connect(directory.qmp) as client:
                has_ended = quit_and_wait(client, self.timeout_s)
            if not has_ended and pid != self.vmm.pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.vmm.end()
        for path in directory.keepers():
            with suppress(PeerError):  # it is just ending
                end_keeper(str(path))
        directory.console.unlink(missing_ok=True)  # an ending keeper may still listen there
        if not keep_log:
            directory.log.unlink(missing_ok=True)
        directory.tidy()
        directory.remove_if_empty()

    # --- what the guest says ---

    def results(self) -> Results:
        """The guest's results area as it is now. Raises ResultsError."""
        gpa, size = self.results_area
        answer = self.client.execute("x-vmm-read-memory", {"gpa": gpa, "size": size})
        return parse_results(base64.b64decode(answer["data"]))

    def hear(self) -> None:
        """See that the guest speaks, having asked it to. Raises PeerError."""
        self.console.ask(self.manners.ask, self.timeout_s)

    def largest_gap_us(self, window: Window) -> float:
        """The largest gap that the guest noted in `window`."""
        clock = ClockPoint.from_qmp(self.client.execute("x-vmm-guest-clock"))
        results = self.results()
        self._lost += max(0, self._ticks - results.ticks)  # a counter that went back
        self._ticks = results.ticks
        return largest_gap_us(results, clock, window)

    # --- the series ---

    def replace(self) -> Window:
        """Hand the guest over to a new VMM process, measuring nothing but the pause that the host sees.

        Raises HandoverError.
        """
        return handover_window(self._replace()[0])

    def _replace(self) -> tuple[dict[str, Any], tuple[float, ...]]:
        """The same; the report, and the stalls."""
        old = self.vmm
        with uninterrupted():
            handed = hand_over(
                self.client,
                self.directory.qmp,
                name=self.directory.name,
                log=self.directory.log,
                mode=self.mode,
                keeper=self.mode == "adopt",
                timeout_s=self.timeout_s,
                progress=self._on_handover,
            )
            self.vmm, self.client = handed.vmm, handed.client
        if (status := old.wait(self.timeout_s)) != 0:
            raise HandoverError(f"the old VMM (pid {old.pid}) ended with status {status}: {old.last_words()}")
        return handed.report, self._look_at_vm()

    def _look_at_vm(self) -> tuple[float, ...]:
        """See which VM it is, and how long its exits waited that came while it was taken over."""
        stats = self.client.execute("x-vmm-stats")
        vm = VmIdentity(**stats["vm"])
        if vm not in self.vms:
            self.vms.append(vm)
        return tuple(us for us in stats["stalls-us"] if us is not None)

    def hand_over(self) -> Step:
        """Hand the guest over, see it speak in the new VMM process, and measure. Raises HandoverError."""
        report, stalls_us = self._replace()
        window = handover_window(report)
        time.sleep(SETTLE_S)
        guest_us = self.largest_gap_us(window)
        self.hear()
        step = Step(report, window, guest_us, self.control_us(window.length_ns), stalls_us)
        self._steps.append(step)
        return step

    def control_us(self, length_ns: int) -> float:
        """The largest gap in a window of the same length at a random moment without a handover."""
        time.sleep(random.uniform(*CONTROL_AFTER_S))
        start = time.monotonic_ns()
        time.sleep(length_ns / 1e9 + SETTLE_S)
        return self.largest_gap_us(Window(start, start + length_ns))

    def finish(self) -> Record:
        """Have the guest end itself, read what it says at last, and see its VMM end as it should."""
        before = self.results()
        self.console.send(self.manners.end)
        self.console.wait_closed(self.timeout_s)
        status = self.vmm.wait(self.timeout_s)
        ticks = self.console.ticks
        lost, errors = self._lost + ticks.lost, before.errors + ticks.errors + (status != GUEST_ENDED_WELL)
        if ticks.last is not None:
            lost += max(0, before.ticks - ticks.last)
        unavailable = (one.name for one in before.checks if one.state is CheckState.UNAVAILABLE)
        found = _violation(self.console.last_line)
        ending = Ending(before.rounds, before.ticks, lost, errors, tuple(unavailable), found)
        steps, vms = tuple(self._steps), tuple(self.vms)
        return Record(self.mode, self.guest, self._memory, self._cpus, steps, vms, ending)


def _violation(line: str) -> str | None:
    """What one of sentinel's reports says is wrong, if it is one and something is."""
    try:
        found = json.loads(line)["violation"]
    except (ValueError, KeyError, TypeError):
        return None
    return None if found is None else json.dumps(found)
