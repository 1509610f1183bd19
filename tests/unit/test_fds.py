"""The fd store, and what the kernel says an fd is."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.errors import PeerError, StateError, VmmError
from vmm.fds import RAM_SEALS, FdKind, FdStore, check_received, identify, sealed_memfd

KVM_CREATE_VM = 0xAE01  # linux/kvm.h
KVM_CREATE_VCPU = 0xAE41


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def one_of(pair: tuple[int, int]) -> int:
    os.close(pair[1])
    return pair[0]


def plain_memfd() -> int:
    fd = os.memfd_create("plain", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    return fd


OPENERS: dict[FdKind, Callable[[], int]] = {
    FdKind.MEMFD: lambda: sealed_memfd("test", 4096),
    FdKind.SOCKET: lambda: socket.socket(socket.AF_UNIX).detach(),
    FdKind.PIPE: lambda: one_of(os.pipe()),
    FdKind.TTY: lambda: one_of(os.openpty()),
    FdKind.CHARACTER: lambda: os.open("/dev/null", os.O_RDWR),
    FdKind.FILE: lambda: os.open(__file__, os.O_RDONLY),
    FdKind.EVENTFD: lambda: os.eventfd(0),
    FdKind.OTHER: lambda: os.open("/", os.O_RDONLY),
}


@pytest.mark.parametrize("kind", OPENERS, ids=lambda kind: kind.name)
def test_identify(fds: FdStore, kind: FdKind) -> None:
    assert identify(fds.add("any", 0, OPENERS[kind]())).kind is kind


def test_identify_sizes_and_seals(fds: FdStore) -> None:
    memfd = identify(fds.add("a", 0, sealed_memfd("test", 12345)))
    assert (memfd.size, memfd.seals) == (12345, RAM_SEALS | fcntl.F_SEAL_SEAL)
    plain = identify(fds.add("b", 0, plain_memfd()))
    assert (plain.size, plain.seals) == (8192, 0)
    file = identify(fds.add("c", 0, OPENERS[FdKind.FILE]()))
    assert (file.size, file.seals) == (Path(__file__).stat().st_size, 0)


@pytest.mark.parametrize(
    "name", ["memfd:x", "anon_inode:kvm-vm", "anon_inode:[eventfd]"], ids=["memfd", "kvm", "eventfd"]
)
def test_a_file_cannot_pose_as_something_else(fds: FdStore, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("")
    assert identify(fds.add("any", 0, os.open(path, os.O_RDONLY))).kind is FdKind.FILE


def test_a_fifo_cannot_pose_as_a_block_device(fds: FdStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sda")
    fd = fds.add("any", 0, os.open(tmp_path / "sda", os.O_RDONLY | os.O_NONBLOCK))
    assert identify(fd).kind is FdKind.PIPE


def test_an_epoll_is_none_of_the_kinds(fds: FdStore) -> None:
    with select.epoll() as epoll:
        assert identify(epoll.fileno()).kind is FdKind.OTHER


def test_identify_kvm(fds: FdStore, kvm_device: Path) -> None:
    kvm = fds.add("kvm", 0, os.open(kvm_device, os.O_RDWR))
    assert identify(kvm).kind is FdKind.CHARACTER
    vm = fds.add("vm", 0, fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
    assert check_received("vm", 0, vm).kind is FdKind.KVM_VM
    vcpu = fds.add("vcpu", 0, fcntl.ioctl(vm, KVM_CREATE_VCPU, 0))
    assert check_received("vcpu", 0, vcpu).kind is FdKind.KVM_VCPU
    with pytest.raises(StateError, match=r"fd vm/0 is a kvm-vcpu where a kvm-vm was expected"):
        check_received("vm", 0, vcpu)


def test_identify_a_closed_fd() -> None:
    fd = OPENERS[FdKind.FILE]()
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        identify(fd)


def test_received_fds_that_are_right(fds: FdStore) -> None:
    assert check_received("ram", 0, fds.add("ram", 0, sealed_memfd("ram", 4096)), 4096).size == 4096
    assert check_received("serial", 0, fds.add("serial", 0, OPENERS[FdKind.TTY]())).kind is FdKind.TTY


@pytest.mark.parametrize(
    ("name", "opener", "size", "text"),
    [
        ("disk", OPENERS[FdKind.FILE], None, "fd disk/3: this VMM knows no fd of that name"),
        ("ram", OPENERS[FdKind.PIPE], None, "fd ram/3 is a pipe where a memfd was expected; refused"),
        ("ram", plain_memfd, 8192, "fd ram/3 is not sealed against shrinking and growing; refused"),
        ("ram", OPENERS[FdKind.MEMFD], 8192, "fd ram/3 has 4096 bytes where 8192 were expected; refused"),
        (
            "serial",
            OPENERS[FdKind.MEMFD],
            None,
            "fd serial/3 is a memfd where a character device or file or pipe or socket or tty was expected",
        ),
    ],
    ids=["name", "kind", "seals", "size", "stream"],
)
def test_received_fds_that_are_refused(
    fds: FdStore, name: str, opener: Callable[[], int], size: int | None, text: str
) -> None:
    fd = fds.add(name, 3, opener())
    with pytest.raises(StateError, match=text):
        check_received(name, 3, fd, size)


def test_a_sealed_memfd_keeps_its_size(fds: FdStore) -> None:
    fd = fds.add("ram", 0, sealed_memfd("ram", 4096))
    assert not os.get_inheritable(fd)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_memfd_that_cannot_be_made_leaves_no_fd(fds: FdStore) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        sealed_memfd("ram", -1)


def test_store_owns_and_closes() -> None:
    store = FdStore()
    opened = [store.add("serial", index, OPENERS[FdKind.FILE]()) for index in range(3)]
    assert list(store.items()) == [("serial", index, fd) for index, fd in enumerate(opened)]
    assert len(store) == 3
    store.remove("serial", 0)
    assert [is_open(fd) for fd in opened] == [False, True, True]
    store.remove("serial", 0)
    taken = store.take("serial", 1)
    assert taken == opened[1]
    store.close()
    assert [is_open(fd) for fd in opened] == [False, True, False]
    assert len(store) == 0
    os.close(taken)
    assert store.take("serial", 1) is None


def test_store_names(fds: FdStore) -> None:
    fd = fds.get_or_open("qmp", 0, OPENERS[FdKind.FILE])
    assert fds.get_or_open("qmp", 0, OPENERS[FdKind.FILE]) == fd
    assert fds.find("qmp") == fds.get("qmp") == fd
    assert fds.find("qmp", 1) is None
    with pytest.raises(StateError, match="fd qmp/1 is missing from the fd table"):
        fds.get("qmp", 1)
    with tempfile.TemporaryFile() as other, pytest.raises(VmmError, match="fd qmp/0 exists already"):
        fds.add("qmp", 0, other.fileno())


# --- sockets ---


def listening() -> int:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")  # a name of the kernel's choosing: unix(7), autobind
    sock.listen()
    return sock.detach()


def pair_of(family: socket.AddressFamily, kind: socket.SocketKind) -> int:
    ours, theirs = socket.socketpair(family, kind)
    theirs.close()
    return ours.detach()


SOCKET_OPENERS: dict[str, Callable[[], int]] = {
    "stream": lambda: pair_of(socket.AF_UNIX, socket.SOCK_STREAM),
    "seqpacket": lambda: pair_of(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "datagram": lambda: pair_of(socket.AF_UNIX, socket.SOCK_DGRAM),
    "listening": listening,
    "internet": lambda: socket.socket(socket.AF_INET).detach(),
}
RIGHT = {"keeper": "seqpacket", "serial-listen": "listening", "qmp": "stream"}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("kind", SOCKET_OPENERS)
def test_a_socket_is_the_one_that_its_name_says(fds: FdStore, name: str, kind: str) -> None:
    fd = fds.add(name, 0, SOCKET_OPENERS[kind]())
    if RIGHT[name] == kind:
        assert check_received(name, 0, fd).kind is FdKind.SOCKET
    else:
        with pytest.raises(StateError, match=f"fd {name}/0 is a socket of family .* was expected; refused"):
            check_received(name, 0, fd)


def test_a_keeper_is_of_our_user(fds: FdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = fds.add("keeper", 0, SOCKET_OPENERS["seqpacket"]())
    monkeypatch.setattr("vmm.sockets.peer", lambda _: (7, 1001))
    with pytest.raises(PeerError, match="fd keeper/0: the peer, process 7, is uid 1001"):
        check_received("keeper", 0, fd)


# --- what nobody wants ---


def test_what_was_received_and_not_asked_for(fds: FdStore) -> None:
    for name, index in (("ram", 0), ("ram", 1), ("serial", 5), ("vm", 0), ("image", 0)):
        fds.add(name, index, os.eventfd(0))
    assert fds.unasked() == []
    fds.received()
    fds.get("ram")
    assert fds.find("serial") is None
    os.close(fds.take("vm") or -1)
    fds.get_or_open("image", 0, lambda: os.eventfd(0))
    fds.get_or_open("irqfd", 0, lambda: os.eventfd(0))
    assert fds.unasked() == [("ram", 1), ("serial", 5)]
    fds.remove("serial", 5)
    assert fds.unasked() == [("ram", 1)]


class Unwilling:
    """A vault whose process has ended."""

    def store(self, name: str, index: int, fd: int) -> None:
        raise PeerError(f"{name}/{index} is not held")

    def drop(self, name: str, index: int) -> None:
        raise PeerError(f"{name}/{index} is not dropped")


def test_a_vault_that_fails_costs_no_fd(fds: FdStore) -> None:
    fd = fds.add("token", 0, plain_memfd())
    fds.vault = Unwilling()
    with pytest.raises(PeerError, match="state/0 is not held"):
        fds.get_or_open("state", 0, plain_memfd)
    for part_with in (fds.take, fds.remove):
        with pytest.raises(PeerError, match="token/0 is not dropped"):
            part_with("token")
    assert fds.get("token") == fd
    assert is_open(fd)
