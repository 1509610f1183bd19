"""What a LAPIC timer, the PIT and kvmclock are after some time, reckoned."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmm.kvm import abi
from vmm.machine import lapic_state as lapic
from vmm.machine import pit_state
from vmm.machine.guest_clock import TimeScale

VECTOR = 0x51
VECTOR_AT, VECTOR_BIT = 0x20, 1 << 17
ENABLED = lapic.SOFTWARE_ENABLE | 0xFF
MS = 1_000_000


def lapic_with(
    mode: lapic.TimerMode, *, initial: int, current: int, divide: int = 0b1011
) -> abi.kvm_lapic_state:
    """Divide 0b1011 is by 1, and a count then a nanosecond."""
    state = abi.kvm_lapic_state()
    lapic.write_register(state, lapic.SPURIOUS, ENABLED)
    lapic.write_register(state, lapic.LVT_TIMER, mode << 17 | VECTOR)
    lapic.write_register(state, lapic.INITIAL_COUNT, initial)
    lapic.write_register(state, lapic.CURRENT_COUNT, current)
    lapic.write_register(state, lapic.DIVIDE, divide)
    return state


def counts(state: abi.kvm_lapic_state) -> tuple[int, int]:
    return lapic.read_register(state, lapic.INITIAL_COUNT), lapic.read_register(state, lapic.CURRENT_COUNT)


def requested(state: abi.kvm_lapic_state) -> bool:
    return bool(lapic.read_register(state, lapic.REQUEST + VECTOR_AT) & VECTOR_BIT)


def test_a_one_shot_timer_counts_on() -> None:
    state = lapic_with(lapic.TimerMode.ONE_SHOT, initial=10 * MS, current=4 * MS)
    lapic.advance(state, 3 * MS)
    assert counts(state) == (10 * MS, MS)
    assert not requested(state)


def test_a_one_shot_timer_that_expires_meanwhile_expires_when_loaded() -> None:
    """KVM does it: a count of 1 is as good as none."""
    state = lapic_with(lapic.TimerMode.ONE_SHOT, initial=10 * MS, current=4 * MS)
    lapic.advance(state, 5 * MS)
    assert counts(state) == (10 * MS, 1)
    assert not requested(state)


@pytest.mark.parametrize("register", [lapic.REQUEST, lapic.IN_SERVICE])
def test_a_one_shot_timer_whose_interrupt_is_there_does_not_start_again(register: int) -> None:
    state = lapic_with(lapic.TimerMode.ONE_SHOT, initial=10 * MS, current=0)
    lapic.write_register(state, register + VECTOR_AT, VECTOR_BIT)
    lapic.advance(state, MS)
    assert counts(state) == (0, 0)


def test_a_one_shot_timer_of_which_nobody_knows_expires_again() -> None:
    state = lapic_with(lapic.TimerMode.ONE_SHOT, initial=10 * MS, current=0)
    lapic.advance(state, MS)
    assert counts(state) == (10 * MS, 0)


def test_a_periodic_timer_keeps_its_phase() -> None:
    state = lapic_with(lapic.TimerMode.PERIODIC, initial=10 * MS, current=4 * MS)
    lapic.advance(state, 3 * MS)
    assert counts(state) == (10 * MS, MS)
    assert not requested(state)


def test_ticks_of_a_periodic_timer_become_one_request() -> None:
    state = lapic_with(lapic.TimerMode.PERIODIC, initial=10 * MS, current=4 * MS)
    lapic.write_register(state, lapic.TRIGGER_MODE + VECTOR_AT, VECTOR_BIT)
    lapic.advance(state, 27 * MS)  # 23 after the first tick, 3 after the third
    assert counts(state) == (10 * MS, 7 * MS)
    assert requested(state)
    assert not lapic.read_register(state, lapic.TRIGGER_MODE + VECTOR_AT) & VECTOR_BIT


@pytest.mark.parametrize(
    ("register", "value"),
    [(lapic.LVT_TIMER, lapic.TimerMode.PERIODIC << 17 | lapic.MASKED | VECTOR), (lapic.SPURIOUS, 0xFF)],
    ids=["masked", "disabled"],
)
def test_a_timer_that_may_not_interrupt_does_not(register: int, value: int) -> None:
    state = lapic_with(lapic.TimerMode.PERIODIC, initial=10 * MS, current=MS)
    lapic.write_register(state, register, value)
    lapic.advance(state, 2 * MS)
    assert counts(state) == (10 * MS, 9 * MS)
    assert not requested(state)


@pytest.mark.parametrize("late_ns", [0, 1_000, 60_000, 199_000])
def test_a_tick_that_nobody_has_noticed_yet_does_not_shift_the_others(late_ns: int) -> None:
    """It reads as 0 left, from the tick on until it is noticed; a hundred handovers may all meet that."""
    period_ns, grid_ns = 10 * MS, 5 * MS
    section = lapic.LapicSection(registers=lapic_with(lapic.TimerMode.PERIODIC, initial=10 * MS, current=1))
    section.expires_ns = grid_ns
    for move in range(1, 101):
        section.registers = lapic_with(lapic.TimerMode.PERIODIC, initial=10 * MS, current=0)
        section.taken_ns = grid_ns + move * period_ns + late_ns
        lapic._keep_step(section)
        assert (section.expires_ns - grid_ns) % period_ns == 0
        loaded = abi.kvm_lapic_state.from_buffer_copy(section.registers)
        lapic.advance(loaded, grid_ns + move * period_ns + MS - section.taken_ns)
        assert counts(loaded) == (10 * MS, 9 * MS)
        assert requested(loaded)


def test_a_new_grid_does_not_move_either() -> None:
    """Where the timer is not in step with what it was, it has been armed anew: it is where it is read."""
    section = lapic.LapicSection(registers=lapic_with(lapic.TimerMode.PERIODIC, initial=10 * MS, current=0))
    section.expires_ns, section.taken_ns = 5 * MS, 88 * MS
    lapic._keep_step(section)
    assert (section.taken_ns, section.expires_ns) == (88 * MS, 88 * MS)


@pytest.mark.parametrize(
    ("divide", "by"),
    [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ],
)
def test_the_divide_register(divide: int, by: int) -> None:
    state = lapic_with(lapic.TimerMode.ONE_SHOT, initial=MS, current=1000, divide=divide)
    assert lapic.remaining_ns(state) == 1000 * by
    lapic.advance(state, 100 * by)
    assert counts(state) == (MS, 900)


@pytest.mark.parametrize("mode", [lapic.TimerMode.TSC_DEADLINE, lapic.TimerMode.PERIODIC])
def test_a_timer_that_does_not_count_is_left_alone(mode: lapic.TimerMode) -> None:
    state = lapic_with(mode, initial=0, current=0)
    before = bytes(state)
    lapic.advance(state, MS)
    assert bytes(state) == before


@given(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
@example(4, 1, 1, 1)  # the first step ends with the period
def test_two_steps_are_one(initial: int, current: int, first: int, second: int) -> None:
    """Of a periodic timer: where it is depends on the time alone. (One count is what rounding may cost.)"""
    current = min(initial, current)
    twice, once = (lapic_with(lapic.TimerMode.PERIODIC, initial=initial, current=current) for _ in range(2))
    lapic.advance(twice, first)
    lapic.advance(twice, second)
    lapic.advance(once, first + second)
    difference = (counts(twice)[1] - counts(once)[1]) % initial
    assert min(difference, initial - difference) <= 1


def pit_with(mode: int, count: int) -> abi.kvm_pit_state2:
    state = abi.kvm_pit_state2()
    for channel in state.channels:
        channel.mode, channel.count, channel.count_load_time = mode, count, 5 * MS
    return state


def counts_of(state: abi.kvm_pit_state2) -> list[int]:
    return [channel.count for channel in state.channels]


@pytest.mark.parametrize("mode", [0, 1, 4, 5])
def test_a_channel_that_counts_down_once_has_less_left(mode: int) -> None:
    state = pit_with(mode, 50_000)
    pit_state.advance(state, 15 * MS)  # 10 ms, 11931.8 counts
    assert counts_of(state) == [50_000, 38_069, 38_069]
    state = pit_with(mode, 50_000)
    pit_state.advance(state, 500 * MS)
    assert counts_of(state) == [50_000, 1, 1]


@pytest.mark.parametrize("mode", [2, 3, 0xFF])
def test_a_channel_that_reloads_itself_or_none_is_left_alone(mode: int) -> None:
    state = pit_with(mode, 50_000)
    pit_state.advance(state, 15 * MS)
    assert counts_of(state) == [50_000] * 3


@pytest.mark.parametrize("khz", [10_000, 999_999, 1_000_000, 2_596_120, 3_999_999, 6_000_000])
def test_the_scale_of_a_tsc(khz: int) -> None:
    """A second is a second, to the precision of a 32-bit fraction."""
    scale = TimeScale.of(khz)
    assert 1 << 31 <= scale.multiplier < 1 << 32
    assert scale.nanoseconds(khz * 1000) == pytest.approx(1_000_000_000, abs=2)
    assert scale.nanoseconds(-khz * 1000) == -scale.nanoseconds(khz * 1000)
    assert scale.nanoseconds(0) == 0


def test_a_scale_by_hand() -> None:
    """kvm_get_time_scale(): a frequency over 2 GHz is halved once, and the multiplier a fraction of 2**32."""
    scale = TimeScale.of(2_596_120)
    assert scale.shift == -1
    assert scale.multiplier == (1_000_000_000 << 32) // (2_596_120_000 >> 1)
