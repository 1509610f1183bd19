"""scripts/bench: what its verdicts stand on. (That the benchmarks run: tests/handover/test_bench.py.)"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vmm.cli.series import Step
from vmm.report.pause import Window

BENCH = Path(__file__).parents[2] / "scripts/bench.d"
SMALL, LARGE = 128 << 20, 4 << 30


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A module of scripts/bench.d by its name; they import each other as a program's modules do."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for path in BENCH.glob("[a-z]*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize(
    ("small_us", "large_us", "handovers", "errors", "good"),
    [
        (1000.0, 1249.0, 10, 0, True),  # 15 % and 0.1 ms
        (1000.0, 1251.0, 10, 0, False),
        (1251.0, 1000.0, 10, 0, False),
        (1000.0, 9000.0, 9, 0, True),  # too few to tell
        (1000.0, 1000.0, 10, 1, False),
        (1000.0, 1000.0, 2, 1, False),
    ],
)
def test_the_pause_is_good(
    module: Callable[[str], Any], small_us: float, large_us: float, handovers: int, errors: int, good: bool
) -> None:
    pause = module("bench_pause")
    subjects = []
    for memory, us in ((SMALL, small_us), (LARGE, large_us)):
        subject = pause.Subject("rebuild", memory, lambda: pytest.fail("nothing is measured here"))
        subject.steps = [Step({"phases-us": {}}, Window(0, 1), us, 0.0)] * handovers
        subjects.append(subject)
    subjects[1].errors = errors
    assert pause.verdict(subjects, {"rebuild": pause.compare("rebuild", subjects)}) is good


def test_processes_of_processes_are_counted(module: Callable[[str], Any]) -> None:
    host = module("host")
    before = host.descendants()
    program = 'sh -c "exit 0" & exec sleep 60'  # which waits for nobody: a child, and its zombie
    with subprocess.Popen(["sh", "-c", program], stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 20.0
        while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\n" and time.monotonic() < deadline:
            time.sleep(0.01)
        found = host.descendants()
        child.kill()
    assert found == before + 2
