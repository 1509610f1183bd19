"""Trace events: what happened when, on the one clock that both VMM processes of a handover share.

An event is a name, CLOCK_MONOTONIC nanoseconds and the role of the process that recorded it. Recording is an
append to a bounded deque, cheap enough for the pause of a handover; it never does I/O.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

KEPT_EVENTS = 4096


class Event(NamedTuple):
    """One trace event; `ns` is CLOCK_MONOTONIC, comparable between processes of one host."""

    name: str
    ns: int
    role: str
    pid: int


class Tracer:
    """The newest KEPT_EVENTS events of one process. Safe to use from any thread: an append is atomic."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._pid = os.getpid()
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)

    def mark(self, name: str) -> int:
        """Record `name` now; returns the nanoseconds recorded."""
        ns = time.monotonic_ns()
        self._events.append(Event(name, ns, self.role, self._pid))
        return ns

    def clear(self) -> None:
        """Forget what was recorded: a new story begins."""
        self._events.clear()

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))
