"""What the monitor says of handovers, in QEMU's words, and the thread that carries one.

A VMM is the new side of one handover and the old side of the next: both have this in common.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vmm.cpr.live import Timeouts
from vmm.cpr.report import Report
from vmm.process.loop import Loop
from vmm.qmp.backend import QmpError
from vmm.qmp.server import QmpServer


class Migration:
    """Parameters, status and report; and what the carrying thread tells the monitor's clients. That is kept
    back until the pause is over, so that nothing competes with the guest for the processors.
    """

    def __init__(self, loop: Loop, monitor: QmpServer) -> None:
        self.timeouts = Timeouts()
        self.error: str | None = None
        self.status: str | None = None
        self.outcome: Report | None = None
        self._loop = loop
        self._monitor = monitor
        self._mode = "normal"
        self._capabilities = {"events": False}
        self._carrier: threading.Thread | None = None
        self._kept_back: list[tuple[str, dict[str, Any] | None, float]] = []

    # --- the carrying thread ---

    def carry(self, work: Callable[[], None]) -> None:
        """Do `work`, a handover, on a thread of its own."""
        self._carrier = threading.Thread(target=work, name="handover", daemon=True)
        self._carrier.start()

    @property
    def under_way(self) -> bool:
        """Whether a handover is being carried out."""
        return self._carrier is not None and self._carrier.is_alive()

    def join(self) -> None:
        """Wait for the handover's end, which has been told to give up."""
        if self._carrier is not None:
            self._carrier.join(self.timeouts.setup_s)

    # --- events ---

    def tell(self, event: str, data: dict[str, Any] | None = None) -> None:
        """An event for the monitor's clients. Any thread."""
        at = time.time()
        if threading.current_thread() is self._carrier:
            self._kept_back.append((event, data, at))
        else:
            self._emit(event, data, at)

    def release_events(self) -> None:
        """Send what was kept back."""
        kept, self._kept_back = self._kept_back, []
        for event, data, at in kept:
            self._emit(event, data, at)

    def _emit(self, event: str, data: dict[str, Any] | None, at: float) -> None:
        if not self._loop.closed:
            self._monitor.emit(event, data, at)

    def set_status(self, status: str | None, error: str | None) -> None:
        """It has come to this status, with this error. Any thread."""
        self.error = error
        if status != self.status:
            self.status = status
            if status is not None and self._capabilities["events"]:
                self.tell("MIGRATION", {"status": status})

    # --- the monitor's commands ---

    def parameters(self) -> dict[str, Any]:
        """QMP `query-migrate-parameters`."""
        return {
            "mode": self._mode,
            "x-vmm-setup-timeout": round(self.timeouts.setup_s * 1000),
            "x-vmm-prepare-timeout": round(self.timeouts.prepare_s * 1000),
            "x-vmm-commit-timeout": round(self.timeouts.commit_s * 1000),
        }

    def set_parameters(self, values: dict[str, Any]) -> None:
        """QMP `migrate-set-parameters`. What a handover under way was started with stays as it is."""
        self._mode = values.get("mode", self._mode)
        changed = {
            f"{key}_s": values[f"x-vmm-{key}-timeout"] / 1000
            for key in ("setup", "prepare", "commit")
            if values.get(f"x-vmm-{key}-timeout") is not None
        }
        self.timeouts = replace(self.timeouts, **changed)

    def capabilities(self) -> dict[str, bool]:
        """QMP `query-migrate-capabilities`."""
        return dict(self._capabilities)

    def set_capabilities(self, values: dict[str, bool]) -> None:
        """QMP `migrate-set-capabilities`."""
        self._capabilities.update(values)

    def query(self) -> dict[str, Any]:
        """QMP `query-migrate`, with QEMU's fields."""
        if self.status is None:
            return {}
        answer: dict[str, Any] = {"status": self.status}
        if self.error is not None:
            answer["error-desc"] = self.error
        if self.status == "completed" and self.outcome is not None:
            answer.update(self.outcome.as_query_migrate())
        return answer

    def report(self) -> dict[str, Any]:
        """QMP `x-vmm-report`."""
        if self.outcome is None:
            raise QmpError("no handover has taken place from this VMM; use migrate first")
        return self.outcome.as_dict()
