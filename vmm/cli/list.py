"""`vmm list`: the named VMs of this user, each as its own monitor describes it."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from vmm.errors import VmmError
from vmm.qmp.client import QmpClient

ANSWER_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm list`."""
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    """List them; what a VMM that was killed has left behind is removed on the way."""
    from vmm.cli.rundir import RunDir, directories
    from vmm.report.table import table
    from vmm.units import format_size

    def describe(directory: RunDir) -> dict[str, Any]:
        """One row. A VMM that does not answer in time is listed with the reason for its state."""
        try:
            pid = int(os.readlink(directory.qmp).removeprefix("qmp-").removesuffix(".sock"))
            with QmpClient.connect(directory.qmp, ANSWER_S) as client:
                return {
                    "name": directory.name,
                    "pid": pid,
                    "state": client.execute("query-status")["status"],
                    "cpus": len(client.execute("query-cpus-fast")),
                    "memory": client.execute("query-memory-size-summary")["base-memory"],
                }
        except (VmmError, OSError, ValueError) as error:
            return {"name": directory.name, "pid": None, "state": str(error), "cpus": None, "memory": None}

    rows = []
    for directory in directories():
        row = describe(directory)
        if row["pid"] is not None or directory.lives():
            rows.append(row)
        else:
            directory.tidy()
    if arguments.json:
        print(json.dumps(rows))
    elif rows:
        cells = [
            [
                row["name"],
                *(str(row[key] or "–") for key in ("pid", "cpus")),
                format_size(row["memory"]) if row["memory"] else "–",
                row["state"],
            ]
            for row in rows
        ]
        print("\n".join(table(("name", "pid", "cpus", "memory", "state"), cells)))
    return 0
