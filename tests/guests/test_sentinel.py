"""sentinel on the real KVM: it reports what it should, and each of its checks notices what it is for."""

from __future__ import annotations

import json
import struct
import time

import pytest

from tests.guests.conftest import Run
from tests.guests.running import RunningGuest
from tests.processes import Spawn
from vmm.report.results import HEADER_SIZE, CheckState, CpuLayout, GuestState

pytestmark = pytest.mark.kvm

PATTERN_START = 0x400000
FIRST_CPU = 0x200000 + HEADER_SIZE
LAST_TSC = FIRST_CPU + CpuLayout.last_tsc.offset
COUNTS = FIRST_CPU + CpuLayout.counts.offset
FIRST = "checks=tsc,counter,pattern"


def add(guest: RunningGuest, gpa: int, what: int) -> None:
    """Add to a u64 in guest memory."""
    (value,) = struct.unpack("<Q", guest.machine.memory.read(gpa, 8))
    guest.machine.memory.write(gpa, struct.pack("<Q", (value + what) % (1 << 64)))


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
    assert gap.start_tsc == paused.cpus[0].last_tsc
    assert cpu.gap_count > before.gap_count


def test_pattern_notices_a_changed_word(run: Run) -> None:
    guest = run("sentinel", "checks=pattern pattern=64K")
    memory = guest.machine.memory
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
    assert guest.status_after(lambda: add(guest, COUNTS + 8 * 1, -1)) == 1 << 1 | 1


def test_tsc_notices_a_step_back(run: Run) -> None:
    guest = run("sentinel", "checks=tsc")
    guest.wait_for(lambda results: results.cpus[0].turns > 10)
    assert guest.status_after(lambda: add(guest, LAST_TSC, 1 << 40)) == 3 << 1 | 1


def test_tsc_notices_a_smaller_offset(run: Run) -> None:
    guest = run("sentinel", "checks=tsc")
    guest.wait_for(lambda results: results.cpus[0].turns > 10)
    vcpu = guest.vcpu(0)
    less = (vcpu.tsc_offset - (1 << 40)) % (1 << 64)
    vcpu.tsc_offset = less
    if vcpu.tsc_offset != less:
        pytest.skip("this KVM has no TSC offsets: a guest's TSC is the host's")
    assert guest.exit_status() == 3 << 1 | 1
