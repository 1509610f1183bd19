"""sentinel on the real KVM: it reports what it should, and each of its checks notices what it is for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.guests.conftest import Run
from tests.processes import Spawn
from vmm.kvm import abi
from vmm.report.results import HEADER_SIZE, CheckState, CpuLayout, GuestState

pytestmark = pytest.mark.kvm

PATTERN_START = 0x400000
FIRST_CPU = 0x200000 + HEADER_SIZE
LAST_TSC = FIRST_CPU + CpuLayout.last_tsc.offset
COUNTS = FIRST_CPU + CpuLayout.counts.offset
RARE = {"ymm", "hlt", "timer", "pit"}
AVX_OFFSET = 576  # of the upper halves in the standard XSAVE format
FIRST = "checks=tsc,counter,pattern"


def native_avx() -> bool:
    """Not in a guest of PVM, which executes kernel code by KVM's emulator: that has no AVX."""
    if Path("/sys/module/kvm_pvm").exists():
        return False
    return " avx " in Path("/proc/cpuinfo").read_text()


def test_ends_after_its_rounds_with_one_json_line(run: Run) -> None:
    guest = run("sentinel", f"{FIRST} rounds=2 pattern=512K")
    assert guest.exit_status() == 1
    line = json.loads(guest.said)
    assert (line["end"], line["errors"], line["violation"]) == (True, 0, None)
    assert line["rounds"] >= 2
    results = guest.results()
    assert (results.state, results.errors, results.pattern_bytes) == (GuestState.ENDED, 0, 512 << 10)
    assert results.rounds >= 2


def test_reports_when_asked_and_runs_on(spawn: Spawn) -> None:
    guest = spawn.vmm("run", "sentinel", "--append", f"{FIRST} pattern=64K", "--memory", "64M")
    while "\n" not in guest.stdout:  # what came before the guest set its UART up is lost
        guest.write(b"r")
        time.sleep(0.1)
    guest.write(b"x")
    assert guest.wait() == 1
    reports = [json.loads(line) for line in guest.stdout.splitlines()]
    assert [report["end"] for report in reports] == [False] * (len(reports) - 1) + [True]
    assert reports[0]["ticks"] < reports[-1]["ticks"]


def test_each_vcpu_counts_for_itself(run: Run) -> None:
    guest = run("sentinel", FIRST, cpus=3)
    guest.wait_for(lambda results: all(cpu.turns > 50 for cpu in results.cpus))
    assert [cpu.apic_id for cpu in guest.results().cpus] == [0, 1, 2]


def test_all_checks_are_on_and_find_nothing(run: Run) -> None:
    guest = run("sentinel", "pattern=256K gap_us=500", cpus=2)
    results = guest.wait_for(
        lambda results: all(check.count > 10 for check in results.checks if check.name not in RARE)
    )
    states = {check.name: check.state for check in results.checks}
    assert states.pop("ymm") is CheckState.OFF
    assert set(states.values()) == {CheckState.ON}
    assert [check.id for check in results.checks] == list(range(1, 31))
    assert results.errors == 0


def test_what_the_machine_lacks_is_unavailable(run: Run) -> None:
    guest = run("sentinel", testdev=False)
    results = guest.wait_for(lambda results: results.ticks > 10)
    lacking = [check.name for check in results.checks if check.state is CheckState.UNAVAILABLE]
    assert lacking == ["pio", "mmio", "posted"]


def test_vector_registers_on_a_kvm_that_executes_natively(run: Run) -> None:
    if not native_avx():
        pytest.skip("this KVM emulates its guests, or the host has no AVX")
    guest = run("sentinel", "checks=ymm fpu=1")
    guest.wait_for(lambda results: next(c for c in results.checks if c.name == "ymm").count > 30)

    def change_upper_halves() -> None:
        state = abi.kvm_xsave()
        guest.vcpus[0].get_xsave(state)
        for word in range(AVX_OFFSET // 4, AVX_OFFSET // 4 + 64):
            state.region[word] ^= 1
        guest.vcpus[0].set_xsave(state)

    assert guest.status_after(change_upper_halves) == 18 << 1 | 1


def test_chosen_checks_alone_are_on(run: Run) -> None:
    guest = run("sentinel", "checks=counter,tsc skip=tsc")
    results = guest.wait_for(lambda results: results.ticks > 10)
    assert [check.name for check in results.checks if check.state is CheckState.ON] == ["counter"]


def test_a_pause_is_a_gap_with_its_time(run: Run) -> None:
    guest = run("sentinel", "checks=counter")
    before = guest.wait_for(lambda results: results.ticks > 100).cpus[0]
    with guest.stopped():
        paused = guest.results()
        time.sleep(0.1)
        assert guest.results().cpus[0].turns == paused.cpus[0].turns
    results = guest.wait_for(lambda results: results.cpus[0].turns > paused.cpus[0].turns + 10)
    cpu = results.cpus[0]
    gap = cpu.largest_gap_within(paused.cpus[0].last_tsc, cpu.last_tsc)
    assert gap is not None
    assert 100_000 <= results.microseconds(gap.cycles) < 1_000_000
    assert 0 <= gap.start_tsc - paused.cpus[0].last_tsc < results.tsc_khz  # less than a millisecond
    assert cpu.gap_count > before.gap_count


def test_pattern_notices_a_changed_word(run: Run) -> None:
    guest = run("sentinel", "checks=pattern pattern=64K")
    memory = guest.memory
    guest.wait_for(lambda results: results.rounds > 1)

    def flip_a_bit_in_each_byte() -> None:
        memory.write(PATTERN_START, bytes(byte ^ 1 for byte in memory.read(PATTERN_START, 4096)))

    assert guest.status_after(flip_a_bit_in_each_byte) == 2 << 1 | 1
    violation = guest.results().violation
    assert violation is not None
    assert (violation.check, violation.where & ~0xFFF) == (2, PATTERN_START)
    assert violation.seen == violation.expected ^ 0x0101010101010101
    assert json.loads(guest.said)["violation"]["where"] == violation.where


def test_counter_notices_a_repeat(run: Run) -> None:
    guest = run("sentinel", "checks=counter")
    guest.wait_for(lambda results: results.ticks > 10)
    assert guest.status_after(lambda: guest.add(COUNTS + 8 * 1, -1)) == 1 << 1 | 1


def test_tsc_notices_a_step_back(run: Run) -> None:
    guest = run("sentinel", "checks=tsc")
    guest.wait_for(lambda results: results.cpus[0].turns > 10)
    assert guest.status_after(lambda: guest.add(LAST_TSC, 1 << 40)) == 3 << 1 | 1


def test_tsc_notices_a_smaller_offset(run: Run) -> None:
    guest = run("sentinel", "checks=tsc")
    guest.wait_for(lambda results: results.cpus[0].last_tsc > 1 << 31)  # so that it stays above zero
    with guest.stopped():
        vcpu = guest.vcpus[0]
        less = (vcpu.tsc_offset - (1 << 30)) % (1 << 64)
        vcpu.tsc_offset = less
        ignored = vcpu.tsc_offset != less
    if ignored:
        pytest.skip("this KVM has no TSC offsets: a guest's TSC is the host's")
    assert guest.exit_status() == 3 << 1 | 1
