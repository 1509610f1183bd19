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

from tests.handover.fault_matrix import KINDS, MODES, PROBLEMS, Outcome, cells, line, run_matrix, totals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cells with TEXT in their name")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    chosen = [cell for cell in cells() if arguments.only in str(cell)]
    if not chosen:
        raise UsageError(f"--only {arguments.only}: no cell has that in its name")
    modes = [arguments.mode] if arguments.mode else list(MODES)
    outcomes = [
        outcome
        for mode in modes
        for outcome in run_matrix(chosen, mode=mode, show=lambda outcome: host.say(line(outcome)))
    ]
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
