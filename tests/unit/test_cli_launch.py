"""Starting a VMM process from a command: its environment, its last words, its end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from vmm.cli.launch import LaunchedVmm, command, environment
from vmm.errors import ConfigError, HostError, PeerError, VmmError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def executable(tmp_path: Path) -> Path:
    """Plays a Python: a script of the test's, that gets the arguments of `vmm run`."""
    path = tmp_path / "python"
    path.touch(mode=0o700)
    return path


def launch(executable: Path, script: str) -> LaunchedVmm:
    executable.write_text(f"#!/bin/sh\n{script}\n")
    log = executable.with_name("log")
    log.write_text("vmm: somebody else's last words\n")
    return LaunchedVmm(["ticker"], monitor=lambda _: Path("/no/such"), log=log, python=str(executable))


def failure(executable: Path, script: str) -> VmmError:
    vmm = launch(executable, script)
    return vmm.failure(vmm.wait(10))


def test_the_last_words_are_its_own(executable: Path) -> None:
    error = failure(executable, "echo 'vmm: no such kernel' >&2; exit 4")
    assert type(error) is ConfigError
    assert str(error) == "no such kernel"


def test_the_last_words_are_a_sentence_if_there_is_one(executable: Path) -> None:
    assert str(failure(executable, "echo 'vmm: it crashed'; echo 'rax=1 rbx=2'; exit 8")) == "it crashed"
    assert str(failure(executable, "echo 'a traceback'; echo 'KeyError: 1'; exit 1")) == "KeyError: 1"


def test_no_last_words(executable: Path) -> None:
    error = failure(executable, "exit 6")
    assert type(error) is HostError
    assert "ended with status 6" in str(error)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot start /no/python: No such file"):
        LaunchedVmm([], monitor=lambda _: Path("/no/such"), log=tmp_path / "log", python="/no/python")


def test_waiting_ends_with_what_ended_it(executable: Path) -> None:
    vmm = launch(executable, "echo 'vmm: no kvm' >&2; exit 6")
    with pytest.raises(HostError, match=r"^no kvm$"):
        vmm.connect(time.monotonic() + 10)


def test_waiting_ends_in_time(executable: Path) -> None:
    vmm = launch(executable, "exec sleep 60")
    try:
        with pytest.raises(PeerError, match="does not answer in time"):
            vmm.connect(time.monotonic() + 0.1)
        with pytest.raises(PeerError, match=r"has not ended within 0\.1 s"):
            vmm.wait(0.1)
    finally:
        assert vmm.end() == -15
    assert vmm.end() == -15


def test_the_arguments_and_the_session(executable: Path) -> None:
    vmm = launch(executable, 'echo "$@"; cut -d" " -f6 /proc/$$/stat; readlink /proc/$$/fd/0')
    assert vmm.wait(10) == 0
    assert executable.with_name("log").read_text().splitlines()[1:] == [
        "-P -m vmm run ticker",
        str(vmm.pid),  # it leads a session of its own
        "/dev/null",
    ]
    assert executable.with_name("log").stat().st_mode & 0o077 == 0o044  # it was there; see the next test


def test_a_new_log_is_private(executable: Path, tmp_path: Path) -> None:
    executable.write_text("#!/bin/sh\n")
    log = tmp_path / "new-log"
    LaunchedVmm([], monitor=lambda _: Path("/no/such"), log=log, python=str(executable)).wait(10)
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_source_folder_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert environment()["PYTHONPATH"] == str(ROOT)
    assert "PYTHONPATH" not in environment("/another/python")
    assert command()[0] == sys.executable
    assert command("/another/python")[0] == "/another/python"
