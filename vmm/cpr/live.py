"""What the two coroutines stand on in a real process: sockets, the run token, the machine, and a thread to
run them on.

The calls are `async` so that a test can put a model under the same coroutines; here each one blocks its
thread, within its deadline, and never yields. One thread carries one handover; the monitor stays free.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from vmm import __version__
from vmm.cpr import incoming, outgoing, protocol
from vmm.cpr.channel import CancelSwitch, Channel, Listener, connect
from vmm.cpr.outgoing import TokenVerdict
from vmm.cpr.protocol import (
    Cancel,
    Commit,
    Farewell,
    FdEntry,
    Method,
    Mode,
    Offer,
    Prepared,
    Ready,
    Refuse,
    Running,
    State,
    TraceEvent,
    as_reason,
    expect,
)
from vmm.cpr.report import Report
from vmm.cpr.token import RunToken
from vmm.errors import HandoverError, PeerError, StateError
from vmm.fds import FdStore, check_received
from vmm.trace import Event, Tracer

log = logging.getLogger(__name__)

T = TypeVar("T")
NAP_S = 0.02
NAPS_BEFORE_A_WORD = 50


@dataclass(frozen=True)
class Timeouts:
    """How long each side waits, in seconds. `commit_s` is also how long it goes on asking for the token of a
    process that may be dying: the kernel may close its sockets well before it drops its locks.
    """

    setup_s: float = 30.0
    prepare_s: float = 5.0
    commit_s: float = 5.0


class OutgoingMachine(Protocol):
    """What a handover needs of the machine it gives away."""

    def describe(self) -> bytes:
        """The configuration as JSON."""

    def hold_fds(self) -> None:
        """Open and close no fd from here on."""

    def release_fds(self) -> None:
        """Undo `hold_fds`, where `quiesce` was not reached."""

    def fd_table(self) -> list[tuple[str, int, int]]:
        """`(name, id, fd)` of all that is to be sent."""

    def quiesce(self, *, keep_running: bool) -> bool:
        """Stop the guest and store its state, or let its vCPUs run on by themselves; whether it was
        running.
        """

    def runs_alone(self) -> bool:
        """Whether its vCPUs can run on without a VMM."""

    def roll_back(self) -> None:
        """Undo `quiesce`."""

    def gave_up(self) -> None:
        """The guest is gone for good."""


@dataclass(frozen=True)
class Choice:
    """How the machine was received, and why so: `adopt` or `rebuild`, and the kernel's answer on the VM
    fd.
    """

    method: Method
    why: str
    received: bool
    probe: str


class IncomingMachine(Protocol):
    """What a handover needs of the machine it builds."""

    def load(self) -> None:
        """Load the state from the state memfd."""

    def resume(self, *, running: bool) -> None:
        """Run the guest, or hold it paused."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never yields to its end."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a live handover step yielded")


class LiveOutgoing:
    """OutgoingWorld over real sockets."""

    def __init__(
        self,
        machine: OutgoingMachine,
        token: RunToken,
        *,
        cpr_path: str,
        main_path: str,
        timeouts: Timeouts,
        tracer: Tracer,
        report: Report,
        on_phase: Callable[[outgoing.Phase, str | None], None],
        farewell: Callable[[], list[tuple[int, bytes]]] = list,
    ) -> None:
        """`farewell` gives up the clients that move with the guest, once it has gone."""
        self.phase = outgoing.Phase.IDLE
        self.cancel = CancelSwitch()
        self.report = report
        self._machine = machine
        self._token = token
        self._epoch = token.epoch()
        self._paths = {"cpr": cpr_path, "main": main_path}
        self._timeouts = timeouts
        self._tracer = tracer
        self._on_phase = on_phase
        self._farewell = farewell
        self._cpr: Channel | None = None
        self._main: Channel | None = None
        self._version = protocol.VERSION  # what both sides speak, once the new one has answered
        self._was_running = False
        self._naps = 0

    @property
    def channels(self) -> list[Channel]:
        """Those that are connected."""
        return [channel for channel in (self._cpr, self._main) if channel is not None]

    def connect_cpr(self) -> None:
        """Connect early, so that `migrate` itself can answer with what is wrong. Raises PeerError."""
        self._tracer.mark("migrate")
        self._cpr = connect(self._paths["cpr"], self.cancel)

    def enter(self, phase: outgoing.Phase, error: str | None = None) -> None:
        outgoing.check_transition(self.phase, phase)
        self.phase = phase
        self.report.outcome = phase.value
        self.report.error = error
        if phase is outgoing.Phase.COMPLETED:
            self._tracer.mark("completed")
            self.report.add(self._tracer)
        self._on_phase(phase, error)

    async def offer(self) -> None:
        assert self._cpr is not None
        self._machine.hold_fds()
        table = self._machine.fd_table()
        offer = Offer(
            release=__version__,
            mode=msgspec.convert(self.report.mode, Mode),
            machine=msgspec.Raw(self._machine.describe()),
            fds=[FdEntry(name, index) for name, index, _ in table],
        )
        self._cpr.send(offer, [fd for _, _, fd in table], self._timeouts.setup_s)
        self._tracer.mark("offer-sent")

    async def wait_ready(self) -> None:
        assert self._cpr is not None
        message, fds = self._cpr.receive(self._timeouts.setup_s)
        _close_all(fds)
        self._version = self._cpr.version
        if isinstance(message, Refuse) and self._version < protocol.VERSION:
            raise StateError(
                f"the new VMM speaks protocol version {self._version}, and was offered the guest in version "
                f"{protocol.VERSION}; hand over to a newer VMM (it says: {as_reason(message.reason)})"
            )
        ready = expect(message, Ready)
        if self._cpr.wait_hang_up(self._timeouts.setup_s) is not None:
            raise StateError("the new VMM said ready and went on talking")
        self.report.method, self.report.why = ready.method, ready.why
        self.report.vm_fd_received, self.report.vm_fd_probe = ready.received, ready.probe
        self._cpr.close()
        self._cpr = None

    async def connect_main(self) -> None:
        self._main = connect(self._paths["main"], self.cancel)
        self._main.version = self._version
        self._tracer.mark("main-connected")

    async def pause(self) -> None:
        keep_running = self.report.method == "adopt" and self._machine.runs_alone()
        self._was_running = self._machine.quiesce(keep_running=keep_running)

    async def send_state(self) -> None:
        self._channel.send(State(self._epoch, self._was_running), (), self._timeouts.prepare_s)

    @property
    def _channel(self) -> Channel:
        if self._main is None:
            raise PeerError("the main channel is closed")
        return self._main

    async def receive_prepared(self) -> None:
        message, fds = self._channel.receive(self._timeouts.prepare_s)
        _close_all(fds)
        expect(message, Prepared)
        self._tracer.mark("prepared")

    async def begin_commit(self) -> None:
        self.cancel.disarm()

    async def release_token(self) -> None:
        self._token.release()

    async def send_commit(self) -> None:
        self._channel.send(Commit(), (), self._timeouts.commit_s)

    async def receive_running(self) -> None:
        message, fds = self._channel.receive(self._timeouts.commit_s)
        _close_all(fds)
        running = expect(message, Running)
        self.report.new_pid = running.pid
        self.report.add(Event(event.name, event.ns, "new", running.pid) for event in running.events)
        try:
            self._channel.send(Farewell(self._farewell()), (), self._timeouts.commit_s)
        except Exception as error:  # noqa: BLE001 -- whatever it was, the guest runs there: it has said so
            log.warning("the clients that were to move with the guest are lost: %s", error)

    async def keep_token(self) -> None:
        self._epoch = self._token.renew()

    async def ask_token(self) -> TokenVerdict:
        if self._token.epoch() != self._epoch:
            return self._outlast()
        try:
            if not self._token.take(self._epoch):
                return TokenVerdict.UNDECIDED
        except StateError:
            return TokenVerdict.LOST
        self._epoch = self._token.epoch()
        return TokenVerdict.MINE

    def _outlast(self) -> TokenVerdict:
        """The new VMM has moved the epoch: does it hold the token for good, or is it dying?"""
        deadline = time.monotonic() + self._timeouts.commit_s
        while self._token.held_elsewhere():
            if time.monotonic() > deadline:
                return TokenVerdict.TAKEN
            time.sleep(NAP_S)
        return TokenVerdict.LOST

    async def nap(self) -> None:
        self._naps += 1
        if self._naps == NAPS_BEFORE_A_WORD:
            log.warning(
                "the new VMM holds the run token and has not run the guest yet; waiting until it does or ends"
            )
        time.sleep(NAP_S)  # noqa: ASYNC251 -- this world has a thread of its own

    async def withdraw(self, reason: str) -> None:
        for channel in self.channels:
            _say_last(channel, Cancel(as_reason(reason)))
        self._cpr = self._main = None
        self._machine.release_fds()

    async def roll_back(self) -> None:
        self._machine.roll_back()

    async def give_up(self) -> None:
        self._machine.gave_up()
        if self._main is not None:
            self._main.close()
            self._main = None

    def close(self) -> None:
        """Give the last fds back, once the coroutine has ended."""
        for channel in self.channels:
            channel.close()
        self._cpr = self._main = None
        self.cancel.close()


class LiveIncoming:
    """IncomingWorld over real sockets. `build` makes the machine from the configuration's JSON and the
    received fds.
    """

    def __init__(
        self,
        *,
        cpr_path: str,
        main_path: str,
        build: Callable[[bytes, FdStore, RunToken], tuple[IncomingMachine, Choice]],
        timeouts: Callable[[], Timeouts],
        tracer: Tracer,
        on_phase: Callable[[incoming.Phase, str | None], None],
    ) -> None:
        """Listen on cpr at once; the old VMM may come any time. Raises HandoverError where that cannot be.

        `timeouts` is asked when it comes: until then the operator may change them.
        """
        self.phase = incoming.Phase.LISTENING
        self.cancel = CancelSwitch()
        self.clients: list[tuple[int, bytes]] = []
        self.fds = FdStore()
        self.token: RunToken | None = None
        self.machine: IncomingMachine | None = None
        self._main_path = main_path
        self._build = build
        self._timeouts = Timeouts()
        self._ask_timeouts = timeouts
        self._tracer = tracer
        self._on_phase = on_phase
        self._cpr_listener = Listener(cpr_path)
        self._main_listener: Listener | None = None
        self._cpr: Channel | None = None
        self._main: Channel | None = None
        self._offer: Offer | None = None
        self._state: State | None = None
        self._choice: Choice | None = None

    @property
    def channels(self) -> list[Channel]:
        """Those that are connected."""
        return [channel for channel in (self._cpr, self._main) if channel is not None]

    def enter(self, phase: incoming.Phase, error: str | None = None) -> None:
        incoming.check_transition(self.phase, phase)
        self.phase = phase
        self._on_phase(phase, error)

    async def receive_offer(self) -> None:
        self._cpr = self._cpr_listener.accept(None, self.cancel)
        self._cpr_listener.close()
        self._timeouts = self._ask_timeouts()
        message, fds = self._cpr.receive(self._timeouts.setup_s)
        try:
            offer = expect(message, Offer)
            if len(fds) != len(offer.fds):
                raise StateError(f"the fd table has {len(offer.fds)} rows, {len(fds)} fds came")
            for entry, fd in zip(offer.fds, fds, strict=True):
                check_received(entry.name, entry.id, fd)
            for entry in offer.fds:
                if self.fds.find(entry.name, entry.id) is not None:
                    raise StateError(f"fd {entry.name}/{entry.id} came twice")
                self.fds.add(entry.name, entry.id, fds.pop(0))
            self.fds.received()
        finally:
            _close_all(fds)
        self._offer = offer
        self._tracer.mark("offer-received")

    async def build(self) -> None:
        assert self._offer is not None
        self.fds.get("token")  # what did not come must not be made anew: two tokens are none
        self.token = RunToken.open(self.fds)
        self.machine, self._choice = self._build(bytes(self._offer.machine), self.fds, self.token)
        self._tracer.mark("built")

    async def listen_main(self) -> None:
        assert self._cpr is not None
        assert self._choice is not None
        self._main_listener = Listener(self._main_path)
        choice = self._choice
        self._cpr.send(Ready(choice.method, choice.why, choice.received, choice.probe))
        self._cpr.close()
        self._cpr = None

    async def receive_state(self) -> None:
        assert self._main_listener is not None
        self._main = self._main_listener.accept(self._timeouts.setup_s, self.cancel)
        self._main_listener.close()
        message, fds = self._main.receive(self._timeouts.setup_s)
        self._tracer.mark("state-received")
        _close_all(fds)
        self._state = expect(message, State)

    async def load(self) -> None:
        assert self.machine is not None
        self.machine.load()

    async def send_prepared(self) -> None:
        assert self._main is not None
        self._main.send(Prepared(), (), self._timeouts.prepare_s)

    async def receive_commit(self) -> None:
        assert self._main is not None
        message, fds = self._main.receive(self._timeouts.commit_s)
        _close_all(fds)
        expect(message, Commit)

    async def take_token(self) -> bool:
        assert self.token is not None
        assert self._state is not None
        deadline = time.monotonic() + self._timeouts.commit_s
        while not self.token.take(self._state.epoch):
            if time.monotonic() > deadline:
                return False
            time.sleep(NAP_S)  # noqa: ASYNC251 -- as above
        self._tracer.mark("token-taken")
        return True

    async def run(self) -> None:
        assert self.machine is not None
        assert self._state is not None
        self.machine.resume(running=self._state.running)

    async def send_running(self) -> None:
        assert self._main is not None
        events = [TraceEvent(event.name, event.ns) for event in self._tracer]
        try:
            self._main.send(Running(os.getpid(), events), (), self._timeouts.commit_s)
            self.clients = self._receive_farewell(self._main)
        finally:
            self._main.close()
            self._main = None

    def _receive_farewell(self, main: Channel) -> list[tuple[int, bytes]]:
        try:
            message, fds = main.receive(self._timeouts.commit_s)
            _close_all(fds)
            return expect(message, Farewell).clients
        except HandoverError as error:
            log.warning("no clients came with the guest: %s", error)
            return []

    async def refuse(self, reason: str) -> None:
        for channel in self.channels:
            _say_last(channel, Refuse(as_reason(reason)))
        self._cpr = self._main = None
        for listener in (self._cpr_listener, self._main_listener):
            if listener is not None:
                listener.close()

    def close(self) -> None:
        """Give the last fds back, once the coroutine has ended."""
        for channel in self.channels:
            channel.close()
        self._cpr = self._main = None
        self.cancel.close()


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _say_last(channel: Channel, message: Cancel | Refuse) -> None:
    """Send a last message to a peer that may be gone, and close."""
    if not channel.say_last(message):
        log.info("the peer was not there to be told: %s", message.reason)


def refusal(differences: list[str]) -> HandoverError:
    """The error for an operator whose options differ from the running machine."""
    return HandoverError(
        "the machine that is handed over differs from what was asked for here: " + "; ".join(differences)
    )
