"""vCPUs in a keeper: an exit is served by whoever is there, once; without a VMM they run until they need
one.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from tests.kvm.keeping import await_end, keeper_port
from tests.kvm.real_mode import ENTRY, Machine, Ram, machine_on, ram_of, with_chips
from vmm.errors import PeerError
from vmm.kvm import Exit, IoctlError, Vcpu, abi, keeper
from vmm.kvm.keeper_port import SPIN_NS, KeeperPort

pytestmark = pytest.mark.kvm

# again: inc ax; mov dx, 0x3f8; out dx, ax; jmp again
COUNTER = b"\x40\xba\xf8\x03\xef\xeb\xf9"
FOREVER = b"\xeb\xfe"
# again: inc word [0x2000]; cmp byte [0x2002], 0; je again; out dx, al; jmp again
UNTIL_TOLD = b"\xff\x06\x00\x20\x80\x3e\x02\x20\x00\x74\xf5\xee\xeb\xf2"
TOLD = 0x2002


@contextmanager
def kept(code: bytes) -> Iterator[tuple[KeeperPort, Machine]]:
    """A machine in a keeper, about to execute `code`."""
    with keeper_port() as port, ram_of(code) as ram, machine_on(ram, port=port) as machine:
        machine.enter_at()
        machine.vcpu.bind_thread()
        yield port, machine


@contextmanager
def successor(port: KeeperPort) -> Iterator[tuple[KeeperPort, Vcpu]]:
    """The port and the vCPU of a VMM that was announced; not attached yet."""
    new = KeeperPort(port.make_successor())
    rows = new.table()
    fds = {(row.name, row.id): row.fd for row in rows}
    new.take_over(rows, fds)
    vcpu = Vcpu(fds.pop(("vcpu", 0)), 0, new, 0x3000)
    try:
        yield new, vcpu
    finally:
        vcpu.close()
        new.close()
        for (name, _), fd in fds.items():
            if name not in KeeperPort.OWN_NAMES:
                os.close(fd)


def value(vcpu: Vcpu) -> int:
    """What the exit at hand writes."""
    assert vcpu.run_page.exit_reason == Exit.IO
    io = vcpu.run_page.io
    return int.from_bytes(vcpu.io_data(io.data_offset, io.size), "little")


def await_exit(vcpu: Vcpu, number: int) -> None:
    """Wait until exit `number` is there for somebody to serve."""
    deadline = time.monotonic() + 10
    while vcpu.pending_exit != number:
        assert time.monotonic() < deadline, f"exit {number} does not come; {vcpu.pending_exit} is there"
        time.sleep(0.001)


def counts(ram: Ram) -> bool:
    """Whether UNTIL_TOLD runs."""
    before = ram.bytes[0x2000:0x2002]
    time.sleep(0.05)
    return bool(ram.bytes[0x2000:0x2002] != before)


def test_exits_are_numbered() -> None:
    with kept(COUNTER) as (_, machine):
        assert machine.vcpu.pending_exit == 0
        for number in range(1, 6):
            assert machine.vcpu.run()
            assert (value(machine.vcpu), machine.vcpu.pending_exit) == (number, number)


def test_an_exit_that_is_left_is_the_first_of_the_next_vmm() -> None:
    with kept(COUNTER) as (port, machine):
        assert machine.vcpu.run()
        with successor(port) as (new, vcpu):
            port.detach()
            new.attach()
            assert vcpu.pending_exit == 1
            assert [value(vcpu) for _ in range(3) if vcpu.run()] == [1, 2, 3]
            new.detach()
        port.attach()
        assert [value(machine.vcpu) for _ in range(3) if machine.vcpu.run()] == [3, 4, 5]


def test_an_exit_that_comes_between_two_vmms_is_not_lost() -> None:
    """It is not there yet when the new VMM is built, nor when the old one leaves; whoever attaches serves it,
    were it the old one again.
    """
    with kept(UNTIL_TOLD) as (port, machine), successor(port) as (new, vcpu):
        machine.vcpu.go_on()
        assert counts(machine.ram)
        port.detach()
        assert counts(machine.ram)
        machine.ram.bytes[TOLD] = 1
        await_exit(vcpu, 1)
        new.attach()
        assert vcpu.run()
        assert vcpu.pending_exit == 1
        assert vcpu.run()
        assert vcpu.pending_exit == 2
        new.detach()
        port.attach()
        assert machine.vcpu.run()
        assert machine.vcpu.pending_exit == 2


def test_a_vmm_that_leaves_lets_the_vcpu_run() -> None:
    with kept(UNTIL_TOLD) as (port, machine):
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(machine.vcpu.run()))
        thread.start()
        assert counts(machine.ram)
        machine.vcpu.leave()
        thread.join(10)
        assert results == [False]
        machine.vcpu.go_on()
        assert counts(machine.ram)
        port.detach()
        port.attach()
        machine.ram.bytes[TOLD] = 1
        assert machine.vcpu.run()
        assert machine.vcpu.pending_exit == 1


def test_a_vmm_that_leaves_with_an_exit_served_lets_the_vcpu_go_on() -> None:
    with kept(COUNTER) as (port, machine):
        assert machine.vcpu.run()
        machine.vcpu.leave()
        machine.vcpu.go_on()
        await_exit(machine.vcpu, 2)
        port.detach()
        port.attach()
        assert machine.vcpu.run()
        assert value(machine.vcpu) == 2


def test_a_vmm_that_is_killed_leaves_the_vcpu_running() -> None:
    """Here: its connection closes."""
    with kept(UNTIL_TOLD) as (port, machine), successor(port) as (new, vcpu):
        machine.vcpu.go_on()
        port.close()
        assert counts(machine.ram)
        new.attach()
        vcpu.kick()
        assert not counts(machine.ram)
        assert not vcpu.run()  # the kick came before it, and the vCPU was running: it is not lost
        machine.ram.bytes[TOLD] = 1
        assert vcpu.run()
        new.close(for_good=True)


def test_a_vmm_that_is_killed_between_asking_and_waking() -> None:
    """It has said that KVM_RUN is to be called, but the keeper's thread still sleeps."""
    with kept(COUNTER) as (port, machine), successor(port) as (new, vcpu):
        port._runners[machine.vcpu.fd].words[0] += 1
        port.close()
        new.attach()
        await_exit(vcpu, 1)
        assert vcpu.run()
        assert value(vcpu) == 1
        new.close(for_good=True)


def test_kicks() -> None:
    with kept(FOREVER) as (_, machine):
        machine.vcpu.kick()  # before the run
        assert not machine.vcpu.run()
        threading.Timer(0.05, machine.vcpu.kick).start()
        assert not machine.vcpu.run()
        machine.vcpu.immediate_exit = True
        assert not machine.vcpu.run()
        assert machine.regs().rip == ENTRY


def test_a_vcpu_that_runs_is_not_waited_for() -> None:
    """The keeper has other VMM requests to serve, and no time to wait for a vCPU."""
    with kept(FOREVER) as (_, machine):
        machine.vcpu.go_on()
        with pytest.raises(IoctlError) as caught:
            machine.vcpu.get_regs(abi.kvm_regs())
        assert caught.value.errno == errno.EBUSY
        assert machine.vm.check(abi.Cap.USER_MEMORY) == 1
        machine.vcpu.kick()
        assert not machine.vcpu.run()
        assert machine.regs().rip == ENTRY


def test_a_vcpu_is_started_without_a_vmm() -> None:
    """INIT and SIPI end KVM_RUN (EAGAIN) with nothing to serve."""
    start = 0x3000
    with keeper_port() as port, ram_of(FOREVER) as ram, machine_on(ram, with_chips, port=port) as machine:
        ram.bytes[start : start + len(COUNTER)] = COUNTER
        with machine.vm.create_vcpu(1) as second:
            second.go_on()
            for delivery in (5 << 8, 6 << 8 | start >> 12):  # INIT, start-up; Intel SDM 3A, 12.11.2
                time.sleep(0.05)
                assert machine.vm.signal_msi(0xFEE0_0000 | 0xFF << 12, delivery)  # to all
            await_exit(second, 1)
            port.detach()
            port.attach()
            assert second.run()
            assert second.run_page.exit_reason == Exit.IO


@pytest.mark.parametrize(("cores", "expected"), [(4, 0), (5, SPIN_NS)])
def test_all_vcpus_spin_or_none(cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is a core to spare for both sides of each is not known before the last one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    with kept(COUNTER) as (port, machine), machine.vm.create_vcpu(1):
        assert [runner.words[keeper.SPIN] for runner in port._runners.values()] == [expected] * 2
        assert [value(machine.vcpu) for _ in range(3) if machine.vcpu.run()] == [1, 2, 3]


def test_the_next_vmm_spins_as_the_first_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be kept off some cores while it takes over."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    with kept(COUNTER) as (port, machine):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
        with successor(port) as (_, _):
            assert port._runners[machine.vcpu.fd].words[keeper.SPIN] == SPIN_NS


def test_a_vmm_cannot_keep_the_keeper_spinning() -> None:
    with kept(COUNTER) as (port, machine):
        port._runners[machine.vcpu.fd].words[keeper.SPIN] = (1 << 64) - 1
        assert machine.vcpu.run()  # from here on its thread looks for the next turn
        time.sleep(0.05)
        with open(f"/proc/{port.pid}/stat", encoding="ascii") as stat:
            before = stat.read().split()[13]
        time.sleep(0.3)
        with open(f"/proc/{port.pid}/stat", encoding="ascii") as stat:
            assert int(stat.read().split()[13]) - int(before) <= 5  # of the 30 ticks


def test_slots_may_hold_anything() -> None:
    """What a VMM writes there harms its own vCPU alone, and that only until it writes something better."""
    with kept(COUNTER) as (port, machine):
        words = port._runners[machine.vcpu.fd].words
        for wild in ((1 << 64) - 1, 1 << 63, 5):
            words[0] = wild
            os.eventfd_write(port._runners[machine.vcpu.fd].go, 1)
            await_exit(machine.vcpu, wild)
        assert machine.vcpu.pending_exit == 5
        port.detach()
        port.attach()
        assert machine.vcpu.run()
        assert value(machine.vcpu) == 3


def test_a_keeper_that_dies_is_noticed() -> None:
    with ram_of(FOREVER) as ram:
        port = KeeperPort.start()
        with machine_on(ram, port=port) as machine:
            machine.enter_at()
            failures: list[BaseException] = []

            def run() -> None:
                try:
                    machine.vcpu.run()
                except PeerError as error:
                    failures.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            time.sleep(0.05)
            os.kill(port.pid, signal.SIGKILL)
            assert await_end(port.lifeline)
            port.lost()
            thread.join(10)
            assert "has ended" in str(failures[0])
            machine.vcpu.kick()  # nothing to do, and no error
            with pytest.raises(PeerError, match="has ended"):
                machine.vm.check(abi.Cap.USER_MEMORY)
        port.close(for_good=True)


def test_a_keeper_that_answers_late_ends_every_run() -> None:
    """It may be taken for dead; it is not."""
    with ram_of(FOREVER) as ram:
        port = KeeperPort.start()
        pid, pidfd = port.pid, os.dup(port.lifeline)
        before = len(os.listdir("/proc/self/fd"))
        try:
            with machine_on(ram, port=port) as machine:
                machine.enter_at()
                failures: list[str] = []

                def run() -> None:
                    try:
                        machine.vcpu.run()
                    except PeerError as error:
                        failures.append(str(error))

                thread = threading.Thread(target=run, daemon=True)
                thread.start()
                time.sleep(0.05)
                port._sock.settimeout(0.1)
                os.kill(pid, signal.SIGSTOP)
                with pytest.raises(PeerError, match="does not answer"):
                    machine.vm.check(abi.Cap.USER_MEMORY)
                thread.join(5)
                assert not thread.is_alive()
                assert "does not answer" in failures[0]
                machine.vcpu.kick()  # nothing to do, and no error
                with pytest.raises(PeerError, match="does not answer"):
                    machine.vcpu.run()
            with pytest.raises(PeerError, match=f"lives on, .*'kill -9 {pid}' ends both"):
                port.close(for_good=True)
            assert len(os.listdir("/proc/self/fd")) == before - 2  # the connection and the lifeline
            port.close(for_good=True)
            assert not await_end(pidfd, 0)
        finally:
            os.kill(pid, signal.SIGCONT)
            assert await_end(pidfd)  # it has no VMM any more
            os.close(pidfd)


def test_an_exit_that_came_before_is_not_served_without_the_keeper() -> None:
    """It is the next VMM's."""
    with kept(COUNTER) as (port, machine):
        machine.vcpu.go_on()
        await_exit(machine.vcpu, 1)
        port.lost()
        with pytest.raises(PeerError, match="has ended"):
            machine.vcpu.run()
        os.kill(port.pid, signal.SIGKILL)
        assert await_end(port.lifeline)


def test_a_kick_that_finds_the_keeper_late_does_not_fail() -> None:
    with keeper_port() as port, ram_of(FOREVER) as ram, machine_on(ram, port=port) as machine:
        port._sock.settimeout(0.1)
        os.kill(port.pid, signal.SIGSTOP)
        machine.vcpu.kick()
        with pytest.raises(PeerError, match="does not answer"):
            machine.vcpu.run()
        os.kill(port.pid, signal.SIGKILL)
        assert await_end(port.lifeline)


class SlowToLeave:
    """A lock after whose release somebody else always comes first."""

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(self, *args: Any) -> None:
        self._lock.__exit__(*args)
        time.sleep(0.2)


def test_nothing_is_asked_after_an_answer_that_did_not_come() -> None:
    """Not even by who waited for the same connection: the late answer would be taken for its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pidfd = os.pidfd_open(os.getpid())
        hello = keeper.HELLO.pack(keeper.PROTOCOL, os.getpid(), 1)
        socket.send_fds(theirs, [keeper.REPLY.pack(0, 0, 0) + hello], [pidfd])
        os.close(pidfd)
        port = KeeperPort(ours)
        ours.settimeout(0.2)
        port._lock = SlowToLeave(port._lock)  # type: ignore[assignment]
        failures: list[PeerError] = []

        def ask() -> None:
            try:
                port.detach()
            except PeerError as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(failures) == 2
        port.close()
        ops = [keeper.REQUEST.unpack(message)[0] for message in iter(lambda: theirs.recv(1 << 16), b"")]
        assert ops == [keeper.OP_HELLO, keeper.OP_DETACH]


def test_an_answer_that_comes_late_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with keeper_port() as port, ram_of(FOREVER) as ram, machine_on(ram, port=port) as machine:
        port._sock.settimeout(0.1)
        os.kill(port.pid, signal.SIGSTOP)
        try:
            with pytest.raises(PeerError, match="does not answer"):
                machine.vm.check(abi.Cap.USER_MEMORY)
        finally:
            os.kill(port.pid, signal.SIGCONT)
        time.sleep(0.1)
        with pytest.raises(PeerError, match="does not answer"):
            machine.vm.check(abi.Cap.NR_VCPUS)
        os.kill(port.pid, signal.SIGKILL)
        assert await_end(port.lifeline)


def test_an_fd_number_may_name_something_else_later() -> None:
    """The keeper's copy is of what was stored, whatever had that number before."""
    with keeper_port() as port:
        numbers = set()
        for _ in range(3):
            memfd = os.memfd_create("one", os.MFD_CLOEXEC)
            numbers.add(memfd)
            os.ftruncate(memfd, 0x1000)
            port.store("serial", 0, memfd)
            rows = {(row.name, row.id): row.fd for row in port.table()}
            assert os.fstat(rows["serial", 0]).st_ino == os.fstat(memfd).st_ino
            for fd in rows.values():
                os.close(fd)
            port.drop("serial", 0)
            os.close(memfd)
        assert len(numbers) == 1
