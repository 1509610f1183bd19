"""Taking over a guest from its keeper, when its VMM is gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from vmm.cpr.token import RunToken
from vmm.errors import HandoverError, VmmError
from vmm.fds import FdStore
from vmm.machine.config import kept_config
from vmm.machine.hypervisor import Origin
from vmm.machine.machine import home_of
from vmm.machine.ports import Port, end_stale_keeper, find_keeper
from vmm.process.checks import check_complete, surplus
from vmm.process.guest import Guest
from vmm.state import Arena

log = logging.getLogger(__name__)

NAP_S = 0.01


def attach(guest: Guest, paths: Sequence[str], timeout_s: float) -> None:
    """Go on with the guest of the keeper at one of `paths`, unless another VMM runs it `timeout_s` from now.

    Raises PeerError, StateError, HandoverError; the guest is then in its keeper as it was.
    """
    port, guest.fds = _find(paths)
    config = kept_config(Arena.open(guest.fds))
    check_complete(config, guest.fds)
    guest.token = token = RunToken.open(guest.fds)
    machine = guest.make(config, port, Origin.ADOPTED)
    deadline = time.monotonic() + timeout_s
    while not token.take(token.epoch()):
        if time.monotonic() > deadline:  # who was just killed may hold it for a moment
            raise HandoverError("another VMM runs the guest; use 'vmm handover' to replace it")
        time.sleep(NAP_S)
    machine.load()
    machine.resume(running=not machine.state.paused, after_crash=True)
    for name, index in surplus(guest.fds):
        log.warning("fd %s/%d came with the guest, and nothing here needs it; closed", name, index)
        guest.fds.remove(name, index)
    guest.own()


def _find(paths: Sequence[str]) -> tuple[Port, FdStore]:
    """The port to the guest's VM, and its fds. Keepers whose VM the guest has left, without ending them, are
    ended.
    """
    found: tuple[Port, FdStore] | None = None
    failure: VmmError = HandoverError("no keeper has the guest: it ended with the VMM that it was handed to")
    for path in paths:
        try:
            there = _look_into(path)
        except VmmError as error:
            log.warning("%s: %s", path, error)
            failure = error
        else:
            found = found or there
    if found is None:
        raise failure
    return found


def _look_into(path: str) -> tuple[Port, FdStore] | None:
    """The port to the VM of the keeper at `path`, and its fds, if that is the guest's VM; if not, that keeper
    is ended. Raises PeerError, StateError.
    """
    fds = FdStore()
    try:
        port = find_keeper(path, fds)
        try:
            fds.get("state")
            fds.received()
            if home_of(Arena.open(fds)) == port.identity:
                return port, fds
            log.warning("%s: the guest has left that keeper's VM; it is ended", path)
        except BaseException:
            port.close(for_good=False)
            raise
        end_stale_keeper(port)
    except BaseException:
        fds.close()
        raise
    fds.close()
    return None
