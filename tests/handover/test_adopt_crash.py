"""VMMs that are killed in the middle of a handover of a guest that is in a keeper: the old one, the new one,
both. The guest is served by the survivor, or by the VMM that attaches next; never by two.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handover.kept import NAME, KeptGuest
from tests.handover.stage import ended, wait_for
from tests.processes import Spawn
from vmm.errors import PeerError
from vmm.kvm.keeper_port import KeeperPort

pytestmark = pytest.mark.kvm

# what happens to old and new, and who has the guest then: the old VMM, the new one, or nobody
CASES = {
    "outgoing:after-offer:kill": "nobody",
    "outgoing:pause:kill": "nobody",
    "outgoing:after-pause:kill": "nobody",
    "outgoing:after-send_state:kill": "new",
    "outgoing:after-receive_prepared:kill": "new",
    "outgoing:after-release_token:kill": "new",
    "outgoing:after-send_commit:kill": "new",
    "incoming:after-build:kill": "old",
    "incoming:after-load:kill": "old",
    "incoming:after-send_prepared:kill": "old",
    "incoming:take_token:kill": "old",
    "incoming:after-take_token:kill": "nobody",
    "incoming:after-run:kill": "nobody",
    "outgoing:after-send_state:kill;incoming:load:kill": "nobody",
    "outgoing:after-send_state:kill;incoming:after-take_token:kill": "nobody",
    "outgoing:after-release_token:kill;incoming:after-run:kill": "nobody",
}


@pytest.fixture
def guest(kvm_device: Path, spawn: Spawn, tmp_socket_dir: Path) -> Iterator[KeptGuest]:
    guest = KeptGuest(spawn, tmp_socket_dir)
    yield guest
    guest.close()


def monitors(guest: KeptGuest) -> list[int]:
    """The pids of the VMMs that live."""
    pids = [int(path.stem.removeprefix("qmp-")) for path in guest.folder.glob("qmp-*.sock")]
    return [pid for pid in pids if not ended(pid)]


# where it is a rebuild into another keeper: those after which the guest is in that one
MOVED = {
    "outgoing:after-send_state:kill",
    "outgoing:after-receive_prepared:kill",
    "outgoing:after-release_token:kill",
    "outgoing:after-send_commit:kill",
    "incoming:after-run:kill",
    "outgoing:after-release_token:kill;incoming:after-run:kill",
}


def listening(guest: KeptGuest) -> list[Path]:
    """The sockets at which keepers of the guest's name are found."""
    found = []
    for path in guest.folder.glob("keeper-*.sock"):
        try:
            KeeperPort.connect(str(path)).close()
        except PeerError:
            continue
        found.append(path)
    return found


@pytest.mark.parametrize("mode", ["adopt", "rebuild"])
@pytest.mark.parametrize("faults", CASES)
def test_somebody_has_the_guest(guest: KeptGuest, faults: str, mode: str) -> None:
    guest.faults = faults
    old = guest.run(append="rate=200")
    guest.hear(5)
    keeper = guest.keeper
    guest.hang_up()
    handover = guest.verb("handover", NAME, "--timeout=20", f"--mode={mode}")
    handover.wait(60)
    guest.faults = None
    guest.kills += faults.count("kill")
    expected = CASES[faults]
    moved = mode == "rebuild" and faults in MOVED
    wait_for("one VMM, or none", lambda: len(monitors(guest)) == (expected != "nobody"))
    if expected == "nobody":
        assert moved or not ended(keeper)
        guest.attach()
    elif expected == "new":
        assert monitors(guest) != [old.pid]
        guest.connect_to(monitors(guest)[0])
    else:
        assert monitors(guest) == [old.pid]
        guest.connect_to(old.pid)
    wait_for("the guest", lambda: guest.state == "running")
    assert (guest.keeper != keeper) == moved
    keeper = guest.keeper
    wait_for("the other keeper's end", lambda: len(listening(guest)) == 1)
    guest.hear(20)
    guest.kill_process(monitors(guest)[0])  # whatever it has been through, the next one can follow
    guest.attach()
    assert guest.keeper == keeper
    guest.hear(20)


def test_a_supervisor_looks_after_the_next_vmm_as_well(guest: KeptGuest) -> None:
    """A handover to a VMM that the supervisor did not start, and then that one dies."""
    supervisor = guest.verb(
        *("run", "ticker", "--append=rate=200", f"--serial=file:{guest.out}", f"--name={NAME}"),
        "--restart=always",
    )
    wait_for("a VMM", lambda: monitors(guest))
    guest.hear(5)
    handed = guest.verb("handover", NAME)
    assert handed.wait(60) == 0, handed.output()
    (pid,) = monitors(guest)
    guest.hear(20)
    guest.kill_process(pid)
    wait_for("another VMM", lambda: [other for other in monitors(guest) if other != pid])
    guest.hear(20)
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0, supervisor.output()
    assert monitors(guest) == []
    assert not list(guest.folder.glob("*.sock"))


def test_a_supervisor_that_is_told_to_end_ends_the_guest_wherever_it_is(guest: KeptGuest) -> None:
    supervisor = guest.verb(
        *("run", "ticker", "--append=rate=200", f"--serial=file:{guest.out}", f"--name={NAME}"),
        "--restart=always",
    )
    wait_for("a VMM", lambda: monitors(guest))
    guest.hear(5)
    handed = guest.verb("handover", NAME)
    assert handed.wait(60) == 0, handed.output()
    (pid,) = monitors(guest)
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0, supervisor.output()
    wait_for("the VMM's end", lambda: ended(pid))
    assert not list(guest.folder.glob("*.sock"))
