"""Handovers in a row; what the VMM holds after the last is compared with what it held after the tenth."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import host

from vmm.cli.handover import add_timeout
from vmm.cli.series import Series
from vmm.errors import UsageError
from vmm.report.table import table
from vmm.units import parse_size

WARM_UP = 10
RSS_TOLERANCE = 0.05  # what the allocator keeps differs from process to process
SETTLE_S = 0.3  # for the thread that carried the handover to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--handovers", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--mode", choices=("rebuild", "adopt"), default="rebuild", help="default: rebuild")
    parser.add_argument("--memory", default="128M", metavar="SIZE", help="guest RAM, default 128M")
    add_timeout(parser, host.TIMEOUT)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    if arguments.handovers <= WARM_UP:
        raise UsageError(f"--handovers {arguments.handovers}: more than the first {WARM_UP} are needed")
    memory = parse_size(arguments.memory, "--memory")
    taken: dict[int, dict[str, int]] = {}
    with Series(
        "ticker",
        mode=arguments.mode,
        memory=memory,
        cpus=1,
        append="rate=20",
        timeout_s=arguments.timeout,
    ) as series:
        for number in range(1, arguments.handovers + 1):
            series.replace()
            if number in (WARM_UP, arguments.handovers):
                series.hear()
                time.sleep(SETTLE_S)
                taken[number] = {**take_stock(series), "processes": host.descendants()}
            if number % 50 == 0:
                host.say(f"{number} handovers")
        record = series.finish()
    first, last = taken[WARM_UP], taken[arguments.handovers]
    same = {
        key: last[key] <= value * (1 + RSS_TOLERANCE) if "rss" in key else last[key] == value
        for key, value in first.items()
    }
    good = all(same.values()) and record.good
    result = {
        "benchmark": "leak",
        "host": host.description(),
        "mode": arguments.mode,
        "handovers": arguments.handovers,
        "after_ten": first,
        "at_the_end": last,
        "same": same,
        "guest": record.as_dict()["guest"],
    }
    columns = ("", f"after {WARM_UP}", f"after {arguments.handovers}", "")
    rows = [[key, str(first[key]), str(last[key]), "same" if same[key] else "MORE"] for key in first]
    text = [
        *table(columns, rows),
        f"ticks: {record.ending.ticks}, lost: {record.ending.lost}, errors: {record.ending.errors}",
    ]
    return result, text, good


def take_stock(series: Series) -> dict[str, int]:
    """What the VMM holds, and its keeper where there is one."""
    stock = asdict(host.holdings(series.vmm.pid))
    if (keeper := series.vms[-1].process) != series.vmm.pid:
        held = asdict(host.holdings(keeper))
        stock |= {f"keeper_{key}": value for key, value in held.items()}
    return stock
