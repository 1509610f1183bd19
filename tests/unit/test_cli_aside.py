"""Which threads keep off which CPUs, of real processes; nothing of KVM's is needed for that."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

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


def test_all_but_the_vcpu_keep_off(vmm: Spawned, keeper: Spawned, spawn: Spawn) -> None:
    vcpu = thread_of(keeper)
    with Aside(vmm.pid, [vcpu]) as aside:
        for process in (os.getpid(), vmm.pid, keeper.pid):
            assert os.sched_getaffinity(process) == CPUS - {CPU}
        assert os.sched_getaffinity(vcpu) == {CPU}
        started = spawn(sys.executable, "-c", RESTS)
        started.expect("\n")
        aside.keep_off(started.pid)
        assert os.sched_getaffinity(started.pid) == CPUS - {CPU}
    assert aside.why_not is None
    assert os.sched_getaffinity(started.pid) == CPUS
    assert os.sched_getaffinity(vcpu) == {CPU}


def test_a_vcpu_that_rests_needs_no_cpu(vmm: Spawned, keeper: Spawned) -> None:
    keeper.write(b"\n")
    with open(f"/proc/{thread_of(keeper)}/stat", encoding="ascii") as stat:
        while " S " not in stat.read():
            stat.seek(0)
    with Aside(vmm.pid, [thread_of(keeper)]):
        assert os.sched_getaffinity(vmm.pid) == CPUS


def test_a_vcpu_that_is_in_exits_needs_what_serves_it(vmm: Spawned, spawn: Spawn) -> None:
    code = "import os, time; print(flush=True)\nwhile True: time.sleep(1e-5); sum(range(2000))"
    keeper = spawn(sys.executable, "-c", code)
    keeper.expect("\n")
    thread = keeper.pid
    os.sched_setaffinity(thread, {CPU})
    sleeper = spawn(sys.executable, "-c", COMPUTES, str(CPU))
    sleeper.expect("\n")
    assert _computes_on([thread, thread_of(sleeper)]) == {CPU}
    sleeper.end()
    assert _computes_on([thread]) == set()


def test_a_vcpu_of_the_vmms_own_is_stopped_anyway(keeper: Spawned) -> None:
    with Aside(keeper.pid, [thread_of(keeper)]):
        assert os.sched_getaffinity(0) == CPUS


def test_vcpus_that_have_every_cpu(vmm: Spawned, keeper: Spawned) -> None:
    os.sched_setaffinity(vmm.pid, {CPU})
    with Aside(vmm.pid, [thread_of(keeper)]):
        assert os.sched_getaffinity(vmm.pid) == {CPU}
        assert os.sched_getaffinity(0) == CPUS - {CPU}
    assert os.sched_getaffinity(vmm.pid) == {CPU}
    os.sched_setaffinity(vmm.pid, CPUS)


def test_a_vmm_that_ends_meanwhile(keeper: Spawned, spawn: Spawn) -> None:
    vmm = spawn(sys.executable, "-c", RESTS)
    with Aside(vmm.pid, [thread_of(keeper)]) as aside:
        vmm.end()
        aside.keep_off()
    assert aside.why_not is None


def test_a_thread_that_cannot_be(vmm: Spawned) -> None:
    with Aside(vmm.pid, [(1 << 31) - 1]) as aside:
        assert os.sched_getaffinity(vmm.pid) == CPUS
    assert aside.why_not is not None
    assert "is not there" in aside.why_not


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user; run it as root")
def test_a_thread_of_another_user(vmm: Spawned, spawn: Spawn) -> None:
    other = spawn(sys.executable, "-c", f"import os; os.setuid(65534); {RESTS}")
    other.expect("\n")
    with Aside(vmm.pid, [other.pid]) as aside:
        assert os.sched_getaffinity(other.pid) == CPUS
    assert aside.why_not is not None
    assert "another user's thread" in aside.why_not
