"""Handovers that must not take place: each is one clean error, the guest runs on, and a good one succeeds
after.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.handover.stage import Side, Stage, wait_for
from vmm.qmp.backend import QmpError
from vmm.qmp.client import QmpClient

pytestmark = pytest.mark.kvm


def goes_on(stage: Stage, old: Side) -> None:
    """The guest runs in `old` as if nothing had happened, and can be handed over."""
    assert old.state == "running"
    stage.hear()
    stage.replace(old)
    stage.hear()


def cpr_transfer(client: QmpClient) -> None:
    client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})


BAD_ARGUMENTS: dict[str, tuple[Callable[[Side], dict[str, Any]], str]] = {
    "no cpr channel": (
        lambda new: {"channels": [new.channel("main")]},
        "missing 'cpr' migration channel",
    ),
    "no main channel": (
        lambda new: {"channels": [new.channel("cpr")]},
        "missing 'main' migration channel",
    ),
    "a uri instead": (
        lambda new: {"uri": f"unix:{new.main}"},
        "missing 'cpr' migration channel",
    ),
    "a uri as well": (
        lambda new: {"uri": f"unix:{new.main}", "channels": new.channels},
        "need either 'uri' or 'channels' argument",
    ),
    "nothing": (
        lambda _: {},
        "need either 'uri' or 'channels' argument",
    ),
    "cpr over TCP": (
        lambda new: {
            "channels": [
                new.channel("main"),
                {
                    "channel-type": "cpr",
                    "addr": {"transport": "socket", "type": "inet", "host": "::1", "port": "1"},
                },
            ]
        },
        "bad cpr channel address; must be unix",
    ),
    "cpr twice": (
        lambda new: {"channels": [new.channel("main"), new.channel("cpr"), new.channel("cpr")]},
        "Channel list has more than one cpr entry",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(stage: Stage, case: str) -> None:
    make, text = BAD_ARGUMENTS[case]
    old, new = stage.start(), stage.await_guest()
    cpr_transfer(old.client)
    with pytest.raises(QmpError) as caught:
        old.client.execute("migrate", make(new))
    assert caught.value.desc == text
    assert caught.value.klass == "GenericError"
    assert new.state == "inmigrate"
    new.client.execute("quit")
    assert new.process.wait() == 0
    goes_on(stage, old)


def test_the_mode_must_be_set(stage: Stage) -> None:
    old, new = stage.start(), stage.await_guest()
    with pytest.raises(QmpError, match="mode"):
        old.client.execute("migrate", {"channels": new.channels})
    goes_on(stage, old)


def test_nobody_listens(stage: Stage) -> None:
    old = stage.start()
    gone = stage.await_guest()
    gone.process.end()
    cpr_transfer(old.client)
    with pytest.raises(QmpError, match=r"c1'?: No such file or directory"):
        old.client.execute("migrate", {"channels": gone.channels})
    assert stage.outcome(old)["status"] == "failed"
    goes_on(stage, old)


@contextmanager
def silent_listener(path: Path) -> Iterator[socket.socket]:
    """Somebody who lets others connect and says nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener


def test_twice_and_cancel(stage: Stage, tmp_socket_dir: Path) -> None:
    old = stage.start()
    new = stage.await_guest()
    silent = tmp_socket_dir / "silent"
    cpr_transfer(old.client)
    with silent_listener(silent):
        old.client.execute(
            "migrate", {"channels": [new.channel("main"), new.channel("cpr", path=str(silent))]}
        )
        assert old.client.execute("query-migrate")["status"] == "setup"
        stage.hear()
        with pytest.raises(QmpError, match=r"^There's a migration process in progress$"):
            old.client.execute("migrate", {"channels": new.channels})
        old.client.execute("migrate_cancel")
        assert stage.outcome(old)["status"] == "cancelled"
    old.client.execute("migrate_cancel")  # nothing to cancel any more: nothing happens
    goes_on(stage, old)


def test_nobody_answers_in_time(stage: Stage, tmp_socket_dir: Path) -> None:
    old = stage.start()
    silent = tmp_socket_dir / "silent"
    cpr_transfer(old.client)
    old.client.execute("migrate-set-parameters", {"x-vmm-setup-timeout": 300})
    with silent_listener(silent):
        addr = {"transport": "socket", "type": "unix", "path": str(silent)}
        channels = [{"channel-type": kind, "addr": addr} for kind in ("main", "cpr")]
        old.client.execute("migrate", {"channels": channels})
        outcome = stage.outcome(old)
    assert outcome["status"] == "failed"
    assert "did not answer" in outcome["error-desc"]
    old.client.execute("migrate-set-parameters", {"x-vmm-setup-timeout": 30_000})
    goes_on(stage, old)


def test_a_changed_mode_changes_nothing_under_way(stage: Stage) -> None:
    old, new = stage.start(), stage.await_guest()
    cpr_transfer(old.client)
    old.client.execute("migrate", {"channels": new.channels})
    old.client.execute("migrate-set-parameters", {"mode": "normal"})
    assert stage.outcome(old)["status"] == "completed"
    stage.hear()


def test_another_machine_was_asked_for(stage: Stage) -> None:
    old = stage.start()
    new = stage.await_guest("--memory=256M", "--cpus=2")
    outcome = stage.migrate(old, new)
    assert outcome["status"] == "failed"
    assert "memory" in outcome["error-desc"]
    assert "cpus" in outcome["error-desc"]
    assert new.process.wait() == 10
    assert "memory" in new.process.stderr
    goes_on(stage, old)


def test_the_same_machine_may_be_asked_for(stage: Stage) -> None:
    old = stage.start("--memory=64M", "--cpus=2")
    new = stage.await_guest("--memory=64M", "--cpus=2")
    assert stage.migrate(old, new)["status"] == "completed"
    stage.hear()


def test_the_new_vmm_is_killed_before_it_has_built(stage: Stage) -> None:
    old, new = stage.start(), stage.await_guest()
    cpr_transfer(old.client)
    new.process.signal(signal.SIGSTOP)
    old.client.execute("migrate", {"channels": new.channels})
    stage.hear()
    new.process.signal(signal.SIGKILL)
    outcome = stage.outcome(old)
    assert outcome["status"] == "failed"
    assert outcome["error-desc"]
    goes_on(stage, old)


def test_the_new_vmm_is_told_when_it_is_cancelled(stage: Stage) -> None:
    old, new = stage.start(), stage.await_guest()
    cpr_transfer(old.client)
    new.process.signal(signal.SIGSTOP)
    old.client.execute("migrate", {"channels": new.channels})
    old.client.execute("migrate_cancel")
    assert stage.outcome(old)["status"] == "cancelled"
    new.process.signal(signal.SIGCONT)
    assert new.process.wait() == 10
    goes_on(stage, old)


def test_the_old_vmm_is_killed_before_it_has_paused(stage: Stage) -> None:
    """The guest dies with its VMM, as anywhere; the new one says so and ends."""
    old, new = stage.start("--no-keeper"), stage.await_guest()
    cpr_transfer(old.client)
    new.process.signal(signal.SIGSTOP)
    old.client.execute("migrate", {"channels": new.channels})
    old.process.signal(signal.SIGKILL)
    old.process.wait()
    new.process.signal(signal.SIGCONT)
    assert new.process.wait() == 10
    assert "no guest was taken over" in new.process.stderr


def test_a_new_vmm_answers_while_it_waits(stage: Stage) -> None:
    new = stage.await_guest()
    assert new.client.execute("query-status") == {"status": "inmigrate", "running": False}
    for command in ("system_reset", "inject-nmi"):
        with pytest.raises(QmpError, match="incoming migration"):
            new.client.execute(command)
    cpr_transfer(new.client)
    with pytest.raises(QmpError, match="incoming migration"):
        new.client.execute("migrate", {"channels": new.channels})
    started = time.monotonic()
    new.client.execute("quit")
    assert new.process.wait() == 0
    assert time.monotonic() - started < 5
    assert not new.cpr.exists()
    assert not os.path.lexists(new.monitor)


def test_nobody_resets_a_guest_that_is_anothers(stage: Stage) -> None:
    """The flag would lie in the state that both VMMs have, until the guest is stopped the next time."""
    old, new = stage.start(), stage.await_guest()
    assert stage.migrate(old, new)["status"] == "completed"
    with pytest.raises(QmpError, match="handed over"):
        old.client.execute("system_reset")
    for command in ("stop", "cont"):
        new.client.execute(command)
    stage.hear()
    assert new.client.execute("x-vmm-stats")["resets"] == 0


def test_sockets_are_private(stage: Stage) -> None:
    new = stage.await_guest()
    wait_for("the cpr socket", new.cpr.exists)
    assert {path.stat().st_mode & 0o777 for path in (new.cpr, new.monitor)} == {0o600}
