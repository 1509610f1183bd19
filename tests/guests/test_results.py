"""parse_results: what a guest wrote comes out, what it was writing does not, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.report import results as results_module
from vmm.report.results import (
    CPU_SIZE,
    GAP_SLOTS,
    HEADER_SIZE,
    RESULTS_SIZE,
    CheckState,
    CpuLayout,
    CpuState,
    Gap,
    GuestState,
    HeaderLayout,
    ResultsError,
    parse_results,
)


class Area:
    """A results area under construction, as a guest with two vCPUs leaves it."""

    def __init__(self) -> None:
        self.header = HeaderLayout(
            magic=results_module.RESULTS_MAGIC,
            version=1,
            size=RESULTS_SIZE,
            cpus=2,
            tsc_khz=2_000_000,
            check_slots=48,
            gap_slots=GAP_SLOTS,
            gap_threshold=400_000,
            state=1,
            ticks=7,
        )
        self.cpus = [CpuLayout(apic_id=index, state=2, turns=100 + index) for index in range(2)]
        self.header.checks[2].id = 2
        self.header.checks[2].state = 1
        self.header.checks[2].name = b"pattern"
        self.cpus[0].counts[2], self.cpus[1].counts[2] = 30, 12

    def record(self, cpu: int, count: int) -> None:
        """`count` gaps of 1000 + i cycles, at TSC i * 10,000."""
        layout = self.cpus[cpu]
        for i in range(count):
            gap = layout.gaps[i % GAP_SLOTS]
            gap.start_tsc, gap.cycles = i * 10_000, 1000 + i
            layout.gap_cycles += 1000 + i
        layout.gaps_begun = layout.gaps_done = count
        if count:
            layout.largest_gap_start, layout.largest_gap_cycles = (count - 1) * 10_000, 1000 + count - 1

    def __bytes__(self) -> bytes:
        return bytes(self.header) + b"".join(bytes(cpu) for cpu in self.cpus)


def test_everything_comes_out() -> None:
    area = Area()
    area.record(0, 3)
    results = parse_results(bytes(area))
    assert (results.state, results.ticks, results.tsc_khz) == (GuestState.RUNNING, 7, 2_000_000)
    assert results.violation is None
    (check,) = results.checks
    assert (check.id, check.name, check.state, check.count) == (2, "pattern", CheckState.ON, 42)
    first, second = results.cpus
    assert first.gaps == (Gap(0, 1000), Gap(10_000, 1001), Gap(20_000, 1002))
    assert (first.largest_gap, first.gap_cycles, first.settled) == (Gap(20_000, 1002), 3003, True)
    assert (second.apic_id, second.state, second.turns) == (1, CpuState.RUNNING, 101)
    assert (second.gaps, second.largest_gap) == ((), None)
    assert results.microseconds(2000) == 1.0


def test_a_violation_counts_once_it_is_complete() -> None:
    area = Area()
    area.header.violation.check = 2
    area.header.violation.where = 0x400008
    assert parse_results(bytes(area)).violation is None
    area.header.errors = 1
    violation = parse_results(bytes(area)).violation
    assert violation is not None
    assert (violation.check, violation.where) == (2, 0x400008)


def test_the_ring_keeps_the_latest() -> None:
    area = Area()
    area.record(0, GAP_SLOTS + 5)
    cpu = parse_results(bytes(area)).cpus[0]
    assert cpu.gap_count == GAP_SLOTS + 5
    assert [gap.start_tsc for gap in cpu.gaps] == [i * 10_000 for i in range(5, GAP_SLOTS + 5)]


@given(done=st.integers(0, 3 * GAP_SLOTS), more=st.integers(0, 3))
def test_what_is_overwritten_during_the_copy_is_left_out(done: int, more: int) -> None:
    """The copy saw `gaps_done` before, and `gaps_begun` after `more` further gaps were begun."""
    area = Area()
    area.record(0, done + more)
    area.cpus[0].gaps_done = done
    cpu = parse_results(bytes(area)).cpus[0]
    assert [gap.start_tsc for gap in cpu.gaps] == [
        i * 10_000 for i in range(max(0, done + more - GAP_SLOTS), done)
    ]
    assert cpu.settled is (more == 0)


def test_largest_gap_within_a_window() -> None:
    area = Area()
    area.record(0, 10)
    cpu = parse_results(bytes(area)).cpus[0]
    assert cpu.largest_gap_within(0, 1 << 40) == Gap(90_000, 1009)
    assert cpu.largest_gap_within(15_000, 40_001) == Gap(40_000, 1004)
    assert cpu.largest_gap_within(20_500, 30_000) == Gap(20_000, 1002)
    assert cpu.largest_gap_within(22_000, 30_000) is None


def test_a_window_older_than_the_ring_is_refused() -> None:
    area = Area()
    area.record(0, GAP_SLOTS + 2)
    cpu = parse_results(bytes(area)).cpus[0]
    assert cpu.largest_gap_within(30_000, 1 << 40) is not None
    with pytest.raises(ResultsError, match="left the ring"):
        cpu.largest_gap_within(15_000, 1 << 40)


def set_header(name: str, value: int) -> Callable[[Area], None]:
    return lambda area: setattr(area.header, name, value)


def set_check(name: str, value: int | bytes) -> Callable[[Area], None]:
    return lambda area: setattr(area.header.checks[2], name, value)


def set_cpu(name: str, value: int) -> Callable[[Area], None]:
    return lambda area: setattr(area.cpus[1], name, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(set_header("magic", 0), "empty", id="empty"),
        pytest.param(set_header("magic", 1), "magic", id="magic"),
        pytest.param(set_header("version", 2), "version is 0x2", id="version"),
        pytest.param(set_header("size", 4096), "size", id="size"),
        pytest.param(set_header("check_slots", 49), "check_slots", id="check slots"),
        pytest.param(set_header("gap_slots", 0), "gap_slots", id="gap slots"),
        pytest.param(set_header("cpus", 0), "0 vCPUs", id="no vCPU"),
        pytest.param(set_header("cpus", 65), "65 vCPUs", id="too many vCPUs"),
        pytest.param(set_header("cpus", 3), "do not hold 3 vCPUs", id="vCPUs beyond the end"),
        pytest.param(set_header("tsc_khz", 0), "tsc_khz is 0", id="no TSC rate"),
        pytest.param(set_header("state", 9), "guest state 9", id="guest state"),
        pytest.param(set_check("id", 3), "slot 2 holds number 3", id="check number"),
        pytest.param(set_check("state", 7), "state 7", id="check state"),
        pytest.param(set_check("name", b"a\xff"), "name", id="check name"),
        pytest.param(set_cpu("state", 3), "vCPU 1: state 3", id="vCPU state"),
        pytest.param(set_cpu("gaps_done", 1), "done 1 gaps and begun 0", id="gap counters"),
    ],
)
def test_damage_is_named(damage: Callable[[Area], None], message: str) -> None:
    area = Area()
    damage(area)
    with pytest.raises(ResultsError, match=message):
        parse_results(bytes(area))


@pytest.mark.parametrize("size", [0, 1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 2 * CPU_SIZE - 1])
def test_a_short_copy_is_refused(size: int) -> None:
    with pytest.raises(ResultsError, match="read"):
        parse_results(bytes(Area())[:size])


@given(st.binary(max_size=300), st.integers(0, HEADER_SIZE + 2 * CPU_SIZE - 300))
def test_noise_never_raises_anything_else(noise: bytes, at: int) -> None:
    data = bytearray(bytes(Area()))
    data[at : at + len(noise)] = noise
    with suppress(ResultsError):
        assert len(parse_results(bytes(data)).cpus) in (1, 2)
