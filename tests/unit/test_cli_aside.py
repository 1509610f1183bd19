"""Which threads keep off which CPUs, of real processes; nothing of KVM's is needed for that."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.processes import Spawn, Spawned
from vmm.cli.aside import Aside, _computes_on

# A thread that computes on the CPU it is told, like a keeper's vCPU; prints its id, and can be stopped.
COMPUTES = """
import os, sys, threading
rest = threading.Event()
def compute():
    os.sched_setaffinity(0, {int(sys.argv[1])})
    print(threading.get_native_id(), flush=True)
    while not rest.is_set():
        pass
    sys.stdin.read()
thread = threading.Thread(target=compute, daemon=True)
thread.start()
sys.stdin.readline()
rest.set()
thread.join()
"""
RESTS = "import sys; print(flush=True); sys.stdin.read()"
CPUS = os.sched_getaffinity(0)
CPU = max(CPUS)

pytestmark = pytest.mark.skipif(
    len(CPUS) < 2, reason="there must be a CPU besides the one that is kept clear"
)


@pytest.fixture
def vmm(spawn: Spawn) -> Iterator[Spawned]:
    process = spawn(sys.executable, "-c", RESTS)
    process.expect("\n")
    yield process
    assert os.sched_getaffinity(process.pid) == CPUS == os.sched_getaffinity(0)


@pytest.fixture
def keeper(spawn: Spawn) -> Iterator[Spawned]:
    process = spawn(sys.executable, "-c", COMPUTES, str(CPU))
    process.expect("\n")
    yield process
    assert os.sched_getaffinity(process.pid) == CPUS


def thread_of(keeper: Spawned) -> int:
    return int(keeper.stdout)


@contextmanager
def kept_off(vmm: Spawned, vcpu: int, refusal: str | None = None) -> Iterator[Aside]:
    """What is said of it has `refusal` in it, or is nothing."""
    said: list[str] = []
    with Aside(vmm.pid, [vcpu], said.append) as aside:
        aside.keep_off()
        yield aside
    if refusal is None:
        assert said == []
    else:
        assert len(said) == 1
        assert refusal in said[0]


def test_all_but_the_vcpu_keep_off(vmm: Spawned, keeper: Spawned, spawn: Spawn) -> None:
    vcpu = thread_of(keeper)
    with kept_off(vmm, vcpu) as aside:
        for process in (os.getpid(), vmm.pid, keeper.pid):
            assert os.sched_getaffinity(process) == CPUS - {CPU}
        assert os.sched_getaffinity(vcpu) == {CPU}
        started = spawn(sys.executable, "-c", RESTS)
        started.expect("\n")
        aside.keep_off(started.pid)
        assert os.sched_getaffinity(started.pid) == CPUS - {CPU}
    assert os.sched_getaffinity(started.pid) == CPUS
    assert os.sched_getaffinity(vcpu) == {CPU}


def test_a_vcpu_that_rests_needs_no_cpu(vmm: Spawned, keeper: Spawned) -> None:
    keeper.write(b"\n")
    with open(f"/proc/{thread_of(keeper)}/stat", encoding="ascii") as stat:
        while " S " not in stat.read():
            stat.seek(0)
    with kept_off(vmm, thread_of(keeper)):
        assert os.sched_getaffinity(vmm.pid) == CPUS


def test_a_vcpu_that_is_in_exits_needs_what_serves_it(vmm: Spawned, spawn: Spawn) -> None:
    code = "import os, time; print(flush=True)\nwhile True: time.sleep(1e-5); sum(range(2000))"
    keeper = spawn(sys.executable, "-c", code)
    keeper.expect("\n")
    thread = keeper.pid
    os.sched_setaffinity(thread, {CPU})
    computes = spawn(sys.executable, "-c", COMPUTES, str(CPU))
    computes.expect("\n")
    assert _computes_on([thread, thread_of(computes)]) == {CPU}
    computes.end()
    assert any(_computes_on([thread]) == set() for _ in range(20))  # on a busy CPU it may hardly run for once


def test_a_vcpu_of_the_vmms_own_is_stopped_anyway(keeper: Spawned) -> None:
    with kept_off(keeper, thread_of(keeper)):
        assert os.sched_getaffinity(0) == CPUS


def test_vcpus_that_have_every_cpu(vmm: Spawned, keeper: Spawned) -> None:
    os.sched_setaffinity(vmm.pid, {CPU})
    with kept_off(vmm, thread_of(keeper)):
        assert os.sched_getaffinity(vmm.pid) == {CPU}
        assert os.sched_getaffinity(0) == CPUS - {CPU}
    assert os.sched_getaffinity(vmm.pid) == {CPU}
    os.sched_setaffinity(vmm.pid, CPUS)


def test_a_vmm_that_ends_meanwhile(keeper: Spawned, spawn: Spawn) -> None:
    vmm = spawn(sys.executable, "-c", RESTS)
    with kept_off(vmm, thread_of(keeper)) as aside:
        vmm.end()
        aside.keep_off()


def test_a_thread_that_cannot_be(vmm: Spawned) -> None:
    with kept_off(vmm, (1 << 31) - 1, "is not there"):
        assert os.sched_getaffinity(vmm.pid) == CPUS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user; run it as root")
def test_a_thread_of_another_user(vmm: Spawned, spawn: Spawn) -> None:
    other = spawn(sys.executable, "-c", f"import os; os.setuid(65534); {RESTS}")
    other.expect("\n")
    with kept_off(vmm, other.pid, "another user's thread"):
        assert os.sched_getaffinity(other.pid) == CPUS


def test_one_that_cannot_be_placed_keeps_no_other_where_it_is(
    vmm: Spawned, keeper: Spawned, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    set_affinity = os.sched_setaffinity

    def refuse(thread: int, cpus: set[int]) -> None:
        if thread == vmm.pid:
            raise PermissionError(errno.EPERM, "not yours")
        set_affinity(thread, cpus)

    with Aside(vmm.pid, [thread_of(keeper)], said.append) as aside:
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        aside.keep_off()
        assert os.sched_getaffinity(keeper.pid) == CPUS - {CPU}
    assert said == [
        f"process {vmm.pid} cannot be kept to CPUs {sorted(cpus)}: not yours" for cpus in (CPUS - {CPU}, CPUS)
    ]
