"""The new VMM's side of a handover, as one coroutine over a table of phases.

    LISTENING ──▶ OFFERED ──▶ BUILT ──▶ RECEIVED ──▶ PREPARED ──▶ TAKEN ──▶ COMPLETED
        │            │          │          │            │
        └────────────┴──────────┴──────────┴────────────┘
                     └──▶ FAILED: the old VMM has the guest, or has died with it; this process ends

In PREPARED this side holds all there is of the guest. Whatever then becomes of the old VMM, of Prepared or of
Commit, the run token decides: this side runs the guest if it gets the token and the epoch has not moved, and
never otherwise. After TAKEN nothing decides anything: the guest is here.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from vmm.errors import HandoverError, PeerError, VmmError


class Phase(Enum):
    """Where an incoming handover stands."""

    LISTENING = "listening"
    OFFERED = "offered"
    BUILT = "built"
    RECEIVED = "received"
    PREPARED = "prepared"
    TAKEN = "taken"
    COMPLETED = "completed"
    FAILED = "failed"


_P = Phase
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    _P.LISTENING: frozenset({_P.OFFERED, _P.FAILED}),
    _P.OFFERED: frozenset({_P.BUILT, _P.FAILED}),
    _P.BUILT: frozenset({_P.RECEIVED, _P.FAILED}),
    _P.RECEIVED: frozenset({_P.PREPARED, _P.FAILED}),
    _P.PREPARED: frozenset({_P.TAKEN, _P.FAILED}),
    _P.TAKEN: frozenset({_P.COMPLETED}),
    _P.COMPLETED: frozenset(),
    _P.FAILED: frozenset(),
}

# QEMU's MigrationStatus for each phase, as `query-migrate` on the new side says it (nothing before the
# offer).
STATUS: dict[Phase, str | None] = {
    _P.LISTENING: None,
    _P.OFFERED: "setup",
    _P.BUILT: "setup",
    _P.RECEIVED: "active",
    _P.PREPARED: "active",
    _P.TAKEN: "active",
    _P.COMPLETED: "completed",
    _P.FAILED: "failed",
}


def check_transition(old: Phase, new: Phase) -> None:
    """Raise VmmError where `new` may not follow `old`."""
    if new not in TRANSITIONS[old]:
        raise VmmError(f"handover phase {old.value} cannot become {new.value}")


class IncomingWorld(Protocol):
    """All that the coroutine can see and do. Each call may raise a VmmError."""

    def enter(self, phase: Phase, error: str | None = None) -> None:
        """The handover is in `phase` now."""

    async def receive_offer(self) -> None:
        """Wait for the old VMM on the cpr channel; take the machine's configuration and fds."""

    async def build(self) -> None:
        """Check what came and build everything that does not need the stopped guest."""

    async def listen_main(self) -> None:
        """Listen on main, then hang up on cpr: ready."""

    async def receive_state(self) -> None:
        """Wait for the old VMM on main, and for its word that the guest is stopped."""

    async def load(self) -> None:
        """Load the state. Nothing that the old VMM could still need is changed."""

    async def send_prepared(self) -> None:
        """Say so."""

    async def receive_commit(self) -> None:
        """Wait for the commit. PeerError: the old VMM went or is silent. StateError: it cancelled."""

    async def take_token(self) -> bool:
        """Try for the run token; False where another process holds it. StateError where the guest has run
        elsewhere since.
        """

    async def run(self) -> None:
        """Run the guest. Only with the token."""

    async def send_running(self) -> None:
        """Tell the old VMM, where it is still there."""

    async def refuse(self, reason: str) -> None:
        """Tell the old VMM, where it still listens, why this will not work; close the channels."""


async def incoming(world: IncomingWorld) -> Phase:
    """Take a guest over; returns COMPLETED (the guest runs here) or FAILED (it does not, and never will in
    this process).
    """
    try:
        await world.receive_offer()
        world.enter(Phase.OFFERED)
        await world.build()
        world.enter(Phase.BUILT)
        await world.listen_main()
        await world.receive_state()
        world.enter(Phase.RECEIVED)
        await world.load()
        world.enter(Phase.PREPARED)
        silence = await _commit_or_silence(world)
        if not await world.take_token():
            raise silence or HandoverError("the old VMM said commit, but the run token is not free")
    except Exception as error:  # noqa: BLE001 -- whatever it was, the guest must go on
        await world.refuse(str(error))
        world.enter(Phase.FAILED, str(error))
        return Phase.FAILED
    world.enter(Phase.TAKEN)
    await world.run()
    try:
        await world.send_running()
    except Exception as error:  # noqa: BLE001 -- whatever it was, the guest must go on
        world.enter(Phase.COMPLETED, f"the guest runs here; the old VMM could not be told: {error}")
    else:
        world.enter(Phase.COMPLETED)
    return Phase.COMPLETED


async def _commit_or_silence(world: IncomingWorld) -> PeerError | None:
    """None at the commit; the PeerError where the old VMM went or fell silent instead: then the token
    decides.
    """
    try:
        await world.send_prepared()
        await world.receive_commit()
    except PeerError as error:
        return error
    return None
