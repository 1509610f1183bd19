"""How long a guest stood still, as it saw it itself: the largest gap in its results area that overlaps a
window of host time, the window being put on the guest's clock.

Figures only: nothing here may talk to a VMM, and a figure that cannot be told is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vmm.errors import VmmError
from vmm.report.results import Results

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class ClockPoint:
    """One moment on two clocks: the host's CLOCK_MONOTONIC (known to `uncertainty_ns`) and the guest's
    TSC.
    """

    monotonic_ns: int
    uncertainty_ns: int
    guest_tsc: int
    tsc_khz: int

    @classmethod
    def from_qmp(cls, answer: Mapping[str, Any]) -> ClockPoint:
        """The answer to `x-vmm-guest-clock`."""
        return cls(answer["monotonic-ns"], answer["uncertainty-ns"], answer["guest-tsc"], answer["tsc-khz"])

    def tsc_at(self, monotonic_ns: int) -> int:
        """The guest's TSC at a moment of the host's clock; the TSC's rate is constant (KVM's `tsc_khz`)."""
        return self.guest_tsc + (monotonic_ns - self.monotonic_ns) * self.tsc_khz // NS_PER_MS


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of host time, CLOCK_MONOTONIC nanoseconds."""

    start_ns: int
    end_ns: int

    @property
    def length_ns(self) -> int:
        """How long it is."""
        return self.end_ns - self.start_ns


def handover_window(report: Mapping[str, Any]) -> Window:
    """From the request to stop the vCPUs to the request to run them again, of an `x-vmm-report`. Raises
    VmmError.
    """
    first: dict[str, int] = {}
    for event in report["events"]:
        first.setdefault(event["name"], event["ns"])
    if "pause" not in first or "resumed" not in first:
        raise VmmError(f"the handover's report has no pause in it (outcome: {report['outcome']})")
    return Window(first["pause"], first["resumed"])


def largest_gap_us(results: Results, clock: ClockPoint, window: Window) -> float:
    """The largest gap that overlaps `window` on any vCPU, in microseconds.

    Where no step was over the guest's threshold, the answer is that threshold: no step was longer. Raises
    ResultsError where gaps of that time have left the guest's ring.
    """
    start = clock.tsc_at(window.start_ns - clock.uncertainty_ns)
    end = clock.tsc_at(window.end_ns + clock.uncertainty_ns)
    found = [cpu.largest_gap_within(start, end) for cpu in results.cpus]
    cycles = max((gap.cycles for gap in found if gap is not None), default=results.gap_threshold)
    return results.microseconds(cycles)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of some figures: the least, the median, the 99th percentile and the largest, each one of the figures
    (nearest rank).
    """

    min: float
    p50: float
    p99: float
    max: float


def plain(figures: Quantiles | None) -> dict[str, float] | None:
    """Plain values for JSON, to a tenth."""
    return None if figures is None else {name: round(value, 1) for name, value in asdict(figures).items()}


def quantiles(figures: Iterable[float]) -> Quantiles | None:
    """The Quantiles of `figures`; None where there are none."""
    ordered = sorted(figures)
    if not ordered:
        return None
    return Quantiles(ordered[0], _rank(ordered, 50), _rank(ordered, 99), ordered[-1])


def _rank(ordered: list[float], percent: int) -> float:
    return ordered[-(-len(ordered) * percent // 100) - 1]
