"""Ways to KVM, and the only place that knows which there are: everything else has a `Port` and cannot
tell.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from vmm.errors import StateError
from vmm.fds import FdStore, check_received
from vmm.kvm import DirectPort, Port, keeper
from vmm.kvm.keeper_port import ADMITTED_NAME, ISSUED, KEEPER_NAME, HeldFd, KeeperPort
from vmm.sandbox import Mode, keeper_program, keeper_ruleset
from vmm.sockets import listen

__all__ = [
    "KEEPER_PROTOCOL",
    "ORPHAN_MAX_S",
    "Port",
    "adopt_from_keeper",
    "direct_port",
    "end_keeper",
    "end_stale_keeper",
    "find_keeper",
    "has_keeper",
    "retire_keeper",
    "start_keeper",
    "take_keeper",
]

ORPHAN_MAX_S = keeper.ORPHAN_MAX_MS / 1000
KEEPER_PROTOCOL = keeper.PROTOCOL  # what a VMM and a keeper must agree on; none before it is understood

# Where a received fd must be the file that the keeper has, for the guest's memory and state are in it
MEMORY = frozenset({"ram", "guest-memfd", "state", "fresh", "token"})
# What cannot be told apart, and is taken from the keeper, whoever else has sent one of that name
OF_KVM = KeeperPort.OWN_NAMES | {"vm", "vcpu"}


def direct_port() -> Port:
    """This process's own ioctls."""
    return DirectPort()


def start_keeper(path: str | None, sandbox: Mode) -> Port:
    """A new keeper, attached to this process; at `path`, if any, VMMs that come after a crash find it.

    Raises ConfigError, HostError.
    """
    with ExitStack() as cleanup:
        listener = None
        if path is not None:
            listener = cleanup.enter_context(listen(path, "keeper", socket.SOCK_SEQPACKET))
        ruleset = keeper_ruleset(sandbox, path)
        if ruleset >= 0:
            cleanup.callback(os.close, ruleset)
        return KeeperPort.start(listener, partial(keeper_program, sandbox, ioctls=ISSUED), ruleset)


def has_keeper(fds: FdStore) -> bool:
    """Whether a connection to the VM's keeper is among the received fds."""
    return fds.find(KEEPER_NAME) is not None


def take_keeper(fds: FdStore) -> socket.socket | None:
    """The connection to the VM's keeper out of the received fds; None where there is none."""
    fd = fds.take(KEEPER_NAME)
    return None if fd is None else socket.socket(fileno=fd)


def adopt_from_keeper(fds: FdStore, *, findable: bool) -> Port:
    """The way to a VM whose keeper's connection is among the received fds; `attach` when the guest is
    ours. What the old VMM has sent must be what the keeper has under those names. `findable`: there is a name
    to find that keeper by, should this process die.

    Raises StateError, PeerError.
    """
    sock = take_keeper(fds)
    if sock is None:
        raise StateError(f"fd {KEEPER_NAME}/0 is missing from the fd table")
    port = KeeperPort(sock, findable=findable)
    with _closed_on_error(port):
        rows = port.table()
        spare = {row.fd for row in rows}
        try:
            for row in rows:
                if row.name in OF_KVM and fds.find(row.name, row.id) is not None:
                    fds.remove(row.name, row.id)
                    fds.add(row.name, row.id, row.fd)
                    spare.remove(row.fd)
                elif row.name in MEMORY:
                    _check_same(row, fds.get(row.name, row.id))
            _take_over(port, rows, fds)
        finally:
            for fd in spare:
                os.close(fd)
    return port


def _check_same(row: HeldFd, received: int) -> None:
    """That a received fd is the very file that the keeper has. Raises StateError."""
    ours, theirs = os.fstat(received), os.fstat(row.fd)
    if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
        raise StateError(f"fd {row.name}/{row.id} is not the one that the keeper has; refused")


@contextmanager
def _closed_on_error(port: KeeperPort) -> Iterator[None]:
    try:
        yield
    except BaseException:
        port.close()
        raise


def find_keeper(path: str, fds: FdStore) -> Port:
    """The way to the VM of the keeper that listens at `path`, whose VMM is gone; `fds` gets all that it
    holds.

    Raises PeerError where no keeper answers, StateError for an fd that is not what its name says; `fds` is
    the caller's to close in any case.
    """
    port = KeeperPort.connect(path)
    with _closed_on_error(port):
        rows = port.table()
        for row in rows:  # each name is there once: they are the keys of the keeper's table
            fds.add(row.name, row.id, row.fd)
        for row in rows:
            if row.name == ADMITTED_NAME:
                fds.remove(row.name, row.id)
            else:
                check_received(row.name, row.id, row.fd)
        _take_over(port, rows, fds)
    return port


def _take_over(port: KeeperPort, rows: list[HeldFd], fds: FdStore) -> None:
    """`port` drives the VM that is in `fds`, and owns those fds that are its own."""
    port.take_over(rows, {(name, index): fd for name, index, fd in fds.items()})
    for name, index, _ in list(fds.items()):
        if name in KeeperPort.OWN_NAMES:
            fds.take(name, index)


def retire_keeper(sock: socket.socket) -> None:
    """Have the keeper at the other end of a connection, which came with the fds of a VM that nobody needs any
    more, end once no VMM is connected to it. Raises PeerError where it does not answer.
    """
    port = KeeperPort(sock)
    try:
        port.set_orphan_timeout(keeper.AT_ONCE_S)
    finally:
        port.close()


def end_keeper(path: str) -> None:
    """End the keeper that listens at `path`, and the guest with it. Raises PeerError where it has a VMM."""
    end_stale_keeper(KeeperPort.connect(path))


def end_stale_keeper(port: Port) -> None:
    """End a keeper that `find_keeper` has found, whose VM the guest has left. Raises PeerError where it has a
    VMM.
    """
    try:
        port.attach()
        port.close(for_good=True)
    except BaseException:
        port.close(for_good=False)
        raise
