"""Pauses from gaps: a window of host time on the guest's clock, and the gap that counts in it."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.errors import VmmError
from vmm.report.pause import (
    ClockPoint,
    Quantiles,
    Window,
    handover_window,
    largest_gap_us,
    plain,
    quantiles,
)
from vmm.report.results import (
    CHECK_SLOTS,
    GAP_SLOTS,
    RESULTS_MAGIC,
    RESULTS_SIZE,
    RESULTS_VERSION,
    CpuLayout,
    CpuState,
    Gap,
    GapLayout,
    GuestState,
    HeaderLayout,
    Results,
    ResultsError,
    parse_results,
)
from vmm.report.table import milliseconds, table

KHZ = 2_000_000  # two cycles a nanosecond
CLOCK = ClockPoint(monotonic_ns=1_000_000, uncertainty_ns=0, guest_tsc=500_000, tsc_khz=KHZ)


def cpu(*gaps: Gap) -> CpuLayout:
    """One vCPU of a results area."""
    layout = CpuLayout(state=CpuState.RUNNING.value, gaps_done=len(gaps), gaps_begun=len(gaps))
    for number, gap in enumerate(gaps):
        layout.gaps[number % GAP_SLOTS] = GapLayout(gap.start_tsc, gap.cycles)
    return layout


def results(*cpus: CpuLayout) -> Results:
    """A results area as the host reads it."""
    header = HeaderLayout(
        magic=RESULTS_MAGIC,
        version=RESULTS_VERSION,
        size=RESULTS_SIZE,
        cpus=len(cpus),
        tsc_khz=KHZ,
        check_slots=CHECK_SLOTS,
        gap_slots=GAP_SLOTS,
        gap_threshold=100_000,
        state=GuestState.RUNNING.value,
    )
    return parse_results(bytes(header) + b"".join(bytes(each) for each in cpus))


def test_the_guests_clock() -> None:
    assert CLOCK.tsc_at(1_000_000) == 500_000
    assert CLOCK.tsc_at(1_000_001) == 500_002
    assert CLOCK.tsc_at(999_999) == 499_998
    answer = {"monotonic-ns": 1, "uncertainty-ns": 2, "guest-tsc": 3, "tsc-khz": 4}
    assert ClockPoint.from_qmp(answer) == ClockPoint(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("gaps", "expected_us"),
    [
        ([], 50.0),  # none over the threshold: no step was longer than that
        ([Gap(400_000, 100_000)], 50.0),  # it ends where the window begins
        ([Gap(400_000, 100_002)], 50.001),  # it reaches into it
        ([Gap(600_000, 300_000)], 150.0),  # it begins within
        ([Gap(700_000, 300_000)], 50.0),  # it begins where the window ends
        ([Gap(0, 4_000_000)], 2000.0),  # it is longer than the window
        ([Gap(500_000, 120_000), Gap(650_000, 180_000), Gap(900_000, 900_000)], 90.0),
    ],
)
def test_the_gap_that_counts(gaps: list[Gap], expected_us: float) -> None:
    window = Window(1_000_000, 1_100_000)  # TSC 500 000 to 700 000
    assert largest_gap_us(results(cpu(*gaps)), CLOCK, window) == expected_us
    assert largest_gap_us(results(cpu(), cpu(*gaps)), CLOCK, window) == expected_us


def test_an_uncertain_clock_widens_the_window() -> None:
    gap = Gap(400_000, 99_900)  # ends 50 ns before the window
    window = Window(1_000_000, 1_100_000)
    unsure = ClockPoint(1_000_000, 60, 500_000, KHZ)
    assert largest_gap_us(results(cpu(gap)), CLOCK, window) == 50.0
    assert largest_gap_us(results(cpu(gap)), unsure, window) == 49.95


def test_a_ring_that_has_turned_over_is_an_error() -> None:
    gaps = [Gap(600_000 + number, 100_000) for number in range(GAP_SLOTS + 1)]
    with pytest.raises(ResultsError, match="have left the ring"):
        largest_gap_us(results(cpu(*gaps)), CLOCK, Window(1_000_000, 1_100_000))


def report(*events: tuple[str, int]) -> dict[str, Any]:
    return {"outcome": "failed", "events": [{"name": name, "ns": ns} for name, ns in events]}


def test_the_window_of_a_handover() -> None:
    window = handover_window(report(("migrate", 1), ("pause", 5), ("resumed", 30), ("completed", 40)))
    assert window == Window(5, 30)
    assert window.length_ns == 25
    with pytest.raises(VmmError, match="no pause in it"):
        handover_window(report(("migrate", 1), ("pause", 5)))


def test_quantiles() -> None:
    assert quantiles([]) is None
    assert quantiles([7.0]) == Quantiles(7.0, 7.0, 7.0, 7.0)
    assert quantiles(range(200, 0, -1)) == Quantiles(1, 100, 198, 200)
    assert plain(Quantiles(0.12, 1.23, 4.56, 7.89)) == {"min": 0.1, "p50": 1.2, "p99": 4.6, "max": 7.9}
    assert plain(None) is None


def test_tables() -> None:
    assert table(("phase", "p50"), [["stop", "1"], ["a longer one", "22.5"]]) == [
        "phase          p50",
        "stop             1",
        "a longer one  22.5",
    ]
    assert milliseconds(1234.56) == "1.235 ms"
    assert milliseconds(None) == "–"
