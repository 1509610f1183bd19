"""What a handover did: one record for `query-migrate`, `x-vmm-report`, the log and the demo. Built from the
trace of both processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vmm.trace import Event

# phase -> the two events it lies between; the events of both VMMs are on one clock (CLOCK_MONOTONIC)
PHASES: dict[str, tuple[str, str]] = {
    "offer": ("migrate", "offer-sent"),
    "build": ("offer-received", "built"),
    "ready": ("offer-sent", "main-connected"),
    "stop": ("pause", "vcpus-saved"),
    "save": ("vcpus-saved", "saved"),
    "send": ("saved", "state-received"),
    "load": ("state-received", "loaded"),
    "prepare": ("loaded", "prepared"),
    "commit": ("prepared", "token-taken"),
    "resume": ("token-taken", "resumed"),
    "confirm": ("resumed", "completed"),
}
PAUSE = ("pause", "resumed")
TOTAL = ("migrate", "completed")


@dataclass
class Report:
    """One handover, from the side that has the whole story (the old VMM once it completed)."""

    mode: str
    method: str = "not chosen"
    why: str = ""
    old_pid: int = field(default_factory=os.getpid)
    new_pid: int | None = None
    vm_fd_received: bool = False
    vm_fd_probe: str = "not probed"
    outcome: str = "idle"
    error: str | None = None
    events: list[Event] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        """Merge the events of either side."""
        self.events = sorted({*self.events, *events}, key=lambda event: event.ns)

    def _between(self, names: tuple[str, str]) -> int | None:
        first = {event.name: event.ns for event in reversed(self.events)}
        if names[0] in first and names[1] in first:
            return first[names[1]] - first[names[0]]
        return None

    def phases_ns(self) -> dict[str, int]:
        """Nanoseconds of each phase that took place."""
        return {name: ns for name, names in PHASES.items() if (ns := self._between(names)) is not None}

    def pause_ns(self) -> int | None:
        """From the request to stop the vCPUs to the request to run them in the new VMM, as the host saw
        it.
        """
        return self._between(PAUSE)

    def total_ns(self) -> int | None:
        """From `migrate` to the end."""
        return self._between(TOTAL)

    @property
    def driven(self) -> str:
        """By whom the received VM fd is driven on: the new VMM itself, the keeper, or nobody (rebuilt)."""
        if self.method != "adopt":
            return "nobody"
        return "vmm" if self.vm_fd_probe == "ok" else "keeper"

    def as_query_migrate(self) -> dict[str, Any]:
        """The fields that QEMU's `query-migrate` adds to a completed migration; milliseconds, and no RAM was
        copied.
        """
        pause, total = self.pause_ns() or 0, self.total_ns() or 0
        setup = self._between(("migrate", "offer-sent")) or 0
        return {
            "setup-time": setup // 1_000_000,
            "downtime": -(-pause // 1_000_000),
            "total-time": -(-total // 1_000_000),
            "ram": {"total": 0, "transferred": 0, "remaining": 0},
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as QMP's `x-vmm-report` gives them."""
        pause = self.pause_ns()
        return {
            "mode": self.mode,
            "method": self.method,
            "why": self.why,
            "outcome": self.outcome,
            "error": self.error,
            "pids": {"old": self.old_pid, "new": self.new_pid},
            "vm-fd": {
                "received": self.vm_fd_received,
                "probe": self.vm_fd_probe,
                "driven": self.driven,
            },
            "pause-us": None if pause is None else pause / 1000,
            "phases-us": {name: ns / 1000 for name, ns in self.phases_ns().items()},
            "events": [{"name": e.name, "ns": e.ns, "role": e.role, "pid": e.pid} for e in self.events],
        }
