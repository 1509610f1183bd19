"""The command line with named VMs, every verb a process of its own, as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import signal
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.handover.stage import VM_FD, connect, ended, wait_for
from tests.processes import Spawn, Spawned
from vmm.cli import launch
from vmm.cli.console import LEAVE
from vmm.cli.handover import hand_over
from vmm.cli.series import Series
from vmm.errors import VmmError

pytestmark = pytest.mark.kvm


class User:
    """Somebody with a runtime directory of his own, who runs `vmm`."""

    def __init__(self, spawn: Spawn, runtime: Path) -> None:
        self.vms = runtime / "vmm"
        self._spawn = spawn
        self._env = {"XDG_RUNTIME_DIR": str(runtime)}

    def start(self, *arguments: str | Path) -> Spawned:
        return self._spawn.vmm(*arguments, env=self._env)

    def says(self, *arguments: str | Path) -> str:
        """What a verb prints that succeeds."""
        process = self.start(*arguments)
        assert process.wait(60) == 0, process.output()
        return process.stdout

    def fails(self, status: int, *arguments: str | Path) -> str:
        """The sentence of a verb that does not; it is the last one on stderr, and stdout is empty."""
        process = self.start(*arguments)
        assert process.wait(60) == status, process.output()
        assert process.stdout == ""
        sentence = process.stderr.splitlines()[-1]
        assert sentence.startswith("vmm: ")
        return sentence

    def guest(self, name: str, *options: str) -> Spawned:
        """A ticker that runs, by its name."""
        process = self.start(
            "run", "ticker", f"--name={name}", "--append=rate=20", "--memory=64M", "-v", *options
        )
        connect(process, self.vms / name / "qmp.sock").close()
        return process

    def listed(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.says("list", "--json"))
        return rows


@pytest.fixture
def user(kvm_device: Path, spawn: Spawn, tmp_socket_dir: Path) -> Iterator[User]:
    user = User(spawn, tmp_socket_dir)
    yield user
    # VMMs that `vmm handover` started are nobody's children
    for monitor in user.vms.glob("*/qmp-*.sock"):
        pid = int(monitor.stem.removeprefix("qmp-"))
        if not ended(pid):
            os.kill(pid, signal.SIGTERM)
            wait_for(f"the end of VMM {pid}", lambda pid=pid: ended(pid))  # type: ignore[misc]


def test_a_named_vm_from_run_to_quit(user: User) -> None:
    first = user.guest("one", "--serial=null", "--cpus=2")
    (row,) = user.listed()
    assert row == {"name": "one", "pid": first.pid, "state": "running", "cpus": 2, "memory": 64 << 20}

    report = json.loads(user.says("handover", "one", "--json"))
    assert report["pids"]["old"] == first.pid
    assert report["outcome"] == "completed"
    assert first.wait() == 0
    assert user.listed()[0]["pid"] == report["pids"]["new"]

    said = user.says("handover", "one")
    assert f"from pid {report['pids']['new']} to pid" in said
    assert {line.split()[0] for line in said.splitlines()} >= {"phase", "stop", "save", "load", "resume"}

    assert json.loads(user.says("ctl", "one", "query-status")) == {"status": "running", "running": True}
    assert json.loads(user.says("ctl", "one", "stop")) == {}
    assert user.says("list").splitlines()[1].split() == [
        "one",
        str(user.listed()[0]["pid"]),
        "2",
        "64M",
        "paused",
    ]
    pid = user.listed()[0]["pid"]
    assert json.loads(user.says("ctl", "one", "quit")) == {}
    wait_for("its end", lambda: ended(pid))
    assert user.listed() == []
    assert [path.name for path in (user.vms / "one").iterdir()] == ["vmm.log"]


def test_files_are_private(user: User) -> None:
    user.guest("one", "--serial=unix")
    folder = user.vms / "one"
    assert {path.stat().st_mode & 0o777 for path in (user.vms, folder)} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.sock")} == {0o600}


def test_ctl(user: User) -> None:
    user.guest("one", "--serial=null")
    user.says("ctl", "one", "migrate-set-parameters", "mode=cpr-transfer", "x-vmm-prepare-timeout=700")
    parameters = json.loads(user.says("ctl", "one", "query-migrate-parameters"))
    assert parameters["mode"] == "cpr-transfer"
    assert parameters["x-vmm-prepare-timeout"] == 700
    user.says("ctl", "one", "migrate-set-parameters", '{"mode": "normal"}')
    monitor = user.vms / "one" / "qmp.sock"
    assert json.loads(user.says("ctl", "--qmp", monitor, "query-migrate-parameters"))["mode"] == "normal"
    assert "The command no-such-thing has not been found" in user.fails(12, "ctl", "one", "no-such-thing")
    assert "does not accept value 'sideways'" in user.fails(
        12, "ctl", "one", "migrate-set-parameters", "mode=sideways"
    )
    assert "no VM named 'two' runs (running: one)" in user.fails(2, "ctl", "two", "query-status")
    assert "no command" in user.fails(2, "ctl", "one")
    assert "is the VMM running?" in user.fails(10, "ctl", "--qmp", "/nonexistent", "query-status")


def test_a_name_is_taken_once(user: User) -> None:
    user.guest("one", "--serial=null")
    sentence = user.fails(2, "run", "ticker", "--name=one", "--serial=null")
    assert "a VM named 'one' runs already" in sentence
    assert len(user.listed()) == 1


def test_what_a_killed_vmm_leaves_is_removed(user: User) -> None:
    user.guest("one", "--serial=unix", "--no-keeper").signal(signal.SIGKILL)
    wait_for("its end", lambda: user.listed() == [])
    assert list(user.vms.iterdir()) == []
    user.guest("one", "--serial=unix")
    assert len(user.listed()) == 1


def test_a_handover_that_fails_leaves_the_guest_alone(user: User) -> None:
    first = user.guest("one", "--serial=null", "--no-keeper")
    assert user.fails(10, "handover", "one", "--python=/bin/false").endswith("vmm.log")
    assert "cannot start /no/python" in user.fails(10, "handover", "one", "--python=/no/python")
    assert "no keeper" in user.fails(10, "handover", "one", "--mode=adopt")
    assert user.listed()[0]["pid"] == first.pid
    assert user.listed()[0]["state"] == "running"
    assert not list((user.vms / "one").glob("handover-*"))
    user.says("handover", "one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_handover_that_is_told_to_end_leaves_nothing(
    user: User, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No VMM that waits for ever, no keeper of its, no folder; no process is left on fewer CPUs."""
    first = user.guest("one", "--serial=null", "--keeper")
    monkeypatch.setenv("VMM_FAULT", "incoming:build:delay:1000")
    handover = user.start("handover", "one", "--mode=rebuild", "--keeper")
    handover.expect("started the new VMM", stream="stderr")
    handover.signal(number)
    assert handover.wait() == 130
    assert user.listed()[0]["pid"] == first.pid
    assert os.sched_getaffinity(first.pid) == os.sched_getaffinity(0)
    left = {path.name for path in (user.vms / "one").iterdir()}
    assert left == {"qmp.sock", "keeper.sock", "vmm.log"} | {
        f"{what}-{first.pid}.sock" for what in ("qmp", "keeper")
    }


def test_a_named_guest_keeps_its_name_by_whatever_path_it_is_handed_over(
    user: User, tmp_socket_dir: Path
) -> None:
    other = tmp_socket_dir / "other"
    user.guest("one", "--serial=null", f"--qmp=unix:{other}")
    for path in (other, user.vms / "one" / "qmp.sock"):
        report = json.loads(user.says("handover", "--qmp", path, "--json"))
        (row,) = user.listed()
        assert (row["name"], row["pid"], row["state"]) == ("one", report["pids"]["new"], "running")
        assert json.loads(user.says("ctl", "--qmp", path, "query-name")) == {"name": "one"}
    assert not list((user.vms / "one").glob("qmp.sock.*"))


def test_a_vmm_without_a_name_keeps_its_monitors_path(user: User, tmp_socket_dir: Path) -> None:
    monitor = tmp_socket_dir / "monitor"
    first = user.start("run", "ticker", "--serial=null", f"--qmp=unix:{monitor}")
    connect(first, monitor).close()
    report = json.loads(user.says("handover", "--qmp", monitor, "--json"))
    assert report["pids"]["old"] == first.pid
    assert first.wait() == 0
    with connect(first, monitor) as client:
        assert client.execute("query-status")["running"] is True
    again = json.loads(user.says("handover", "--qmp", f"unix:{monitor}", "--json"))
    assert again["pids"]["old"] == report["pids"]["new"]
    user.says("ctl", "--qmp", monitor, "quit")
    wait_for("its end", lambda: ended(again["pids"]["new"]))
    assert {path.name for path in tmp_socket_dir.iterdir()} <= {"vmm", "monitor.log", "monitor"}


def test_a_console_over_a_handover(user: User) -> None:
    user.guest("one", "--serial=unix")
    console = user.start("console", "one")
    console.expect("tick ")
    user.says("handover", "one")
    seen = console.stdout.count("tick ")
    wait_for("ticks from the new VMM", lambda: console.stdout.count("tick ") > seen + 3)
    assert "in use by another client" in user.says("console", "one")
    console.write(b"q")  # ends the guest, and so its console
    assert console.wait() == 0
    assert console.stdout.endswith("done\n") or console.stdout.endswith("done\r\n")
    assert "the console was closed" in console.stderr


def test_a_console_is_left_with_a_key(user: User) -> None:
    user.guest("one", "--serial=unix")
    console = user.start("console", "one")
    console.expect("tick ")
    console.write(LEAVE)
    assert console.wait() == 0
    again = user.start("console", "one")
    again.expect("tick ")
    again.write(b"ab" + LEAVE)
    assert again.wait() == 0
    assert user.listed()[0]["state"] == "running"


def test_a_terminal_is_raw_while_it_is_the_console(user: User) -> None:
    user.guest("one", "--serial=unix")
    ours, theirs = pty.openpty()
    try:
        before = termios.tcgetattr(theirs)
        pid = os.fork()
        if pid == 0:
            os.dup2(theirs, 0)
            os.execvpe(
                "python3",
                ["python3", "-c", "import sys; from vmm.cli import main; sys.exit(main())", "console", "one"],
                {**os.environ, **user._env},
            )
        wait_for("raw mode", lambda: not termios.tcgetattr(theirs)[3] & termios.ECHO)
        os.write(ours, LEAVE)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_serial_line_that_is_no_socket_has_no_console(user: User) -> None:
    user.guest("one", "--serial=null")
    assert "--serial unix" in user.fails(2, "console", "one")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rebuild", "adopt"])
@pytest.mark.parametrize("guest", ["ticker", "sentinel"])
def test_demo_as_json(user: User, guest: str, mode: str) -> None:
    said = user.says("demo", "--json", "--guest", guest, "--handovers=2", "--mode", mode, "--memory=64M")
    record = json.loads(said)
    assert said.count("\n") == 1
    assert record["mode"] == mode
    assert record["handovers"] == 2
    assert len(set(record["pids"])) == 3
    assert (record["memory_bytes"], record["cpus"]) == (64 << 20, 1)
    assert record["guest"]["image"] == guest
    assert record["guest"]["ticks"] > 0
    assert (record["guest"]["lost"], record["guest"]["errors"]) == (0, 0)
    for who in ("host", "guest", "control"):
        pause = record["pause_us"][who]
        assert 0 < pause["p50"] <= pause["p99"] <= pause["max"]
    if mode == "rebuild":  # the guest stands still for as long; adopted, it runs on
        assert record["pause_us"]["guest"]["max"] >= record["pause_us"]["host"]["p50"] / 2
    assert {"stop", "save", "send", "load", "commit", "resume"} <= record["phases_us"].keys()
    if mode == "adopt":
        assert record["vm_fd"] in (VM_FD["keeper"], VM_FD["vmm"])
    else:
        assert record["vm_fd"] in (VM_FD["nobody"], {**VM_FD["nobody"], "probe": "ok"})
    assert len(record["vms"]) == (1 if mode == "adopt" else 3)
    assert list(user.vms.iterdir()) == []


@pytest.mark.slow
def test_demo_for_people(user: User) -> None:
    said = user.says("demo", "--handovers=1", "--mode=both")
    lines = said.splitlines()
    assert "  tick 1" in lines
    assert any(line.split()[:2] == ["pause", "rebuild"] for line in lines)
    assert sum("lost: 0, errors: 0" in line for line in lines) == 2


def test_an_interrupted_demo_leaves_nothing(user: User) -> None:
    demo = user.start("demo", "--handovers=100", "--mode=rebuild")
    demo.expect("it saw a pause")
    demo.signal(signal.SIGINT)
    assert demo.wait() == 130
    assert list(user.vms.iterdir()) == []


def test_a_demo_waits_as_long_as_it_is_told(user: User) -> None:
    said = user.fails(10, "demo", "--json", "--timeout=0.01")
    assert "does not answer in time" in said
    assert [path.name for path in user.vms.glob("*/*")] == ["vmm.log"]  # which the sentence refers to


def test_a_series_says_what_ended_its_vmm(
    kvm_device: Path, tmp_socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fatal signal leaves where it met the VMM in the log, which is kept."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_socket_dir))
    series = Series("ticker", mode="rebuild", memory=64 << 20, cpus=1)

    def meets_a_signal() -> None:
        with series:
            os.kill(series.vmm.pid, signal.SIGSEGV)
            series.results()

    with pytest.raises(VmmError, match=r"ended by SIGSEGV; see .*/vmm\.log$"):
        meets_a_signal()
    log = series.directory.log.read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert "vmm/process/loop.py" in log


@pytest.mark.parametrize("whose", ["its own", "another"])
def test_a_series_ends_a_vmm_that_does_not_answer(
    kvm_device: Path, tmp_socket_dir: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """Nothing stays behind, and the error is the one that there was."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_socket_dir))
    monkeypatch.setattr(launch, "ENDING_S", 0.5)
    series = Series("ticker", mode="adopt", memory=64 << 20, cpus=1)

    def is_cut_off() -> None:
        with series:
            vmm = series.vmm
            if whose == "another":
                directory = series.directory
                handed = hand_over(series.client, directory.qmp, name=directory.name, log=directory.log)
                handed.client.close()
                vmm = handed.vmm
            stopped.append(vmm)
            os.kill(vmm.pid, signal.SIGSTOP)
            raise ZeroDivisionError

    stopped: list[launch.LaunchedVmm] = []
    try:
        with pytest.raises(ZeroDivisionError):
            is_cut_off()
        assert list((tmp_socket_dir / "vmm").rglob("*")) == []
        assert stopped[0].process.wait(10) == -signal.SIGKILL
    finally:
        for vmm in stopped:
            vmm.process.kill()
            vmm.process.wait()


def test_bad_numbers_for_a_demo(user: User) -> None:
    assert "--handovers 0" in user.fails(2, "demo", "--handovers=0")
    assert "'lots' is not a size" in user.fails(4, "demo", "--memory=lots")
    assert "cpus" in user.fails(4, "demo", "--cpus=0")


def test_version(user: User) -> None:
    versions = json.loads(user.says("version", "--json"))
    assert versions["kvm-api"] == 12
    assert versions["kvm-error"] is None
    assert versions["state-layout"] >= 1
    assert versions["oldest-protocol"] <= versions["protocol"]
    assert f"KVM API        {versions['kvm-api']}" in user.says("version").splitlines()


def test_a_vmm_ends_soon_after_its_signal(user: User) -> None:
    process = user.guest("one", "--serial=null")
    started = time.monotonic()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert time.monotonic() - started < 5
    assert not (user.vms / "one").exists()
