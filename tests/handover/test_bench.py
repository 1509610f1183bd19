"""The benchmarks run, and what they print can be read; their figures are for docs/benchmarks.md."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, Spawn
from vmm.errors import HostError
from vmm.kvm import System
from vmm.kvm.capabilities import require_guest_memfd

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


@pytest.fixture
def bench(kvm_device: Path, spawn: Spawn, tmp_socket_dir: Path) -> Any:
    """Runs a benchmark and returns its record."""

    def run(*arguments: str) -> dict[str, Any]:
        env = {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(tmp_socket_dir)}
        process = spawn(sys.executable, ROOT / "scripts" / "bench.d", *arguments, "--json", env=env)
        assert process.wait(55) == 0, process.output()
        record: dict[str, Any] = json.loads(process.stdout)
        assert record["benchmark"] == arguments[0]
        assert record["host"]["cpus"] >= 1
        return record

    return run


def test_leak(bench: Any) -> None:
    record = bench("leak", "--handovers=12")
    assert record["after_ten"].keys() == record["at_the_end"].keys() == record["same"].keys()
    assert record["after_ten"]["fds"] == record["at_the_end"]["fds"] > 0
    assert record["guest"]["lost"] == 0


def test_storm(bench: Any) -> None:
    record = bench("storm", "--seconds=3")
    assert record["handovers"] >= 1
    assert record["guest"]["errors"] == 0
    assert record["turns_per_second"]["calm"] > 0
    assert record["turns_per_second"]["storm"] > 0


def test_exits(bench: Any) -> None:
    record = bench("exits", "--rounds=3", "--writes=400")
    ratios = {(row["way"], row["port"]): row["ratio"] for row in record["ways"]}
    assert ratios.keys() == {
        (way, port)
        for way in ("exit", "coalesced", "ioeventfd")
        for port in ("direct", "keeper", "keeper, spinning")
    }
    assert ratios["exit", "direct"] == 1
    assert ratios["exit", "keeper"] > 1
    assert max(ratios["coalesced", "direct"], ratios["ioeventfd", "direct"]) < 1


@pytest.mark.parametrize("backend", ["memfd", "guest-memfd"])
def test_crash(bench: Any, backend: str) -> None:
    """A guest_memfd goes from VMM to VMM, and outlives them, like other memory."""
    if backend == "guest-memfd":
        try:
            with System() as system:
                require_guest_memfd(system)
        except HostError as error:
            pytest.skip(str(error))
    record = bench(
        *("crash", f"--memory-backend={backend}", "--memory=64M", "--handovers=3"),
        *("--kills=2", "--handover-kills=2", "--seed=5"),
    )
    assert record["memory_backend"] == backend
    assert record["alive"] == sum(record["kills"].values()) == 8
    assert sum(record["kills_by_mode"].values()) == 6
    assert (record["kills_by_mode"].get("rebuild", 0) == 0) == (backend == "guest-memfd")
    assert record["guest"]["errors"] == 0


def test_pause(bench: Any) -> None:
    record = bench("pause", "--handovers=2", "--sizes=64M,4G")
    assert [(each["who"], each["memory_bytes"]) for each in record["subjects"]] == [
        ("rebuild", 64 << 20),
        ("rebuild", 4 << 30),
    ]
    for subject in record["subjects"]:
        assert subject["handovers"] == 2
        assert subject["pause_us"]["guest"]["max"] >= subject["pause_us"]["guest"]["p50"] > 0
    assert len(record["alike"]["rebuild"]["p50_us"]) == 2


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="there is no QEMU to compare with")
def test_qemu_beside_it(bench: Any) -> None:
    record = bench("pause", "--handovers=2", "--sizes=64M", "--peer=qemu")
    assert [each["who"] for each in record["subjects"]] == ["rebuild", "qemu"]
    assert record["subjects"][1]["errors"] == 0
    assert record["ratio_to_qemu"].keys() == {"rebuild 64M"}
