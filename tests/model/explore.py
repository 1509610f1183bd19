"""Every interleaving of the two coroutines with every crash, lost connection, timeout, failure and cancel, and
the rules that must hold in each of the worlds met.

The search is breadth first over `(position of old, position of new, world)`, so the story that is told of a
broken rule is a shortest one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.automaton import Automaton, Position
from tests.model.world import (
    NAMES,
    NEW,
    OLD,
    STEPS,
    ModelIncoming,
    ModelOutgoing,
    Step,
    World,
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
    faults: bool = True  # without: no crash, loss, cancel, timeout or failure


@dataclass(frozen=True)
class Result:
    """What the search found. `ends` counts the ways in which the two sides end, with who has the guest."""

    states: int
    transitions: int
    positions: tuple[int, int]
    violations: dict[str, list[str]]  # rule -> a shortest story that breaks it
    ends: dict[tuple[str, str, str], int]


FAULTS = frozenset({"timeout", "failed", "broken", "cancelled"})


class Explorer:
    """One search."""

    def __init__(self, variant: Variant) -> None:
        self._steps = STEPS | (variant.steps or {})
        self._faults = variant.faults

        def start_old() -> tuple[ModelOutgoing, Coroutine[Any, Any, Any]]:
            world = variant.outgoing_world()
            return world, variant.outgoing(world)

        def start_new() -> tuple[ModelIncoming, Coroutine[Any, Any, Any]]:
            world = variant.incoming_world()
            return world, variant.incoming(world)

        self._automata = (Automaton(start_old), Automaton(start_new))

    def explore(self) -> Result:
        """Search it all."""
        first = Node((self._automata[OLD].initial, self._automata[NEW].initial), World())
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
                backwards.setdefault(after, []).append(node)
            if _is_settled(node):
                settled.append(node)
                ends[_end(node)] = ends.get(_end(node), 0) + 1
                for rule in _rules_at_the_end(node):
                    violations.setdefault(rule, node)
            elif not any(name[0] != "!" for name, _ in moves):
                violations.setdefault(f"{_waiting(node)} for ever", node)
        for node in _cannot_end(came_from, backwards, settled):
            if node.world.violation is None:
                violations.setdefault(f"{_waiting(node)} without any way to an end", node)
        stories = {rule: _story(came_from, node) for rule, node in violations.items()}
        positions = (self._automata[OLD].positions, self._automata[NEW].positions)
        return Result(len(came_from), transitions, positions, stories, ends)

    def _moves(self, node: Node) -> Iterator[tuple[str, Node]]:
        """Everything that can happen next. A name that begins with `!` is a fault from outside: nothing may
        rely on it.
        """
        world = node.world
        for side in (OLD, NEW):
            if not world.alive[side]:
                yield from self._dying(node, side)
                continue
            position = node.positions[side]
            if position.step is not None:
                for label, after in self._steps[position.step](world, side):
                    if self._faults or label not in FAULTS:
                        yield f"{NAMES[side]}: {position.step} {label}", self._stepped(node, side, label, after)
            if self._faults:
                yield f"! {NAMES[side]} is killed", Node(node.positions, _killed(world, side))
                if not world.cancel[side] and position.step is not None and not (side == OLD and world.committed):
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
            if world.holder == side:
                after = after._replace(holder=None)
            yield f"{NAMES[side]}'s locks are dropped", Node(node.positions, after)

    def _stepped(self, node: Node, side: int, label: str, world: World) -> Node:
        transition = self._automata[side].step(node.positions[side], label)
        for phase, with_error in transition.phases:
            for rule in _rules_on_entering(phase, with_error, world):
                world = world.violate(rule)
        if transition.to.raised is not None:
            world = world.violate(f"{NAMES[side]} ends with an exception: {transition.to.raised}")
        return Node(put(node.positions, side, transition.to), world)


def _killed(world: World, side: int) -> World:
    orphaned = side == OLD and world.stated and world.moved_by is None
    return world._replace(
        alive=put(world.alive, side, False),
        guest=put(world.guest, side, False),
        orphaned=world.orphaned or orphaned,
    )


def _is_settled(node: Node) -> bool:
    world = node.world
    return all(
        node.positions[side].step is None if world.alive[side] else world.hung_up[side] and world.let_go[side]
        for side in (OLD, NEW)
    )


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
    """Never none: where one side lives and the other has not taken the guest to its grave, it has the guest."""
    world = node.world
    if all(world.alive):
        if not any(world.guest):
            yield "both VMMs live and neither has the guest"
    elif world.alive[OLD]:
        if not world.guest[OLD] and world.moved_by != NEW:
            yield "the new VMM died before it took the guest, and the old one does not have it"
    elif world.alive[NEW] and not world.guest[NEW]:
        if world.moved_by == NEW:
            yield "the new VMM took the guest, lives, and does not have it"
        elif world.orphaned and not world.excused:
            yield "the old VMM died with the whole state handed over, and the new one does not run the guest"


def _end(node: Node) -> tuple[str, str, str]:
    def side(at: int) -> str:
        return node.positions[at].frames[0].value if node.world.alive[at] else "dead"  # type: ignore[attr-defined]

    where = [NAMES[at] for at in (OLD, NEW) if node.world.guest[at]]
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
