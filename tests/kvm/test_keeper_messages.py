"""What a keeper does with messages: each gets an answer, whoever sends it and whatever it says, and none ends
the keeper but OP_QUIT of the VMM that is attached.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kvm.keeping import RawVmm, await_end, keeper_port
from tests.kvm.real_mode import RAM_SIZE, machine_on, ram_of
from vmm.errors import HostError, PeerError
from vmm.kvm import IoctlError, System, abi, keeper
from vmm.kvm.keeper_port import HeldFd, KeeperPort

pytestmark = pytest.mark.kvm

HUGE = (1 << 64) - 1
NAME = keeper.NAME.pack(b"something", 7, 0)
OF_A_VMM = [op for name, op in vars(keeper).items() if name.startswith("OP_") and op not in keeper.ANYBODY]


@pytest.fixture
def path(tmp_socket_dir: Path) -> Path:
    return tmp_socket_dir / "keeper.sock"


@pytest.fixture
def vmm(path: Path) -> Iterator[RawVmm]:
    """The VMM that is attached to a keeper."""
    with keeper_port(path) as port:
        port.detach()
        vmm = RawVmm.connect(path)
        assert vmm.ask(keeper.OP_ATTACH)[1] == 0
        yield vmm
        assert vmm.ask(keeper.OP_HELLO)[1] == 0, "the keeper does not answer any more"
        vmm.close()
        port.attach()


def memory_payload(memfd: int, guest_memfd: int = keeper.NO_FD) -> bytes:
    return struct.pack("=IIQ", memfd & keeper.NO_FD, guest_memfd, 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"x", errno.EINVAL),
        (bytes(keeper.REQUEST.size - 1), errno.EINVAL),
        (keeper.REQUEST.pack(0xFFFFFFFF, -1, 0, 0, 0, 0, 0), errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_IOCTL, -1, HUGE, HUGE, HUGE, HUGE, HUGE), errno.EPERM),
        (keeper.REQUEST.pack(keeper.OP_IOCTL, -1, 0xAE03, 0, 0, 0, 0), errno.EBADF),
        (keeper.REQUEST.pack(keeper.OP_IOCTL, 0, 0xAE03, 0, 0, 0, 0), errno.EBADF),  # its stdin
        (keeper.REQUEST.pack(keeper.OP_IOCTL, 0, keeper.KVM_RUN, 0, 0, 0, 0), errno.EPERM),
        (keeper.REQUEST.pack(keeper.OP_CREATE, 0, 0xAE03, 0, 0, 0, 0), errno.EPERM),
        (keeper.REQUEST.pack(keeper.OP_ATTRIBUTE, 0, 0xAE03, 0, 0, 0, 0), errno.EPERM),
        (keeper.REQUEST.pack(keeper.OP_MEMORY, -1, 0, 0, 0, HUGE, HUGE), errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_MEMORY, -1, 0, 0, 0, HUGE, HUGE) + memory_payload(-2), errno.EBADF),
        (keeper.REQUEST.pack(keeper.OP_DIRTY_LOG, -1, 0, 0, HUGE, 0, 0), errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_VCPU, -1, 0, HUGE, 0, 0, 0), errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_VCPU, -1, 0, 0, 0, 0, 0), errno.EBADF),
        (keeper.REQUEST.pack(keeper.OP_KICK, -1, 0, HUGE, 0, 0, 0), errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_STORE, -1, 0, 0, 0, 0, 0), errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_STORE, -1, 0, 0, 0, 0, 0) + NAME, errno.EBADF),
        (keeper.REQUEST.pack(keeper.OP_DROP, -1, 0, 0, 0, 0, 0) + NAME, errno.EBADF),
        (keeper.REQUEST.pack(keeper.OP_DROP, -1, 0, 0, 0, 0, 0) + NAME[:-1], errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_SUCCESSOR, -1, 0, 0, 0, 0, 0), errno.EINVAL),
        (keeper.REQUEST.pack(keeper.OP_ORPHAN, -1, 0, HUGE, 0, 0, 0), errno.EINVAL),
        (keeper.REQUEST.pack(0, -1, 0, 0, 0, 0, 0) + bytes(1 + keeper.PAYLOAD_MAX), errno.EINVAL),
    ],
)  # fmt: skip
def test_a_bad_message_gets_an_errno(vmm: RawVmm, data: bytes, expected: int) -> None:
    result, number, _, fds = vmm.say(data)
    assert (result, number, fds) == (-1, expected, [])


def test_the_table_from_anywhere(vmm: RawVmm) -> None:
    total = vmm.ask(keeper.OP_TABLE)[0]
    for first in (total, total + 1, HUGE):
        result, number, payload, fds = vmm.ask(keeper.OP_TABLE, arguments=[first])
        assert (result, number, payload, fds) == (total, 0, b"", [])


def test_more_fds_than_a_message_has(vmm: RawVmm) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert vmm.ask(keeper.OP_STORE, payload=NAME, fds=[null] * 9)[1] == errno.EINVAL
        assert vmm.ask(keeper.OP_STORE, payload=NAME, fds=[null] * 8)[1] == 0  # the first counts
        assert vmm.ask(keeper.OP_STORE, payload=NAME, fds=[null])[1] == errno.EEXIST
        assert vmm.ask(keeper.OP_SUCCESSOR, fds=[null])[1] == errno.ENOTSOCK
        assert vmm.ask(keeper.OP_SUCCESSOR, fds=[null, null])[1] == errno.EINVAL
    finally:
        os.close(null)
    assert vmm.ask(keeper.OP_DROP, payload=NAME)[1] == 0


def test_credentials_are_no_fds(vmm: RawVmm) -> None:
    """The kernel adds them to what comes on a socket whose other owner has asked for them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        assert vmm.ask(keeper.OP_SUCCESSOR, fds=[theirs.fileno()])[1] == 0
    successor = RawVmm(ours)
    assert successor.ask(keeper.OP_HELLO)[1] == 0
    successor.close()


def test_a_stream_is_no_successor(vmm: RawVmm) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        assert vmm.ask(keeper.OP_SUCCESSOR, fds=[stream.fileno()])[1] == errno.EINVAL


def test_only_the_attached_vmm_is_obeyed(vmm: RawVmm, path: Path) -> None:
    other = RawVmm.connect(path)
    for op in OF_A_VMM:
        assert other.ask(op)[1] == errno.EPERM, op
    assert other.ask(keeper.OP_ATTACH)[1] == errno.EBUSY
    assert other.ask(keeper.OP_TABLE)[1] == 0
    assert vmm.ask(keeper.OP_DETACH)[1] == 0
    assert other.ask(keeper.OP_ATTACH)[1] == 0
    assert vmm.ask(keeper.OP_KICK)[1] == errno.EPERM
    other.close()  # as if it had been killed
    assert vmm.ask(keeper.OP_ATTACH)[1] == 0


def test_a_client_that_takes_no_answers_is_dismissed(vmm: RawVmm, path: Path) -> None:
    mute = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mute:
        mute.connect(str(path))
        mute.settimeout(5)

        def talk() -> None:
            while True:
                mute.send(keeper.REQUEST.pack(keeper.OP_HELLO, 0, 0, 0, 0, 0, 0), socket.MSG_NOSIGNAL)

        with pytest.raises(ConnectionError):  # its answers fill its socket; then there is nobody any more
            talk()
    started = time.monotonic()
    assert vmm.ask(keeper.OP_HELLO)[1] == 0
    assert time.monotonic() - started < 1


def test_too_many_clients(vmm: RawVmm, path: Path) -> None:
    others = [RawVmm.connect(path) for _ in range(keeper.CLIENTS_MAX)]
    answered = 0
    for other in others:
        try:
            answered += other.ask(keeper.OP_HELLO)[1] == 0
        except (AssertionError, ConnectionError):
            continue
    for other in others:
        other.close()
    assert 0 < answered < keeper.CLIENTS_MAX
    assert vmm.ask(keeper.OP_HELLO)[1] == 0  # by now it may have seen them go; after the next one it has
    assert vmm.ask(keeper.OP_HELLO)[1] == 0
    again = RawVmm.connect(path)
    assert again.ask(keeper.OP_HELLO)[1] == 0
    again.close()


AS_NOBODY = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
try:
    print(sock.recv(1))
except ConnectionResetError:
    print(b"")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(vmm: RawVmm, path: Path) -> None:
    """Though the files let him through."""
    path.parent.chmod(0o711)
    path.chmod(0o666)
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", AS_NOBODY, path], capture_output=True, check=True, timeout=20
    )
    assert said.stdout == b"b''\n"


def test_memory_that_is_too_short(vmm: RawVmm) -> None:
    """A slot behind the end of its memfd would be a slot without memory."""
    with System() as system:
        result, _, payload, _ = vmm.ask(keeper.OP_STORE, payload=NAME, fds=[system.fd])
        kvm = int.from_bytes(payload, "little")
        _, number, payload, _ = vmm.ask(keeper.OP_CREATE, kvm, abi.KVM_CREATE_VM.number)
        assert (result, number) == (0, 0)
        vm = int.from_bytes(payload, "little")
    memfd = os.memfd_create("short", os.MFD_CLOEXEC)
    os.ftruncate(memfd, 0x1000)
    _, _, payload, _ = vmm.ask(keeper.OP_STORE, payload=keeper.NAME.pack(b"ram", 0, 0), fds=[memfd])
    os.close(memfd)
    ram = int.from_bytes(payload, "little")
    for size, offset in ((0x2000, 0), (0x1000, 0x1000), (HUGE, 0), (0x1000, HUGE), (0x1000, 0x800)):
        answer = vmm.ask(keeper.OP_MEMORY, vm, 0, [0, 0, size, offset], memory_payload(ram))
        assert answer[1] == errno.EINVAL, (size, offset)
    assert vmm.ask(keeper.OP_MEMORY, vm, 0, [0, 0, 0x1000, 0], memory_payload(ram))[1] == 0
    assert vmm.ask(keeper.OP_VCPU, vm)[1] == errno.ENOTTY  # a VM is no vCPU


def test_memory_of_a_slot_is_not_dropped() -> None:
    with keeper_port() as port, ram_of(b"\xf4") as ram, machine_on(ram, port=port) as machine:
        (row,) = [key for key, fd in port._names.items() if fd == ram.memfd]
        with pytest.raises(PeerError, match="refuses to drop"):
            port.drop(*row)
        machine.vm.set_memory(0, 0, 0, ram.hva, ram.memfd, 0)
        port._names[row] = ram.memfd
        port.drop(*row)


def test_one_vm_by_one_number() -> None:
    """What the keeper maps and how large a dirty log is, it knows by the slot alone."""
    with keeper_port() as port, ram_of(b"\xf4") as ram, machine_on(ram, port=port) as machine:
        with pytest.raises(IoctlError) as caught:
            machine.system.create_vm()
        assert caught.value.errno == errno.EEXIST
        alias = os.dup(machine.vm.fd)
        try:
            port.store("alias", 0, alias)
            for size in (0, RAM_SIZE):
                with pytest.raises(IoctlError) as caught:
                    port.set_user_memory(alias, 0, 0, 0, size, ram.hva, ram.memfd, 0)
                assert caught.value.errno == errno.EBADF
            ram.give(machine.vm, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
            with pytest.raises(IoctlError) as caught:
                port.get_dirty_log(alias, 0, bytearray(8))
            assert caught.value.errno == errno.EINVAL
            machine.vm.get_dirty_log(0, bytearray(8))
            with pytest.raises(PeerError, match="refuses to drop vm/0"):
                port.drop("vm", 0)
            port.drop("alias", 0)
            ram.give(machine.vm)
        finally:
            os.close(alias)


def test_a_vm_that_was_not_made_may_be_made_yet() -> None:
    with keeper_port() as port, ram_of(b"\xf4") as ram:
        with System(port=port) as system, pytest.raises(IoctlError):
            system.create_vm(0x7FFF)  # a type that there is not
        with machine_on(ram, port=port):
            pass


def test_no_capability_is_enabled_but_those_that_are_used() -> None:
    """Some take addresses, others change what the VM is."""
    with keeper_port() as port, ram_of(b"\xf4") as ram, machine_on(ram, port=port) as machine:
        for cap in (abi.Cap.X86_DISABLE_EXITS, abi.Cap.MAX_VCPUS, 1 << 31):
            with pytest.raises(IoctlError) as caught:
                machine.vm.enable_cap(cap, 0, 0)
            assert caught.value.errno == errno.EPERM
        machine.vm.enable_cap(abi.Cap.EXCEPTION_PAYLOAD, 0, 1)


def test_an_irqfd_names_fds_that_it_holds_and_no_others(vmm: RawVmm) -> None:
    """Both of them, each where the kernel looks for it."""
    eventfd = os.eventfd(0)
    held = int.from_bytes(vmm.ask(keeper.OP_STORE, payload=NAME, fds=[eventfd])[2], "little")
    os.close(eventfd)
    foreign = 1  # its stdout
    for fd, resample, expected in (
        (foreign, 0, errno.EBADF),
        (held, foreign, errno.EBADF),
        (held, 0, errno.ENOTTY),  # the kernel's answer: this is no VM
        (held, held, errno.ENOTTY),
    ):
        irqfd = bytes(abi.kvm_irqfd(fd=fd, gsi=1, resamplefd=resample))
        assert vmm.ask(keeper.OP_IOCTL, held, abi.KVM_IRQFD.number, payload=irqfd)[1] == expected


def test_no_fd_is_left_in_it(path: Path) -> None:
    """Slots, names, clients and machines come and go."""
    with keeper_port(path) as port, ram_of(b"\xf4") as ram:

        def fds() -> int:
            return len(os.listdir(f"/proc/{port.pid}/fd"))

        with machine_on(ram, port=port) as machine:
            before = fds()
            for _ in range(5):
                machine.vm.set_memory(0, 0, 0, ram.hva, ram.memfd, 0)
                ram.give(machine.vm)
                eventfd = os.eventfd(0)
                port.store("irqfd", 3, eventfd)
                port.drop("irqfd", 3)
                machine.vm.assign_ioeventfd(eventfd, 0x3F8, 1, pio=True)
                machine.vm.deassign_ioeventfd(eventfd, 0x3F8, 1, pio=True)
                os.close(eventfd)
                port.make_successor().close()
                port.detach()
                port.attach()
                rows = close_all(port)
                assert len(rows) == len({row.keepers_fd for row in rows})
            deadline = time.monotonic() + 5
            while fds() != before:  # it may not have seen yet that the last one left
                assert time.monotonic() < deadline, (fds(), before)
                time.sleep(0.01)


def close_all(port: KeeperPort) -> list[HeldFd]:
    """The table, its fds closed."""
    rows = port.table()
    for row in rows:
        os.close(row.fd)
    return rows


def test_a_slot_can_be_changed_and_is_unmapped_when_it_goes() -> None:
    with keeper_port() as port, ram_of(b"\xf4") as ram, machine_on(ram, port=port) as machine:

        def mappings() -> int:
            return Path(f"/proc/{port.pid}/maps").read_text().count("/memfd:ram")

        assert mappings() == 1
        ram.give(machine.vm, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)  # the same memory, at the same address
        assert mappings() == 1
        machine.vm.set_memory(0, 0, 0, ram.hva, ram.memfd, 0)
        assert mappings() == 0
        ram.give(machine.vm)
        assert mappings() == 1


# --- what it is made of ---


def test_it_imports_nothing_of_vmm() -> None:
    tree = ast.parse(Path(keeper.__file__).read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_its_document_names_every_message() -> None:
    document = Path(__file__).parent.parent.parent / "docs" / "keeper.md"
    _, _, section = document.read_text().partition("## Its messages")
    rows = [line.split("|") for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    named = {name: row[2].strip() for row in rows for name in re.findall("`([A-Z_]+)`", row[1])}
    assert named.keys() == {name[3:] for name in vars(keeper) if name.startswith("OP_")}
    anybody = {name for name, who in named.items() if who == "anybody"}
    assert {getattr(keeper, f"OP_{name}") for name in anybody} == keeper.ANYBODY


def test_it_is_small() -> None:
    with keeper_port() as port, ram_of(b"\xf4") as ram, machine_on(ram, port=port):
        lines = Path(f"/proc/{port.pid}/smaps_rollup").read_text().splitlines()
        private_kib = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    assert private_kib < 10 * 1024


# --- how it ends ---


def test_without_a_vmm_it_ends_unless_told_otherwise() -> None:
    port = KeeperPort.start()
    pidfd = os.dup(port.lifeline)
    try:
        port.close()
        assert await_end(pidfd)
    finally:
        os.close(pidfd)


def test_a_vmm_that_detached_is_not_gone() -> None:
    with keeper_port() as port:
        port.set_orphan_timeout(0.2)
        port.detach()
        time.sleep(0.5)
        port.attach()


def test_the_orphan_timeout_is_kept(path: Path) -> None:
    with keeper_port(path) as port:
        pidfd = os.dup(port.lifeline)
        try:
            port.set_orphan_timeout(0.3)
            started = time.monotonic()
            port.close()
            RawVmm.connect(path).close()  # somebody looks, who is no VMM
            assert await_end(pidfd)
            assert 0.25 < time.monotonic() - started < 2
            assert not path.exists()
        finally:
            os.close(pidfd)


def test_a_vmm_that_is_about_to_attach_is_not_too_late(path: Path) -> None:
    """It has asked for the table, and builds its machine."""
    with keeper_port(path) as port:
        pidfd = os.dup(port.lifeline)
        try:
            port.set_orphan_timeout(0.3)
            vmm = RawVmm.connect(path)
            assert vmm.ask(keeper.OP_TABLE)[1] == 0
            port.close()
            assert not await_end(pidfd, 0.8)
            assert vmm.ask(keeper.OP_ATTACH)[1] == 0
            vmm.close()
            assert await_end(pidfd)
        finally:
            os.close(pidfd)


def test_it_can_wait_for_ever(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        listener.listen()
        port = KeeperPort.start(listener)
    port.live_on(0.0)
    pidfd = os.dup(port.lifeline)
    try:
        port.close()
        assert not await_end(pidfd, 0.5)
        again = KeeperPort.connect(str(path))
        assert (again.pid, again.identity) == (port.pid, port.identity)
        again.attach()
        again.close(for_good=True)
        assert await_end(pidfd)
    finally:
        os.close(pidfd)


def test_sigterm_ends_it_once_it_has_no_vmm(path: Path) -> None:
    """Not by one that came before: that was the VMM's to follow."""
    with keeper_port(path) as port:
        port.live_on(0.0)
        pidfd = os.dup(port.lifeline)
        try:
            vmm = RawVmm.connect(path)
            port.close()
            assert vmm.ask(keeper.OP_ATTACH)[1] == 0
            os.kill(port.pid, signal.SIGTERM)
            vmm.close()
            assert not await_end(pidfd, 0.3)
            vmm = RawVmm.connect(path)
            assert vmm.ask(keeper.OP_ATTACH)[1] == 0
            os.kill(port.pid, signal.SIGTERM)
            assert not await_end(pidfd, 0.3)
            vmm.close()
            assert not await_end(pidfd, 0.3)
            os.kill(port.pid, signal.SIGTERM)
            assert await_end(pidfd)
        finally:
            os.close(pidfd)


def test_quit_leaves_no_socket_behind(path: Path) -> None:
    with keeper_port(path) as port:
        assert path.exists()
        port.close(for_good=True)
        assert not path.exists()  # as soon as the answer is there


def test_a_vmm_that_quits_and_does_not_wait(path: Path) -> None:
    with keeper_port(path) as port:
        port.detach()
        vmm = RawVmm.connect(path)
        assert vmm.ask(keeper.OP_ATTACH)[1] == 0
        vmm.sock.send(keeper.REQUEST.pack(keeper.OP_QUIT, -1, 0, 0, 0, 0, 0))
        vmm.close()
        assert await_end(port.lifeline)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_ends_vmms_does_not_end_it(number: signal.Signals) -> None:
    with keeper_port() as port, ram_of(b"\xf4") as ram, machine_on(ram, port=port) as machine:
        os.kill(port.pid, number)
        assert not await_end(port.lifeline, 0.2)
        assert machine.vm.check(abi.Cap.USER_MEMORY) == 1


@pytest.mark.parametrize("call", ["pidfd_open", "waitid"])  # of Linux 5.3 and 5.4
def test_a_kernel_that_is_too_old_for_it(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS if call == "pidfd_open" else errno.EINVAL, "fake")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(HostError, match=r"use Linux 5\.4 or later, or --no-keeper"):
        KeeperPort.start()


def test_another_protocol_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        hello = keeper.REPLY.pack(0, 0, 0) + keeper.HELLO.pack(keeper.PROTOCOL + 1, 1234, 5)
        pidfd = os.pidfd_open(os.getpid())
        socket.send_fds(theirs, [hello], [pidfd])
        os.close(pidfd)
        with pytest.raises(PeerError, match=f"1234, speaks protocol {keeper.PROTOCOL + 1}"):
            KeeperPort(ours)


@pytest.mark.parametrize(
    ("payload", "fds"), [(b"", 0), (keeper.HELLO.pack(1, 2, 3), 2), (b"", 1), (bytes(3), 1)]
)
def test_a_greeting_that_is_none(payload: bytes, fds: int) -> None:
    """(What has come with it is closed: the fixture looks.)"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        socket.send_fds(theirs, [keeper.REPLY.pack(0, 0, 0) + payload], [theirs.fileno()] * fds)
        with pytest.raises(PeerError, match="no keeper"):
            KeeperPort(ours)


@pytest.mark.parametrize("errno_", [0, errno.EIO])
def test_a_table_that_is_none(errno_: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pidfd = os.pidfd_open(os.getpid())
        hello = keeper.HELLO.pack(keeper.PROTOCOL, os.getpid(), 1)
        socket.send_fds(theirs, [keeper.REPLY.pack(0, 0, 0) + hello], [pidfd])
        row = keeper.NAME.pack(b"\xff" * 32, 0, 1)
        answer = keeper.REPLY.pack(-1, errno_, 0) if errno_ else keeper.REPLY.pack(2, 0, 0) + row
        socket.send_fds(theirs, [answer], [] if errno_ else [pidfd, pidfd])
        os.close(pidfd)
        port = KeeperPort(ours)
        with pytest.raises(PeerError, match="a table that is none" if not errno_ else "refuses to say"):
            port.table()
        port.close()


def test_what_is_no_keeper_is_refused(tmp_socket_dir: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with pytest.raises(PeerError):
        KeeperPort(ours)
    with pytest.raises(PeerError, match="no keeper answers at"):
        KeeperPort.connect(str(tmp_socket_dir / "nothing"))
