"""The targets of scripts/fuzz for a moment each: their seeds, past findings, and changes of both."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import NAMES, committed, inputs


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
