"""Guests that go from one version of this project to another, and back."""

from __future__ import annotations

import ctypes
import subprocess
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vmm.devices.testdev
import vmm.machine.machine
from tests.handover.rig import rig
from tests.handover.stage import Stage
from tests.processes import ROOT, Spawn
from vmm.devices.testdev import TestState as State
from vmm.errors import StateError
from vmm.machine.machine import Machine

pytestmark = pytest.mark.kvm


# --- a later layout of one device's state ---


class LaterState(ctypes.LittleEndianStructure):
    """The test device's state, as it could be one version on: everything has moved."""

    VERSION: ClassVar[int] = State.VERSION + 1
    PREVIOUS: ClassVar[type[State]] = State
    _fields_ = (("flags", ctypes.c_uint64), *State._fields_)

    def convert(self, previous: State) -> None:
        for name, *_ in State._fields_:
            setattr(self, name, getattr(previous, name))


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called: machines that are made from here on are a later version's."""

    def change(_: Machine | None = None) -> None:
        for module in (vmm.devices.testdev, vmm.machine.machine):
            monkeypatch.setattr(module, "TestState", LaterState)

    return change


SENTINEL = {"kernel": "sentinel", "append": "checks=counter,pio,mmio pattern=1M", "testdev": True}


def test_state_of_the_previous_version_is_converted(update: Any) -> None:
    """Sentinel counts with the device, and sees if it is not the same one."""
    with rig(**SENTINEL) as one:
        one.wait_for(lambda results: True)
        one.go_on()
        one.hand_over(offered=update)
        one.go_on()
        one.hand_over()
        one.go_on()
        assert one.results().errors == 0
        section = one.machine.arena.find("testdev", 0)
        assert section is not None
        assert section.version == LaterState.VERSION


def test_a_failed_update_leaves_nothing_behind(update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old version goes on with its own state, and hands it to another VMM of its own version."""

    def fail(_: Machine) -> None:
        raise RuntimeError("this handover is to fail")

    with rig(**SENTINEL) as one:
        one.wait_for(lambda results: True)
        for step in ("built", "saved", "loaded"):
            with monkeypatch.context() as later:
                for module in (vmm.devices.testdev, vmm.machine.machine):
                    later.setattr(module, "TestState", LaterState)
                with pytest.raises(RuntimeError, match="to fail"):
                    one.hand_over(**{step: fail})
            one.go_on()
        one.hand_over()
        one.go_on()
        assert one.results().errors == 0
        update()
        one.hand_over()
        one.go_on()
        assert one.results().errors == 0


def test_state_of_a_later_version_is_refused(update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        for module in (vmm.devices.testdev, vmm.machine.machine):
            later.setattr(module, "TestState", LaterState)
        one = rig(**SENTINEL)
        guest = one.__enter__()
    try:
        guest.wait_for(lambda results: True)
        known = f"testdev/0 has version {LaterState.VERSION}, this VMM knows {State.VERSION}; hand over to"
        with pytest.raises(StateError, match=known):
            guest.hand_over()
        guest.go_on()
        assert guest.results().errors == 0
    finally:
        one.__exit__(None, None, None)


# --- the previous release ---


def git(*arguments: str) -> bytes:
    """What git says of this repository; nothing where there is none."""
    ended = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=False)
    return ended.stdout if ended.returncode == 0 else b""


def previous_release() -> str | None:
    """The commit of the release before this version: the last tag before it, or else the last commit that
    had another version number.
    """
    changed = git("log", "--format=%H", "-G^__version__ = ", "--", "vmm/__init__.py").decode().split()
    if len(changed) < 2:
        return None  # the first version is in the making
    before = f"{changed[0]}^"
    return git("describe", "--tags", "--match=v*", "--abbrev=0", before).decode().strip() or before


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The previous release's package."""
    if (commit := previous_release()) is None:
        pytest.skip("there is no release before this version in this folder's git")
    folder = tmp_path_factory.mktemp("release")
    with tarfile.open(fileobj=BytesIO(git("archive", commit, "vmm", "firmware/images"))) as content:
        content.extractall(folder, filter="data")
    return folder


@pytest.fixture
def stage(spawn: Spawn, tmp_socket_dir: Path) -> Iterator[Stage]:
    stage = Stage(spawn, tmp_socket_dir)
    yield stage
    stage.close()


@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
def test_from_the_previous_release_and_back(stage: Stage, spawn: Spawn, release: Path, keeper: str) -> None:
    sides = []
    for root in (release, ROOT, release):
        spawn.root = root
        sides.append(stage.replace(sides[-1], keeper) if sides else stage.start(keeper))
        stage.hear()
    versions = [side.client.version["package"] for side in sides]
    assert versions[0] == versions[2] != versions[1] == f"vmm-cpr {vmm.__version__}"
    sides[-1].client.execute("quit")
    assert sides[-1].process.wait() == 0
