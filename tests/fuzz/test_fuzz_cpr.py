"""A handover over a hostile wire: the real coroutines on real sockets and a real run token, with somebody in
between who cuts, changes, repeats and delays what goes by. Whatever that does, the guest is in one place.

(tests/fuzz/targets/cpr.py throws bytes at one side; tests/model goes through every interleaving; here the
code in between is run too.)
"""

from __future__ import annotations

import array
import os
import select
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.cpr import incoming, outgoing
from vmm.cpr.live import Choice, IncomingMachine, LiveIncoming, LiveOutgoing, Timeouts, run
from vmm.cpr.report import Report
from vmm.cpr.token import RunToken
from vmm.fds import FdStore
from vmm.trace import Tracer

DEADLINES = Timeouts(setup_s=1.0, prepare_s=0.15, commit_s=0.15)
PATIENT = Timeouts(setup_s=10.0, prepare_s=10.0, commit_s=2.0)  # on a loaded machine, too
MAIN_DELAY_S = 0.2  # longer than the short ones
JOIN_S = 20.0
BOTH_WAYS = ("to new", "to old")


@dataclass(frozen=True)
class Tampering:
    """What is done to the bytes of one channel, one way, from byte `at` on."""

    channel: str
    way: str
    act: str
    at: int
    value: int = 0


TAMPERINGS = st.builds(
    Tampering,
    channel=st.sampled_from(("cpr", "main")),
    way=st.sampled_from(BOTH_WAYS),
    act=st.sampled_from(("cut", "flip", "insert", "repeat", "drop", "delay", "fds")),
    at=st.integers(0, 700) | st.integers(0, 40),
    value=st.integers(1, 255),
)


@dataclass
class Guest:
    """Who has the guest, and what happened that must not."""

    where: str | None = "old"
    progress: int = 0
    saved: int = -1
    wrong: list[str] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        with self.guard:
            self.where, self.saved = None, self.progress

    def go(self, where: str, token: RunToken, copy: int) -> None:
        with self.guard:
            if not token.held:
                self.wrong.append(f"{where} runs it without the token")
            if self.where is not None:
                self.wrong.append(f"{where} runs it, and so does {self.where}")
            if copy != self.progress:
                self.wrong.append(f"{where} runs a stale copy, {copy} of {self.progress}")
            self.where = where
            self.progress += 1


class OldMachine:
    """vmm.cpr.live.OutgoingMachine."""

    def __init__(self, guest: Guest, token: RunToken, fds: FdStore) -> None:
        self._guest, self._token, self._fds = guest, token, fds
        self.gone = False

    def describe(self) -> bytes:
        return b'{"a":"machine"}'

    def hold_fds(self) -> None:
        """Nothing opens any here."""

    def release_fds(self) -> None:
        """As above."""

    def fd_table(self) -> list[tuple[str, int, int]]:
        return list(self._fds.items())

    def quiesce(self, *, keep_running: bool) -> bool:
        self._guest.stop()
        return True

    def runs_alone(self) -> bool:
        return False

    def roll_back(self) -> None:
        self._guest.go("old", self._token, self._guest.saved)

    def gave_up(self) -> None:
        self.gone = True


class NewMachine:
    """vmm.cpr.live.IncomingMachine."""

    def __init__(self, guest: Guest, token: RunToken) -> None:
        self._guest, self._token, self._copy = guest, token, -2

    def load(self) -> None:
        self._copy = self._guest.saved

    def resume(self, *, running: bool) -> None:
        self._guest.go("new", self._token, self._copy)


class Wire:
    """Listens where the old VMM connects, connects where the new one listens, and tampers in between."""

    def __init__(self, path: str, target: str, tamperings: list[Tampering]) -> None:
        self._target = target
        self._tamperings = tamperings
        self._stop = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="wire")
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not select.select([self._listener], [], [], 0.01)[0]:
                continue
            old, _ = self._listener.accept()
            with old, socket.socket(socket.AF_UNIX) as new:
                try:
                    new.connect(self._target)
                except OSError:
                    continue
                self._pass_on({old: (new, "to new"), new: (old, "to old")})

    def _pass_on(self, ends: dict[socket.socket, tuple[socket.socket, str]]) -> None:
        passed = dict.fromkeys(BOTH_WAYS, 0)
        while not self._stop.is_set():
            for source in select.select(list(ends), [], [], 0.01)[0]:
                sink, way = ends[source]
                try:
                    data, fds, _, _ = socket.recv_fds(source, 1 << 16, 253)
                except ConnectionResetError:
                    return
                try:
                    if not data or not self._tampered(sink, way, passed, data, fds):
                        return
                except (BrokenPipeError, ConnectionResetError):
                    return
                finally:
                    for fd in fds:
                        os.close(fd)

    def _tampered(
        self, sink: socket.socket, way: str, passed: dict[str, int], data: bytes, fds: list[int]
    ) -> bool:
        """Send what is left of `data`; False: hang up."""
        start = passed[way]
        passed[way] += len(data)
        going_on = True
        for one in self._tamperings:
            at = one.at - start
            if one.way != way or not 0 <= at < len(data):
                continue
            if one.act == "cut":
                data, going_on = data[:at], False
            elif one.act == "flip":
                data = data[:at] + bytes([data[at] ^ one.value]) + data[at + 1 :]
            elif one.act == "insert":
                data = data[:at] + bytes([one.value]) * one.value + data[at:]
            elif one.act == "repeat":
                data += data
            elif one.act == "drop":
                data, fds = data[:at], []
            elif one.act == "delay":
                self._stop.wait(MAIN_DELAY_S)
            elif one.act == "fds":
                fds = [*fds, sink.fileno()]
        if data:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sent = sink.sendmsg([data], rights)
            if sent < len(data):  # a send of nothing meets a peer that has answered and hung up
                sink.sendall(data[sent:])
        return going_on


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"), key=int)


@contextmanager
def hand_over(
    tamperings: list[Tampering],
    deadlines: Timeouts,
) -> Iterator[tuple[outgoing.Phase | None, incoming.Phase | None, Guest]]:
    """A handover under `tamperings`: the phase that each side ends in (None: it raised), and the guest."""
    guest = Guest()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmm-", dir="/tmp")))
        fds = FdStore()
        stack.callback(fds.close)
        token = stack.enter_context(RunToken.open(fds))
        assert token.take(0)

        def build(_: bytes, received: FdStore, theirs: RunToken) -> tuple[IncomingMachine, Choice]:
            return NewMachine(guest, theirs), Choice("rebuild", "a test", False, "not received")

        new = LiveIncoming(
            cpr_path=str(folder / "cpr-new"),
            main_path=str(folder / "main-new"),
            build=build,
            timeouts=lambda: deadlines,
            tracer=Tracer("new"),
            on_phase=lambda phase, error: None,
        )
        for name in ("cpr", "main"):
            chosen = [one for one in tamperings if one.channel == name]
            wire = Wire(str(folder / f"{name}-old"), str(folder / f"{name}-new"), chosen)
            stack.callback(wire.close)
        old = LiveOutgoing(
            OldMachine(guest, token, fds),
            token,
            cpr_path=str(folder / "cpr-old"),
            main_path=str(folder / "main-old"),
            timeouts=deadlines,
            tracer=Tracer("old"),
            report=Report("cpr-transfer"),
            on_phase=lambda phase, error: None,
        )
        ends: dict[str, incoming.Phase] = {}
        thread = threading.Thread(target=lambda: ends.update(new=run(incoming.incoming(new))), name="new")
        thread.start()
        old.connect_cpr()
        here = run(outgoing.outgoing(old))
        old.close()
        thread.join(deadlines.setup_s * 2)
        if thread.is_alive():  # it was never connected to: only its operator can end that
            new.cancel.set("the test ends")
            thread.join(JOIN_S)
        yield here, ends.get("new"), guest
        new.close()
        if new.token is not None:
            new.token.close()
        new.fds.close()


def check(
    tamperings: list[Tampering], deadlines: Timeouts = DEADLINES
) -> tuple[outgoing.Phase | None, incoming.Phase | None]:
    """Hand over, and hold what was found against the rules."""
    before = open_fds()
    with hand_over(tamperings, deadlines) as (here, there, guest):
        assert guest.wrong == []
        assert guest.where is not None, "the guest is nowhere"
        assert there is (incoming.Phase.COMPLETED if guest.where == "new" else incoming.Phase.FAILED)
        if guest.where == "new":
            assert here is outgoing.Phase.COMPLETED
        else:
            assert here is outgoing.Phase.FAILED
    assert open_fds() == before
    return here, there


@settings(max_examples=25)
@given(st.lists(TAMPERINGS, max_size=3))
def test_whatever_the_wire_does_the_guest_is_in_one_place(tamperings: list[Tampering]) -> None:
    check(tamperings)


def test_a_wire_that_does_nothing() -> None:
    assert check([], PATIENT) == (outgoing.Phase.COMPLETED, incoming.Phase.COMPLETED)


def test_a_commit_that_is_lost() -> None:
    """The new VMM asks the token, and has the guest before the old one has lost its patience, or after."""
    state_and_more = Tampering("main", "to new", "cut", 60)
    check([state_and_more], replace(PATIENT, commit_s=DEADLINES.commit_s))


def test_a_confirmation_that_is_lost() -> None:
    """The old VMM finds the token taken."""
    here, there = check([Tampering("main", "to old", "cut", 36)], PATIENT)  # just behind Prepared
    assert (here, there) == (outgoing.Phase.COMPLETED, incoming.Phase.COMPLETED)
