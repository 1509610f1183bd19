"""A VMM whose keeper answers what no keeper does: an older one, or one that has been taken over. (What comes
with such an answer is closed: the fixture `nothing_left_behind` looks.)
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmm.errors import HostError, PeerError
from vmm.fds import sealed_memfd
from vmm.kvm import IoctlError, System, abi, keeper, keeper_port
from vmm.kvm.keeper_port import HeldFd, KeeperPort

FULL = (1 << 64) - 2  # an eventfd counts no further
Give = Callable[..., None]


class Stage:
    """A keeper's end of a connection, on which answers wait for their questions."""

    def __init__(self) -> None:
        self.ours, self.keeper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.opened: list[int] = []

    def answer(self, payload: bytes = b"", *fds: int, result: int = 0, number: int = 0) -> None:
        """An answer, to the next question that has none yet; the fds are closed."""
        socket.send_fds(self.keeper, [keeper.REPLY.pack(result, number, 0) + payload], fds)
        for fd in fds:
            os.close(fd)

    def greet(self) -> KeeperPort:
        pid = os.getpid()
        self.answer(keeper.HELLO.pack(keeper.PROTOCOL, pid, 1), os.pidfd_open(pid))
        return KeeperPort(self.ours)

    def held(self, port: KeeperPort, number: int = 7) -> int:
        """An fd of this process that the keeper holds under that number."""
        fd = os.eventfd(0)
        self.opened.append(fd)
        self.answer(number.to_bytes(4, "little"))
        port.admit(fd)
        return fd

    def close(self) -> None:
        for fd in self.opened:
            os.close(fd)
        self.ours.close()
        self.keeper.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
def port(stage: Stage) -> Iterator[KeeperPort]:
    port = stage.greet()
    yield port
    port.close()


def refuses(port: KeeperPort, call: Callable[[], object], match: str = "makes no sense") -> None:
    """Now and from then on."""
    with pytest.raises(PeerError, match=match):
        call()
    with pytest.raises(PeerError, match=match):
        port.detach()


def device() -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


# --- the shape of an answer ---


@pytest.mark.parametrize("op", ["detach", "attach", "kick", "store", "drop", "ioctl", "successor"])
def test_fds_that_nobody_asked_for(stage: Stage, port: KeeperPort, op: str) -> None:
    fd = stage.held(port)
    asks: dict[str, Callable[[], object]] = {
        "detach": port.detach,
        "attach": port.attach,
        "kick": lambda: port._do(keeper.OP_KICK, "kick"),
        "store": lambda: port.store("serial", 0, fd),
        "drop": lambda: port.drop("admitted", 0),
        "ioctl": lambda: port.ioctl(fd, abi.KVM_CHECK_EXTENSION, 1),
        "successor": port.make_successor,
    }
    stage.answer(bytes(4) if op == "store" else b"", device())
    refuses(port, asks[op])


@pytest.mark.parametrize(
    ("result", "number"), [(0, 5), (-1, 0), (0, -5), (-1, -5), (-1, 1 << 30), ((1 << 31) - 1, 16)]
)
def test_an_errno_that_is_none(stage: Stage, port: KeeperPort, result: int, number: int) -> None:
    fd = stage.held(port)
    stage.answer(result=result, number=number)
    refuses(port, lambda: port.ioctl(fd, abi.KVM_CHECK_EXTENSION, 1))


@pytest.mark.parametrize("size", [0, 7, 9, keeper.PAYLOAD_MAX])
def test_answers_of_another_size(stage: Stage, size: int) -> None:
    asks: list[Callable[[KeeperPort, int], object]] = [
        lambda port, fd: port.get_attr(fd, 0, 0),
        lambda port, fd: port.get_dirty_log(fd, 0, bytearray(8)),
        lambda port, fd: port.ioctl(fd, abi.KVM_GET_CLOCK, abi.kvm_clock_data()),
        lambda port, fd: port.store("serial", 0, fd),
    ]
    for ask in asks:
        with ExitStack() as cleanup:
            other = Stage()
            cleanup.callback(other.close)
            port = other.greet()
            cleanup.callback(port.close)
            fd = other.held(port)
            other.answer(bytes(size))
            refuses(port, lambda: ask(port, fd))  # noqa: B023
    stage.greet().close()


def test_what_the_kernel_has_written_comes_with_an_errno(stage: Stage, port: KeeperPort) -> None:
    fd = stage.held(port)
    stage.answer((9).to_bytes(4, "little"), result=-1, number=7)
    count = abi.kvm_msr_list()
    with pytest.raises(IoctlError):
        port.ioctl(fd, abi.KVM_GET_MSR_INDEX_LIST, count)
    assert count.nmsrs == 9


def test_a_message_that_is_too_long(stage: Stage, port: KeeperPort) -> None:
    fd = stage.held(port)
    stage.answer(bytes(keeper.PAYLOAD_MAX + 1), device())
    refuses(port, lambda: port.ioctl(fd, abi.KVM_CHECK_EXTENSION, 1), "not whole")


def test_fds_that_there_is_no_room_for(stage: Stage, port: KeeperPort) -> None:
    """The kernel leaves out what is beyond the limit, and says so."""
    fds = [device() for _ in range(8)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stage.answer(bytes(8 * keeper.NAME.size), *fds, result=8)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) - 3, hard))
    try:
        refuses(port, port.table, "not whole")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_number_that_is_no_fd(stage: Stage, port: KeeperPort) -> None:
    fd = os.eventfd(0)
    stage.opened.append(fd)
    stage.answer(b"\xff" * 4)
    refuses(port, lambda: port.admit(fd))


# --- fds ---


def test_a_lifeline_that_is_no_pidfd(stage: Stage) -> None:
    stage.answer(keeper.HELLO.pack(keeper.PROTOCOL, os.getpid(), 1), device())
    with pytest.raises(PeerError, match="no keeper"):
        KeeperPort(stage.ours)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_vm_that_is_none(stage: Stage, port: KeeperPort, count: int) -> None:
    fd = stage.held(port)
    stage.answer(bytes(4), *(device() for _ in range(count)))
    refuses(port, lambda: port.create(fd, abi.KVM_CREATE_VM))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_vcpu_without_its_eventfds(stage: Stage, port: KeeperPort, count: int) -> None:
    fd = stage.held(port)
    stage.answer(bytes(4))
    stage.answer(b"", *(device() for _ in range(count)))
    refuses(port, lambda: port.start_vcpu(fd, 0))


def unsealed(size: int) -> int:
    fd = os.memfd_create("vmm-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


@pytest.mark.parametrize(
    "slots",
    [
        lambda: sealed_memfd("vmm-slots", 4096),
        lambda: sealed_memfd("vmm-slots", 2 * keeper.SLOTS_SIZE),
        lambda: unsealed(keeper.SLOTS_SIZE),
        lambda: os.eventfd(0),
        device,
    ],
    ids=["small", "large", "unsealed", "eventfd", "device"],
)
def test_slots_that_could_be_taken_away(stage: Stage, port: KeeperPort, slots: Callable[[], int]) -> None:
    """A SIGBUS at the next exit."""
    fd = stage.held(port)
    stage.answer(bytes(4))
    stage.answer(b"", os.eventfd(0), os.eventfd(0))
    stage.answer(keeper.NAME.pack(b"kvm-slots", 0, 3), slots(), result=1)
    refuses(port, lambda: port.start_vcpu(fd, 0))


# --- the table ---


def row(name: bytes = b"serial", index: int = 0, number: int = 3) -> bytes:
    return bytes(keeper.NAME.pack(name, index, number))


@pytest.mark.parametrize(
    ("rows", "count", "total"),
    [
        ([], 0, 5),  # which never come
        ([row()], 1, keeper.FDS_MAX + 1),
        ([row(), row()], 2, 2),
        ([row(number=1 << 31)], 1, 1),
        ([row(b"\xc3\xa4")], 1, 1),
        ([row(b"a\nb")], 1, 1),
        ([row()], 2, 1),
        ([row()[:-1]], 1, 1),
    ],
)
def test_a_table_that_is_none(
    stage: Stage, port: KeeperPort, rows: list[bytes], count: int, total: int
) -> None:
    stage.answer(b"".join(rows), *(device() for _ in range(count)), result=total)
    refuses(port, port.table, "a table that is none")


def test_a_table_that_does_not_end(stage: Stage, port: KeeperPort, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time, each just in time."""
    monkeypatch.setattr(keeper_port, "ANSWER_TIMEOUT_S", 0.0)
    for index in range(2):
        stage.answer(row(index=index), device(), result=3)
    refuses(port, port.table, "a table that is none")


# --- slots ---


class Slots:
    """The fds of a VM with one vCPU, as they come with a handover."""

    def __init__(self) -> None:
        self.fds = {
            ("vm", 0): device(),
            ("vcpu", 0): device(),
            ("kvm-slots", 0): sealed_memfd("vmm-slots", keeper.SLOTS_SIZE),
            ("kvm-go", 0): os.eventfd(0),
            ("kvm-done", 0): os.eventfd(0),
        }

    @property
    def rows(self) -> list[HeldFd]:
        return [HeldFd(name, index, 100 + fd, fd) for (name, index), fd in self.fds.items()]

    def write(self, word: int, value: int) -> None:
        os.pwrite(self.fds["kvm-slots", 0], value.to_bytes(8, "little"), 8 * word)

    def read(self, word: int) -> int:
        return int.from_bytes(os.pread(self.fds["kvm-slots", 0], 8, 8 * word), "little")


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots()
    yield slots
    for fd in slots.fds.values():
        os.close(fd)


@pytest.fixture
def taken(stage: Stage, slots: Slots) -> Iterator[tuple[KeeperPort, int]]:
    """A port that has taken them over, and the vCPU."""
    port = stage.greet()
    port.take_over(slots.rows, slots.fds)
    for name in KeeperPort.OWN_NAMES:
        slots.fds[name, 0] = os.dup(slots.fds[name, 0])
    yield port, slots.fds["vcpu", 0]
    port.close()


def test_a_result_that_is_no_errno(slots: Slots, taken: tuple[KeeperPort, int]) -> None:
    port, vcpu = taken
    for word, value in ((keeper.CALLED, 5), (keeper.RETURNED, 5), (keeper.RESULT, 1 << 63)):
        slots.write(word, value)
    with pytest.raises(PeerError, match="makes no sense"):
        port.run(vcpu)


def test_a_count_that_is_at_its_end(slots: Slots, taken: tuple[KeeperPort, int]) -> None:
    port, vcpu = taken
    for word in (keeper.CALLED, keeper.RETURNED):
        slots.write(word, keeper.LARGEST_WORD)
    assert port.run(vcpu)
    port.leave(vcpu)
    assert not port.run(vcpu)
    assert slots.read(keeper.CALLED) == 0


def test_an_exit_of_the_future(slots: Slots, taken: tuple[KeeperPort, int]) -> None:
    port, vcpu = taken
    for word, value in ((keeper.CALLED, 5), (keeper.RETURNED, 5), (keeper.SINCE, keeper.LARGEST_WORD)):
        slots.write(word, value)
    assert port.pending_exit(vcpu) == 5
    assert port.waiting_ns(vcpu) == 0


def test_an_eventfd_that_counts_no_further(slots: Slots, taken: tuple[KeeperPort, int]) -> None:
    """It is readable; a write would wait for the keeper."""
    port, vcpu = taken
    slots.write(keeper.CALLED, 1)
    os.eventfd_write(slots.fds["kvm-done", 0], FULL)
    started = time.monotonic()
    port.leave(vcpu)
    assert not port.run(vcpu)
    assert time.monotonic() - started < 5


def test_an_eventfd_that_does_not_wait(slots: Slots, taken: tuple[KeeperPort, int]) -> None:
    port, vcpu = taken
    os.set_blocking(slots.fds["kvm-done", 0], False)
    slots.write(keeper.CALLED, 1)
    with pytest.raises(PeerError, match="does not wait"):
        port.run(vcpu)


@pytest.mark.parametrize("name", ["kvm-slots", "kvm-go", "kvm-done"])
def test_fds_of_slots_that_are_missing_or_others(stage: Stage, slots: Slots, name: str) -> None:
    """They stay the caller's."""
    port = stage.greet()
    lost = slots.fds.pop((name, 0))
    with pytest.raises(PeerError, match="other slots"):
        port.take_over(slots.rows, slots.fds)
    for index in (0, 1):  # another one than it should be, and one too many
        slots.fds[name, index] = device() if index == 0 else lost
        with pytest.raises(PeerError, match="makes no sense"):
            port.take_over(slots.rows, slots.fds)
    port.close()


def test_a_vcpu_beyond_the_slots(stage: Stage, slots: Slots) -> None:
    port = stage.greet()
    for name in ("vcpu", "kvm-go", "kvm-done"):
        slots.fds[name, keeper.SLOTS] = slots.fds.pop((name, 0))
    with pytest.raises(PeerError, match="other slots"):
        port.take_over(slots.rows, slots.fds)
    port.close()


# --- what is above it ---


def test_more_msrs_than_there_are(stage: Stage, port: KeeperPort) -> None:
    """16 GiB of them would have been asked for."""
    stage.answer(bytes(4))
    stage.answer(result=abi.KVM_API_VERSION)
    stage.answer(result=12288)
    with System("/dev/null", port) as system:
        stage.answer(b"\xff" * 4, result=-1, number=7)
        with pytest.raises(HostError, match="4294967295 MSRs"):
            system.msr_index_list()
        stage.answer()


def test_an_fd_that_the_keeper_will_not_drop_is_closed_here(stage: Stage, port: KeeperPort) -> None:
    stage.answer(bytes(4))
    stage.answer(result=abi.KVM_API_VERSION)
    stage.answer(result=12288)
    system = System("/dev/null", port)
    stage.answer()
    port.attach()
    stage.answer(b"what?")
    with pytest.raises(PeerError, match="makes no sense"):
        system.close()
    system.close()


SOMEBODY_ELSE = """
import os, socket, struct, sys
sock = socket.socket(fileno=int(sys.argv[1]))
sys.stdin.buffer.read()
sock.recv(100)
pid = {pid}
answer = {reply!r} + struct.pack("=IIQ", {protocol}, pid, 1)
socket.send_fds(sock, [answer], [os.pidfd_open(os.getppid())])
sock.recv(100)
"""


@pytest.mark.parametrize("pid", ["os.getpid()", "os.getppid()"])
def test_a_new_keeper_that_is_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: str
) -> None:
    program = tmp_path / "keeper.py"
    program.write_text(
        SOMEBODY_ELSE.format(pid=pid, reply=keeper.REPLY.pack(0, 0, 0), protocol=keeper.PROTOCOL)
    )
    monkeypatch.setattr(keeper, "__file__", str(program))
    with pytest.raises(HostError, match="does not say who it is"):
        KeeperPort.start()
