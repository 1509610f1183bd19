"""Fds have names: the store that owns every fd of a machine, and the check of what an fd really is.

Cold start and handover are the same code: a part asks `get_or_open(name, id, opener)` and is handed either
the fd that came from the previous VMM or a new one. The store closes what it owns; nobody else does. (QEMU's
`cpr_save_fd` has the same idea.)
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from vmm.errors import StateError, VmmError
from vmm.sockets import check_peer

RAM_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class FdKind(Enum):
    """What an fd is, read from the kernel and never from its name."""

    MEMFD = "memfd"
    GUEST_MEMFD = "guest_memfd"
    SOCKET = "socket"
    PIPE = "pipe"
    TTY = "tty"
    CHARACTER = "character device"
    BLOCK = "block device"
    FILE = "file"
    EVENTFD = "eventfd"
    KVM_VM = "kvm-vm"
    KVM_VCPU = "kvm-vcpu"
    KVM_STATS = "kvm-stats"
    OTHER = "other"


SIZED = frozenset({FdKind.MEMFD, FdKind.GUEST_MEMFD})
STREAMS = frozenset({FdKind.SOCKET, FdKind.PIPE, FdKind.TTY, FdKind.CHARACTER, FdKind.FILE})

# The kinds that a name may stand for; a received fd of another kind is refused.
EXPECTED_KINDS: dict[str, frozenset[FdKind]] = {
    "ram": frozenset({FdKind.MEMFD}),
    "guest-memfd": frozenset({FdKind.GUEST_MEMFD}),
    "state": frozenset({FdKind.MEMFD}),
    "token": frozenset({FdKind.MEMFD}),
    "vm": frozenset({FdKind.KVM_VM}),
    "vcpu": frozenset({FdKind.KVM_VCPU}),
    "kvm-stats": frozenset({FdKind.KVM_STATS}),
    "fresh": frozenset({FdKind.MEMFD}),
    "irqfd": frozenset({FdKind.EVENTFD}),
    "image": frozenset({FdKind.FILE}),
    "keeper": frozenset({FdKind.SOCKET}),
    "kvm-slots": frozenset({FdKind.MEMFD}),
    "kvm-go": frozenset({FdKind.EVENTFD}),
    "kvm-done": frozenset({FdKind.EVENTFD}),
    "serial": STREAMS,
    "serial-out": STREAMS,
    "serial-listen": frozenset({FdKind.SOCKET}),
    "qmp": frozenset({FdKind.SOCKET}),
}


class SocketKind(NamedTuple):
    """What a UNIX socket has to be. `ours`: its peer has to be this user or root."""

    type: socket.SocketKind
    listens: bool
    ours: bool


# Where the name says which socket it is. A stream may be any, such as one that was the first VMM's stdin.
EXPECTED_SOCKETS: dict[str, SocketKind] = {
    "keeper": SocketKind(socket.SOCK_SEQPACKET, listens=False, ours=True),
    "serial-listen": SocketKind(socket.SOCK_STREAM, listens=True, ours=False),
    "qmp": SocketKind(socket.SOCK_STREAM, listens=False, ours=False),  # looked at when it is served
}


@dataclass(frozen=True)
class FdIdentity:
    """What the kernel says of an fd: its kind, its size in bytes and its seals (both 0 where it has none; a
    guest_memfd's size never changes, so it needs no seals).
    """

    kind: FdKind
    size: int
    seals: int


_ANON_INODES = {
    "anon_inode:kvm-vm": FdKind.KVM_VM,
    "anon_inode:kvm-vm-stats": FdKind.KVM_STATS,
    "anon_inode:[eventfd]": FdKind.EVENTFD,
}
_GUEST_MEMFD_INODES = ("anon_inode:[kvm-gmem]", "/[kvm-gmem] (deleted)")  # the latter from Linux 6.19 on
_VCPU_INODE = re.compile(r"anon_inode:kvm-vcpu(:\d+)?")


def identify(fd: int) -> FdIdentity:
    """Ask the kernel what `fd` is (fstat, /proc/self/fd, F_GET_SEALS). Raises OSError for a closed fd."""
    info = os.fstat(fd)
    target = os.readlink(f"/proc/self/fd/{fd}")
    if target in _ANON_INODES:
        return FdIdentity(_ANON_INODES[target], 0, 0)
    if _VCPU_INODE.fullmatch(target):
        return FdIdentity(FdKind.KVM_VCPU, 0, 0)
    if target in _GUEST_MEMFD_INODES:
        return FdIdentity(FdKind.GUEST_MEMFD, info.st_size, 0)
    if stat.S_ISREG(info.st_mode):
        if target.startswith("/memfd:"):
            return FdIdentity(FdKind.MEMFD, info.st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS))
        return FdIdentity(FdKind.FILE, info.st_size, 0)
    if stat.S_ISCHR(info.st_mode):
        return FdIdentity(FdKind.TTY if os.isatty(fd) else FdKind.CHARACTER, 0, 0)
    for test, kind in (
        (stat.S_ISSOCK, FdKind.SOCKET),
        (stat.S_ISFIFO, FdKind.PIPE),
        (stat.S_ISBLK, FdKind.BLOCK),
    ):
        if test(info.st_mode):
            return FdIdentity(kind, 0, 0)
    return FdIdentity(FdKind.OTHER, 0, 0)


def check_received(name: str, index: int, fd: int, size: int | None = None) -> FdIdentity:
    """Check that a received fd is what its name claims; memfds must be sealed and they and guest_memfds,
    where `size` is given, of that size.

    Raises StateError that names the fd, what was expected and what came.
    """
    identity = identify(fd)
    expected = EXPECTED_KINDS.get(name)
    if expected is None:
        raise StateError(
            f"fd {name}/{index}: this VMM knows no fd of that name; hand over to a VMM of the same version"
        )
    if identity.kind not in expected:
        kinds = " or ".join(sorted(kind.value for kind in expected))
        raise StateError(
            f"fd {name}/{index} is a {identity.kind.value} where a {kinds} was expected; refused"
        )
    if identity.kind is FdKind.MEMFD and identity.seals & RAM_SEALS != RAM_SEALS:
        raise StateError(f"fd {name}/{index} is not sealed against shrinking and growing; refused")
    if identity.kind in SIZED and size is not None and identity.size != size:
        raise StateError(f"fd {name}/{index} has {identity.size} bytes where {size} were expected; refused")
    if name in EXPECTED_SOCKETS:
        _check_socket(f"fd {name}/{index}", fd, EXPECTED_SOCKETS[name])
    return identity


def _check_socket(what: str, fd: int, expected: SocketKind) -> None:
    """Raises StateError, PeerError."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if (sock.family, sock.type, listens) != (socket.AF_UNIX, expected.type, expected.listens):
            raise StateError(
                f"{what} is a socket of family {int(sock.family)}, type {int(sock.type)}, "
                f"{'' if listens else 'not '}listening, where a UNIX socket of type {int(expected.type)}, "
                f"{'' if expected.listens else 'not '}listening, was expected; refused"
            )
        if expected.ours:
            check_peer(sock, what)


def sealed_memfd(name: str, size: int, flags: int = 0) -> int:
    """A new close-on-exec memfd of `size` bytes, zeroed, sparse, sealed against shrinking and growing."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, RAM_SEALS | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


class Vault(Protocol):
    """Another process that holds a copy of every fd, for whoever comes after this one."""

    def store(self, name: str, index: int, fd: int) -> None:
        """Hold a copy of `fd` under that name."""

    def drop(self, name: str, index: int) -> None:
        """Close that copy."""


class FdStore:
    """Maps `(name, id)` to an fd and owns closing it. Not thread-safe: used by the main thread and before
    vCPUs run. Where there is a `vault`, what changes here changes there too.
    """

    def __init__(self) -> None:
        self._fds: dict[tuple[str, int], int] = {}
        self._unasked: set[tuple[str, int]] = set()
        self.vault: Vault | None = None

    def __len__(self) -> int:
        return len(self._fds)

    def items(self) -> Iterator[tuple[str, int, int]]:
        """Every `(name, id, fd)`, in the order of insertion."""
        return iter([(name, index, fd) for (name, index), fd in self._fds.items()])

    def add(self, name: str, index: int, fd: int) -> int:
        """Take ownership of `fd`. A name that is taken is an error in the caller."""
        if (name, index) in self._fds:
            raise VmmError(f"fd {name}/{index} exists already")
        if self.vault is not None:
            self.vault.store(name, index, fd)
        self._fds[name, index] = fd
        return fd

    def find(self, name: str, index: int = 0) -> int | None:
        """The fd of that name, or None."""
        self._unasked.discard((name, index))
        return self._fds.get((name, index))

    def get(self, name: str, index: int = 0) -> int:
        """The fd of that name; StateError where there is none."""
        fd = self.find(name, index)
        if fd is None:
            raise StateError(f"fd {name}/{index} is missing from the fd table")
        return fd

    def get_or_open(self, name: str, index: int, opener: Callable[[], int]) -> int:
        """The fd of that name; where there is none, `opener()`'s, from then on under that name."""
        fd = self.find(name, index)
        if fd is None:
            fd = opener()
            try:
                self.add(name, index, fd)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def take(self, name: str, index: int = 0) -> int | None:
        """Give up ownership of that fd without closing it; None where there is none."""
        self._unasked.discard((name, index))
        if (name, index) in self._fds and self.vault is not None:
            self.vault.drop(name, index)  # where that fails it is still here, and closed with the others
        return self._fds.pop((name, index), None)

    def remove(self, name: str, index: int = 0) -> None:
        """Close that fd and forget it; nothing happens where there is none."""
        fd = self.take(name, index)
        if fd is not None:
            os.close(fd)

    def received(self) -> None:
        """All that is here came from another VMM: `unasked` tells from now on what no part wants of it."""
        self._unasked = set(self._fds)

    def unasked(self) -> list[tuple[str, int]]:
        """`(name, id)` of what was received and nobody has asked for yet."""
        return sorted(self._unasked)

    def deposit(self, vault: Vault) -> None:
        """Have `vault` hold everything that is here and all that changes from here on."""
        for name, index, fd in self.items():
            vault.store(name, index, fd)
        self.vault = vault

    def close(self) -> None:
        """Close every fd. What a vault holds stays there."""
        while self._fds:
            _, fd = self._fds.popitem()
            os.close(fd)
