"""Handovers back to back while the guest is busy on all of its checks: how many, any error, and the
guest's speed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import host

from vmm.cli.handover import add_timeout
from vmm.cli.series import Series
from vmm.report.pause import plain, quantiles
from vmm.report.table import milliseconds, table
from vmm.units import parse_size

CALM_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="default 60")
    parser.add_argument("--mode", choices=("rebuild", "adopt"), default="rebuild", help="default: rebuild")
    parser.add_argument("--memory", default="128M", metavar="SIZE", help="guest RAM, default 128M")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="number of vCPUs, default 2")
    add_timeout(parser, host.TIMEOUT)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    memory = parse_size(arguments.memory, "--memory")

    def speed(seconds: float, series: Series, handovers: bool) -> tuple[float, int]:
        """Loop turns a second of all vCPUs, and the number of handovers meanwhile."""
        before, start, done = turns(series), time.monotonic(), 0
        while time.monotonic() < start + seconds:
            if handovers:
                pauses.append(series.replace().length_ns / 1000)
                done += 1
            else:
                time.sleep(0.1)
        return (turns(series) - before) / (time.monotonic() - start), done

    pauses: list[float] = []
    with Series(
        "sentinel", mode=arguments.mode, memory=memory, cpus=arguments.cpus, timeout_s=arguments.timeout
    ) as series:
        calm, _ = speed(CALM_S, series, handovers=False)
        stormy, done = speed(arguments.seconds, series, handovers=True)
        record = series.finish()
    figures = quantiles(pauses)
    assert figures is not None
    slow_down = calm / stormy
    result = {
        "benchmark": "storm",
        "host": host.description(),
        "mode": arguments.mode,
        "memory_bytes": memory,
        "cpus": arguments.cpus,
        "seconds": arguments.seconds,
        "handovers": done,
        "turns_per_second": {"calm": round(calm, 1), "storm": round(stormy, 1)},
        "slow_down": round(slow_down, 3),
        "pause_us": {"host": plain(figures)},
        "guest": record.as_dict()["guest"],
    }
    text = [
        f"{done} handovers in {arguments.seconds:g} s by {arguments.mode}",
        *table(
            ("pause", "p50", "p99", "max"),
            [["as the host saw it", *map(milliseconds, (figures.p50, figures.p99, figures.max))]],
        ),
        f"the guest's turns a second: {calm:.0f} before, {stormy:.0f} then ({slow_down:.2f} times slower)",
        f"ticks: {record.ending.ticks}, lost: {record.ending.lost}, errors: {record.ending.errors}",
    ]
    if record.ending.unavailable:
        text.append(f"checks that this machine does not allow: {', '.join(record.ending.unavailable)}")
    return result, text, record.good


def turns(series: Series) -> int:
    """Loop turns so far, of all vCPUs."""
    return sum(cpu.turns for cpu in series.results().cpus)
