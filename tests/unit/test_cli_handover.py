"""`vmm handover` between VMMs that are not there: when an interrupt takes effect, and what it says of the new
one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from vmm.cli import handover, signals
from vmm.cli.handover import hand_over
from vmm.errors import PeerError
from vmm.qmp.client import Event, QmpClient

NEW = 4711


class Old:
    """The old VMM's monitor: a handover comes to its end as soon as it has begun. `interrupted_in` is what is
    being sent when an interrupt comes.
    """

    pid = os.getpid()

    def __init__(self, interrupted_in: str = "", status: str = "completed") -> None:
        self.asked: list[str] = []
        self.events: list[Event] = []
        self._interrupted_in = interrupted_in
        self._status = status

    def execute(self, name: str, _: object = None) -> Any:
        if name == self._interrupted_in:
            signal.raise_signal(signal.SIGINT)
        if name == "migrate_cancel" and "migrate" in self.asked:
            self._status = "cancelled"
        self.asked.append(name)
        answers = {
            "query-migrate": {"status": self._status},
            "query-status": {"status": "running"},
            "x-vmm-report": {"pids": {"old": self.pid, "new": NEW}},
        }
        return answers.get(name, {})

    def wait_event(self, name: str, timeout: float) -> Event:
        if "migrate" not in self.asked:
            raise PeerError("the event did not come in time")
        return Event(name, {"status": self._status}, 0)


class New:
    """The new VMM, as it was started, and its monitor, which may not answer."""

    pid = NEW

    def __init__(self, monitor: Path, status: int | None = None) -> None:
        self.monitor = monitor
        self.process = self
        self.ended = self.closed = False
        self._status = status

    def poll(self) -> int | None:
        return self._status

    def connect(self, deadline: float) -> New:
        return self

    def execute(self, name: str) -> Any:
        raise PeerError("no answer")

    def last_words(self) -> str:
        return "so long"

    def end(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> New:
    new = New(tmp_path / "aside")
    new.monitor.touch()
    monkeypatch.setattr(handover, "_start", lambda *_, **__: new)
    monkeypatch.setattr(handover, "quit_and_wait", lambda old, _: old.execute("quit") == {})
    return new


def moved(old: Old, monitor: Path) -> None:
    hand_over(cast(QmpClient, old), monitor, name=None, log=monitor.with_name("log"), mode="rebuild")


def test_an_interrupt_as_it_begins_cancels_it(new: New, tmp_path: Path) -> None:
    old = Old("migrate")
    with pytest.raises(KeyboardInterrupt):
        moved(old, tmp_path / "monitor")
    assert "migrate_cancel" in old.asked
    assert new.ended
    assert new.closed
    assert [path.name for path in tmp_path.iterdir()] == ["aside"]


@pytest.mark.parametrize("when", ["query-migrate", "x-vmm-report", "quit"])
def test_one_that_comes_too_late_waits_for_its_end(new: New, tmp_path: Path, when: str) -> None:
    old = Old(when)
    with pytest.raises(KeyboardInterrupt):
        moved(old, tmp_path / "monitor")
    assert "migrate_cancel" not in old.asked
    assert old.asked[-1] == "quit"
    assert not new.ended
    assert new.closed
    assert [path.name for path in tmp_path.iterdir()] == ["monitor"]


def test_one_before_the_old_vmm_was_told_ends_the_new_one(
    new: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> New:
        signal.raise_signal(signal.SIGINT)
        return new

    monkeypatch.setattr(handover, "_start", start)
    old = Old()
    with pytest.raises(KeyboardInterrupt):
        moved(old, tmp_path / "monitor")
    assert "migrate" not in old.asked
    assert new.ended


AGAIN = ", or end it and the old one has the guest again"
SILENT = f"the new VMM (pid {NEW}) does not answer and may hold the guest; continue it"


@pytest.mark.parametrize(
    ("poll", "old_status", "said"),
    [
        (None, "device", SILENT + AGAIN),
        (None, "completed", SILENT),
        (10, "device", "the new VMM has ended: so long"),
    ],
)
def test_what_is_said_of_a_new_vmm_that_is_silent(
    poll: int | None, old_status: str, said: str, tmp_path: Path
) -> None:
    """One that is stopped may hold the token, and has not ended."""
    new: Any = New(tmp_path, poll)
    assert handover._whereabouts(cast(QmpClient, Old(status=old_status)), new, new) == said


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signals.INTERRUPTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_and_sighup_are_interrupts(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup(1)
    signals.interruptible()
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
