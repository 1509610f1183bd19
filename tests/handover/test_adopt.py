"""Handovers by `adopt`: the very VM goes on, driven by a new VMM; and everything that can go wrong before the
new one has it leaves it with the old one.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.handover.rig import RESULTS_GPA
from tests.handover.stage import Side, Stage, connect, ended, open_fds, wait_for
from tests.kvm.keeping import RawVmm
from tests.processes import Spawn
from vmm.cpr.channel import CancelSwitch, Listener
from vmm.cpr.protocol import Ready, State
from vmm.errors import HandoverError
from vmm.kvm import keeper
from vmm.report.results import CPU_SIZE, HEADER_SIZE, ResultsError, parse_results

pytestmark = pytest.mark.kvm

MANY = 12
WARM_UP = 4
RSS_TOLERANCE = 0.05  # what the allocator keeps differs from process to process
KEEPER_RSS_TOLERANCE = 0.01  # it is one process throughout
FLOOD = "--append=rate=1000"


def vm_of(side: Side) -> dict[str, Any]:
    """The VM that a VMM drives: the kernel's name of it, and the process that it lives in."""
    vm: dict[str, Any] = side.client.execute("x-vmm-stats")["vm"]
    assert re.fullmatch(r"kvm-\d+", vm["id"])
    return vm


def report_of(side: Side) -> dict[str, Any]:
    report: dict[str, Any] = side.client.execute("x-vmm-report")
    return report


def with_fault(stage: Stage, spawn: Spawn, fault: str, *arguments: str) -> Side:
    """A VMM with a fault in it."""
    number = len(stage.sides)
    monitor, main, cpr = (stage.folder / f"{letter}{number}" for letter in "qmc")
    process = spawn.vmm("run", "-v", f"--qmp=unix:{monitor}", *arguments, env={"VMM_FAULT": fault})
    side = Side(process, monitor, connect(process, monitor), main, cpr)
    stage.sides.append(side)
    return side


def faulty_new(stage: Stage, spawn: Spawn, fault: str, *options: str) -> Side:
    number = len(stage.sides)
    return with_fault(
        stage,
        spawn,
        fault,
        f"--incoming=unix:{stage.folder}/m{number}",
        f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={stage.folder}/c{number}",
        *options,
    )


def faulty_old(stage: Stage, spawn: Spawn, fault: str, *options: str) -> Side:
    serial = f"--serial=file:{stage.out}"
    return with_fault(stage, spawn, fault, "ticker", "--append=rate=20", serial, "--keeper", *options)


# --- it works ---


def test_the_same_vm_through_other_processes(stage: Stage) -> None:
    side = stage.start("--keeper", "--cpus=2")
    vm, pids = vm_of(side), {side.process.pid}
    threads = [cpu["thread-id"] for cpu in side.client.execute("query-cpus-fast")]
    assert set(threads) < {int(name) for name in os.listdir(f"/proc/{vm['process']}/task")}
    for _ in range(3):
        stage.hear()
        old = side
        new = stage.await_guest()
        assert stage.migrate(old, new)["status"] == "completed"
        report = report_of(old)
        assert report["method"] == "adopt"
        assert report["vm-fd"] == {"received": True, "probe": "EIO", "driven": "keeper"}
        assert "the keeper drives the VM" in report["why"]
        wait_for("the guest in the new VMM", lambda new=new: new.state == "running")  # type: ignore[misc]
        old.client.execute("quit")
        assert old.process.wait() == 0
        side = new
        assert vm_of(side) == vm
        assert [cpu["thread-id"] for cpu in side.client.execute("query-cpus-fast")] == threads
        pids.add(side.process.pid)
    assert len(pids) == 4
    assert vm["process"] not in pids
    assert vm["id"] == f"kvm-{vm['process']}"
    stage.hear()
    side.client.execute("quit")
    assert side.process.wait() == 0
    wait_for("the keeper's end", lambda: ended(vm["process"]), 1.0)


def test_exits_that_come_meanwhile_wait_and_are_served_once(stage: Stage, spawn: Spawn) -> None:
    """The new VMM takes a third of a second; the guest is in the middle of a line."""
    old = stage.start("--keeper", FLOOD)
    stage.hear(20)
    new = faulty_new(stage, spawn, "incoming:load:delay:300")
    assert stage.migrate(old, new)["status"] == "completed"
    stage.hear(50)
    (stall_us,) = new.client.execute("x-vmm-stats")["stalls-us"]
    assert 200_000 < stall_us < 5_000_000
    third = faulty_new(stage, spawn, "incoming:run:delay:300")
    assert stage.migrate(new, third)["status"] == "completed"
    stage.hear(50)


def test_clients_still_get_stop_and_resume(stage: Stage) -> None:
    old = stage.start("--keeper")
    stage.hear()
    new = stage.await_guest()
    assert stage.migrate(old, new)["status"] == "completed"
    assert old.client.wait_event("STOP", 5).data is not None
    assert new.client.wait_event("RESUME", 5).data is not None


def test_a_paused_guest_stays_paused(stage: Stage) -> None:
    old = stage.start("--keeper")
    stage.hear()
    old.client.execute("stop")
    said = stage.out.read_bytes()
    new = stage.await_guest()
    assert stage.migrate(old, new)["status"] == "completed"
    wait_for("the guest in the new VMM", lambda: new.state == "paused")
    time.sleep(0.2)
    assert stage.out.read_bytes() == said
    new.client.execute("cont")
    stage.hear()


def test_a_guest_that_never_ran(stage: Stage) -> None:
    old = stage.start("--keeper", "-S")
    new = stage.await_guest()
    assert stage.migrate(old, new)["status"] == "completed"
    wait_for("the guest in the new VMM", lambda: new.state == "paused")
    new.client.execute("cont")
    assert stage.hear() >= 3


def turns(side: Side) -> int:
    """What the sentinel counts in its own memory, which it needs no VMM for."""
    answer = side.client.execute("x-vmm-read-memory", {"gpa": RESULTS_GPA, "size": HEADER_SIZE + CPU_SIZE})
    return parse_results(base64.b64decode(answer["data"])).cpus[0].turns


def test_a_guest_that_is_held_on_arrival_stands_still(stage: Stage) -> None:
    old = stage.start("sentinel", "--keeper", guest=None)
    wait_for("the guest", lambda: old.client.execute("query-status")["running"] and started(old))
    new = stage.await_guest("-S")
    assert stage.migrate(old, new)["status"] == "completed"
    wait_for("the guest in the new VMM", lambda: new.state == "paused")
    before = turns(new)
    time.sleep(0.2)
    assert turns(new) == before
    new.client.execute("system_reset")
    assert new.state == "paused"
    new.client.execute("cont")
    wait_for("the guest's start", lambda: started(new))


def started(side: Side) -> bool:
    try:
        before = turns(side)
    except ResultsError:
        return False
    time.sleep(0.05)
    return turns(side) > before


def test_a_guest_that_ends_before_its_new_vmm_could_say_that_it_runs(stage: Stage, spawn: Spawn) -> None:
    """The guest is the new VMM's from the moment on that this has the run token, and so is its end."""
    old = stage.start("ticker", "--append=rate=20 count=60", "--keeper", guest=None)
    stage.hear(3)
    vm = vm_of(old)
    new = faulty_new(stage, spawn, "incoming:send_running:delay:3500")
    assert stage.migrate(old, new)["status"] == "completed"
    assert new.process.wait() == 1, new.process.output()  # the guest's own status
    assert "Traceback" not in new.process.stderr
    assert stage.out.read_bytes().endswith(b"done\r\n")
    wait_for("the keeper's end", lambda: ended(vm["process"]), 2.0)
    assert old.state == "postmigrate"
    old.client.execute("quit")
    assert old.process.wait() == 0


def test_the_guest_may_be_reset_and_stopped_afterwards(stage: Stage) -> None:
    new = stage.replace(stage.start("--keeper"))
    stage.hear()
    new.client.execute("stop")
    new.client.execute("system_reset")
    new.client.execute("cont")
    wait_for("the first tick again", lambda: stage.out.read_bytes().count(b"tick 1\r\n") == 2)


def test_a_console_client_that_came_after_a_handover_outlives_a_vmm(stage: Stage, spawn: Spawn) -> None:
    """What the new VMM opens is in the keeper too."""
    path = stage.folder / "console"
    old = stage.start("--keeper", serial=f"unix:{path}")
    new = stage.replace(old)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.settimeout(20)
        console.connect(str(path))
        assert console.recv(4096)
        new = stage.replace(new)
        assert console.recv(4096)
        rows = [row for row in new.client.execute("x-vmm-fds") if row["name"] == "serial"]
        assert len(rows) == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.settimeout(20)
        console.connect(str(path))  # the first one has left, and its number is free
        assert console.recv(4096)
        new = stage.replace(new)
        assert console.recv(4096)


def test_nothing_piles_up(stage: Stage) -> None:
    """(`scripts/bench leak --mode=adopt` looks at hundreds of handovers.)"""

    def memory(pid: int) -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert found
        return int(found[1])

    def measure(side: Side) -> tuple[list[str], list[str], int, int, int]:
        time.sleep(0.2)  # for the thread that carried the handover to end
        vmm, keeper = side.process.pid, vm_of(side)["process"]
        threads = len(os.listdir(f"/proc/{keeper}/task"))
        return open_fds(vmm), open_fds(keeper), threads, memory(vmm), memory(keeper)

    side = stage.start("--keeper", "--cpus=2")
    for count in range(1, MANY + 1):
        before = side
        side = stage.replace(side)
        before.client.close()
        if count == WARM_UP:
            early = measure(side)
    late = measure(side)
    assert late[:3] == early[:3]
    assert late[3] <= early[3] * (1 + RSS_TOLERANCE)
    assert late[4] <= early[4] * (1 + KEEPER_RSS_TOLERANCE)
    stage.hear()


# --- it does not ---


BY_NEW = (
    *("build:kill", "after-listen_main:kill", "load:kill", "load:fail"),
    *("load:hang-up", "after-send_prepared:kill"),
)
BY_OLD = ("connect_main:fail", "pause:cancel", "send_state:fail", "after-receive_prepared:cancel")


@pytest.mark.parametrize("fault", BY_NEW)
def test_a_new_vmm_that_fails_before_the_commit_leaves_the_guest(
    stage: Stage, spawn: Spawn, fault: str
) -> None:
    old = stage.start("--keeper", FLOOD)
    stage.hear()
    vm = vm_of(old)
    new = faulty_new(stage, spawn, f"incoming:{fault}")
    fds = open_fds(old.process.pid)
    assert stage.migrate(old, new)["status"] == "failed"
    assert (old.state, vm_of(old)) == ("running", vm)
    stage.hear(20)
    new.process.wait()
    wait_for("the fds to be as before", lambda: open_fds(old.process.pid) == fds)
    stage.replace(old)
    stage.hear(20)


@pytest.mark.parametrize("fault", BY_OLD)
def test_an_old_vmm_that_fails_before_the_commit_keeps_the_guest(
    stage: Stage, spawn: Spawn, fault: str
) -> None:
    old = faulty_old(stage, spawn, f"outgoing:{fault}", FLOOD)
    stage.hear()
    vm = vm_of(old)
    new = stage.await_guest()
    assert stage.migrate(old, new)["status"] in ("failed", "cancelled")
    assert (old.state, vm_of(old)) == ("running", vm)
    if not fault.startswith("connect_main"):  # there it cannot be told, and waits for a while
        assert new.process.wait() == HandoverError.exit_code
    stage.hear(20)
    stage.replace(old)
    stage.hear(20)


def test_a_paused_guest_stays_paused_where_it_fails(stage: Stage, spawn: Spawn) -> None:
    old = stage.start("--keeper")
    stage.hear()
    old.client.execute("stop")
    assert stage.migrate(old, faulty_new(stage, spawn, "incoming:load:fail"))["status"] == "failed"
    assert old.state == "paused"
    said = stage.out.read_bytes()
    time.sleep(0.2)
    assert stage.out.read_bytes() == said
    old.client.execute("cont")
    stage.hear()


def test_another_machine_is_refused(stage: Stage) -> None:
    old = stage.start("--keeper")
    outcome = stage.migrate(old, stage.await_guest("--cpus=3"))
    assert outcome["status"] == "failed"
    assert "cpus: 3 was given here" in outcome["error-desc"]
    stage.hear()


def test_adopt_needs_a_keeper(stage: Stage) -> None:
    old = stage.start("--no-keeper")
    outcome = stage.migrate(old, stage.await_guest("--handover=adopt"))
    assert outcome["status"] == "failed"
    assert "adopt was asked for, but the kernel says EIO and the VM has no keeper" in outcome["error-desc"]
    stage.hear()


def test_the_old_vmm_dies_after_it_has_let_go(stage: Stage, spawn: Spawn) -> None:
    """The run token is free, and the new VMM has all there is."""
    old = faulty_old(stage, spawn, "outgoing:release_token:kill", FLOOD)
    stage.hear()
    vm = vm_of(old)
    new = stage.await_guest()
    old.client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    old.client.execute("migrate", {"channels": new.channels})
    old.process.wait()
    wait_for("the guest in the new VMM", lambda: new.state == "running")
    assert vm_of(new) == vm
    stage.hear(20)


@contextmanager
def played(stage: Stage, old: Side) -> Iterator[tuple[RawVmm, socket.socket]]:
    """A handover to this test, which says that it adopts: its connection to the keeper, and main, on which
    the old VMM has said that the guest waits.
    """
    cancel = CancelSwitch()
    listeners = [Listener(str(stage.folder / name)) for name in ("cpr", "main")]
    new = Side(old.process, old.monitor, old.client, stage.folder / "main", stage.folder / "cpr")
    old.client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    old.client.execute("migrate", {"channels": new.channels})
    cpr = listeners[0].accept(20, cancel)
    offer, fds = cpr.receive(20)
    keeper_fd = next(fd for row, fd in zip(offer.fds, fds, strict=True) if row.name == "keeper")
    vmm = RawVmm(socket.socket(fileno=os.dup(keeper_fd)))
    for fd in fds:
        os.close(fd)
    cpr.send(Ready("adopt", "so it says", received=True, probe="EIO"))
    cpr.close()
    main = listeners[1].accept(20, cancel)
    assert isinstance(main.receive(20)[0], State)
    try:
        yield vmm, main._sock
    finally:
        vmm.close()
        main.close()
        for listener in listeners:
            listener.close()
        cancel.close()


def test_a_new_vmm_cannot_take_the_vm_before_the_commit(stage: Stage) -> None:
    """Though it has a connection to the keeper; and whatever it says, the old VMM has the guest."""
    old = stage.start("--keeper", FLOOD)
    stage.hear()
    with played(stage, old) as (vmm, main):
        assert vmm.ask(keeper.OP_ATTACH)[1] == errno.EBUSY
        main.sendall(b"rubbish" * 10)
        assert stage.outcome(old)["status"] == "failed"
        assert old.state == "running"
        stage.hear(20)
    stage.replace(old)
    stage.hear(20)


# --- into another keeper, or none ---


@pytest.mark.parametrize("option", ["--keeper", "--no-keeper"])
def test_a_rebuild_leaves_the_keeper_and_ends_it(stage: Stage, option: str) -> None:
    old = stage.start("--keeper", FLOOD)
    stage.hear()
    before = vm_of(old)
    new = stage.await_guest("--handover=rebuild", option)
    assert stage.migrate(old, new)["status"] == "completed"
    assert report_of(old)["method"] == "rebuild"
    wait_for("the guest in the new VMM", lambda: new.state == "running")
    after = vm_of(new)
    assert after["id"] != before["id"]
    assert (after["process"] == new.process.pid) == (option == "--no-keeper")
    stage.hear(20)
    old.client.execute("quit")
    assert old.process.wait() == 0
    wait_for("the old keeper's end", lambda: ended(before["process"]), 2.0)
    last = stage.replace(new) if option == "--keeper" else new
    stage.hear(20)
    assert vm_of(last) == after


def test_the_old_keeper_ends_though_its_vmm_is_killed(stage: Stage) -> None:
    old = stage.start("--keeper")
    before = vm_of(old)
    new = stage.await_guest("--handover=rebuild")
    assert stage.migrate(old, new)["status"] == "completed"
    wait_for("the guest in the new VMM", lambda: new.state == "running")
    time.sleep(0.1)
    old.process.popen.kill()
    old.process.wait()
    wait_for("the old keeper's end", lambda: ended(before["process"]), 2.0)
    stage.hear()


def test_a_guest_gets_a_keeper_by_a_rebuild(stage: Stage) -> None:
    old = stage.start("--no-keeper", FLOOD)
    stage.hear()
    new = stage.await_guest("--keeper")
    assert stage.migrate(old, new)["status"] == "completed"
    assert report_of(old)["method"] == "rebuild"
    wait_for("the guest in the new VMM", lambda: new.state == "running")
    vm = vm_of(new)
    assert vm["process"] != new.process.pid
    stage.hear(20)
    last = stage.await_guest()
    assert stage.migrate(new, last)["status"] == "completed"
    assert report_of(new)["method"] == "adopt"
    wait_for("the guest in the last VMM", lambda: last.state == "running")
    assert vm_of(last) == vm
    stage.hear(20)


def test_a_rebuild_that_fails_leaves_the_guest_in_its_keeper(stage: Stage, spawn: Spawn) -> None:
    old = stage.start("--keeper", FLOOD)
    stage.hear()
    vm = vm_of(old)
    new = faulty_new(stage, spawn, "incoming:after-load:fail", "--handover=rebuild")
    assert stage.migrate(old, new)["status"] == "failed"
    assert new.process.wait() == HandoverError.exit_code
    assert (old.state, vm_of(old)) == ("running", vm)
    stage.hear(20)
