"""What a new VMM was sent by the old one, held against what the keeper has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kvm.keeping import keeper_port
from vmm.errors import StateError
from vmm.fds import FdStore, sealed_memfd
from vmm.kvm.keeper_port import KeeperPort
from vmm.machine.ports import MEMORY, adopt_from_keeper

pytestmark = pytest.mark.kvm

OF_FILES = sorted(MEMORY - {"guest-memfd"})


@pytest.fixture
def port() -> Iterator[KeeperPort]:
    with keeper_port() as port:
        yield port


@pytest.fixture
def fds(port: KeeperPort) -> Iterator[FdStore]:
    """What a new VMM has got: copies of what the keeper holds."""
    fds = FdStore()
    for name in OF_FILES:
        fd = fds.add(name, 0, sealed_memfd(name, 4096))
        port.store(name, 0, fd)
    fds.add("keeper", 0, port.make_successor().detach())
    yield fds
    fds.close()


def test_the_same_is_taken(fds: FdStore) -> None:
    fds.add("kvm-slots", 0, sealed_memfd("another", 4096))  # not looked at: the keeper's own is used
    adopt_from_keeper(fds, findable=True).close(for_good=False)
    assert {name for name, _, _ in fds.items()} == set(OF_FILES)


@pytest.mark.parametrize("name", OF_FILES)
def test_another_file_of_that_name_is_refused(fds: FdStore, name: str) -> None:
    fds.remove(name)
    fds.add(name, 0, sealed_memfd(name, 4096))
    with pytest.raises(StateError, match=f"fd {name}/0 is not the one that the keeper has"):
        adopt_from_keeper(fds, findable=True)


def test_a_keeper_that_ends_meanwhile_leaves_nothing_open(fds: FdStore, port: KeeperPort) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fds.remove("ram")
    with pytest.raises(StateError, match="fd ram/0 is missing"):
        adopt_from_keeper(fds, findable=True)
    assert len(os.listdir("/proc/self/fd")) == before - 2  # ram, and the connection
