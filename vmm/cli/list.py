"""`vmm list`: the named VMs of this user, each as its own monitor describes it."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from vmm.cli.rundir import RunDir, directories
from vmm.errors import VmmError
from vmm.qmp.client import QmpClient

ANSWER_S = 1.0
ORPHANED = "orphaned"  # its keeper has the guest, no VMM serves it: `vmm attach`
COLUMNS = ("name", "pid", "cpus", "memory", "state")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm list`."""
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    """List them; what a VMM that was killed has left behind is removed on the way."""
    from vmm.report.table import table

    rows = [row for directory in directories() if (row := describe(directory)) is not None]
    if arguments.json:
        print(json.dumps(rows))
    elif rows:
        print("\n".join(table(COLUMNS, [_cells(row) for row in rows])))
    return 0


def describe(directory: RunDir) -> dict[str, Any] | None:
    """One VM by `COLUMNS`; None where nothing runs there. A VMM that does not answer is listed with the
    reason as its state.
    """
    if directory.lives():
        try:
            return _ask(directory)
        except (VmmError, OSError, ValueError) as error:
            return _row(directory, state=str(error))
    if directory.kept():
        return _row(directory, state=ORPHANED)
    directory.tidy()
    return None


def _ask(directory: RunDir) -> dict[str, Any]:
    pid = int(os.readlink(directory.qmp).removeprefix("qmp-").removesuffix(".sock"))
    with QmpClient.connect(directory.qmp, ANSWER_S) as client:
        return _row(
            directory,
            pid=pid,
            cpus=len(client.execute("query-cpus-fast")),
            memory=client.execute("query-memory-size-summary")["base-memory"],
            state=client.execute("query-status")["status"],
        )


def _row(directory: RunDir, **known: Any) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS), "name": directory.name, **known}


def _cells(row: dict[str, Any]) -> list[str]:
    from vmm.units import format_size

    memory = None if row["memory"] is None else format_size(row["memory"])
    return ["–" if cell is None else str(cell) for cell in {**row, "memory": memory}.values()]
