"""Every interleaving of the two coroutines with every crash, stop, lost connection, timeout, failure and
cancel, and the rules that must hold in each of the worlds met.

The search is breadth first over `(position of old, position of new, world)`, so the story that is told of a
broken rule is a shortest one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.automaton import DEAD, Automaton, Position
from tests.model.world import (
    FATAL,
    NAMES,
    NEW,
    OLD,
    STEPS,
    ModelIncoming,
    ModelOutgoing,
    Step,
    World,
    attach,
    close_all,
    put,
)
from vmm.cpr import incoming, outgoing


class Node(NamedTuple):
    """One state of everything."""

    positions: tuple[Position, Position]
    world: World


@dataclass(frozen=True)
class Variant:
    """What is explored: the protocol as it is, or with one part exchanged."""

    outgoing: Callable[[Any], Coroutine[Any, Any, Any]] = outgoing.outgoing
    incoming: Callable[[Any], Coroutine[Any, Any, Any]] = incoming.incoming
    outgoing_world: Callable[[], ModelOutgoing] = ModelOutgoing
    incoming_world: Callable[[], ModelIncoming] = ModelIncoming
    steps: dict[str, Step] | None = None  # in place of those of STEPS
    faults: bool = True  # without: no crash, stop, loss, cancel, timeout or failure
    lock_dies_with_holder: bool = True
    adopt: bool = False


@dataclass(frozen=True)
class Result:
    """What the search found. `ends` counts the ways in which the two sides end, with who has the guest."""

    states: int
    transitions: int
    positions: tuple[int, int]
    violations: dict[str, list[str]]  # rule -> a shortest story that breaks it
    ends: dict[tuple[str, str, str], int]

    def summary(self) -> str:
        """All of it in a few lines."""
        counts = f"{self.states} states, {self.transitions} transitions, {sum(self.positions)} positions"
        lines = [f"{counts}; {len(self.violations)} violations"]
        lines += [
            f"{count:7} ends: old {old:9}  new {new:9}  guest: {where}"
            for (old, new, where), count in sorted(self.ends.items())
        ]
        for rule, story in self.violations.items():
            lines += [f"VIOLATED: {rule}", *(f"    {step}" for step in story)]
        return "\n".join(lines)


UNRELIABLE = frozenset({"failed", "broken"})
FAULTS = UNRELIABLE | {"timeout", "cancelled"}


class Explorer:
    """One search."""

    def __init__(self, variant: Variant) -> None:
        self._steps = STEPS | (variant.steps or {})
        self._faults = variant.faults
        self._lock_dies = variant.lock_dies_with_holder
        self._adopt = variant.adopt

        def start_old() -> tuple[ModelOutgoing, Coroutine[Any, Any, Any]]:
            world = variant.outgoing_world()
            return world, variant.outgoing(world)

        def start_new() -> tuple[ModelIncoming, Coroutine[Any, Any, Any]]:
            world = variant.incoming_world()
            return world, variant.incoming(world)

        self._automata = (Automaton(start_old), Automaton(start_new))

    def explore(self) -> Result:
        """Search it all."""
        first = Node((self._automata[OLD].initial, self._automata[NEW].initial), World(adopt=self._adopt))
        came_from: dict[Node, tuple[Node, str] | None] = {first: None}
        backwards: dict[Node, list[Node]] = {}
        violations: dict[str, Node] = {}
        ends: dict[tuple[str, str, str], int] = {}
        settled: list[Node] = []
        transitions = 0
        todo = deque([first])
        while todo:
            node = todo.popleft()
            if node.world.violation is not None:
                violations.setdefault(node.world.violation, node)
                continue  # what follows from a broken rule proves nothing
            moves = list(self._moves(node))
            for name, after in moves:
                transitions += 1
                if after not in came_from:
                    came_from[after] = (node, name)
                    todo.append(after)
                if name[0] != "!":
                    backwards.setdefault(after, []).append(node)
            if _is_settled(node):
                settled.append(node)
                ends[_end(node)] = ends.get(_end(node), 0) + 1
                for rule in _rules_at_the_end(node):
                    violations.setdefault(rule, node)
            elif not any(name[0] != "!" for name, _ in moves):
                violations.setdefault(f"{_waiting(node)} for ever", node)
        for node in _cannot_end(came_from, backwards, settled):
            if node.world.violation is None and not _is_undecided(node):
                violations.setdefault(f"{_waiting(node)} without any way to an end", node)
        stories = {rule: _story(came_from, node) for rule, node in violations.items()}
        positions = (self._automata[OLD].positions, self._automata[NEW].positions)
        return Result(len(came_from), transitions, positions, stories, ends)

    def _moves(self, node: Node) -> Iterator[tuple[str, Node]]:
        """Everything that can happen next. What begins with `!` may, but nothing may rely on it."""
        world = node.world
        if not any(_can_act(world, side) for side in (OLD, NEW)):
            return  # there is nobody left to do anything wrong
        if self._faults and world.adopt and world.holder is None and not world.alive[OLD]:
            yield "! a VMM attaches", Node(node.positions, attach(world))
        for side in (OLD, NEW):
            if not world.alive[side]:
                yield from self._dying(node, side)
                continue
            position = node.positions[side]
            active = position.step is not None and not world.stopped[side]
            if position.step is not None and active:
                for label, after in self._steps[position.step](world, side):
                    if self._faults or label not in FAULTS:
                        mark = "! " if label in UNRELIABLE else ""
                        name = f"{mark}{NAMES[side]}: {position.step} {label}"
                        yield name, self._stepped(node, side, label, after)
            if self._faults:
                yield f"! {NAMES[side]} is killed", _ended(node, side, _killed(world, side))
                if active:
                    stopped = world._replace(stopped=put(world.stopped, side, True))
                    yield f"! {NAMES[side]} is stopped", _ended(node, side, stopped)
                if active and not world.cancel[side] and not (side == OLD and world.committed):
                    cancelled = world._replace(cancel=put(world.cancel, side, True))
                    yield f"! {NAMES[side]} is cancelled", Node(node.positions, cancelled)
        if self._faults:
            for name in ("cpr", "main"):
                channel = getattr(world, name)
                if channel is not None and all(channel.open):
                    lost = world.with_channel(name, channel.lose())._replace(excused=True)
                    yield f"! {name} is lost", Node(node.positions, lost)

    def _dying(self, node: Node, side: int) -> Iterator[tuple[str, Node]]:
        world = node.world
        if not world.hung_up[side]:
            after = close_all(world, side)._replace(hung_up=put(world.hung_up, side, True))
            yield f"{NAMES[side]}'s sockets are closed", Node(node.positions, after)
        if not world.let_go[side]:
            after = world._replace(let_go=put(world.let_go, side, True))
            if world.holder == side and self._lock_dies:
                after = after._replace(holder=None)
            yield f"{NAMES[side]}'s locks are dropped", Node(node.positions, after)

    def _stepped(self, node: Node, side: int, label: str, world: World) -> Node:
        step = node.positions[side].step
        if step in FATAL and label in UNRELIABLE:
            return _ended(node, side, _killed(node.world, side))
        transition = self._automata[side].step(node.positions[side], label)
        if world.epoch < node.world.epoch:
            world = world.violate("the epoch goes back")
        for phase, with_error in transition.phases:
            for rule in _rules_on_entering(phase, with_error, world):
                world = world.violate(rule)
        if transition.to.raised is not None:
            world = world.violate(f"{NAMES[side]} ends with an exception: {transition.to.raised}")
        return Node(put(node.positions, side, transition.to), world)


def _ended(node: Node, side: int, world: World) -> Node:
    """`side` will never act again: forget all that only its acts could depend on."""
    return Node(
        put(node.positions, side, DEAD),
        world._replace(
            copy=put(world.copy, side, None),
            expected=put(world.expected, side, 0),
            cancel=put(world.cancel, side, False),
        ),
    )


def _killed(world: World, side: int) -> World:
    orphaned = side == OLD and world.stated and world.moved_by is None
    return world._replace(
        alive=put(world.alive, side, False),
        stopped=put(world.stopped, side, False),
        guest=put(world.guest, side, False),
        orphaned=world.orphaned or orphaned,
    )


def _can_act(world: World, side: int) -> bool:
    return world.alive[side] and not world.stopped[side]


def _is_settled(node: Node) -> bool:
    world = node.world
    if not any(_can_act(world, side) for side in (OLD, NEW)):
        return True
    return all(
        node.positions[side].step is None if world.alive[side] else world.hung_up[side] and world.let_go[side]
        for side in (OLD, NEW)
    )


def _is_undecided(node: Node) -> bool:
    """The one wait that only the new VMM can end, by going on or by dying: stopped with the lock, before
    it moved the epoch. Nobody else may run the guest then.
    """
    world = node.world
    return world.stopped[NEW] and world.holder == NEW and world.epoch == world.expected[OLD]


def _rules_on_entering(phase: Any, with_error: bool, world: World) -> Iterator[str]:
    """What a VMM says of a handover must be so at the moment in which it says it."""
    if phase is outgoing.Phase.COMPLETED:
        if not (world.moved_by == NEW if with_error else world.entered[NEW]):
            yield "the old VMM says completed, and the new one has not taken the guest"
    elif phase in (outgoing.Phase.FAILED, outgoing.Phase.CANCELLED):
        if not world.guest[OLD]:
            yield f"the old VMM says {phase.value}, and does not have the guest"
    elif phase is outgoing.Phase.LOST:
        if world.alive[NEW] or world.moved_by != NEW:
            yield "the old VMM says lost, and the new one lives or never took the guest"
    elif phase is incoming.Phase.COMPLETED:
        if not world.guest[NEW]:
            yield "the new VMM says completed, and does not have the guest"
    elif phase is incoming.Phase.FAILED and world.moved_by == NEW:
        yield "the new VMM says failed, and has taken the guest"


def _rules_at_the_end(node: Node) -> Iterator[str]:
    """Never none: where one side can act and the other has not taken the guest with it, it has the guest. (A
    stopped VMM may have it; that is settled when it goes on, or dies.)
    """
    world = node.world
    old, new = (_can_act(world, side) for side in (OLD, NEW))
    if world.attached:
        return
    if world.adopt and not any(world.guest) and world.holder is not None and _can_act(world, world.holder):
        yield "nobody serves the guest, and a VMM that lives keeps others from attaching"
    if old and new:
        if not any(world.guest):
            yield "both VMMs live and neither has the guest"
    elif old:
        if not world.guest[OLD] and world.moved_by != NEW:
            yield "the new VMM ended before it took the guest, and the old one does not have it"
    elif new and not world.guest[NEW]:
        if world.moved_by == NEW:
            yield "the new VMM took the guest, lives, and does not have it"
        elif world.orphaned and not world.excused:
            yield "the old VMM died with the whole state handed over, and the new one does not run the guest"
        elif world.stopped[OLD] and world.holder is None and not world.excused:
            yield "the old VMM released the token, and the new one does not run the guest"


def _end(node: Node) -> tuple[str, str, str]:
    def side(at: int) -> str:
        phase = node.positions[at].phase
        if phase is not None:
            return str(phase.value)
        return "stopped" if node.world.alive[at] else "dead"

    where = [NAMES[at] for at in (OLD, NEW) if node.world.guest[at]] + ["attached"] * node.world.attached
    return side(OLD), side(NEW), where[0] if where else "nobody"


def _waiting(node: Node) -> str:
    waits = [
        f"{NAMES[side]} in {position.step}"
        for side, position in enumerate(node.positions)
        if node.world.alive[side] and position.step is not None
    ]
    return " and ".join(waits) + " waits"


def _cannot_end(
    nodes: dict[Node, tuple[Node, str] | None], backwards: dict[Node, list[Node]], settled: list[Node]
) -> Iterator[Node]:
    """The nodes from which no settled node can be reached."""
    reaches = set(settled)
    todo = deque(settled)
    while todo:
        for node in backwards.get(todo.popleft(), ()):
            if node not in reaches:
                reaches.add(node)
                todo.append(node)
    return (node for node in nodes if node not in reaches)


def _story(came_from: dict[Node, tuple[Node, str] | None], node: Node) -> list[str]:
    steps: list[str] = []
    while (origin := came_from[node]) is not None:
        node, name = origin
        steps.append(name)
    return steps[::-1]
