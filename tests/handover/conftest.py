"""Fixtures of the tests with two VMM processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handover.stage import Stage
from tests.processes import Spawn


@pytest.fixture
def stage(kvm_device: Path, spawn: Spawn, tmp_socket_dir: Path) -> Iterator[Stage]:
    """Starts VMMs whose guest writes to one file."""
    stage = Stage(spawn, tmp_socket_dir)
    yield stage
    stage.close()
