"""Sentinel, with all of its checks, from one VMM process to the next, as an operator would have it."""

from __future__ import annotations

import base64

import pytest

from tests.handover.stage import Side, Stage, wait_for
from vmm.report.results import (
    CPU_SIZE,
    HEADER_SIZE,
    CpuState,
    GuestState,
    Results,
    ResultsError,
    parse_results,
)

pytestmark = pytest.mark.kvm

RESULTS_GPA = 0x200000  # firmware/include/results.h
HANDOVERS = 3


def results(side: Side, cpus: int) -> Results | None:
    """What the guest says of itself; None where it has not come so far."""
    size = HEADER_SIZE + cpus * CPU_SIZE
    answer = side.client.execute("x-vmm-read-memory", {"gpa": RESULTS_GPA, "size": size})
    try:
        found = parse_results(base64.b64decode(answer["data"]))
    except ResultsError:
        return None
    started = found.state is not GuestState.STARTING
    return found if started and all(cpu.state is CpuState.RUNNING for cpu in found.cpus) else None


def go_on(side: Side, cpus: int, turns: int) -> Results:
    """Wait until every vCPU has taken so many turns more; nothing may be wrong."""
    first = wait_for("the guest's start", lambda: results(side, cpus), timeout_s=60.0)

    def moved() -> Results | None:
        now = results(side, cpus)
        assert now is not None
        assert now.violation is None
        enough = all(cpu.turns >= had.turns + turns for cpu, had in zip(now.cpus, first.cpus, strict=True))
        return now if enough else None

    return wait_for("turns of every vCPU", moved, timeout_s=60.0)


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_no_check_finds_anything(cpus: int, stage: Stage) -> None:
    side = stage.start("sentinel", "--append=pattern=4M", f"--cpus={cpus}", "--testdev", guest=None)
    go_on(side, cpus, turns=50)
    for _ in range(HANDOVERS):
        side = stage.replace(side)
        go_on(side, cpus, turns=20)


def test_nmis_by_the_monitor(stage: Stage) -> None:
    """Of a running guest, whose vCPU is in KVM_RUN: it is answered, and the NMIs come, before and after."""
    side = stage.start("sentinel", "--append=checks=counter pattern=1M", "--cpus=2", guest=None)
    go_on(side, 2, turns=10)
    side.client.execute("inject-nmi")
    side = stage.replace(side)
    side.client.execute("stop")
    side.client.execute("inject-nmi")
    side.client.execute("cont")
    wait_for("four NMIs", lambda: (now := results(side, 2)) and now.nmis == 4)
