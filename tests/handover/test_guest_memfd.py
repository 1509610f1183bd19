"""Guests whose RAM is guest_memfd: memory that only their own VM may have, whoever serves them."""

from __future__ import annotations

import base64
import logging
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.handover.stage import Side, Stage, connect, wait_for
from tests.kvm.keeping import keeper_port
from tests.processes import Spawn, Spawned
from vmm.boot.image import find_image, load_image
from vmm.cli.rundir import RunDir
from vmm.errors import ConfigError, HandoverError, HostError, StateError, VmmError
from vmm.fds import FdKind, FdStore, check_received, identify
from vmm.kvm import Cap, DirectPort, Port, System, Vm, abi
from vmm.kvm.capabilities import LOADABLE, require_guest_memfd
from vmm.memory import GuestMemory, layout
from vmm.qmp.backend import QmpError
from vmm.report.results import CPU_SIZE, HEADER_SIZE, Results, ResultsError, parse_results
from vmm.units import GIB, MIB

pytestmark = pytest.mark.kvm

BOUND = "--memory-backend=guest-memfd"
RAM = 128 * MIB
CANNOT_MAP = "this VMM cannot map the guest's memory"


@pytest.fixture(params=["direct", "keeper"])
def port(request: pytest.FixtureRequest, kvm_device: Path) -> Iterator[Port]:
    """What the VM is driven through."""
    with nullcontext(DirectPort()) if request.param == "direct" else keeper_port() as port:
        yield port


@pytest.fixture
def system(port: Port) -> Iterator[System]:
    with System(port=port) as system:
        yield system


@pytest.fixture
def bound(kvm_device: Path) -> None:
    """Skips where guests cannot live in guest_memfd."""
    try:
        with System() as system:
            require_guest_memfd(system)
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def vm(system: System, bound: None) -> Iterator[Vm]:
    with system.create_vm() as vm:
        yield vm


@pytest.fixture
def fds() -> Iterator[FdStore]:
    fds = FdStore()
    yield fds
    fds.close()


# --- the memory ---


def test_the_kernel_says_what_it_is(vm: Vm, fds: FdStore) -> None:
    fd = fds.add("guest-memfd", 0, vm.create_guest_memfd(MIB, LOADABLE))
    assert (identify(fd).kind, identify(fd).size) == (FdKind.GUEST_MEMFD, MIB)
    check_received("guest-memfd", 0, fd, MIB)
    with pytest.raises(StateError, match="fd guest-memfd/0 has 1048576 bytes where 2097152 were expected"):
        check_received("guest-memfd", 0, fd, 2 * MIB)
    with pytest.raises(StateError, match="fd ram/0 is a guest_memfd where a memfd was expected"):
        check_received("ram", 0, fd, MIB)


def test_what_one_vmm_writes_the_next_one_reads(vm: Vm, fds: FdStore) -> None:
    first = GuestMemory.map_guest_memfd(fds, 4 * GIB, lambda size: vm.create_guest_memfd(size, LOADABLE))
    assert [(name, index) for name, index, _ in fds.items()] == [("guest-memfd", 0), ("guest-memfd", 1)]
    first.write(4 * GIB, b"above")
    second = GuestMemory.map_guest_memfd(fds, 4 * GIB, None)
    assert second.read(4 * GIB, 5) == b"above"
    first.close()
    second.close()


def test_memory_that_did_not_come_is_not_made_anew(fds: FdStore) -> None:
    with pytest.raises(StateError, match="fd guest-memfd/0 is missing"):
        GuestMemory.map_guest_memfd(fds, MIB, None)


def test_received_memory_that_cannot_be_mapped(
    vm: Vm, fds: FdStore, caplog: pytest.LogCaptureFixture
) -> None:
    """As a confidential guest's: this VMM says what it cannot do, and goes on."""
    fds.add("guest-memfd", 0, vm.create_guest_memfd(MIB))
    with caplog.at_level(logging.WARNING):
        memory = GuestMemory.map_guest_memfd(fds, MIB, None)
    assert "this VMM serves the guest, but cannot read or write its memory" in caplog.text
    for access in (lambda: memory.read(0x1000, 4), lambda: memory.write(0x1000, b"data")):
        with pytest.raises(VmmError, match=CANNOT_MAP):
            access()
    with pytest.raises(VmmError, match=r"guest address 0x100000\.\.0x100001 is not RAM"):
        memory.read(MIB, 1)
    with pytest.raises(VmmError, match=CANNOT_MAP):
        memory.check_mapped()
    memory.close()


def test_new_memory_that_cannot_be_mapped_is_refused(vm: Vm, fds: FdStore) -> None:
    with pytest.raises(HostError, match="memory: cannot map 1M"):
        GuestMemory.map_guest_memfd(fds, MIB, vm.create_guest_memfd)


def test_a_slot_of_it(vm: Vm, fds: FdStore) -> None:
    fd = fds.add("guest-memfd", 0, vm.create_guest_memfd(MIB, LOADABLE))
    vm.set_guest_memory(0, 0, MIB, 0, fd, 0)
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION2"):
        vm.set_guest_memory(1, MIB, MIB, 0, fd, MIB)  # beyond its end
    vm.set_guest_memory(0, 0, 0, 0, fd, 0)


def test_the_keeper_holds_it_once(bound: None, fds: FdStore) -> None:
    with keeper_port() as port, System(port=port) as system, system.create_vm() as vm:
        fds.deposit(port)
        for index in range(2):
            fds.add("guest-memfd", index, vm.create_guest_memfd(MIB, LOADABLE))
        rows = port.table()
        for row in rows:
            os.close(row.fd)
        assert [row.id for row in rows if row.name == "guest-memfd"] == [0, 1]
        links = [os.readlink(path) for path in Path(f"/proc/{port.pid}/fd").iterdir()]
        assert len([link for link in links if "kvm-gmem" in link]) == 2


class Lacking(DirectPort):
    """A host whose KVM gives these answers."""

    def __init__(self, answers: dict[Cap, int]) -> None:
        super().__init__()
        self.answers = answers

    def ioctl(self, fd: int, request: abi.Ioctl, arg: object = 0) -> int:
        if request is abi.KVM_CHECK_EXTENSION and arg in self.answers:
            return self.answers[Cap(arg)]
        return super().ioctl(fd, request, arg)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({Cap.GUEST_MEMFD: 0}, "lacks KVM_CAP_GUEST_MEMFD, so"),
        ({Cap.GUEST_MEMFD: 1, Cap.USER_MEMORY2: 0}, "lacks KVM_CAP_USER_MEMORY2, so"),
        (
            {Cap.GUEST_MEMFD: 1, Cap.USER_MEMORY2: 1, Cap.GUEST_MEMFD_FLAGS: abi.GUEST_MEMFD_FLAG_MMAP},
            r"lacks GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED \(KVM_CAP_GUEST_MEMFD_FLAGS is 0x1\), so",
        ),
    ],
)
def test_a_host_without_it_says_so(kvm_device: Path, answers: dict[Cap, int], text: str) -> None:
    with System(port=Lacking(answers)) as system, pytest.raises(HostError, match=text):
        require_guest_memfd(system)


def test_there_are_no_huge_pages_of_it(spawn: Spawn) -> None:
    process = spawn.vmm("run", "hello64", BOUND, "--hugepages=2M")
    assert process.wait() == ConfigError.exit_code, process.output()
    assert "hugepages: a guest-memfd has none" in process.stderr


# --- guests in it ---


@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
def test_hello(bound: None, spawn: Spawn, keeper: str) -> None:
    process = spawn.vmm("run", "hello64", BOUND, keeper)
    process.expect("hello from long mode")
    assert process.wait() == 1, process.output()  # what it says by debug-exit
    assert ("this guest cannot be handed over" in process.stderr) == (keeper == "--no-keeper")


def results(side: Side) -> Results:
    """What the sentinel has found so far."""
    area = load_image(find_image("sentinel"), ram=layout(RAM)).results
    assert area is not None
    answer = side.client.execute("x-vmm-read-memory", {"gpa": area[0], "size": HEADER_SIZE + CPU_SIZE})
    return parse_results(base64.b64decode(answer["data"]))


def goes_on(side: Side) -> None:
    """Wait until the sentinel has done more; it must have found nothing wrong."""
    before = results(side).cpus[0].turns
    wait_for("the guest's turns", lambda: results(side).cpus[0].turns > before + 3)
    assert results(side).errors == 0, results(side)


def sentinel(stage: Stage, *options: str) -> Side:
    side = stage.start("sentinel", "--testdev", BOUND, *options, guest=None)
    wait_for("the sentinel's start", lambda: side.state == "running" and ready(side))
    return side


def ready(side: Side) -> bool:
    try:
        return results(side).cpus[0].turns > 0
    except ResultsError:
        return False


def names(side: Side) -> set[str]:
    return {row["name"] for row in side.client.execute("x-vmm-fds")}


def test_adopted_twice(bound: None, stage: Stage) -> None:
    side = sentinel(stage, "--keeper")
    for _ in range(2):
        side = stage.replace(side)
        assert "guest-memfd" in names(side)
        assert "ram" not in names(side)
        goes_on(side)


def test_a_vmm_that_cannot_map_the_memory_serves_the_guest(bound: None, stage: Stage) -> None:
    """It has no room for the mapping, which is larger than all the memory it may have."""
    old = stage.start(BOUND, "--keeper", "--memory=3G")
    stage.hear()
    new = stage.await_guest()
    resource.prlimit(new.process.pid, resource.RLIMIT_AS, (2 * GIB, 2 * GIB))
    assert stage.migrate(old, new)["status"] == "completed", new.process.output()
    wait_for("the guest in the new VMM", lambda: new.state == "running")
    old.client.execute("quit")
    assert old.process.wait() == 0
    stage.hear()
    assert "this VMM serves the guest, but cannot read or write its memory" in new.process.stderr
    for command, arguments in (("x-vmm-read-memory", {"gpa": 0, "size": 4}), ("system_reset", None)):
        with pytest.raises(QmpError, match=CANNOT_MAP):
            new.client.execute(command, arguments)
    stage.hear()
    last = stage.replace(new)
    last.client.execute("x-vmm-read-memory", {"gpa": 0, "size": 4})
    stage.hear()


def test_rebuild_is_refused_and_the_guest_runs_on(bound: None, stage: Stage) -> None:
    old = sentinel(stage, "--keeper")
    new = stage.await_guest("--handover=rebuild", "--keeper")
    outcome = stage.migrate(old, new)
    assert outcome["status"] == "failed"
    assert "the guest's memory is guest_memfd, which is bound to its VM" in outcome["error-desc"]
    assert new.process.wait() == HandoverError.exit_code
    assert old.state == "running"
    goes_on(old)
    goes_on(stage.replace(old))


def test_without_a_keeper_it_stays(bound: None, stage: Stage) -> None:
    old = sentinel(stage, "--no-keeper")
    assert "this guest cannot be handed over" in old.process.stderr
    outcome = stage.migrate(old, stage.await_guest())
    assert outcome["status"] == "failed"
    assert "there is no keeper) cannot be" in outcome["error-desc"]
    goes_on(old)


def test_it_outlives_its_vmm(
    bound: None, stage: Stage, spawn: Spawn, tmp_socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_socket_dir))
    first = sentinel(stage, "--keeper", "--name=bound")
    before = results(first).cpus[0].turns
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    monitor = tmp_socket_dir / "attached"
    process: Spawned = spawn.vmm("attach", "bound", f"--qmp=unix:{monitor}", "-v")
    second = Side(process, monitor, connect(process, monitor), monitor, monitor)
    stage.sides.append(second)
    wait_for("the guest in its new VMM", lambda: second.state == "running")
    assert results(second).cpus[0].turns >= before
    goes_on(second)
    second.client.execute("quit")
    assert process.wait() == 0
    assert not RunDir("bound").lives()
