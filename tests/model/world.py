"""The model's world: what the two VMMs share, what each step of theirs does to it, and what may go wrong.

    token       a lock that at most one holds, and an epoch; a dying process lets go of its sockets and of the
                lock one after the other, in either order
    cpr, main   a queue each way; an end is open or closed, and what was sent before a hang-up still arrives
    guest       where it is, and how far it has got: what was saved when it stopped is stale once it moved on

`STEPS` maps each step to a function that lists how it may end in a given world: `(label, world after it)`;
an empty list: it has to wait. The labels are those of `automaton.ERRORS`, or values. A wait may time out at
any moment, since a deadline knows nothing of what the other side is doing: so a slow process needs no further
treatment, nor one that is stopped and continued. A guest that is handed over paused differs in nothing: who
has it may run it at any time.

In an `adopt` the guest lives in its keeper: `guest` then says who serves it. There is one state of it and no
copy to go stale, it does not die with a VMM, and once the old VMM is gone an operator may attach a third one,
which takes the lock like any other.

What is assumed: a process that has begun to die drops its lock while the others still ask for it
(`vmm.cpr.live.Timeouts.commit_s` says for how long they do).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from tests.model.automaton import OracleWorld, ask
from vmm.cpr import incoming, outgoing
from vmm.cpr.outgoing import TokenVerdict
from vmm.errors import StateError

OLD, NEW = 0, 1
ATTACHED = 2  # who holds the lock, where that is a VMM which has attached
NAMES = ("old", "new")
T = TypeVar("T")


def put(pair: tuple[T, T], side: int, value: T) -> tuple[T, T]:
    """`pair` with `value` at `side`."""
    return (value, pair[1]) if side == OLD else (pair[0], value)


class Channel(NamedTuple):
    """One connection. `inbox[side]` is what that side has not read yet."""

    open: tuple[bool, bool] = (True, True)
    inbox: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def send(self, side: int, message: str) -> Channel:
        """With `message` on its way from `side`, where there is somebody to read it."""
        to = 1 - side
        return self._replace(inbox=put(self.inbox, to, (*self.inbox[to], message))) if self.open[to] else self

    def read(self, side: int) -> Channel:
        """Without the message that `side` reads."""
        return self._replace(inbox=put(self.inbox, side, self.inbox[side][1:]))

    def close(self, side: int) -> Channel:
        """With that side's end closed; what it had not read is gone."""
        return Channel(put(self.open, side, False), put(self.inbox, side, ()))

    def lose(self) -> Channel:
        """With both ends closed and nothing on its way."""
        return Channel((False, False))


class World(NamedTuple):
    """All that both sides share, and what the rules must remember. Pairs are indexed by side."""

    adopt: bool = False
    attached: bool = False  # a third VMM serves the guest
    alive: tuple[bool, bool] = (True, True)
    hung_up: tuple[bool, bool] = (False, False)  # a dead process's sockets are closed
    let_go: tuple[bool, bool] = (False, False)  # a dead process's lock is dropped
    stopped: tuple[bool, bool] = (False, False)  # SIGSTOP, for good
    holder: int | None = OLD
    epoch: int = 1
    cpr: Channel = Channel()
    main: Channel | None = None
    listening: bool = False  # the new side, on main
    cancel: tuple[bool, bool] = (False, False)
    committed: bool = False  # migrate_cancel does nothing any more
    guest: tuple[bool, bool] = (True, False)  # who runs the guest, or keeps it paused
    progress: int = 0  # how often the guest was let go
    copy: tuple[int | None, int | None] = (
        None,
        None,
    )  # the progress that a side's copy stands for
    saved: int | None = None  # the progress that the state memfd stands for
    expected: tuple[int, int] = (1, 1)  # the epoch that each side expects
    moved_by: int | None = None  # who moved the epoch last
    entered: tuple[bool, bool] = (True, False)  # whether the guest was ever let go there
    stated: bool = False  # State was sent
    orphaned: bool = False  # the old VMM died when State was sent and the epoch had not moved
    excused: bool = False  # a step of the new VMM failed, its patience ended, or a connection was lost
    violation: str | None = None

    def channel(self, name: str) -> Channel:
        """The channel of that name, which must be connected."""
        channel: Channel | None = getattr(self, name)
        assert channel is not None, f"{name} is used before it is connected"
        return channel

    def with_channel(self, name: str, channel: Channel) -> World:
        """With that channel changed."""
        return self._replace(cpr=channel) if name == "cpr" else self._replace(main=channel)

    def excuse(self, side: int) -> World:
        """After a failure of `side`'s own."""
        return self._replace(excused=True) if side == NEW else self

    def violate(self, rule: str) -> World:
        """With a broken rule, unless one is broken already."""
        return self._replace(violation=self.violation or rule)

    def lets_go(self) -> bool:
        """Whether who holds the lock is dying: it will drop it by itself."""
        return self.holder in (OLD, NEW) and not self.alive[self.holder]


Outcomes = list[tuple[str, World]]
Step = Callable[[World, int], Outcomes]


def own_failures(world: World, side: int, *labels: str) -> Outcomes:
    """`labels`, each a failure of `side`'s own; `cancelled` where that was asked for and is possible."""
    possible = [label for label in labels if label != "cancelled" or may_cancel(world, side)]
    return [(label, world.excuse(side)) for label in possible]


def may_cancel(world: World, side: int) -> bool:
    """Whether a wait of `side` ends because of its cancel switch."""
    return world.cancel[side] and not (side == OLD and world.committed)


def send(name: str, message: str, effect: Callable[[World], World] = lambda world: world) -> Step:
    """Send `message` on channel `name`."""

    def step(world: World, side: int) -> Outcomes:
        channel = world.channel(name)
        failures = own_failures(world, side, "timeout", "broken", "cancelled")
        if not all(channel.open):
            return [("hang-up", world), *failures]
        return [("ok", effect(world.with_channel(name, channel.send(side, message)))), *failures]

    return step


def receive(name: str, wanted: str, effect: Callable[[World], World] = lambda world: world) -> Step:
    """Wait on channel `name` for `wanted`; whatever else comes is an error."""

    def step(world: World, side: int) -> Outcomes:
        failures = own_failures(world, side, "timeout", "broken", "cancelled")
        channel = world.channel(name)
        if channel.inbox[side]:
            after = world.with_channel(name, channel.read(side))
            if channel.inbox[side][0] == wanted:
                return [("ok", effect(after)), *failures]
            return [("refused", after), *failures]
        if not all(channel.open):
            return [("hang-up", world), *failures]
        return failures

    return step


def close_all(world: World, side: int, message: str | None = None) -> World:
    """`side` says `message` on every channel that it has open, and closes it."""
    for name in ("cpr", "main"):
        channel: Channel | None = getattr(world, name)
        if channel is not None and channel.open[side]:
            if message is not None:
                channel = channel.send(side, message)
            world = world.with_channel(name, channel.close(side))
    return world._replace(listening=False) if side == NEW else world


def let_guest_go(world: World, side: int) -> World:
    """`side` runs the guest from its copy (or keeps it paused, to be run at any time)."""
    if world.holder != side:
        world = world.violate(f"the {NAMES[side]} VMM lets the guest go without the token")
    if world.guest[1 - side] or world.attached:
        world = world.violate("the guest is in two VMMs")
    if world.adopt:
        return world._replace(guest=put(world.guest, side, True), entered=put(world.entered, side, True))
    if world.copy[side] != world.progress:
        world = world.violate(f"the {NAMES[side]} VMM lets a stale copy of the guest go")
    return world._replace(
        guest=put(world.guest, side, True),
        entered=put(world.entered, side, True),
        copy=put(world.copy, side, None),
        progress=world.progress + 1,
    )


def move_epoch(world: World, side: int) -> World:
    """`side`, which holds the lock, moves the epoch and remembers it."""
    if world.holder != side:
        world = world.violate(f"the {NAMES[side]} VMM moves the epoch without the lock")
    epoch = world.epoch + 1
    return world._replace(epoch=epoch, expected=put(world.expected, side, epoch), moved_by=side)


# --- what both do ---


def look_at_epoch(world: World, side: int) -> Outcomes:
    return [("same" if world.epoch == world.expected[side] else "moved", world)]


def check_epoch(world: World, side: int) -> Outcomes:
    """With the lock: the same epoch is moved and the token is held; a moved one means to let go."""
    if world.epoch == world.expected[side]:
        return [("same", move_epoch(world, side))]
    return [("moved", world._replace(holder=None))]


# --- the old VMM's steps ---


def await_hang_up(world: World, side: int) -> Outcomes:
    failures = own_failures(world, side, "timeout", "broken", "cancelled")
    if world.cpr.inbox[side]:
        return [("refused", world), *failures]
    if all(world.cpr.open):
        return failures
    return [("ok", world.with_channel("cpr", world.cpr.close(side))), *failures]


def connect_main(world: World, side: int) -> Outcomes:
    failures = own_failures(world, side, "broken", "cancelled")
    if not world.listening or not world.alive[NEW]:
        return [("nobody", world), *failures]
    return [("ok", world._replace(main=Channel())), *failures]


def pause(world: World, side: int) -> Outcomes:
    stopped = world._replace(guest=put(world.guest, side, False))
    if not world.adopt:
        stopped = stopped._replace(copy=put(world.copy, side, world.progress), saved=world.progress)
    return [("ok", stopped), ("failed", world), ("broken", world)]


def begin_commit(world: World, side: int) -> Outcomes:
    return [("cancelled", world)] if may_cancel(world, side) else [("ok", world._replace(committed=True))]


def release_token(world: World, side: int) -> Outcomes:
    return [("ok", world._replace(holder=None if world.holder == side else world.holder))]


def commit_rule(world: World) -> World:
    return world.violate("Commit is sent before the token is released") if world.holder == OLD else world


def keep_token(world: World, side: int) -> Outcomes:
    return [("ok", move_epoch(world, side)), ("broken", world)]


def try_once(world: World, side: int) -> Outcomes:
    return [("got", world._replace(holder=side))] if world.holder is None else [("held", world)]


def outlast(world: World, _: int) -> Outcomes:
    """Whether another holds the token for good: a dying process does not."""
    if world.holder is None:
        return [("free", world)]
    return [] if world.lets_go() else [("held", world)]


def withdraw(world: World, side: int) -> Outcomes:
    return [("ok", close_all(world, side, "cancel")), ("broken", close_all(world, side))]


def roll_back(world: World, side: int) -> Outcomes:
    return [("ok", let_guest_go(world, side)), ("broken", world)]


def give_up(world: World, side: int) -> Outcomes:
    return [("ok", close_all(world, side))]


def nothing(world: World, _: int) -> Outcomes:
    return [("ok", world)]


# --- the new VMM's steps ---


def build(world: World, side: int) -> Outcomes:
    return [("ok", world), *own_failures(world, side, "failed", "broken")]


def listen_main(world: World, side: int) -> Outcomes:
    return [("ok", world._replace(listening=True)), *own_failures(world, side, "failed", "broken")]


def hang_up_cpr(world: World, side: int) -> Outcomes:
    return [("ok", world.with_channel("cpr", world.cpr.close(side)))]


def receive_state(world: World, side: int) -> Outcomes:
    if world.main is None:
        return own_failures(world, side, "timeout", "broken", "cancelled")
    return receive("main", "state", lambda world: world._replace(listening=False))(world, side)


def load(world: World, side: int) -> Outcomes:
    loaded = world._replace(copy=put(world.copy, side, world.saved))
    return [("ok", loaded), *own_failures(world, side, "failed", "broken")]


def try_for_a_while(world: World, side: int) -> Outcomes:
    if world.holder is None:
        return [("got", world._replace(holder=side))]
    return [] if world.lets_go() else [("held", world.excuse(side))]


def run(world: World, side: int) -> Outcomes:
    return [("ok", let_guest_go(world, side))]


def refuse(world: World, side: int) -> Outcomes:
    return [("ok", close_all(world, side, "refuse"))]


def attach(world: World) -> World:
    """A third VMM takes the lock and serves the guest."""
    if any(world.guest):
        world = world.violate("the guest is in two VMMs")
    return world._replace(attached=True, holder=ATTACHED, epoch=world.epoch + 1, moved_by=ATTACHED)


FATAL = frozenset({"keep_token", "roll_back"})  # an error in one of these ends the VMM

STEPS: dict[str, Step] = {
    "offer": send("cpr", "offer"),
    "receive_ready": receive("cpr", "ready"),
    "await_hang_up": await_hang_up,
    "connect_main": connect_main,
    "pause": pause,
    "send_state": send("main", "state", lambda world: world._replace(stated=True)),
    "receive_prepared": receive("main", "prepared"),
    "begin_commit": begin_commit,
    "release_token": release_token,
    "send_commit": send("main", "commit", commit_rule),
    "receive_running": receive("main", "running"),
    "keep_token": keep_token,
    "look_at_epoch": look_at_epoch,
    "try_once": try_once,
    "check_epoch": check_epoch,
    "outlast": outlast,
    "nap": nothing,
    "withdraw": withdraw,
    "roll_back": roll_back,
    "give_up": give_up,
    "receive_offer": receive("cpr", "offer"),
    "build": build,
    "listen_main": listen_main,
    "send_ready": send("cpr", "ready"),
    "hang_up_cpr": hang_up_cpr,
    "receive_state": receive_state,
    "load": load,
    "send_prepared": send("main", "prepared"),
    "receive_commit": receive("main", "commit"),
    "try_for_a_while": try_for_a_while,
    "run": run,
    "send_running": send("main", "running"),
    "refuse": refuse,
}


class ModelOutgoing(OracleWorld):
    """`vmm.cpr.outgoing.OutgoingWorld`, answered by the explorer."""

    def __init__(self) -> None:
        super().__init__(outgoing.check_transition, outgoing.Phase.IDLE)

    async def wait_ready(self) -> None:
        """A word and a hang-up."""
        await ask("receive_ready")
        await ask("await_hang_up")

    async def ask_token(self) -> TokenVerdict:
        """As `LiveOutgoing.ask_token`, in the steps that another process can come between."""
        if await ask("look_at_epoch") == "moved":
            return TokenVerdict.TAKEN if await ask("outlast") == "held" else TokenVerdict.LOST
        if await ask("try_once") == "held":
            return TokenVerdict.UNDECIDED
        return TokenVerdict.MINE if await ask("check_epoch") == "same" else TokenVerdict.LOST


class ModelIncoming(OracleWorld):
    """`vmm.cpr.incoming.IncomingWorld`, answered by the explorer."""

    def __init__(self) -> None:
        super().__init__(incoming.check_transition, incoming.Phase.LISTENING)

    async def listen_main(self) -> None:
        """Another process can come in between."""
        await ask("listen_main")
        await ask("send_ready")
        await ask("hang_up_cpr")

    async def take_token(self) -> bool:
        """As `LiveIncoming.take_token` and `RunToken.take`."""
        if await ask("look_at_epoch") == "moved":
            raise StateError("the guest has run elsewhere")
        if await ask("try_for_a_while") == "held":
            return False
        if await ask("check_epoch") == "moved":
            raise StateError("the guest has run elsewhere")
        return True
