"""The fixtures' own promises: children die with their parent, what a test leaves behind is found."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.host import no_kvm
from tests.patience import at_most
from tests.processes import Spawn, children, end_adopted
from vmm.kvm import Cap, DirectPort, abi

ROOT = Path(__file__).parents[2]
pytest_plugins = ["pytester"]

LEAKY = """
from __future__ import annotations
import os, subprocess, sys, threading
import pytest

def test_fd():
    os.open("/dev/null", os.O_RDONLY)

def test_thread():
    threading.Thread(target=threading.Event().wait, args=(30,), name="forgotten", daemon=True).start()

def test_orphan():
    subprocess.run(["sh", "-c", "sleep 98765 & exit 0"], check=True)

def test_nothing():
    with open("/dev/null") as file:
        thread = threading.Thread(target=file.read)
        thread.start()

def test_output(spawn):
    process = spawn("sh", "-c", "echo said on stdout; echo said on stderr >&2; exec sleep 98765")
    process.expect("said on stdout")
    process.expect("said on stderr", stream="stderr")
    assert False
"""


def test_what_a_test_leaves_behind_is_named(pytester: pytest.Pytester) -> None:
    (pytester.path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile(test_leaky=LEAKY)
    leaky = pytester.runpytest_subprocess("-p", "no:cacheprovider", f"--override-ini=pythonpath={ROOT}")
    leaky.assert_outcomes(passed=4, failed=1, errors=3)
    leaky.stdout.fnmatch_lines(
        [
            "left behind by this test: fd * (/dev/null)",
            "left behind by this test: thread forgotten",
            "left behind by this test: process * (sleep 98765)",
            "*process * (sh -c *",  # and a failure shows what its processes said
            "said on stdout",
            "--- stderr",
            "said on stderr",
        ]
    )


def test_a_child_dies_with_its_parent(spawn: Spawn, tmp_path: Path) -> None:
    parent = spawn(
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from tests.processes import Spawn\n"
        "child = Spawn(Path(sys.argv[2]))('sh', '-c', 'echo ready; exec sleep 98765')\n"
        "child.expect('ready'); print(child.pid, flush=True); sys.stdin.read()",
        ROOT,
        tmp_path / "child",
    )
    pid = int(parent.expect("\n"))
    assert children() == {parent.pid}
    parent.signal(signal.SIGKILL)
    assert parent.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while pid not in children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert end_adopted([pid]) == []  # it had ended by itself


def test_expect_reports_an_early_end(spawn: Spawn) -> None:
    process = spawn("sh", "-c", "echo only this; exit 3")
    with pytest.raises(AssertionError, match="ended with 3 without 'that' on stdout") as error:
        process.expect("that")
    assert "only this" in str(error.value)


def test_wait_reports_one_that_does_not_end(spawn: Spawn) -> None:
    process = spawn("sleep", "98765")
    with pytest.raises(AssertionError, match=rf"has not ended in {at_most(0.05):g} s"):
        process.wait(0.05)


def test_socket_directory_is_private_and_short(tmp_socket_dir: Path) -> None:
    assert tmp_socket_dir.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(tmp_socket_dir / ("x" * 80))) <= 107


class FakeKvm(DirectPort):
    """Answers as a KVM of that API version without some capabilities."""

    def __init__(self, version: int = 12, lacking: tuple[Cap, ...] = ()) -> None:
        self._version, self._lacking = version, lacking

    def ioctl(self, fd: int, request: abi.Ioctl, arg: Any = 0) -> int:
        answers = {"KVM_GET_API_VERSION": self._version, "KVM_CHECK_EXTENSION": arg not in self._lacking}
        return answers.get(request.name, 4096)


@pytest.mark.parametrize(
    ("port", "sentence"),
    [
        (FakeKvm(), None),
        (FakeKvm(lacking=(Cap.BINARY_STATS_FD,)), None),  # no guest needs it
        (FakeKvm(version=11), "{} speaks KVM API version 11, not 12; use a Linux kernel of 2.6.22 or later"),
        (
            FakeKvm(lacking=(Cap.IMMEDIATE_EXIT,)),
            (
                "{} lacks KVM_CAP_IMMEDIATE_EXIT (a vCPU is stopped without losing the request); "
                "use Linux 4.11 or later"
            ),
        ),
    ],
    ids=["all", "one less that is optional", "another API", "one less that is required"],
)
def test_a_kvm_that_opens_may_not_do(tmp_path: Path, port: FakeKvm, sentence: str | None) -> None:
    device = tmp_path / "kvm"
    device.touch()
    assert no_kvm(device, port) == (None if sentence is None else sentence.format(device))


def test_kvm_is_required_or_skipped(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    conftest = (ROOT / "tests/conftest.py").read_text().replace("/dev/kvm", "/dev/no-kvm-here")
    (pytester.path / "conftest.py").write_text(conftest)
    pytester.makeini("[pytest]\nmarkers = kvm: x")
    pytester.makepyfile(
        "import pytest\ndef test_fixture(kvm_device): pass\n@pytest.mark.kvm\ndef test_marker(): pass\n"
    )
    options = ("-rs", "-p", "no:cacheprovider", f"--override-ini=pythonpath={ROOT}")
    monkeypatch.delenv("VMM_REQUIRE_KVM", raising=False)
    skipped = pytester.runpytest_subprocess(*options)
    skipped.assert_outcomes(skipped=2)
    skipped.stdout.fnmatch_lines(["*/dev/no-kvm-here does not exist; enable virtualisation *"])
    monkeypatch.setenv("VMM_REQUIRE_KVM", "1")
    pytester.runpytest_subprocess(*options).assert_outcomes(errors=2)
    pytester.runpytest_subprocess(*options, "-m", "not kvm").assert_outcomes(deselected=2)
