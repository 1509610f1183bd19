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

from tests.fuzz.targets import NAMES, committed, inputs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", NAMES)
def test_seeds_and_past_findings(target: str) -> None:
    module = importlib.import_module(f"tests.fuzz.targets.{target}")
    for data in (*module.seeds(), *committed(target)):
        module.one(data)


@pytest.mark.parametrize("target", NAMES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_inputs(target: str, data: st.DataObject) -> None:
    importlib.import_module(f"tests.fuzz.targets.{target}").one(data.draw(inputs(target)))


@pytest.mark.parametrize("engine", ["hypothesis", "atheris"])
def test_a_run_says_what_it_did(engine: str) -> None:
    if engine == "atheris" and importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: scripts/fuzz does so where it has a wheel")
    command = [sys.executable, "-m", "tests.fuzz", "arena", "--seconds=1", f"--engine={engine}", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=True)
    [outcome] = json.loads(run.stdout)["targets"]
    assert (outcome["target"], outcome["engine"], outcome["failed"]) == ("arena", engine, False)
    assert outcome["runs"] > 10
