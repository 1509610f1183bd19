"""An error that a verb ends with becomes a sentence or a traceback, and a status that is no guest's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable

import pytest

import vmm.cli.demo
import vmm.cli.list
import vmm.cli.series
from tests.processes import RUN_VMM
from vmm.cli import main
from vmm.cli.series import Ending, Record
from vmm.errors import HandoverError
from vmm.kvm import IoctlError, abi

FULL = os.strerror(errno.ENOSPC)

Raise = Callable[[BaseException], None]


@pytest.fixture
def raises(monkeypatch: pytest.MonkeyPatch) -> Raise:
    """`raises(error)`: what `vmm list` ends with."""

    def ends_with(error: BaseException) -> None:
        def run(_: Namespace) -> int:
            raise error

        monkeypatch.setattr(vmm.cli.list, "run", run)

    return ends_with


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (HandoverError("the guest is where it was"), 10, "the guest is where it was"),
        (OSError(errno.ENOSPC, FULL), 6, FULL),
        (OSError(errno.ENOSPC, FULL, "/a/file"), 6, f"/a/file: {FULL}"),
        (OSError(errno.ENOSPC, FULL, b"/a/file"), 6, f"/a/file: {FULL}"),
        (IoctlError(errno.EMFILE, abi.KVM_CREATE_VCPU), 6, "KVM_CREATE_VCPU: Too many open files"),
        (OSError("no number"), 6, "no number"),
        (TimeoutError(), 6, "TimeoutError"),
    ],
)
def test_sentences(
    raises: Raise, capsys: pytest.CaptureFixture[str], error: Exception, status: int, sentence: str
) -> None:
    raises(error)
    assert main(["list"]) == status
    assert capsys.readouterr() == ("", f"vmm: {sentence}\n")


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [("/dev/full", 6, b"vmm: No space left on device\n"), ("a pipe that nobody reads", 70, b"")],
)
def test_output_that_nobody_takes(where: str, status: int, said: bytes) -> None:
    if where.startswith("/"):
        fd = os.open(where, os.O_WRONLY)
    else:
        reader, fd = os.pipe()
        os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", RUN_VMM, "version"], stdout=fd, stderr=subprocess.PIPE, check=False, timeout=20
    )
    os.close(fd)
    assert (ended.returncode, ended.stderr) == (status, said)


@pytest.mark.parametrize("error", [KeyError("colour"), AssertionError(), RecursionError(), ImportError()])
def test_an_error_of_the_vmm_s_own_is_shown_whole(
    raises: Raise, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    raises(error)
    assert main(["list"]) == 70
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Traceback ")
    assert said.err.splitlines()[-1].startswith(type(error).__name__)


def test_an_interrupt(raises: Raise, capsys: pytest.CaptureFixture[str]) -> None:
    raises(KeyboardInterrupt())
    assert main(["list"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ending", "status", "sentence"),
    [
        (Ending(rounds=1, ticks=9, lost=0, errors=0), 0, ""),
        (Ending(rounds=1, ticks=9, lost=1, errors=0), 14, "vmm: something of the guest was lost or wrong"),
        (Ending(rounds=1, ticks=9, lost=0, errors=1), 14, "vmm: something of the guest was lost or wrong"),
        (Ending(1, 9, lost=0, errors=0, unavailable=("pit",)), 14, "vmm: something of the guest was lost"),
        (
            Ending(1, 9, lost=0, errors=1, violation='{"check":"pit"}'),
            14,
            "vmm: something of the guest was lost",
        ),
    ],
)
def test_a_demo_s_guest(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ending: Ending,
    status: int,
    sentence: str,
) -> None:
    record = Record("rebuild", "ticker", 64 << 20, 1, (), (), ending)
    monkeypatch.setattr(vmm.cli.demo, "_show", lambda *_: record)
    monkeypatch.setattr(vmm.cli.demo, "interruptible", lambda: None)
    assert main(["demo", "--mode=rebuild"]) == status
    said = capsys.readouterr()
    assert f"ticks: 9, lost: {ending.lost}, errors: {ending.errors}" in said.out
    assert (f"it found: {ending.violation}" in said.out) is (ending.violation is not None)
    assert said.err.startswith(sentence)


@pytest.mark.parametrize(("timeout_s", "expected"), [(60.0, []), (20.0, []), (600.0, ["stall_ms=100000"])])
def test_sentinel_is_as_patient_as_its_series(
    timeout_s: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a VMM takes long to start, so does what waits for one."""
    monkeypatch.setattr(vmm.cli.series, "executes_avx", lambda: False)
    series = vmm.cli.series.Series("sentinel", mode="adopt", memory=64 << 20, cpus=1, timeout_s=timeout_s)
    assert series._append.split() == ["gap_us=500", *expected]
