"""The model finds the mistakes that others made, and those that suggest themselves: each is the real
coroutine with a line or two changed, or the world with one step that does wrong.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.model.automaton import ask
from tests.model.explore import Explorer, Variant
from tests.model.world import (
    NEW,
    STEPS,
    ModelIncoming,
    Outcomes,
    World,
    look_at_epoch,
    move_epoch,
)
from vmm.cpr import incoming, outgoing


def mutant(module: ModuleType, *changes: tuple[str, str]) -> Callable[[Any], Any]:
    """The module's coroutine with each `(is, becomes)` applied to its source, where `is` stands once."""
    source = re.sub("  # noqa: .*", "", inspect.getsource(module))
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
        source = source.replace(old, new)
    namespace: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source, f"<mutant of {module.__name__}>", "exec"), namespace)  # noqa: S102
    # Its enums are those of the module, so that the rules recognise a mutant's phases.
    namespace |= {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    coroutine: Callable[[Any], Any] = namespace[module.__name__.rpartition(".")[2]]
    return coroutine


def lines(indent: int, *statements: str) -> str:
    return "".join(f"{' ' * indent}{statement}\n" for statement in statements)


TELL_NEW = lines(8, "reason = await _withdraw(world, str(error))")
ROLL_BACK = lines(8, "if paused:", "    await world.keep_token()", "    await world.roll_back()")
RELEASE = lines(4, "await world.release_token()", "try:", "    await world.send_commit()")
ARBITRATE = lines(8, "return await _arbitrate(world, error)")
PREPARED = lines(8, "await world.receive_prepared()")
BEGIN = lines(8, "await world.begin_commit()")
ASK = lines(
    4, "while (verdict := await world.ask_token()) is TokenVerdict.UNDECIDED:", "    await world.nap()"
)

OLD_MISTAKES = {
    "an error after the commit resumes the source, as in Cloud Hypervisor": (
        [(ARBITRATE, lines(8, "await world.roll_back()", "return Phase.FAILED"))],
        "the old VMM lets the guest go without the token",
    ),
    "no acknowledgement after the commit, as in QEMU": (
        [(lines(8, "await world.receive_running()"), "")],
        "the old VMM says completed, and the new one has not taken the guest",
    ),
    "the guest goes on and the epoch stays": (
        [(ROLL_BACK, lines(8, "if paused:", "    await world.roll_back()"))],
        "the new VMM lets a stale copy of the guest go",
    ),
    "the guest goes on, then the epoch is moved": (
        [(ROLL_BACK, lines(8, "if paused:", "    await world.roll_back()", "    await world.keep_token()"))],
        "the new VMM lets a stale copy of the guest go",
    ),
    "what goes wrong in telling the new VMM ends the old one": (
        [
            (
                f"{TELL_NEW}        phase = Phase",
                f"{lines(8, 'reason = str(error)', 'await world.withdraw(reason)')}        phase = Phase",
            )
        ],
        "old ends with an exception: OSError: [Errno 12] Cannot allocate memory",
    ),
    "a failure leaves the guest stopped": (
        [(ROLL_BACK, "")],
        "the old VMM says failed, and does not have the guest",
    ),
    "the token is released before Prepared and not taken back": (
        [
            (PREPARED, lines(8, "await world.release_token()") + PREPARED),
            (RELEASE, lines(4, "try:", "    await world.send_commit()")),
        ],
        "the old VMM moves the epoch without the lock",
    ),
    "Commit is sent before the token is released": (
        [(RELEASE, lines(4, "try:", "    await world.send_commit()", "    await world.release_token()"))],
        "Commit is sent before the token is released",
    ),
    "nobody asks again while the new VMM has not decided": (
        [(ASK, lines(4, "verdict = await world.ask_token()"))],
        "the old VMM says lost, and the new one lives or never took the guest",
    ),
    "a guest that was lost elsewhere is run again": (
        [
            (
                lines(4, "if verdict is TokenVerdict.MINE:"),
                lines(4, "if verdict in (TokenVerdict.MINE, TokenVerdict.LOST):"),
            )
        ],
        "the old VMM lets the guest go without the token",
    ),
    "only errors of the VMM's own are put to the token": (
        [
            (
                lines(4, "except Exception as error:") + ARBITRATE,
                lines(4, "except VmmError as error:") + ARBITRATE,
            )
        ],
        "old ends with an exception: OSError: [Errno 12] Cannot allocate memory",
    ),
    "what was never stopped is rolled back": (
        [
            (
                lines(8, "await world.pause()", "paused = True"),
                lines(8, "paused = True", "await world.pause()"),
            )
        ],
        "the old VMM lets a stale copy of the guest go",
    ),
    "the guest is given up with the token, before the new VMM has it": (
        [
            (
                BEGIN,
                BEGIN
                + lines(
                    8,
                    "await world.release_token()",
                    "await world.give_up()",
                    "world.enter(Phase.COMMITTED)",
                    "world.enter(Phase.COMPLETED)",
                    "return Phase.COMPLETED",
                ),
            )
        ],
        "the old VMM says completed, and the new one has not taken the guest",
    ),
}

LOAD = lines(8, "await world.load()")
SEND_PREPARED = lines(8, "await world.send_prepared()")
TAKE = lines(
    8,
    "if not await world.take_token():",
    '    raise silence or HandoverError("the old VMM said commit, but the run token is not free")',
)
RUN = lines(4, "await world.run()")
TELL = lines(
    4,
    "try:",
    "    await world.send_running()",
    "except Exception as error:",
    '    world.enter(Phase.COMPLETED, f"the guest runs here; the old VMM could not be told: {error}")',
    "else:",
    "    world.enter(Phase.COMPLETED)",
)

NEW_MISTAKES = {
    "Commit is enough, whoever holds the token": (
        [(TAKE, lines(8, "await world.take_token()"))],
        "the new VMM lets the guest go without the token",
    ),
    "the old VMM is silent, so it must be dead": (
        [(TAKE, lines(8, "if silence is None:", "    await world.take_token()"))],
        "the new VMM lets the guest go without the token",
    ),
    "the old VMM is silent, so it must have the guest": (
        [(lines(4, "except PeerError as error:", "    return error"), lines(4, "finally:", "    pass"))],
        "the old VMM died with the whole state handed over, and the new one does not run the guest",
    ),
    "Prepared that cannot be sent is a failure": (
        [(SEND_PREPARED, ""), (LOAD, LOAD + SEND_PREPARED)],
        "the old VMM died with the whole state handed over, and the new one does not run the guest",
    ),
    "the guest runs, then the token is taken": (
        [(RUN, ""), (TAKE, lines(8, "await world.run()") + TAKE)],
        "the new VMM lets the guest go without the token",
    ),
    "Running that cannot be sent is a failure": (
        [(TELL, lines(4, "await world.send_running()", "world.enter(Phase.COMPLETED)"))],
        "new ends with an exception: PeerError: the peer hung up",
    ),
    "the guest runs before its state is loaded": (
        [(LOAD, "")],
        "the new VMM lets a stale copy of the guest go",
    ),
}


def without_epoch(world: World, side: int) -> Outcomes:
    return [("same", move_epoch(world, side) if world.holder == side else world)]


def only_look(world: World, side: int) -> Outcomes:
    return look_at_epoch(world, side) if side == NEW else STEPS["check_epoch"](world, side)


def late(world: World, side: int) -> Outcomes:
    return [("ok", move_epoch(world, side))]


def without_deadline(world: World, side: int) -> Outcomes:
    return [(label, after) for label, after in STEPS["receive_prepared"](world, side) if label != "timeout"]


def shared_lock(world: World, side: int) -> Outcomes:
    return [("got", world._replace(holder=side))]


def set_back(world: World, side: int) -> Outcomes:
    return [("ok", move_epoch(world, side)._replace(epoch=world.epoch - 1))]


def keep_hold(world: World, side: int) -> Outcomes:
    if world.epoch == world.expected[side]:
        return STEPS["check_epoch"](world, side)
    return [("moved", world)]


class MovesTheEpochLate(ModelIncoming):
    async def run(self) -> None:
        await ask("run")
        await ask("move_epoch")


WORLD_MISTAKES = {
    "the epoch is not checked": (
        Variant(steps={"look_at_epoch": without_epoch, "check_epoch": without_epoch}),
        "the new VMM lets a stale copy of the guest go",
    ),
    "the epoch is moved after the guest was entered": (
        Variant(
            incoming_world=MovesTheEpochLate,
            steps={
                "check_epoch": only_look,
                "move_epoch": lambda world, side: [("ok", move_epoch(world, side))],
            },
        ),
        "the old VMM lets a stale copy of the guest go",
    ),
    "the epoch is set back": (
        Variant(steps={"keep_token": set_back}),
        "the epoch goes back",
    ),
    "a stale lock is kept, and nobody can attach": (
        Variant(steps={"check_epoch": keep_hold}, adopt=True),
        "nobody serves the guest, and a VMM that lives keeps others from attaching",
    ),
    "two serve a guest that lives in its keeper": (
        Variant(steps={"try_for_a_while": shared_lock}, adopt=True),
        "the guest is in two VMMs",
    ),
    "a wait without a deadline": (
        Variant(steps={"receive_prepared": without_deadline}),
        "old in receive_prepared waits for ever",
    ),
    "a lock that a copy of its description keeps alive": (
        Variant(lock_dies_with_holder=False),
        "new in try_for_a_while waits for ever",
    ),
    "a lock that others can take too": (
        Variant(steps={"try_once": shared_lock}),
        "the new VMM lets the guest go without the token",
    ),
}


def found(variant: Variant) -> dict[str, list[str]]:
    return Explorer(variant).explore().violations


@pytest.mark.parametrize("mistake", OLD_MISTAKES)
def test_mistake_of_the_old_vmm_is_found(mistake: str) -> None:
    changes, rule = OLD_MISTAKES[mistake]
    assert rule in found(Variant(outgoing=mutant(outgoing, *changes)))


@pytest.mark.parametrize("mistake", NEW_MISTAKES)
def test_mistake_of_the_new_vmm_is_found(mistake: str) -> None:
    changes, rule = NEW_MISTAKES[mistake]
    assert rule in found(Variant(incoming=mutant(incoming, *changes)))


@pytest.mark.parametrize("mistake", WORLD_MISTAKES)
def test_mistake_of_the_world_is_found(mistake: str) -> None:
    variant, rule = WORLD_MISTAKES[mistake]
    assert rule in found(variant)


def test_a_story_is_told_from_the_start() -> None:
    """What is found can be followed: a shortest story, its last step the one that broke the rule."""
    changes, rule = OLD_MISTAKES["the guest goes on and the epoch stays"]
    story = found(Variant(outgoing=mutant(outgoing, *changes)))[rule]
    assert story[0] in ("old: offer ok", "new: receive_offer ok")
    assert story[-1] == "new: run ok"
    assert "! old is killed" in story
    assert story.index("old: roll_back ok") < story.index("! old is killed")


def test_a_mutant_of_nothing_is_the_real_thing() -> None:
    variant = Variant(outgoing=mutant(outgoing), incoming=mutant(incoming))
    real, copy = Explorer(Variant()).explore(), Explorer(variant).explore()
    assert copy.violations == {}
    assert copy.states == real.states
