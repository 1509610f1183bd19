"""An old VMM that offers what no machine can be: played by the test, against a real new VMM, which says why
it refuses, and ends.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.handover.rig import rig
from tests.handover.stage import wait_for
from tests.processes import Spawn, Spawned
from vmm.cpr.channel import CancelSwitch, Channel, connect
from vmm.cpr.protocol import FdEntry, Message, Offer, Ready, Refuse
from vmm.cpr.token import SIZE as TOKEN_SIZE
from vmm.errors import ConfigError, HandoverError, PeerError
from vmm.fds import sealed_memfd
from vmm.machine.config import decode, encode
from vmm.state.arena import SIZE as ARENA_SIZE
from vmm.units import MIB

ANSWER_S = 20.0
GOOD: dict[str, Any] = {"kernel": "ticker", "memory": 32 * MIB, "cpus": 1, "serial": "null"}
MEMFDS = {"token": TOKEN_SIZE, "state": ARENA_SIZE, "fresh": ARENA_SIZE, "ram": 32 * MIB}
ROWS: dict[str, int | str] = {**MEMFDS, "image": __file__}  # a memfd of that size, or that file


@dataclass
class Newcomer:
    """A real new VMM, and the channel on which a guest is offered to it."""

    process: Spawned
    channel: Channel

    def is_offered(self, machine: bytes, rows: dict[str, int | str]) -> str:
        """Offer it a machine with these fds; why it refuses. Then it ends, and its log says the same."""
        return self.refuses(
            machine,
            [
                (name, 0, sealed_memfd(name, what) if isinstance(what, int) else os.open(what, os.O_RDONLY))
                for name, what in rows.items()
            ],
        )

    def refuses(self, machine: bytes, rows: list[tuple[str, int, int]]) -> str:
        """As `is_offered`, with fds that are open; they are closed."""
        answer = self.answers(machine, rows)
        assert isinstance(answer, Refuse)
        assert self.process.wait() == HandoverError.exit_code
        assert f"no guest was taken over: {answer.reason}" in self.process.stderr
        assert "Traceback" not in self.process.stderr
        return answer.reason

    def answers(self, machine: bytes, rows: list[tuple[str, int, int]]) -> Message:
        """What it says to an offer."""
        table = [FdEntry(name, index) for name, index, _ in rows]
        fds = [fd for _, _, fd in rows]
        try:
            self.channel.send(Offer("0", "cpr-transfer", msgspec.Raw(machine), table), fds, ANSWER_S)
            answer, _ = self.channel.receive(ANSWER_S)
        finally:
            for fd in fds:
                os.close(fd)
        assert isinstance(answer, Message)
        return answer


@pytest.fixture
def newcomer(request: pytest.FixtureRequest, spawn: Spawn, tmp_socket_dir: Path) -> Iterator[Newcomer]:
    """Started with the options that `indirect` parameters give."""
    cpr, main = tmp_socket_dir / "cpr", tmp_socket_dir / "main"
    process = spawn.vmm(
        "run",
        f"--incoming=unix:{main}",
        f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={cpr}",
        *getattr(request, "param", ()),
    )
    switch = CancelSwitch()

    def look() -> Channel | None:
        try:
            return connect(str(cpr), switch)
        except PeerError:
            return None

    try:
        channel = wait_for("the new VMM's socket", look)
        yield Newcomer(process, channel)
        channel.close()
    finally:
        switch.close()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"memory": 0}, "memory"),
        ({"memory": -1}, "memory"),
        ({"memory": 1 << 60}, "memory"),
        ({"memory": 4097}, "memory"),
        ({"memory": "all of it"}, "memory: 'all of it' is not a size"),
        ({"cpus": 0}, "cpus: 0 is outside"),
        ({"cpus": 1 << 40}, "is outside"),
        ({"cpus": 1.5}, "expected `int`, got `float`"),
        ({"append": "x" * 100_000}, "append: longer than"),
        ({"irqchip": "pic"}, "invalid enum value 'pic'"),
        ({"serial": "/etc/passwd"}, "serial"),
        ({"hugepages": "3M"}, "hugepages: '3M' is not a page size"),
        ({"name": "../../etc"}, "name"),
        ({"debug": True}, "unknown field `debug`"),
    ],
    ids=lambda value: json.dumps(value)[:20] if isinstance(value, dict) else "",
)
def test_absurd_machines(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^the old VMM's machine: .*{re.escape(words)}"):
        decode(json.dumps({**GOOD, **changed}).encode(), "the old VMM's machine")


@pytest.mark.parametrize("changed", [{"memory": 1 << 60}, {"debug": True}], ids=str)
def test_an_absurd_machine_is_refused(newcomer: Newcomer, changed: dict[str, Any]) -> None:
    reason = newcomer.is_offered(json.dumps({**GOOD, **changed}).encode(), {**ROWS})
    assert reason.startswith("the old VMM's machine: ")


@pytest.mark.parametrize("machine", [b"null", b"[" * 500 + b"]" * 500], ids=["null", "deep"])
def test_what_is_no_machine(newcomer: Newcomer, machine: bytes) -> None:
    assert "machine" in newcomer.is_offered(machine, {**ROWS})


@pytest.mark.parametrize(
    ("memfds", "words"),
    [
        ({}, "fd token/0 is missing from the fd table"),
        ({"token": TOKEN_SIZE}, "fd state/0 is missing from the fd table"),
        ({"token": TOKEN_SIZE, "state": ARENA_SIZE}, "fd fresh/0 is missing from the fd table"),
        ({**ROWS, "ram": None}, "fd ram/0 is missing from the fd table"),
        ({**ROWS, "image": None}, "fd image/0 is missing from the fd table"),
        ({**ROWS, "token": 8}, "fd token/0 has 8 bytes where 4096 were expected"),
    ],
)
def test_what_did_not_come_is_not_made_anew(
    newcomer: Newcomer, memfds: dict[str, int | str | None], words: str
) -> None:
    came = {name: what for name, what in memfds.items() if what is not None}
    assert words in newcomer.is_offered(json.dumps(GOOD).encode(), came)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"state": 4096}, "fd state/0 has 4096 bytes"),
        ({"ram": 1}, "fd ram/0 has 1 bytes where"),
        ({}, "state memfd: no state directory in it"),
    ],
)
def test_memfds_of_another_kind(newcomer: Newcomer, changed: dict[str, int], words: str) -> None:
    assert words in newcomer.is_offered(json.dumps(GOOD).encode(), {**ROWS, **changed})


@pytest.mark.parametrize("newcomer", [("--memory=64M", "--cpus=2")], indirect=True)
def test_differences_are_listed(newcomer: Newcomer) -> None:
    reason = newcomer.is_offered(json.dumps(GOOD).encode(), {**ROWS})
    assert "cpus: 2 was given here, the running machine has 1" in reason
    assert f"memory: {64 * MIB} was given here, the running machine has {32 * MIB}" in reason


# --- paths that the other side names ---

UNCONFINED = [("--sandbox=off",)]


@pytest.mark.parametrize("newcomer", UNCONFINED, indirect=True)
@pytest.mark.parametrize("kind", ["file", "unix"])
def test_a_path_that_the_other_side_names_is_not_opened(
    newcomer: Newcomer, tmp_socket_dir: Path, kind: str
) -> None:
    """Nothing but the check holds it back."""
    victim = tmp_socket_dir / "victim"
    if kind == "file":
        victim.write_text("precious")
    machine = json.dumps({**GOOD, "serial": f"{kind}:{victim}"}).encode()
    missing = {"file": "serial-out", "unix": "serial-listen"}[kind]
    assert newcomer.is_offered(machine, {**ROWS}) == f"fd {missing}/0 is missing from the fd table"
    if kind == "file":
        assert victim.read_text() == "precious"
    else:
        assert not victim.exists()


@pytest.mark.parametrize("newcomer", UNCONFINED, indirect=True)
@pytest.mark.parametrize("serial", ["stdio", "pty"])
def test_the_newcomers_own_terminal_is_not_the_guests(newcomer: Newcomer, serial: str) -> None:
    machine = json.dumps({**GOOD, "serial": serial}).encode()
    assert newcomer.is_offered(machine, {**ROWS}) == "fd serial/0 is missing from the fd table"


# --- what nobody asked for ---


def listener() -> int:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen()
    return sock.detach()


def one_end(kind: socket.SocketKind) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.close()
    return ours.detach()


SURPLUS: dict[str, tuple[str, int, Callable[[], int]]] = {
    "memory": ("ram", 9, lambda: sealed_memfd("ram", 4096)),
    "a second image": ("image", 1, lambda: os.open(__file__, os.O_RDONLY)),
    "a console": ("serial", 0, lambda: one_end(socket.SOCK_STREAM)),
    "another console": ("serial", 5, lambda: os.open("/dev/null", os.O_RDWR)),
    "a listener": ("serial-listen", 0, listener),
    "an interrupt": ("irqfd", 3, lambda: os.eventfd(0)),
    "a token": ("token", 1, lambda: sealed_memfd("token", TOKEN_SIZE)),
}


@pytest.mark.kvm
@pytest.mark.parametrize("surplus", [None, *SURPLUS])
def test_what_nobody_asked_for_is_refused(newcomer: Newcomer, surplus: str | None) -> None:
    """The fds of a good machine, and one more; without it the same offer is good."""
    with rig(kernel="ticker", memory=32 * MIB) as one:
        rows = [
            (name, index, os.dup(fd)) for name, index, fd in one.machine.fds.items() if name != "kvm-stats"
        ]
        rows.append(("token", 0, sealed_memfd("token", TOKEN_SIZE)))
        machine = encode(one.config)
        if surplus is None:
            answer = newcomer.answers(machine, rows)
            assert isinstance(answer, Ready), answer
            return
        name, index, opener = SURPLUS[surplus]
        reason = newcomer.refuses(machine, [*rows, (name, index, opener())])
    assert reason == f"the fd table has what this machine has no use for: {name}/{index}; refused"


@pytest.mark.parametrize(
    ("name", "opener", "words"),
    [
        ("kvm", lambda: os.open("/dev/zero", os.O_RDONLY), "fd kvm/0: this VMM knows no fd of that name"),
        ("keeper", lambda: one_end(socket.SOCK_STREAM), "fd keeper/0 is a socket of family 1, type 1"),
        ("serial-listen", lambda: one_end(socket.SOCK_STREAM), "type 1, not listening, where"),
    ],
)
def test_fds_that_are_of_no_use_to_any(
    newcomer: Newcomer, name: str, opener: Callable[[], int], words: str
) -> None:
    assert words in newcomer.refuses(json.dumps(GOOD).encode(), [(name, 0, opener())])
