"""The old VMM's side of a handover, as one coroutine over a table of phases.

    SETUP ──▶ OFFERED ──▶ READY ──▶ PAUSED ──▶ PREPARED ──▶ COMMITTED ──▶ COMPLETED
      │          │          │         │           │             │  │
      └──────────┴──────────┴─────────┴───────────┘             │  └──▶ LOST    the new VMM ran it and died
                     │                                          └─────▶ FAILED  it died before: token back
                     └──▶ FAILED or CANCELLED: the guest runs here as if nothing had happened

PAUSED is the first phase in which the guest stands still, and it is left by a message, an error or a
deadline. Where the guest goes on here, the token's epoch is moved first: the new VMM may have loaded the
state and not have heard of the failure, and must never run what has become stale. After COMMITTED no error
decides anything: the run token does.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from vmm.cpr.channel import Cancelled
from vmm.errors import VmmError


class Phase(Enum):
    """Where an outgoing handover stands."""

    IDLE = "idle"
    SETUP = "setup"
    OFFERED = "offered"
    READY = "ready"
    PAUSED = "paused"
    PREPARED = "prepared"
    COMMITTED = "committed"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


_P = Phase
_BEFORE_COMMIT = frozenset({_P.FAILED, _P.CANCELLED})
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    _P.IDLE: frozenset({_P.SETUP}),
    _P.SETUP: frozenset({_P.OFFERED}) | _BEFORE_COMMIT,
    _P.OFFERED: frozenset({_P.READY}) | _BEFORE_COMMIT,
    _P.READY: frozenset({_P.PAUSED}) | _BEFORE_COMMIT,
    _P.PAUSED: frozenset({_P.PREPARED}) | _BEFORE_COMMIT,
    _P.PREPARED: frozenset({_P.COMMITTED}) | _BEFORE_COMMIT,
    _P.COMMITTED: frozenset({_P.COMPLETED, _P.FAILED, _P.LOST}),
    _P.COMPLETED: frozenset(),
    _P.FAILED: frozenset(),
    _P.CANCELLED: frozenset(),
    _P.LOST: frozenset(),
}

# QEMU's MigrationStatus (qapi/migration.json) for each phase.
STATUS: dict[Phase, str] = {
    _P.IDLE: "none",
    _P.SETUP: "setup",
    _P.OFFERED: "setup",
    _P.READY: "active",
    _P.PAUSED: "device",
    _P.PREPARED: "device",
    _P.COMMITTED: "device",
    _P.COMPLETED: "completed",
    _P.FAILED: "failed",
    _P.CANCELLED: "cancelled",
    _P.LOST: "failed",
}


def check_transition(old: Phase, new: Phase) -> None:
    """Raise VmmError where `new` may not follow `old`."""
    if new not in TRANSITIONS[old]:
        raise VmmError(f"handover phase {old.value} cannot become {new.value}")


class TokenVerdict(Enum):
    """What the run token says after the commit, when the new VMM's last word is missing."""

    MINE = "taken back: the guest has not moved"
    TAKEN = "held by the new VMM, which has the guest"
    UNDECIDED = "held by the new VMM, which has not run the guest yet"
    LOST = "free, and the guest has run elsewhere: the new VMM died with it"


class OutgoingWorld(Protocol):
    """All that the coroutine can see and do. A call may raise, unless it says that it cannot fail; before the
    commit that ends the handover.
    """

    def enter(self, phase: Phase, error: str | None = None) -> None:
        """The handover is in `phase` now."""

    async def offer(self) -> None:
        """Connect the cpr channel; send the machine and its fds."""

    async def wait_ready(self) -> None:
        """Wait for the new VMM to hang up on cpr; its Refuse is an error."""

    async def connect_main(self) -> None:
        """Connect the main channel."""

    async def pause(self) -> None:
        """Stop the guest and store its state. A failure leaves the guest as it was."""

    async def send_state(self) -> None:
        """Say that the state is there."""

    async def receive_prepared(self) -> None:
        """Wait for the new VMM to have loaded it."""

    async def begin_commit(self) -> None:
        """From here on nothing can be cancelled. Raises Cancelled where it was before."""

    async def release_token(self) -> None:
        """Give the run token up. Cannot fail."""

    async def send_commit(self) -> None:
        """Tell the new VMM."""

    async def receive_running(self) -> None:
        """Wait for the new VMM to run the guest."""

    async def keep_token(self) -> None:
        """Move the epoch, the token in hand: what the new VMM was told of the guest is stale. An error ends
        this VMM: the guest is then the new one's, which may have all of it, or gone with this one.
        """

    async def ask_token(self) -> TokenVerdict:
        """Try to take the token back, and say what it says."""

    async def nap(self) -> None:
        """Wait a little before asking again."""

    async def withdraw(self, reason: str) -> None:
        """Tell the new VMM, where it still listens, that the handover is off; close the channels."""

    async def roll_back(self) -> None:
        """Run the guest again (or hold it paused, as it was). An error ends this VMM."""

    async def give_up(self) -> None:
        """The guest is the new VMM's for good."""


async def outgoing(world: OutgoingWorld) -> Phase:
    """Hand the guest over; returns the phase it ended in. The guest is then here, or there, as the module's
    drawing says.
    """
    paused = False
    try:
        world.enter(Phase.SETUP)
        await world.offer()
        world.enter(Phase.OFFERED)
        await world.wait_ready()
        await world.connect_main()
        world.enter(Phase.READY)
        await world.pause()
        paused = True
        world.enter(Phase.PAUSED)
        await world.send_state()
        await world.receive_prepared()
        world.enter(Phase.PREPARED)
        await world.begin_commit()
    except Exception as error:  # noqa: BLE001 -- whatever it was, the guest must go on
        if paused:
            await world.keep_token()
            await world.roll_back()
        reason = await _withdraw(world, str(error))
        phase = Phase.CANCELLED if isinstance(error, Cancelled) else Phase.FAILED
        world.enter(phase, reason)
        return phase
    world.enter(Phase.COMMITTED)
    await world.release_token()
    try:
        await world.send_commit()
        await world.receive_running()
    except Exception as error:  # noqa: BLE001 -- whatever it was, the guest must go on
        return await _arbitrate(world, error)
    await world.give_up()
    world.enter(Phase.COMPLETED)
    return Phase.COMPLETED


async def _withdraw(world: OutgoingWorld, reason: str) -> str:
    """Tell the new VMM. The guest runs here by now, whatever becomes of that: an error is added to the
    reason.
    """
    try:
        await world.withdraw(reason)
    except Exception as error:  # noqa: BLE001 -- whatever it was, the guest must go on
        return f"{reason}; and then: {error}"
    return reason


async def _arbitrate(world: OutgoingWorld, error: Exception) -> Phase:
    """The new VMM's last word is missing: the token says who runs the guest. It is asked until it says so."""
    while (verdict := await world.ask_token()) is TokenVerdict.UNDECIDED:
        await world.nap()
    if verdict is TokenVerdict.MINE:
        await world.roll_back()
        reason = await _withdraw(world, str(error))
        world.enter(Phase.FAILED, f"{reason}; the guest had not moved and runs here again")
        return Phase.FAILED
    await world.give_up()
    if verdict is TokenVerdict.TAKEN:
        world.enter(Phase.COMPLETED, f"the new VMM took the guest, but did not confirm that it runs: {error}")
        return Phase.COMPLETED
    world.enter(Phase.LOST, f"the new VMM took the guest and ended: {error}")
    return Phase.LOST
