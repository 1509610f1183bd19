"""VMMs in their sandbox: confined in every thread, and able to do all that a VMM does."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.handover.stage import Side, Stage, ended, wait_for
from tests.processes import Spawn
from vmm.sandbox import landlock
from vmm.sandbox.kernel import Absent

pytestmark = pytest.mark.kvm

ON = "--sandbox=on"
IMAGES = Path(__file__).parents[2] / "firmware" / "images"


def status(pid: int) -> list[dict[str, str]]:
    """/proc/PID/status of every thread."""
    return [
        dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        for task in sorted(Path(f"/proc/{pid}/task").iterdir())
    ]


def confined(pid: int) -> bool:
    """Whether every thread has a filter, no capability, and can gain none."""
    return all(
        (task["Seccomp"], task["NoNewPrivs"], int(task["CapPrm"], 16)) == ("2", "1", 0)
        for task in status(pid)
    )


def keeper_of(pid: int) -> int | None:
    """The keeper that the VMM `pid` started, if it runs."""
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid and any(word.endswith(b"keeper.py") for word in words):
                return int(path.name)
    return None


def hand_over(stage: Stage, old: Side, *options: str) -> Side:
    """To a new VMM in its sandbox, the old one ended."""
    new = stage.await_guest(ON, *options)
    assert stage.migrate(old, new)["status"] == "completed", new.process.output()
    wait_for("the guest in the new VMM", lambda: new.state == "running")
    old.client.execute("quit")
    assert old.process.wait() == 0
    return new


def test_a_guest_lives_through_everything_in_sandboxes(stage: Stage, tmp_path: Path) -> None:
    """Start, stop, reset, two handovers, a reset from an image whose file is gone, quit."""
    image = tmp_path / "guest.elf"
    shutil.copy(IMAGES / "ticker.elf", image)
    first = stage.start(ON, guest=str(image))
    stage.hear()
    assert confined(first.process.pid)
    first.client.execute("stop")
    first.client.execute("cont")
    second = hand_over(stage, first)
    assert confined(second.process.pid)
    stage.hear()
    image.unlink()
    third = hand_over(stage, second)
    stage.hear()
    assert b"tick 1\r\n" in stage.out.read_bytes()
    third.client.execute("system_reset")
    wait_for("the guest's first tick again", lambda: stage.out.read_bytes().count(b"tick 1\r\n") == 2)
    third.client.execute("quit")
    assert third.process.wait() == 0


def test_adopted_guests_and_their_keeper(stage: Stage) -> None:
    first = stage.start(ON, "--keeper")
    stage.hear()
    keeper = keeper_of(first.process.pid)
    assert keeper is not None
    assert confined(first.process.pid)
    assert confined(keeper)
    second = hand_over(stage, first)
    assert confined(second.process.pid)
    assert len(status(keeper)) > 1  # the vCPU's thread
    stage.hear()
    second.client.execute("quit")
    assert second.process.wait() == 0
    wait_for("the keeper's end", lambda: ended(keeper))


def test_a_new_vmm_may_bring_a_keeper(stage: Stage) -> None:
    """Its keeper is started before it confines itself, since afterwards it can start nothing."""
    old = stage.start(ON, "--no-keeper")
    stage.hear()
    new = hand_over(stage, old, "--keeper")
    stage.hear()
    keeper = keeper_of(new.process.pid)
    assert keeper is not None
    assert confined(keeper)
    last = hand_over(stage, new, "--keeper")  # adopts: the keeper it brought is not needed
    stage.hear()
    pid = last.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for("the end of a keeper that nobody needs", lambda: not children.read_text())  # and no zombie
    last.client.execute("quit")
    assert last.process.wait() == 0


def test_a_console_is_served_and_its_socket_removed(stage: Stage) -> None:
    path = stage.folder / "console"
    old = stage.start(ON, "--append=rate=20 count=60", serial=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(20)
        console.connect(str(path))
        assert console.recv(4096)
        new = hand_over(stage, old)
        heard = b""
        while data := console.recv(4096):
            heard += data
    assert heard.endswith(b"done\r\n")
    assert new.process.wait() == 1  # debug-exit 0
    assert not path.exists()


def test_a_console_elsewhere_is_left_with_a_word(stage: Stage, tmp_path: Path) -> None:
    """The new VMM was not told of that folder, and a path that a peer names opens nothing."""
    stage.folder = Path(os.path.relpath(stage.folder))  # names that are not absolute are as good
    old = stage.start(ON, serial=f"unix:{tmp_path}/console")
    new = hand_over(stage, old)
    new.client.execute("quit")
    assert new.process.wait() == 0
    try:
        landlock.abi()
    except Absent:
        assert not (tmp_path / "console").exists()
    else:
        assert "lies where the sandbox lets nothing be removed" in new.process.stderr


@pytest.mark.parametrize("mode", ["log", "off"])
def test_other_modes(stage: Stage, mode: str) -> None:
    side = stage.start(f"--sandbox={mode}")
    stage.hear(1)
    assert confined(side.process.pid) is (mode == "log")
    side.client.execute("quit")
    assert side.process.wait() == 0


def test_the_environment_sets_the_default(spawn: Spawn) -> None:
    wrong = spawn.vmm("run", "hello64", "--serial=null", env={"VMM_SANDBOX": "maybe"})
    assert wrong.wait() == 2
    assert "it takes on, log or off" in wrong.stderr
    off = spawn.vmm("run", "-v", "hello64", "--serial=null", env={"VMM_SANDBOX": "off"})
    assert off.wait() == 1
    assert "sandbox" not in off.stderr
    default = spawn.vmm("run", "-v", "hello64", "--serial=null")
    assert default.wait() == 1
    assert "INFO sandbox: no new privileges, no capabilities" in default.stderr
