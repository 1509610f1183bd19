"""A supervisor's patience, what it tells the VMMs that it starts, and how it waits for and ends others."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import Spawn
from vmm.cli import supervise
from vmm.cli.rundir import RunDir
from vmm.cli.signals import INTERRUPTS
from vmm.cli.supervise import BACK_OFF_S, MOST_RESTARTS, WINDOW_S, BackOff, Supervisor, attach_options
from vmm.errors import PeerError

# A VMM's monitor for half a second; says how many have connected.
LISTENS = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(64)
print("listens", flush=True)
time.sleep(0.5)
listener.settimeout(0)
count = 0
try:
    while True:
        listener.accept()
        count += 1
except BlockingIOError:
    print(count)
"""


def restarts(lives_s: float, most: int = 200) -> int:
    """How many VMMs are started that live for so long each, before it gives up; `most` where it does not."""
    back_off, now = BackOff(), 1000.0
    for count in range(most):
        wait_s = back_off.before_restart(now)
        if wait_s is None:
            return count
        now += wait_s + lives_s
    return most


@pytest.mark.parametrize("lives_s", [0.0, 0.3, 1.0, 3.0])
def test_it_gives_up_where_no_vmm_lasts(lives_s: float) -> None:
    assert restarts(lives_s) == MOST_RESTARTS


@pytest.mark.parametrize("lives_s", [7.0, 60.0])
def test_it_does_not_where_they_last_for_a_while(lives_s: float) -> None:
    assert restarts(lives_s) == 200


def test_the_waits_grow_and_shrink() -> None:
    back_off, now = BackOff(), 0.0
    waits = []
    for _ in BACK_OFF_S:
        wait_s = back_off.before_restart(now)
        assert wait_s is not None
        waits.append(wait_s)
        now += wait_s
    assert waits == list(BACK_OFF_S)
    assert back_off.before_restart(now + 1 + WINDOW_S) == BACK_OFF_S[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["ticker", "--name=a"], []),
        (
            [
                "ticker",
                "--qmp",
                "unix:/a",
                "--name=a",
                "-vv",
                "--qmp=unix:/b",
                "--sandbox",
                "log",
                "--cpus=2",
            ],
            ["--qmp=unix:/a", "--qmp=unix:/b", "--sandbox=log", "-v", "-v"],
        ),
        (["one.toml", "--verbose", "kernel.elf"], ["-v"]),
    ],
)
def test_the_next_vmm_is_told_what_the_first_one_was(given: list[str], expected: list[str]) -> None:
    assert attach_options(given) == expected


@pytest.fixture
def supervisor(tmp_socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """One whose guest's first VMM has ended, and which starts no other."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_socket_dir))
    monkeypatch.setattr(Supervisor, "_serve", lambda *_: 0)
    monkeypatch.setattr(RunDir, "kept", lambda _: True)
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    supervisor = Supervisor(RunDir("one").make())
    yield supervisor
    os.close(supervisor._wake)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_it_connects_once_to_another_s_vmm(
    supervisor: Supervisor, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmm = spawn(sys.executable, "-c", LISTENS, str(RunDir("one").qmp))
    vmm.expect("listens")
    monkeypatch.setattr(RunDir, "kept", lambda _: vmm.popen.poll() is None)
    assert supervisor.run([]) == 0
    assert vmm.stdout.split() == ["listens", "1"]


def test_it_waits_no_longer_once_it_is_told(supervisor: Supervisor, spawn: Spawn) -> None:
    vmm = spawn(sys.executable, "-c", "import time; time.sleep(60)")
    signal.signal(signal.SIGTERM, supervisor._pass_on)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    supervisor._wait_ended(vmm.pid)
    timer.join()
    assert vmm.popen.poll() is None


def refused(_: object) -> None:
    raise PeerError("it has a VMM")


def test_it_tries_again_to_end_the_guest(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its VMM may be ending, and neither answer any more nor have let go of the keeper yet."""
    lives, kept = [True, False, False], ["keeper"]
    supervisor._directory = SimpleNamespace(  # type: ignore[assignment]
        name="one",
        qmp=Path("/nonexistent"),
        lives=lambda: lives.pop(0),
        kept=lambda: bool(kept),
        keepers=lambda: kept,
    )
    monkeypatch.setattr(supervise, "end_keeper", lambda path: refused(path) if lives else kept.clear())
    supervisor._end_guest()
    assert not kept


def test_it_does_not_try_for_ever(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "ENDING_S", 0.2)
    monkeypatch.setattr(supervise, "end_keeper", refused)
    monkeypatch.setattr(RunDir, "keepers", lambda _: [Path("keeper")])
    started = time.monotonic()
    with pytest.raises(PeerError, match="it has a VMM"):
        supervisor._end_guest()
    assert time.monotonic() - started > 0.2
