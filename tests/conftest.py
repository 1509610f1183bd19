"""Fixtures of all tests, and the check that no test leaves an fd, a thread or a process behind."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.host import no_kvm
from tests.patience import PATIENCE, at_most
from tests.processes import Spawn, become_subreaper, children, end_adopted

KVM_DEVICE = Path("/dev/kvm")
SPAWN = pytest.StashKey[Spawn]()


def pytest_configure() -> None:
    become_subreaper()
    settings.register_profile("vmm", deadline=None)  # on a busy machine any example may take long
    settings.load_profile("vmm")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The marker `kvm` and the fixture `kvm_device` each bring the other. Patience is for whole tests too."""
    if PATIENCE != 1:
        for item in items:
            own = item.get_closest_marker("timeout")
            if usual := own.args[0] if own else config.getini("timeout"):
                item.add_marker(pytest.mark.timeout(at_most(float(usual))), append=False)
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if "kvm_device" in item.fixturenames:
            item.add_marker(pytest.mark.kvm)
        elif item.get_closest_marker("kvm"):
            item.fixturenames.insert(0, "kvm_device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failing test's report shows what its processes said."""
    report = yield
    spawn = item.stash.get(SPAWN, None)
    if report.failed and spawn is not None:
        report.sections.extend((str(process), process.output()) for process in spawn.spawned)
    return report


@pytest.fixture(scope="session")
def kvm_device() -> Path:
    """A /dev/kvm that guests can run on; without one the test skips, or fails if VMM_REQUIRE_KVM=1."""
    if reason := no_kvm(KVM_DEVICE):
        if os.environ.get("VMM_REQUIRE_KVM") == "1":
            pytest.fail(f"{reason} (VMM_REQUIRE_KVM=1)", pytrace=False)
        pytest.skip(reason)
    return KVM_DEVICE


@pytest.fixture
def spawn(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Spawn]:
    """Starts processes, which end with the test: `spawn("socat", …)`, `spawn.vmm("run", …)`."""
    spawn = Spawn(tmp_path / "processes")
    request.node.stash[SPAWN] = spawn
    yield spawn
    spawn.end_all()


@pytest.fixture
def tmp_socket_dir() -> Iterator[Path]:
    """A private directory with a short path: a UNIX socket's has 107 bytes (unix(7)), tmp_path is long."""
    folder = Path(tempfile.mkdtemp(prefix="vmm-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which more fds, threads or child processes exist than before it."""
    fds, threads, processes = _open_fds(), set(threading.enumerate()), children()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(at_most(1.0))  # one that is just ending is no leak
    left = [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
    left += [f"process {process}" for process in end_adopted(children() - processes)]
    if _open_fds() != fds:
        gc.collect()  # what only a reference cycle keeps open is the collector's to close
        left += [f"fd {fd} ({target})" for fd, target in sorted(_open_fds().items() - fds.items())]
    if left:
        pytest.fail(f"left behind by this test: {', '.join(left)}", pytrace=False)


def _open_fds() -> dict[int, str]:
    """Every open fd of this process and what it refers to."""
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the directory's own
    return fds
