"""What a handover must carry along: a paused guest's being paused, the console's client, every setting of a
machine, and nothing that piles up.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.handover.stage import Side, Stage, open_fds, wait_for
from vmm.qmp.backend import QmpError

pytestmark = pytest.mark.kvm

LEAK_HANDOVERS = 7
WARM_UP = 3
RSS_TOLERANCE = 0.05


def test_a_paused_guest_stays_paused(stage: Stage) -> None:
    old = stage.start()
    stage.hear()
    old.client.execute("stop")
    new = stage.await_guest()
    assert stage.migrate(old, new)["status"] == "completed"
    wait_for("the guest in the new VMM", lambda: new.state == "paused")
    with pytest.raises(QmpError, match="handed over"):
        old.client.execute("cont")
    said = stage.ticks().ticks
    time.sleep(0.3)
    assert stage.ticks().ticks == said
    new.client.execute("cont")
    assert new.state == "running"
    stage.hear()


def test_a_paused_guest_stays_paused_when_its_handover_fails(stage: Stage) -> None:
    old = stage.start()
    stage.hear()
    old.client.execute("stop")
    assert stage.migrate(old, stage.await_guest("--cpus=3"))["status"] == "failed"
    assert old.state == "paused"
    said = stage.ticks().ticks
    time.sleep(0.2)
    assert stage.ticks().ticks == said
    old.client.execute("cont")
    stage.hear()


def test_a_running_guest_can_be_held_on_its_arrival(stage: Stage) -> None:
    """`stop` and `cont` to a VMM that waits say how the guest is to arrive, as with QEMU."""
    old, new = stage.start(), stage.await_guest()
    stage.hear()
    new.client.execute("stop")
    assert stage.migrate(old, new)["status"] == "completed"
    wait_for("the guest in the new VMM", lambda: new.state == "paused")
    new.client.execute("cont")
    stage.hear()
    third = stage.await_guest()
    third.client.execute("stop")
    third.client.execute("cont")
    assert stage.migrate(new, third)["status"] == "completed"
    wait_for("the guest in the third VMM", lambda: third.state == "running")
    stage.hear()


def test_a_guest_that_never_ran_can_be_handed_over(stage: Stage) -> None:
    old = stage.start("-S")
    new = stage.await_guest()
    assert stage.migrate(old, new)["status"] == "completed"
    wait_for("the guest in the new VMM", lambda: new.state == "paused")
    assert stage.ticks().ticks == 0
    new.client.execute("cont")
    assert stage.hear() >= 3


def read_ticks(console: socket.socket, pending: bytearray, count: int) -> list[int]:
    """The next `count` tick numbers on a console."""
    numbers: list[int] = []
    while len(numbers) < count:
        data = console.recv(4096)
        assert data, "the console was closed"
        pending += data
        while b"\n" in pending and len(numbers) < count:
            line, _, rest = bytes(pending).partition(b"\n")
            pending[:] = rest
            match = re.fullmatch(rb"tick (\d+)\r", line)
            assert match, line
            numbers.append(int(match[1]))
    return numbers


def test_a_console_client_stays_connected(stage: Stage, tmp_socket_dir: Path) -> None:
    path = tmp_socket_dir / "console"
    old = stage.start("-S", serial=f"unix:{path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.settimeout(20)
        console.connect(str(path))
        old.client.execute("cont")
        pending = bytearray()
        seen = read_ticks(console, pending, 3)
        new = stage.replace(stage.replace(old))
        seen += read_ticks(console, pending, 20)
        assert seen == list(range(1, 24))
        console.send(b"q")  # input goes its way too
        assert new.process.wait() == 1
        rest = b""
        while data := console.recv(4096):
            rest += data
    assert rest.endswith(b"done\r\n")
    assert not path.exists()


def test_a_console_client_may_come_later(stage: Stage, tmp_socket_dir: Path) -> None:
    """The listening socket moves as well."""
    path = tmp_socket_dir / "console"
    stage.replace(stage.start(serial=f"unix:{path}"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.settimeout(20)
        console.connect(str(path))
        heard = b""
        while b"tick " not in heard:
            data = console.recv(4096)
            assert data, heard
            heard += data


def test_a_guest_that_ends_later_ends_its_new_vmm(stage: Stage) -> None:
    path = stage.folder / "console"
    old = stage.start(serial=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(str(path))
        new = stage.replace(old)
        console.settimeout(20)
        console.send(b"q")
        said = b""
        while data := console.recv(4096):
            said += data
    assert new.process.wait() == 1
    assert said.endswith(b"done\r\n")


def test_nothing_piles_up(stage: Stage) -> None:
    """After seven rebuilds a VMM is what it was after three: fds, threads, memory; and no process is left."""

    def measure(side: Side) -> tuple[list[str], int, int]:
        time.sleep(0.2)  # for the thread that carried the handover to end
        pid = side.process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        rss = re.search(r"RssAnon:\s+(\d+) kB", status)
        threads = re.search(r"Threads:\s+(\d+)", status)
        assert rss
        assert threads
        return open_fds(pid), int(threads[1]), int(rss[1])

    side = stage.start("--no-keeper")
    for count in range(1, LEAK_HANDOVERS + 1):
        before = side
        side = stage.replace(side, "--no-keeper")
        before.client.close()
        if count == WARM_UP:
            early = measure(side)
    late = measure(side)
    assert late[0] == early[0]
    assert late[1] == early[1]
    assert late[2] <= early[2] * (1 + RSS_TOLERANCE)
    assert {path.name for path in stage.folder.iterdir()} == {"out", side.monitor.name}
    stage.hear()


def test_kvm_fds_do_not_pile_up(stage: Stage) -> None:
    """The received VM and vCPU fds are closed once probed: held open, they would keep the old VM alive."""
    old, new = stage.start("--cpus=2", "--no-keeper"), stage.await_guest("--no-keeper")
    assert stage.migrate(old, new)["status"] == "completed"
    stage.hear()
    kinds = [link.removeprefix("anon_inode:").partition(":")[0] for link in open_fds(new.process.pid)]
    assert kinds.count("kvm-vm") == 1
    each = 1 if sys.version_info >= (3, 13) else 2  # before, a mapping holds a copy of its fd
    assert kinds.count("kvm-vcpu") == 2 * each
    assert not [name for name in os.listdir(stage.folder) if name.startswith(("m", "c"))]
