"""A machine does the same with a keeper as without: its guests, its ends, and the monitor's commands."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.handover.stage import Side, Stage, ended, wait_for
from tests.processes import Spawn
from tests.unit.elfwriter import Part, write_elf
from vmm.errors import GuestCrash
from vmm.qmp.backend import QmpError

pytestmark = pytest.mark.kvm

LOAD = 0x7C00
FLAT = ("--entry-mode=real16", f"--load-address={LOAD:#x}")
SAY = {letter: bytes((0xB0, ord(letter), 0xBA, 0xF8, 0x03, 0xEE)) for letter in "RNE"}  # mov al; mov dx; out
HALT = b"\xf4\xeb\xfd"  # again: hlt; jmp again
EXIT_5 = b"\xb0\x05\xba\xf4\x00\xee"  # mov al, 5; mov dx, 0xf4; out dx, al
# 'R'; inc byte [0x9000]; cmp byte [0x9000], 3; je +6; …; hlt; then exit 5
THRICE = SAY["R"] + b"\xfe\x06\x00\x90\x80\x3e\x00\x90\x03\x74"
RESETS = {
    "i8042": b"\xb0\xfe\xe6\x64\xf4",  # mov al, 0xfe; out 0x64, al
    "rst_cnt": b"\xb0\x06\xba\xf9\x0c\xee\xf4",  # mov al, 6; mov dx, 0xcf9; out dx, al
}
POWER_OFF = b"\xb8\x00\x20\xba\x04\x06\xef"  # mov ax, 0x2000; mov dx, 0x604; out dx, ax
# mov word [8], HANDLER; mov word [10], 0: the vector of an NMI, at which it says 'N' and ends
HANDLER = LOAD + 0x40
VECTOR = b"\xc7\x06\x08\x00" + HANDLER.to_bytes(2, "little") + b"\xc7\x06\x0a\x00\x00\x00"
ON_NMI = (VECTOR + SAY["R"] + HALT).ljust(HANDLER - LOAD, b"\x90") + SAY["N"] + EXIT_5


@pytest.fixture(params=["--no-keeper", "--keeper"])
def kept(request: pytest.FixtureRequest) -> str:
    option: str = request.param
    return option


def flat(stage: Stage, code: bytes) -> str:
    path = stage.folder / "guest.bin"
    path.write_bytes(code)
    return str(path)


def keepers(side: Side) -> list[int]:
    """The keeper processes that a VMM has started."""
    children = Path(f"/proc/{side.process.pid}/task/{side.process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"keeper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def ends(side: Side, status: int, kept: list[int]) -> None:
    """The VMM ends with `status`, and its keeper with it."""
    assert side.process.wait() == status, side.process.output()
    for pid in kept:
        wait_for("the keeper's end", lambda pid=pid: ended(pid), 1.0)  # type: ignore[misc]


def held_back(stage: Stage, kept: str, *options: str, guest: str) -> tuple[Side, list[int]]:
    """A guest that is about to run, and its keeper."""
    side = stage.start("-S", kept, *options, guest=guest)
    found = keepers(side)
    assert len(found) == (kept == "--keeper")
    return side, found


@pytest.mark.parametrize("image", ["hello16", "hello32", "hello64"])
def test_hello(stage: Stage, kept: str, image: str) -> None:
    side, keeper = held_back(stage, kept, guest=image)
    side.client.execute("cont")
    ends(side, 1, keeper)
    assert stage.out.read_bytes().startswith(b"hello")


def test_ticker(stage: Stage, kept: str) -> None:
    side, keeper = held_back(stage, kept, "--append=rate=100 count=30", guest="ticker")
    side.client.execute("cont")
    ends(side, 1, keeper)
    ticks = stage.ticks()
    assert (ticks.ticks, ticks.lost, ticks.errors) == (30, 0, 0)


def test_several_vcpus(stage: Stage, kept: str) -> None:
    side, keeper = held_back(
        stage, kept, "--cpus=2", "--append=rounds=1 pattern=64K", "--testdev", guest="sentinel"
    )
    side.client.execute("cont")
    ends(side, 1, keeper)
    assert b'"errors":0' in stage.out.read_bytes().replace(b" ", b"")


def test_the_debug_exit_status(stage: Stage, kept: str) -> None:
    side, keeper = held_back(stage, kept, *FLAT, guest=flat(stage, EXIT_5 + HALT))
    side.client.execute("cont")
    ends(side, 11, keeper)


def test_power_off(stage: Stage, kept: str) -> None:
    side, keeper = held_back(stage, kept, *FLAT, guest=flat(stage, POWER_OFF + HALT))
    side.client.execute("cont")
    event = side.client.wait_event("SHUTDOWN", 10)
    assert event.data == {"guest": True, "reason": "guest-shutdown"}
    ends(side, 0, keeper)


@pytest.mark.parametrize("how", RESETS)
def test_a_guest_resets_itself(stage: Stage, kept: str, how: str) -> None:
    """Each run begins anew: RAM outside of the image stays."""
    reset = RESETS[how]
    code = THRICE + bytes((len(reset),)) + reset + EXIT_5 + HALT
    side, keeper = held_back(stage, kept, *FLAT, guest=flat(stage, code))
    side.client.execute("cont")
    ends(side, 11, keeper)
    assert stage.out.read_bytes() == b"RRR"


def test_system_reset(stage: Stage, kept: str) -> None:
    side, _ = held_back(stage, kept, guest="ticker")
    side.client.execute("cont")
    stage.hear()
    side.client.execute("system_reset")
    assert side.client.wait_event("RESET", 10).data == {"guest": False, "reason": "host-qmp-system-reset"}
    first = b"tick 1\r\n"
    wait_for("the first tick again", lambda: stage.out.read_bytes().count(first) == 2)
    assert side.client.execute("x-vmm-stats")["resets"] == 1
    side.client.execute("stop")
    side.client.execute("system_reset")
    side.client.execute("cont")
    wait_for("the first tick a third time", lambda: stage.out.read_bytes().count(first) == 3)
    assert side.state == "running"


def test_stop_and_cont(stage: Stage, kept: str) -> None:
    side, _ = held_back(stage, kept, guest="ticker")
    for _ in range(3):
        said = stage.ticks().ticks
        time.sleep(0.15)
        assert stage.ticks().ticks == said
        side.client.execute("cont")
        stage.hear()
        side.client.execute("stop")
        assert side.state == "paused"


def test_inject_nmi(stage: Stage, kept: str) -> None:
    side, keeper = held_back(stage, kept, *FLAT, guest=flat(stage, ON_NMI))
    side.client.execute("cont")
    wait_for("the guest", lambda: stage.out.read_bytes() == b"R")
    side.client.execute("inject-nmi")
    ends(side, 11, keeper)
    assert stage.out.read_bytes() == b"RN"


def test_a_triple_fault_is_reported(stage: Stage, kept: str) -> None:
    path = stage.folder / "fault.elf"
    path.write_bytes(write_elf([Part(0x100000, b"\xfa\x90\x0f\x0b")], bits=32))  # cli; nop; ud2
    side, keeper = held_back(stage, kept, guest=str(path))
    side.client.execute("cont")
    ends(side, GuestCrash.exit_code, keeper)
    report = side.process.stderr
    assert "triple fault" in report
    assert re.search(r"rip=0x100002\b", report)
    assert "bytes at RIP: 0f 0b" in report


def test_quit_and_sigterm(stage: Stage, kept: str) -> None:
    side, keeper = held_back(stage, kept, guest="ticker")
    side.client.execute("cont")
    stage.hear()
    side.client.execute("quit")
    ends(side, 0, keeper)
    side, keeper = held_back(stage, kept, guest="ticker")
    side.client.execute("cont")
    side.process.signal(signal.SIGTERM)
    ends(side, 0, keeper)


def test_a_vmm_that_is_killed_before_its_guest_ran_leaves_nothing(stage: Stage, kept: str) -> None:
    side, keeper = held_back(stage, kept, guest="ticker")
    side.process.signal(signal.SIGKILL)
    side.process.wait()
    for pid in keeper:
        wait_for("the keeper's end", lambda pid=pid: ended(pid), 5.0)  # type: ignore[misc]


def test_a_start_that_fails_leaves_no_keeper(
    kvm_device: Path, spawn: Spawn, tmp_path: Path, kept: str
) -> None:
    path = tmp_path / "bad.elf"
    path.write_bytes(b"\x7fELF" + bytes(60))
    assert spawn.vmm("run", path, kept, "--serial=null").wait() == 4
    assert spawn.vmm("run", "hello64", kept, "--serial=file:/nonexistent/out").wait() == 4
    assert spawn.vmm("run", "hello64", kept, "--serial=null", "--memory=64G", "--hugepages=1G").wait() == 6


def test_commands_that_need_a_guest_that_can_go_on(stage: Stage, kept: str) -> None:
    side, _ = held_back(stage, kept, guest="ticker")
    side.client.execute("cont")
    stage.hear()
    clock = side.client.execute("x-vmm-guest-clock")
    later = side.client.execute("x-vmm-guest-clock")
    assert later["guest-tsc"] > clock["guest-tsc"]
    names = {(row["name"], row["id"]) for row in side.client.execute("x-vmm-fds")}
    assert {("vm", 0), ("vcpu", 0), ("ram", 0), ("state", 0), ("token", 0)} <= names
    assert (("kvm-slots", 0) in names) == (kept == "--keeper")
    with pytest.raises(QmpError, match="not RAM"):
        side.client.execute("x-vmm-read-memory", {"gpa": 1 << 40, "size": 8})
