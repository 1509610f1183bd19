"""Ways to KVM, and the only place that knows which there are: everything else has a `Port` and cannot
tell.
"""

from __future__ import annotations

import os
import socket

from vmm.errors import StateError
from vmm.fds import FdStore
from vmm.kvm import DirectPort, Port
from vmm.kvm.keeper_port import KEEPER_NAME, KeeperPort
from vmm.sockets import listen

__all__ = [
    "Port",
    "adopt_from_keeper",
    "direct_port",
    "find_keeper",
    "has_keeper",
    "start_keeper",
    "tidy_path",
]

UNREACHABLE_S = 2.0  # how long a keeper waits for a VMM where none could ever find it


def direct_port() -> Port:
    """This process's own ioctls."""
    return DirectPort()


def start_keeper(path: str | None, orphan_timeout_s: float) -> Port:
    """A new keeper, attached to this process; at `path` VMMs that come after a crash find it.

    It ends, with the guest, after `orphan_timeout_s` without a VMM (0: never). Raises ConfigError, HostError.
    """
    if path is None:
        port = KeeperPort.start()
        port.set_orphan_timeout(UNREACHABLE_S)
        return port
    with listen(path, "keeper", socket.SOCK_SEQPACKET) as listener:
        port = KeeperPort.start(listener)
    port.set_orphan_timeout(orphan_timeout_s)
    return port


def has_keeper(fds: FdStore) -> bool:
    """Whether a connection to the VM's keeper is among the received fds."""
    return fds.find(KEEPER_NAME) is not None


def adopt_from_keeper(fds: FdStore) -> Port:
    """The way to a VM whose keeper's connection is among the received fds; `attach` when the guest is
    ours.
    """
    fd = fds.take(KEEPER_NAME)
    if fd is None:
        raise StateError(f"fd {KEEPER_NAME}/0 is missing from the fd table")
    return _adopt(socket.socket(fileno=fd), fds)


def find_keeper(path: str, fds: FdStore) -> Port:
    """The way to the VM of the keeper that listens at `path`, whose VMM is gone; `fds` gets all that it
    holds.

    Raises PeerError where no keeper answers.
    """
    port = KeeperPort.connect(path)
    for row in port.table():
        fds.add(row.name, row.id, row.fd)
    port.close()
    return _adopt(KeeperPort.connect_socket(path), fds)


def _adopt(sock: socket.socket, fds: FdStore) -> Port:
    port = KeeperPort.adopt(sock, {(name, index): fd for name, index, fd in fds.items()})
    for name, index, _ in list(fds.items()):
        if name in KeeperPort.OWN_NAMES:
            fds.take(name, index)  # the port closes them
    return port


def tidy_path(path: str) -> None:
    """Remove the file of a keeper's socket, once the keeper has ended."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return  # it never listened there, or somebody was faster
