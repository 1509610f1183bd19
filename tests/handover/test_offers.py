"""An old VMM that offers what no machine can be: played by the test, against a real new VMM, which says why
it refuses, and ends.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.handover.stage import wait_for
from tests.processes import Spawn, Spawned
from vmm.cpr.channel import CancelSwitch, Channel, connect
from vmm.cpr.protocol import FdEntry, Offer, Refuse
from vmm.cpr.token import SIZE as TOKEN_SIZE
from vmm.errors import ConfigError, HandoverError, PeerError
from vmm.fds import sealed_memfd
from vmm.machine.config import decode
from vmm.state.arena import SIZE as ARENA_SIZE
from vmm.units import MIB

ANSWER_S = 20.0
GOOD: dict[str, Any] = {"kernel": "ticker", "memory": 32 * MIB, "cpus": 1, "serial": "null"}
MEMFDS = {"token": TOKEN_SIZE, "state": ARENA_SIZE, "fresh": ARENA_SIZE, "ram": 32 * MIB}


@dataclass
class Newcomer:
    """A real new VMM, and the channel on which a guest is offered to it."""

    process: Spawned
    channel: Channel

    def is_offered(self, machine: bytes, memfds: dict[str, int]) -> str:
        """Offer it a machine with these memfds; why it refuses. Then it ends, and its log says the same."""
        fds = [sealed_memfd(name, size) for name, size in memfds.items()]
        table = [FdEntry(name, 0) for name in memfds]
        try:
            self.channel.send(Offer("0", "cpr-transfer", msgspec.Raw(machine), table), fds, ANSWER_S)
            answer, _ = self.channel.receive(ANSWER_S)
        finally:
            for fd in fds:
                os.close(fd)
        assert isinstance(answer, Refuse)
        assert self.process.wait() == HandoverError.exit_code
        assert f"no guest was taken over: {answer.reason}" in self.process.stderr
        assert "Traceback" not in self.process.stderr
        return answer.reason


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
    reason = newcomer.is_offered(json.dumps({**GOOD, **changed}).encode(), MEMFDS)
    assert reason.startswith("the old VMM's machine: ")


@pytest.mark.parametrize("machine", [b"null", b"[" * 500 + b"]" * 500], ids=["null", "deep"])
def test_what_is_no_machine(newcomer: Newcomer, machine: bytes) -> None:
    assert "machine" in newcomer.is_offered(machine, MEMFDS)


@pytest.mark.parametrize(
    ("memfds", "words"),
    [
        ({}, "fd token/0 is missing from the fd table"),
        ({"token": TOKEN_SIZE}, "fd state/0 is missing from the fd table"),
        ({"token": TOKEN_SIZE, "state": ARENA_SIZE}, "fd fresh/0 is missing from the fd table"),
        ({**MEMFDS, "ram": None}, "fd ram/0 is missing from the fd table"),
        ({**MEMFDS, "token": 8}, "fd token/0 has 8 bytes where 4096 were expected"),
    ],
)
def test_what_did_not_come_is_not_made_anew(
    newcomer: Newcomer, memfds: dict[str, int | None], words: str
) -> None:
    came = {name: size for name, size in memfds.items() if size is not None}
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
    assert words in newcomer.is_offered(json.dumps(GOOD).encode(), {**MEMFDS, **changed})


@pytest.mark.parametrize("newcomer", [("--memory=64M", "--cpus=2")], indirect=True)
def test_differences_are_listed(newcomer: Newcomer) -> None:
    reason = newcomer.is_offered(json.dumps(GOOD).encode(), MEMFDS)
    assert "cpus: 2 was given here, the running machine has 1" in reason
    assert f"memory: {64 * MIB} was given here, the running machine has {32 * MIB}" in reason
