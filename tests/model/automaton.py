"""The real coroutines as automata: learned by running them again and again, each time a little further.

A coroutine cannot be copied, but what it does next follows from where it stands and what its local variables
hold: those are its position. So one run to each position is enough, and a search over millions of states of
the world costs a few hundred runs of the code under test.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine, Generator, Hashable
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import Any, NamedTuple

from vmm.cpr.channel import Cancelled
from vmm.errors import HandoverError, PeerError, StateError

# What a step can meet, and the exception that the coroutine then sees. Any other label is a value.
ERRORS: dict[str, Callable[[], Exception]] = {
    "timeout": lambda: PeerError("the peer did not answer within the time allowed"),
    "hang-up": lambda: PeerError("the peer hung up"),
    "nobody": lambda: PeerError("nobody listens"),
    "refused": lambda: StateError("the peer refuses, cancels or sends rubbish"),
    "failed": lambda: HandoverError("the step failed"),
    "cancelled": lambda: Cancelled("cancelled"),
    "broken": lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
}


class Ask:
    """`label = await Ask(step)`: the explorer decides how `step` ends."""

    def __init__(self, step: str) -> None:
        self.step = step

    def __await__(self) -> Generator[Ask, str, str]:
        label = yield self
        return label


async def ask(step: str) -> str:
    """How `step` ended; raises where it ended in an error."""
    label = await Ask(step)
    if (make_error := ERRORS.get(label)) is not None:
        error = make_error()
        raise error
    return label


@dataclass(frozen=True, eq=False)
class Position:
    """Where a coroutine stands: one entry a frame, and the step it waits for (None: it has ended). An
    automaton has one object for each, so that they are told apart by being another.
    """

    phase: Enum | None
    frames: tuple[Hashable, ...]
    step: str | None
    raised: str | None = None  # the exception that nobody caught


DEAD = Position(None, (), None)  # of a process that acts no more


class Transition(NamedTuple):
    """What one label leads to: the next position and the phases entered on the way."""

    to: Position
    phases: tuple[tuple[Enum, bool], ...]  # each with whether an error was told


class OracleWorld:
    """A world whose calls the explorer answers: each call is a step of that name, but for `enter`, which is
    checked and recorded, and for the calls that a subclass takes apart.
    """

    def __init__(self, check: Callable[[Any, Any], None], start: Enum) -> None:
        self._check = check
        self.phase = start
        self.entered: list[tuple[Enum, bool]] = []

    def enter(self, phase: Enum, error: str | None = None) -> None:
        self._check(self.phase, phase)
        self.phase = phase
        self.entered.append((phase, error is not None))

    def __getattr__(self, step: str) -> Callable[..., Coroutine[Ask, str, str]]:
        return lambda *_: ask(step)


def _visible(value: object) -> Hashable:
    """What a local variable's value says about the future."""
    if isinstance(value, BaseException):
        return type(value).__name__
    if value is None or isinstance(value, bool | int | str | Enum):
        return value
    return type(value).__name__


def _frame(frame: FrameType) -> Hashable:
    values = tuple((name, _visible(value)) for name, value in sorted(frame.f_locals.items()))
    return (frame.f_code.co_qualname, frame.f_lasti, values)


class Automaton:
    """`start()` makes a fresh world and its coroutine; positions and transitions are found on demand."""

    def __init__(self, start: Callable[[], tuple[OracleWorld, Coroutine[Ask, str, Any]]]) -> None:
        self._start = start
        self._known: dict[Hashable, Position] = {}
        self._ways: dict[Position, tuple[str, ...]] = {}
        self._transitions: dict[tuple[Position, str], Transition] = {}
        self.runs = 0
        self.initial, _ = self._run(())
        self._ways[self.initial] = ()

    def step(self, position: Position, label: str) -> Transition:
        """Where the coroutine gets to from `position` when its step ends with `label`."""
        known = self._transitions.get((position, label))
        if known is None:
            way = (*self._ways[position], label)
            to, phases = self._run(way)
            self._ways.setdefault(to, way)
            known = self._transitions[position, label] = Transition(to, phases)
        return known

    @property
    def positions(self) -> int:
        """How many positions were met."""
        return len(self._ways)

    def _run(self, labels: tuple[str, ...]) -> tuple[Position, tuple[tuple[Enum, bool], ...]]:
        self.runs += 1
        world, coroutine = self._start()
        try:
            asked = coroutine.send(None)
            for label in labels:
                world.entered.clear()
                asked = coroutine.send(label)
        except StopIteration:
            return self._position(world.phase, (), None), tuple(world.entered)
        except Exception as error:  # noqa: BLE001 - whatever nobody caught is what the rules ask for
            raised = f"{type(error).__name__}: {error}"
            return self._position(world.phase, (), None, raised), tuple(world.entered)
        try:
            return self._position(world.phase, _frames(coroutine), asked.step), tuple(world.entered)
        finally:
            coroutine.close()

    def _position(
        self, phase: Enum | None, frames: tuple[Hashable, ...], step: str | None, raised: str | None = None
    ) -> Position:
        key = (phase, frames, step, raised)
        return self._known.setdefault(key, Position(phase, frames, step, raised))


def _frames(coroutine: Any) -> tuple[Hashable, ...]:
    found = []
    while getattr(coroutine, "cr_frame", None) is not None:
        found.append(_frame(coroutine.cr_frame))
        coroutine = coroutine.cr_await
    return tuple(found)
