"""Fixtures of the tests that run the firmware."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guests.running import RunningGuest, running

Run = Callable[..., RunningGuest]


@pytest.fixture
def run(kvm_device: Path) -> Iterator[Run]:
    """`run("sentinel", "rounds=1", cpus=2)`: a guest that runs, ended with the test."""
    with ExitStack() as stack:
        yield lambda *image, **machine: stack.enter_context(running(*image, **machine))
