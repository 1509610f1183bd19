"""A fault at every step of a handover, on either side, in every kind: who runs the guest then?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import host

from vmm.errors import UsageError
from vmm.report.table import table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the matrix is shared with the tests

from tests.handover.fault_matrix import (
    KINDS,
    MODES,
    ONLY,
    PROBLEMS,
    Outcome,
    choose,
    default_jobs,
    line,
    run_matrix,
    totals,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument("--only", default=[], action="append", metavar="TEXT", help=ONLY)
    parser.add_argument(
        "--jobs",
        type=int,
        default=default_jobs(),
        metavar="N",
        help="how many cells at a time, each with processes of its own (default: twice the CPUs, at most 4: "
        "here %(default)s); a cell mostly waits, but "
        "where too many share a CPU deadlines can pass by themselves",
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    if arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}: at least one cell has to be run at a time")
    modes = [arguments.mode] if arguments.mode else list(MODES)
    outcomes = run_matrix(
        choose(arguments.only),
        modes=modes,
        jobs=arguments.jobs,
        show=lambda outcome: host.say(line(outcome)),
    )
    counts = totals(outcomes)
    record = {
        "benchmark": "faults",
        "host": host.description(),
        "modes": {mode: totals([outcome for outcome in outcomes if outcome.mode == mode]) for mode in modes},
        **counts,
        "matrix": [outcome.as_dict() for outcome in outcomes],
    }
    return record, [*_matrix(outcomes), "", *_counts(counts)], counts["passed"] == counts["cells"]


def _matrix(outcomes: list[Outcome]) -> list[str]:
    """Who has the guest, a row for each step and a column for each kind of fault; `!` marks a problem."""
    rows: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        after = f" (after {cell.provoke})" if cell.provoke else ""
        name = f"{outcome.mode:7} {cell.side} {cell.point}{after}{' paused' * cell.paused}"
        rows.setdefault(name, {})[cell.kind] = outcome.who + "!" * bool(outcome.problems)
    kinds = sorted({outcome.cell.kind for outcome in outcomes}, key=KINDS.index)
    return table(
        ("the guest is with", *kinds),
        [[name, *(found.get(kind, "") for kind in kinds)] for name, found in rows.items()],
    )


def _counts(counts: dict[str, Any]) -> list[str]:
    where = ", ".join(f"{count} with {who}" for who, count in counts["guest_with"].items())
    problems = ", ".join(f"{kind} {counts[kind.replace(' ', '_')]}" for kind in PROBLEMS)
    return [f"{counts['cells']} cells, {counts['passed']} as expected; the guest: {where}", problems]
