"""The targets of scripts/fuzz for a moment each: their seeds, past findings, and changes of both."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import __main__ as command
from tests.fuzz.targets import NAMES, committed, inputs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", NAMES)
def test_seeds_and_past_findings(target: str) -> None:
    module = importlib.import_module(f"tests.fuzz.targets.{target}")
    for data in (*module.seeds(), *committed(target)):
        module.one(data)


@pytest.mark.parametrize("target", NAMES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_inputs(target: str, data: st.DataObject) -> None:
    importlib.import_module(f"tests.fuzz.targets.{target}").one(data.draw(inputs(target)))


@pytest.mark.parametrize("engine", ["hypothesis", "atheris"])
def test_a_run_says_what_it_did(engine: str) -> None:
    if engine == "atheris" and importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: scripts/fuzz does so where it has a wheel")
    words = [sys.executable, "-m", "tests.fuzz", "arena", "--seconds=1", f"--engine={engine}", "--json"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=50, check=True)
    [outcome] = json.loads(run.stdout)["targets"]
    assert (outcome["target"], outcome["engine"], outcome["failed"]) == ("arena", engine, False)
    assert outcome["runs"] > 10


def test_a_target_that_hangs_has_failed_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first never ends, in the place of what `tests.fuzz.child` would be; the second does."""
    package = tmp_path / "tests" / "fuzz"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "child.py").write_text(
        "import sys, time\n"
        "print('Done 7 runs', flush=True)\n"
        "if sys.argv[2] == 'elf':\n    print('stuck', flush=True); time.sleep(60)\n"
    )
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "NAMES", ("elf", "qmp"))
    monkeypatch.setattr(command, "GRACE_S", 1)
    monkeypatch.setattr(sys, "argv", ["fuzz", "all", "--seconds=2", "--engine=hypothesis", "--json"])
    assert command.main() == 1
    said = capsys.readouterr()
    first, second = json.loads(said.out)["targets"]
    assert (first["target"], first["failed"], first["runs"]) == ("elf", True, 7)
    assert (second["target"], second["failed"], second["runs"]) == ("qmp", False, 7)
    assert "stuck" in said.err
    assert "elf: still running 1 s after its time; killed" in said.err
