"""The directories of named VMs: what lives, what a killed VMM has left, and what is not touched."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.cli.rundir import RunDir, base, directories, named
from vmm.errors import ConfigError, HostError, UsageError


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_socket_dir: Path) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_socket_dir))
    return tmp_socket_dir


@pytest.fixture
def vm(runtime: Path) -> RunDir:
    return RunDir("one").make()


@pytest.fixture
def monitor(vm: RunDir) -> Iterator[socket.socket]:
    """A VMM's control socket, listening, and claimed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(vm.own_qmp()))
        listener.listen(5)
        vm.claim()
        yield listener


def test_a_vm_that_lives(vm: RunDir, monitor: socket.socket) -> None:
    assert vm.lives()
    assert vm.running() == vm.qmp
    assert os.readlink(vm.qmp) == f"qmp-{os.getpid()}.sock"
    assert [each.name for each in named()] == ["one"]
    vm.tidy()
    assert vm.lives()


def test_claiming_again_changes_nothing(vm: RunDir, monitor: socket.socket) -> None:
    vm.claim()
    assert vm.lives()
    assert sorted(path.name for path in vm.path.iterdir()) == sorted([vm.qmp.name, vm.own_qmp().name])


def test_what_a_killed_vmm_leaves(vm: RunDir, monitor: socket.socket) -> None:
    vm.console.touch()
    monitor.close()
    assert not vm.lives()
    assert named() == []
    with pytest.raises(UsageError, match="no VM named 'one' runs"):
        vm.running()
    vm.tidy()
    assert not vm.path.exists()


def test_a_log_is_kept(vm: RunDir, monitor: socket.socket) -> None:
    vm.log.write_text("why it ended")
    monitor.close()
    vm.tidy()
    assert [path.name for path in vm.path.iterdir()] == ["vmm.log"]


def test_a_directory_that_is_being_set_up_is_left_alone(vm: RunDir) -> None:
    vm.tidy()
    assert vm.path.exists()


def test_disclaiming_is_for_ones_own(vm: RunDir, monitor: socket.socket) -> None:
    vm.qmp.unlink()
    vm.qmp.symlink_to("qmp-1.sock")  # another process has claimed it meanwhile
    vm.disclaim()
    assert os.readlink(vm.qmp) == "qmp-1.sock"
    vm.claim()
    monitor.close()
    vm.own_qmp().unlink()
    vm.disclaim()
    assert not vm.path.exists()


def test_names(runtime: Path) -> None:
    for name in ("", ".hidden", "-x", "a/b", "x" * 41, "ü"):
        with pytest.raises(ConfigError, match="is not a VM name"):
            RunDir(name)
    (base() / ".not-a-vm").mkdir()
    (base() / "two").mkdir()
    assert [each.name for each in directories()] == ["two"]


def test_a_runtime_directory_that_is_not_there_is_not_invented(
    monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "none"))
    with pytest.raises(HostError, match=rf"^{runtime}/none/vmm cannot be made: No such file or directory; "):
        base()
    assert not (runtime / "none").exists()


def test_a_file_is_in_the_way(runtime: Path) -> None:
    (runtime / "vmm").touch()
    with pytest.raises(HostError, match=rf"^{runtime}/vmm cannot be made: File exists; "):
        base()


def test_without_a_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert base() == Path(f"/tmp/vmm-{os.geteuid()}")
    assert base().stat().st_mode & 0o777 == 0o700
