"""Faults on purpose: a handover's world that dies, stops, waits or fails at one step, for tests.

Imported only where the environment variable VMM_FAULT is set. It holds faults divided by `;`, each

    SIDE:STEP:KIND          outgoing:send_state:kill, incoming:load:delay:300, incoming:after-load:stop

SIDE is `outgoing` or `incoming`. STEP is a call of that side's world; the fault strikes before it, or with
`after-` once it has succeeded. Each strikes once in a process and is then gone from the variable. The kinds:

    kill        SIGKILL to this process
    stop        SIGSTOP to this process; whoever runs the test continues it
    delay:MS    the step waits that many milliseconds
    fail        the step raises HandoverError
    break       the step raises OSError, as no step should
    hang-up     both connections are shut down
    cancel      as `migrate_cancel` does, or the end of a new VMM
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getmembers, iscoroutinefunction
from typing import Any, TypeVar, cast

from vmm.cpr.incoming import IncomingWorld
from vmm.cpr.outgoing import OutgoingWorld
from vmm.errors import HandoverError, UsageError

log = logging.getLogger(__name__)

VARIABLE = "VMM_FAULT"
AFTER = "after-"
W = TypeVar("W", OutgoingWorld, IncomingWorld)


def _steps(world: type) -> frozenset[str]:
    return frozenset(name for name, _ in getmembers(world, iscoroutinefunction))


STEPS = {"outgoing": _steps(OutgoingWorld), "incoming": _steps(IncomingWorld)}


@dataclass(frozen=True)
class Fault:
    """One fault. `argument` is a delay's milliseconds."""

    side: str
    step: str
    after: bool
    kind: str
    argument: int = 0

    def __str__(self) -> str:
        argument = f":{self.argument}" if self.kind == "delay" else ""
        return f"{self.side}:{AFTER if self.after else ''}{self.step}:{self.kind}{argument}"


def parse(text: str) -> list[Fault]:
    """The faults of a VMM_FAULT. Raises UsageError."""
    faults = []
    for one in filter(None, text.split(";")):
        side, _, rest = one.partition(":")
        step, _, rest = rest.partition(":")
        kind, _, argument = rest.partition(":")
        after = step.startswith(AFTER)
        step = step.removeprefix(AFTER)
        if step not in STEPS.get(side, ()) or kind not in _KINDS:
            raise UsageError(f"VMM_FAULT: {one!r} is not SIDE:STEP:KIND; see vmm/cpr/faults.py")
        if (kind == "delay") != argument.isdecimal():
            raise UsageError(f"VMM_FAULT: {one!r}: a delay, and nothing else, has a number of milliseconds")
        faults.append(Fault(side, step, after, kind, int(argument or 0)))
    return faults


def inject(world: W) -> W:
    """`world` with the faults that the variable has for its side. Raises UsageError."""
    side = "outgoing" if hasattr(world, "ask_token") else "incoming"
    faults = [fault for fault in parse(os.environ[VARIABLE]) if fault.side == side]
    for fault in faults:
        log.warning("VMM_FAULT: %s", fault)
    return cast("W", _FaultyWorld(world, faults)) if faults else world


class _FaultyWorld:
    """Passes every call on to the real world, but for the faults."""

    def __init__(self, world: OutgoingWorld | IncomingWorld, faults: list[Fault]) -> None:
        self._world = world
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._world, name)
        if not iscoroutinefunction(call):
            return call

        async def step(*arguments: Any) -> Any:
            self._strike(name, after=False)
            result = await call(*arguments)
            self._strike(name, after=True)
            return result

        return step

    def _strike(self, step: str, *, after: bool) -> None:
        for fault in [fault for fault in self._faults if (fault.step, fault.after) == (step, after)]:
            self._faults.remove(fault)
            os.environ[VARIABLE] = ";".join(
                str(other) for other in parse(os.environ[VARIABLE]) if other != fault
            )
            log.warning("VMM_FAULT: %s strikes", fault)
            _KINDS[fault.kind](self._world, fault)


def _kill(_: Any, __: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(_: Any, __: Fault) -> None:
    # To this thread and not to the process: then this thread is the first to stop, and stops here.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _delay(_: Any, fault: Fault) -> None:
    time.sleep(fault.argument / 1000)


def _fail(_: Any, fault: Fault) -> None:
    raise HandoverError(f"fault {fault}")


def _break(_: Any, fault: Fault) -> None:
    raise OSError(errno.ENOMEM, f"fault {fault}")


def _hang_up(world: Any, _: Fault) -> None:
    for channel in world.channels:
        channel.hang_up()


def _cancel(world: Any, fault: Fault) -> None:
    world.cancel.set(f"fault {fault}")


_KINDS: dict[str, Callable[[Any, Fault], None]] = {
    "kill": _kill,
    "stop": _stop,
    "delay": _delay,
    "fail": _fail,
    "break": _break,
    "hang-up": _hang_up,
    "cancel": _cancel,
}
