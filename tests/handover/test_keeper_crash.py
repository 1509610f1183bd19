"""A VMM that is killed: the guest stays, and goes on with the next one as if nothing had happened."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.handover.kept import NAME, KeptGuest, repeats
from tests.handover.rig import NoReactor
from tests.handover.stage import Stage, ended, wait_for
from tests.processes import Spawn, Spawned
from vmm.cli.handover import unix_channel
from vmm.errors import HandoverError, HostError, PeerError, UsageError
from vmm.fds import FdStore
from vmm.kvm import Port
from vmm.kvm.keeper_port import KeeperPort
from vmm.machine.config import MachineConfig
from vmm.machine.hypervisor import Origin
from vmm.machine.machine import Machine, MachineState
from vmm.machine.ports import find_keeper
from vmm.qmp.client import QmpClient
from vmm.sockets import listen
from vmm.state import Arena
from vmm.trace import Tracer

pytestmark = pytest.mark.kvm

STORM = 6


@pytest.fixture
def guest(kvm_device: Path, spawn: Spawn, tmp_socket_dir: Path) -> Iterator[KeptGuest]:
    guest = KeptGuest(spawn, tmp_socket_dir)
    yield guest
    guest.close()


def test_the_guest_goes_on_with_the_next_vmm(guest: KeptGuest) -> None:
    first = guest.run()
    guest.hear()
    keeper = guest.keeper
    guest.kill()
    assert not ended(keeper)
    second = guest.attach()
    assert second.pid != first.pid
    assert (guest.keeper, guest.state) == (keeper, "running")
    guest.hear()
    guest.quit()


def test_the_list_says_that_a_guest_has_lost_its_vmm(guest: KeptGuest) -> None:
    guest.run()
    guest.kill()
    listed = guest.verb("list")
    assert listed.wait() == 0
    assert re.search(rf"^{NAME} .* orphaned$", listed.stdout, re.MULTILINE)
    guest.attach()
    listed = guest.verb("list")
    assert listed.wait() == 0
    assert re.search(rf"^{NAME} .* running$", listed.stdout, re.MULTILINE)


def test_a_paused_guest_stays_paused(guest: KeptGuest) -> None:
    guest.run()
    guest.hear()
    assert guest.client is not None
    guest.client.execute("stop")
    said = guest.out.read_bytes()
    guest.kill()
    guest.attach()
    assert guest.state == "paused"
    time.sleep(0.3)
    assert guest.out.read_bytes() == said
    guest.client.execute("cont")
    guest.hear()


def test_a_guest_that_never_ran(guest: KeptGuest) -> None:
    guest.run("-S")
    wait_for("it", lambda: guest.state == "paused")
    guest.kill()
    guest.attach()
    assert guest.state == "paused"
    assert guest.client is not None
    guest.client.execute("cont")
    guest.hear()


def test_a_guest_whose_vmm_lives_is_not_attached_to(guest: KeptGuest) -> None:
    guest.run()
    other = guest.verb("attach", NAME)
    assert other.wait() == UsageError.exit_code
    assert "use 'vmm handover one'" in other.stderr
    (guest.folder / "qmp.sock").unlink()  # the token still says so
    other = guest.verb("attach", NAME)
    assert other.wait() == HandoverError.exit_code
    assert "another VMM runs the guest" in other.stderr
    guest.hear()


def test_a_guest_that_is_not_there_is_not_attached_to(guest: KeptGuest) -> None:
    other = guest.verb("attach", NAME)
    assert other.wait() == UsageError.exit_code
    assert "no keeper has a VM named 'one'" in other.stderr


def test_of_two_that_attach_one_gets_the_guest(guest: KeptGuest) -> None:
    guest.run()
    guest.kill()
    both = [guest.verb("attach", NAME), guest.verb("attach", NAME)]
    wait_for("the loser's end", lambda: any(one.popen.poll() is not None for one in both))
    loser = next(one for one in both if one.popen.poll() is not None)
    assert loser.wait() in (HandoverError.exit_code, UsageError.exit_code), loser.output()
    guest._answering(next(one for one in both if one is not loser))
    guest.hear()


def test_a_name_that_a_keeper_has_is_taken(guest: KeptGuest) -> None:
    guest.run()
    guest.kill()
    again = guest.verb("run", "ticker", f"--name={NAME}", "--serial=null")
    assert again.wait() == UsageError.exit_code
    assert "use 'vmm attach'" in again.stderr


def test_the_guest_ends_while_nobody_is_there(guest: KeptGuest) -> None:
    """Its last exit waits, and ends the VMM that comes."""
    guest.run(append="rate=50 count=10", guest="ticker")
    guest.kill()
    time.sleep(0.5)
    vmm = guest.verb("attach", NAME)
    assert vmm.wait() == 1
    assert guest.out.read_bytes().endswith(b"done\r\n")
    assert not list(guest.folder.glob("*.sock"))


def test_a_guest_that_had_ended_ends_the_vmm_that_comes(guest: KeptGuest) -> None:
    """The old one was killed between the guest's end and the keeper's."""
    guest.run()
    guest.kill()
    with state_of(guest) as state:
        state.ended, state.exit_status = 1, 23
    vmm = guest.verb("attach", NAME)
    assert vmm.wait() == 23, vmm.output()
    assert not list(guest.folder.glob("*.sock"))


def test_an_exit_that_returns_at_once_does_not_stay_so(guest: KeptGuest) -> None:
    """A VMM that is killed while it stops the guest leaves `immediate_exit` set in the vCPU's page."""
    guest.run()
    guest.hear()
    guest.kill()
    port = KeeperPort.connect(str(next(guest.folder.glob("keeper-*.sock"))))
    for row in port.table():
        if row.name == "vcpu":
            with mmap.mmap(row.fd, mmap.PAGESIZE) as page:
                page[1] = 1  # kvm_run.immediate_exit
        os.close(row.fd)
    port.close()
    guest.attach()
    guest.hear()


@contextmanager
def state_of(guest: KeptGuest) -> Iterator[MachineState]:
    """The machine's own section, in the keeper's state memfd."""
    port = KeeperPort.connect(str(next(guest.folder.glob("keeper-*.sock"))))
    for row in port.table():
        if row.name == "state":
            arena = Arena(row.fd, create=False)
        os.close(row.fd)
    port.close()
    yield arena.place("machine", 0, MachineState)


@pytest.mark.parametrize("name", ["ram", "state", "fresh", "token"])
def test_a_guest_without_all_that_is_its_own_is_not_attached_to(guest: KeptGuest, name: str) -> None:
    """What is missing must not be made anew, and empty."""
    guest.run()
    keeper = guest.keeper
    guest.kill()
    port = KeeperPort.connect(str(next(guest.folder.glob("keeper-*.sock"))))
    port.attach()
    for row in port.table():
        os.close(row.fd)
        port._names[row.name, row.id] = -1
    if name == "ram":
        with pytest.raises(PeerError, match="refuses to drop ram/0"):
            port.drop(name, 0)
        port.close()
        return
    port.drop(name, 0)
    port.close()
    vmm = guest.verb("attach", NAME)
    assert vmm.wait() == HandoverError.exit_code
    assert f"fd {name}/0 is missing from the fd table" in vmm.stderr
    assert not ended(keeper)


def test_a_vm_that_the_guest_has_left_is_not_attached_to(guest: KeptGuest) -> None:
    """A rebuild took it to another VM, which has ended: nobody may run what is left here."""
    guest.run()
    keeper = guest.keeper
    guest.kill()
    with state_of(guest) as state:
        state.home ^= 1
    vmm = guest.verb("attach", NAME)
    assert vmm.wait() == HandoverError.exit_code
    assert "no keeper has the guest" in vmm.stderr
    wait_for("the keeper's end", lambda: ended(keeper))


def test_keepers_that_the_guest_has_left_are_ended_whatever_their_order(guest: KeptGuest) -> None:
    """Those that a VMM serves, and what is no keeper of a guest's, are passed over."""
    guest.run()
    guest.hear()
    keeper = guest.keeper
    guest.kill()
    with (
        other_keeper(guest, "0") as served,
        other_keeper(guest, "x") as left,
        other_keeper(guest, "z") as last,
    ):
        for port in (left, last):
            port.live_on(0.0)
            port.close()
        (guest.folder / "keeper-y.sock").touch()
        guest.attach()
        assert guest.keeper == keeper
        for port in (left, last):
            wait_for("its end", lambda port=port: ended(port.pid))  # type: ignore[misc]
        assert not ended(served.pid)
        assert f"process {served.pid}, serves another VMM that lives" in guest.vmm.stderr
        served.close(for_good=True)
    guest.hear()


@contextmanager
def other_keeper(guest: KeptGuest, name: str) -> Iterator[KeeperPort]:
    """A keeper with the guest's name and state, and not the guest; attached to."""
    with listen(str(guest.folder / f"keeper-{name}.sock"), "keeper", socket.SOCK_SEQPACKET) as listener:
        port = KeeperPort.start(listener)
    kept = KeeperPort.connect(str(next(guest.folder.glob("keeper-[1-9]*.sock"))))
    for row in kept.table():
        if row.name == "state":
            port.store(row.name, row.id, row.fd)
        os.close(row.fd)
    kept.close()
    try:
        yield port
    finally:
        port.close()


def test_a_vm_is_the_guests_home_only_if_it_lives_on(kvm_device: Path) -> None:
    """A VMM may be killed between the two."""

    class Unwilling(KeeperPort):
        def live_on(self, orphan_timeout_s: float) -> None:
            raise PeerError("killed")

    port = Unwilling.start()
    machine = one_machine(FdStore(), port, Origin.NEW)
    with pytest.raises(PeerError, match="killed"):
        machine.start()
    assert machine.state.home == 0
    assert not machine.is_home
    close_machine(machine)


def test_the_next_vmm_listens_to_irqfds_that_the_last_one_had_released(tmp_socket_dir: Path) -> None:
    """It was killed while it saved the guest for a handover that never came."""
    path = tmp_socket_dir / "keeper.sock"
    machine = first_machine(path)
    machine.irqfds.open(0, 5)
    machine.start()
    machine.irqfds.release()
    close_machine(machine, for_good=False)
    machine = next_machine(path)
    eventfd = machine.irqfds.open(0, 5)
    machine.resume(running=True, after_crash=True)
    with pytest.raises(OSError, match="KVM_IRQFD") as caught:
        machine.hypervisor.vm.assign_irqfd(eventfd, 5)
    assert caught.value.errno == errno.EBUSY  # it is assigned
    close_machine(machine)


def test_the_next_vmm_tells_the_keeper_what_the_last_one_could_not(tmp_socket_dir: Path) -> None:
    """It was killed after it had taken the guest, and before it told of its own --orphan-timeout."""
    path = tmp_socket_dir / "keeper.sock"
    machine = first_machine(path)
    machine.start()
    machine.state.orphan_ms = 300
    keeper = machine.hypervisor.port.process
    close_machine(machine, for_good=False)
    machine = next_machine(path)
    machine.resume(running=True, after_crash=True)
    assert not ended(keeper)
    close_machine(machine, for_good=False)
    wait_for("the keeper's end", lambda: ended(keeper))


def first_machine(path: Path) -> Machine:
    """One in a keeper that is found at `path`."""
    with listen(str(path), "keeper", socket.SOCK_SEQPACKET) as listener:
        port = KeeperPort.start(listener)
    fds = FdStore()
    fds.deposit(port)
    return one_machine(fds, port, Origin.NEW)


def next_machine(path: Path) -> Machine:
    """The same one, its VMM having been killed."""
    fds = FdStore()
    return one_machine(fds, find_keeper(str(path), fds), Origin.ADOPTED)


def one_machine(fds: FdStore, port: Port, origin: Origin) -> Machine:
    """A ticker whose serial line is nobody's."""
    return Machine(
        MachineConfig(kernel="ticker", serial="null", memory=64 << 20).check(),
        fds,
        port=port,
        origin=origin,
        tracer=Tracer("one"),
        reactor=NoReactor(),
        listener=mock.Mock(),
        may_run=lambda: True,
    )


def close_machine(machine: Machine, *, for_good: bool = True) -> None:
    machine.close(for_good=for_good)
    machine.memory.close()
    machine.fds.close()


@pytest.mark.parametrize("rate", [20, 2000], ids=["seldom heard", "in the middle of an exit"])
def test_a_keeper_that_dies_ends_its_vmm(guest: KeptGuest, rate: int) -> None:
    guest.run(append=f"rate={rate}")
    guest.hear()
    os.kill(guest.keeper, signal.SIGKILL)
    assert guest.vmm.wait(5) == HostError.exit_code, guest.vmm.output()
    assert "the keeper of the VM has ended" in guest.vmm.stderr


def test_the_orphan_timeout(guest: KeptGuest) -> None:
    guest.run("--orphan-timeout=3")
    keeper = guest.keeper
    guest.kill()
    guest.attach()  # in time; it counts anew
    guest.hear()
    guest.kill()
    started = time.monotonic()
    wait_for("the keeper's end", lambda: ended(keeper))
    assert 2.5 < time.monotonic() - started < 6
    assert not list(guest.folder.glob("keeper-*"))


def test_the_orphan_timeout_moves_into_another_keeper(guest: KeptGuest) -> None:
    guest.run("--orphan-timeout=2")
    first = guest.keeper
    handed = guest.verb("handover", NAME, "--mode=rebuild")
    assert handed.wait(60) == 0, handed.output()
    guest.connect_to(int(os.readlink(guest.folder / "qmp.sock")[len("qmp-") : -len(".sock")]))
    keeper = guest.keeper
    assert keeper != first
    assert guest.client is not None
    guest.kill_process(guest.client.pid)
    started = time.monotonic()
    wait_for("the keeper's end", lambda: ended(keeper))
    assert 1.5 < time.monotonic() - started < 5


def hand_over_by_hand(guest: KeptGuest, *options: str) -> Spawned:
    """The new VMM, which has the guest and is found by its name; the old one has not been told to quit."""
    main, cpr = guest.folder / "m", guest.folder / "c"
    new = guest.verb(
        *("run", "-v", f"--name={NAME}", f"--incoming=unix:{main}", *options),
        f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={cpr}",
    )
    wait_for("the new VMM", cpr.exists)
    client = guest.client
    assert client is not None
    client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    client.execute("migrate", {"channels": [unix_channel("main", main), unix_channel("cpr", cpr)]})
    wait_for("its end", lambda: client.execute("query-migrate")["status"] == "completed")
    wait_for("the link", lambda: os.readlink(guest.folder / "qmp.sock") == f"qmp-{new.pid}.sock")
    return new


def test_an_orphan_timeout_of_the_new_vmms(guest: KeptGuest) -> None:
    guest.run()
    guest.hear()
    keeper = guest.keeper
    new = hand_over_by_hand(guest, "--orphan-timeout=2")
    assert guest.client is not None
    guest.client.execute("quit")
    assert guest.vmm.wait() == 0, guest.vmm.output()
    new.signal(signal.SIGKILL)
    new.popen.wait()
    assert not ended(keeper)
    started = time.monotonic()
    wait_for("the keeper's end", lambda: ended(keeper))
    assert 1.5 < time.monotonic() - started < 5


def test_an_old_vmm_that_lingers_keeps_nobody_from_attaching(guest: KeptGuest) -> None:
    """It has given the guest to a VMM that is killed before anybody has told the old one to quit."""
    guest.run(append="rate=50")
    guest.hear()
    old, client = guest.vmm, guest.client
    assert client is not None
    new = hand_over_by_hand(guest)
    new.signal(signal.SIGKILL)
    new.popen.wait()
    guest.kills += 1
    guest.client = None
    guest.attach()
    guest.hear()
    client.execute("quit")
    client.close()
    assert old.wait() == 0, old.output()
    guest.hear()
    guest.quit()


def test_without_a_name_nobody_could_come(stage: Stage) -> None:
    side = stage.start("--keeper")
    keeper = side.client.execute("x-vmm-stats")["vm"]["process"]
    side.process.signal(signal.SIGKILL)
    side.process.wait()
    wait_for("the keeper's end", lambda: ended(keeper))


def test_kills_in_the_middle_of_the_guests_output(guest: KeptGuest) -> None:
    """No byte is lost; the one that was on its way may come twice."""
    guest.run(append="rate=1000", guest="ticker")
    chance = random.Random(4)
    for _ in range(STORM):
        time.sleep(chance.uniform(0.0, 0.05))
        guest.kill()
        guest.attach()
    guest.hear(50)
    assert guest.client is not None
    guest.client.execute("stop")
    assert repeats(guest.said()) <= STORM


def test_kills_while_devices_count(guest: KeptGuest) -> None:
    """Sentinel's checks of string I/O and MMIO see an access that is lost or made twice."""
    checks = "checks=counter,tsc,pio,mmio,posted,pattern,timer pattern=64K"
    guest.run("--cpus=2", "--testdev", "--serial=null", append=checks, guest="sentinel")
    chance = random.Random(8)
    for _ in range(STORM):
        time.sleep(chance.uniform(0.0, 0.3))
        guest.kill()
        guest.attach()
    time.sleep(0.3)
    assert guest.state == "running", guest.vmm.output()


def console_of(guest: KeptGuest) -> socket.socket:
    console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    console.settimeout(20)
    wait_for("the console", (guest.folder / "console.sock").exists)
    console.connect(str(guest.folder / "console.sock"))
    return console


def test_a_console_client_stays_connected(guest: KeptGuest) -> None:
    guest.run("--serial=unix")
    with console_of(guest) as console:
        said = console.recv(4096)
        for _ in range(3):
            guest.kill()
            guest.attach()
            more = b""
            while more.count(b"tick") < 3:
                data = console.recv(4096)
                assert data, "the console was closed"
                more += data
            said += more
        console.send(b"q")  # input goes its way too
        assert guest.vmm.wait() == 1
        while data := console.recv(4096):
            said += data
    assert said.endswith(b"done\r\n")
    whole = said[said.index(b"tick") : said.index(b"done")]  # this client came in the middle of a line
    assert repeats(whole, int(whole.split()[1])) <= 3
    assert not list(guest.folder.glob("*.sock"))


def test_console_clients_come_and_go_between_kills(guest: KeptGuest) -> None:
    """The keeper's table follows: who has left is let go, who has come is kept."""
    guest.run("--serial=unix")
    for _ in range(3):
        with console_of(guest) as console:
            assert console.recv(4096)
            guest.kill()
            guest.attach()
            assert console.recv(4096)
    guest.kill()
    console = console_of(guest)  # the backlog is the keeper's
    guest.attach()
    assert console.recv(4096)
    console.close()
    guest.quit()


def test_a_reset_that_was_asked_for_is_carried_out(guest: KeptGuest, tmp_path: Path) -> None:
    """A guest that resets itself all the time, and whose VMMs are killed all the time, says only its line."""
    # mov al, 'R'; mov dx, 0x3f8; out dx, al; mov al, 0xfe; out 0x64, al; hlt
    image = tmp_path / "reset.bin"
    image.write_bytes(b"\xb0\x52\xba\xf8\x03\xee\xb0\xfe\xe6\x64\xf4\xeb\xfd")
    guest.run("--entry-mode=real16", "--load-address=0x7c00", guest=str(image), append="")
    chance = random.Random(15)
    for _ in range(STORM):
        time.sleep(chance.uniform(0.0, 0.1))
        guest.kill()
        guest.attach()
    before = len(guest.out.read_bytes())
    wait_for("resets", lambda: len(guest.out.read_bytes()) > before + 5)
    assert set(guest.out.read_bytes()) == {ord("R")}
    assert guest.state == "running"


def test_a_supervisor_restarts_the_vmm(guest: KeptGuest) -> None:
    supervisor = guest.verb(
        "run",
        "ticker",
        "--append=rate=50",
        f"--serial=file:{guest.out}",
        f"--name={NAME}",
        "--restart=always",
    )
    monitor = guest.folder / "qmp.sock"
    seen = set()
    for _ in range(3):
        pid = wait_for("a VMM", lambda: vmm_at(monitor, seen))
        seen.add(pid)
        before = len(guest.said())
        wait_for("ticks", lambda before=before: len(guest.said()) > before + 3)  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
    pid = wait_for("a VMM", lambda: vmm_at(monitor, seen))
    os.kill(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait() == 0, supervisor.output()
    wait_for("its end", lambda: ended(pid))
    assert not list(guest.folder.glob("*.sock"))


def test_a_supervisor_s_next_vmm_has_the_same_options(guest: KeptGuest) -> None:
    extra = guest.folder.parent / "extra"
    supervisor = guest.verb(
        *("run", "ticker", "--append=rate=50", f"--serial=file:{guest.out}", f"--name={NAME}"),
        *("--restart=always", f"--qmp=unix:{extra}", "--sandbox=off", "-v"),
    )
    monitor = guest.folder / "qmp.sock"
    first = wait_for("a VMM", lambda: vmm_at(monitor, set()), 40.0)
    wait_for("the guest's first words", guest.said)
    os.kill(first, signal.SIGKILL)
    second = wait_for("a VMM", lambda: vmm_at(monitor, {first}), 40.0)
    with QmpClient.connect(extra) as client:
        assert client.pid == second
    told = Path(f"/proc/{second}/cmdline").read_bytes().split(b"\0")
    assert {b"attach", b"--sandbox=off", b"-v"} <= set(told)
    os.kill(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait() == 0, supervisor.output()


def vmm_at(monitor: Path, seen: set[int]) -> int | None:
    try:
        pid = int(os.readlink(monitor).removeprefix("qmp-").removesuffix(".sock"))
    except FileNotFoundError:
        return None
    return None if pid in seen or ended(pid) else pid
