"""A new VMM that fails at each step of the protocol: played by the test, over the real channels, against a
real old VMM. Before the commit every failure leaves the guest where it was.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.handover.stage import Stage
from vmm.cpr.channel import CancelSwitch, Channel, Listener
from vmm.cpr.protocol import HEADER, MAGIC, VERSION, Message, Prepared, Ready, Refuse, State, expect

pytestmark = pytest.mark.kvm

STEP_S = 10.0
READY = Ready("rebuild", "played by a test", True, "EIO")


class Impostor:
    """The new side's sockets, and the steps of the protocol that a scenario goes through."""

    def __init__(self, folder: Path) -> None:
        self.switch = CancelSwitch()
        self.cpr_path, self.main_path = str(folder / "cpr"), str(folder / "main")
        self.listener = Listener(self.cpr_path)
        self.main_listener: Listener | None = None
        self.channels: list[Channel] = []
        self.failure: BaseException | None = None

    def offered(self) -> Channel:
        """Accept cpr and take the offer; its fds are closed at once."""
        channel = self.listener.accept(STEP_S, self.switch)
        self.channels.append(channel)
        _, fds = channel.receive(STEP_S)
        for fd in fds:
            os.close(fd)
        return channel

    def ready(self) -> Channel:
        """Say that the machine is built; the main channel, the guest's state announced on it."""
        cpr = self.offered()
        self.main_listener = Listener(self.main_path)
        cpr.send(READY, (), STEP_S)
        cpr.close()
        main = self.main_listener.accept(STEP_S, self.switch)
        self.channels.append(main)
        message, _ = main.receive(STEP_S)
        expect(message, State)
        return main

    def play(self, scenario: Callable[[Impostor], None]) -> None:
        """Run `scenario`; what it raises is kept for the test."""
        try:
            scenario(self)
        except BaseException as error:  # noqa: BLE001 -- raised again by the test's own thread
            self.failure = error

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for listener in (self.listener, self.main_listener):
            if listener is not None:
                listener.close()
        self.switch.close()


def hangs_up_at_once(new: Impostor) -> None:
    new.listener.accept(STEP_S, new.switch).close()


def refuses_the_offer(new: Impostor) -> None:
    new.offered().send(Refuse("no room here"), (), STEP_S)


def hangs_up_on_the_offer(new: Impostor) -> None:
    new.offered().close()


def ready_but_deaf(new: Impostor) -> None:
    cpr = new.offered()
    cpr.send(READY, (), STEP_S)
    cpr.close()


def ready_by_unknown_means(new: Impostor) -> None:
    cpr = new.offered()
    new.main_listener = Listener(new.main_path)
    cpr.send(Ready("teleport", "because", True, "ok"), (), STEP_S)
    cpr.close()


def talks_nonsense(new: Impostor) -> None:
    main = new.ready()
    main._sock.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def announces_too_much(new: Impostor) -> None:
    main = new.ready()
    main._sock.send(HEADER.pack(MAGIC, VERSION, 1 << 31, 0))


def a_later_protocol(new: Impostor) -> None:
    main = new.ready()
    main._sock.send(HEADER.pack(MAGIC, VERSION + 1, 2, 0))


def dies_with_the_state(new: Impostor) -> None:
    new.ready().close()


def refuses_the_state(new: Impostor) -> None:
    new.ready().send(Refuse("the state is of another world"), (), STEP_S)


def never_prepared(new: Impostor) -> None:
    new.ready()


def prepared_then_gone(new: Impostor) -> None:
    """It dies without ever having held the run token: the old VMM takes the token back."""
    main = new.ready()
    main.send(Prepared(), (), STEP_S)
    main.receive(STEP_S)
    main.close()


def speaks_out_of_turn(new: Impostor) -> None:
    message: Message = State(0, True)
    new.ready().send(message, (), STEP_S)


SCENARIOS: list[tuple[Callable[[Impostor], None], str]] = [
    (hangs_up_at_once, ""),
    (refuses_the_offer, "no room here"),
    (hangs_up_on_the_offer, "hung up"),
    (ready_but_deaf, "main"),
    (ready_by_unknown_means, "teleport"),
    (talks_nonsense, "another protocol"),
    (announces_too_much, "announces"),
    (a_later_protocol, "protocol version"),
    (dies_with_the_state, "hung up"),
    (refuses_the_state, "another world"),
    (never_prepared, "did not answer"),
    (speaks_out_of_turn, "State where Prepared"),
    (prepared_then_gone, "runs here"),
]


@pytest.mark.parametrize(("scenario", "reason"), SCENARIOS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_guest_runs_on(
    stage: Stage, tmp_socket_dir: Path, scenario: Callable[[Impostor], None], reason: str
) -> None:
    old = stage.start()
    stage.hear()
    impostor = Impostor(tmp_socket_dir)
    thread = threading.Thread(target=impostor.play, args=(scenario,))
    try:
        parameters: dict[str, Any] = {"mode": "cpr-transfer", "x-vmm-prepare-timeout": 500}
        old.client.execute("migrate-set-parameters", parameters)
        thread.start()
        addresses = {"main": impostor.main_path, "cpr": impostor.cpr_path}
        channels = [
            {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
            for kind, path in addresses.items()
        ]
        old.client.execute("migrate", {"channels": channels})
        outcome = stage.outcome(old)
        thread.join(STEP_S)
    finally:
        impostor.close()
    assert impostor.failure is None
    assert outcome["status"] == "failed"
    assert reason in outcome["error-desc"]
    assert old.state == "running"
    stage.hear()
    stage.replace(old)
    stage.hear()
