"""QEMU's run states, and which may follow which. A transition that is not in the table is a bug and
raises.
"""

from __future__ import annotations

from enum import Enum

from vmm.errors import VmmError


class RunState(Enum):
    """QEMU's RunState names, those that this VMM has (qapi/run-state.json)."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal-error"


_S = RunState
TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    _S.PRELAUNCH: frozenset({_S.RUNNING, _S.PAUSED, _S.INTERNAL_ERROR}),
    _S.INMIGRATE: frozenset({_S.RUNNING, _S.PAUSED}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.FINISH_MIGRATE, _S.SHUTDOWN, _S.INTERNAL_ERROR}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.SHUTDOWN, _S.INTERNAL_ERROR}),
    _S.FINISH_MIGRATE: frozenset({_S.RUNNING, _S.PAUSED, _S.POSTMIGRATE, _S.SHUTDOWN}),
    _S.POSTMIGRATE: frozenset(),
    _S.SHUTDOWN: frozenset({_S.PAUSED}),
    _S.INTERNAL_ERROR: frozenset({_S.PAUSED}),
}


def check_transition(old: RunState, new: RunState) -> None:
    """Raise VmmError where `new` may not follow `old`."""
    if new not in TRANSITIONS[old]:
        raise VmmError(f"run state {old.value} cannot become {new.value}")
