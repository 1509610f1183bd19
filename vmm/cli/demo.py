"""`vmm demo`: a guest that goes on while the VMM process under it is replaced, again and again, and what that
cost.

Text for people, or one JSON object for programs; both are made from the same record, and both end with a
status that is not 0 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vmm.cli.handover import add_timeout
from vmm.cli.signals import interruptible
from vmm.errors import GuestHarm, UsageError

if TYPE_CHECKING:
    from vmm.cli.series import Record
    from vmm.machine.config import MachineConfig
    from vmm.report.pause import Quantiles

HANDOVERS = 5
MEMORY = "128M"
MODES = {"rebuild": ("rebuild",), "adopt": ("adopt",), "both": ("rebuild", "adopt")}
COLUMNS = ("p50", "p99", "max")
DRIVEN = {
    "rebuild": "so the guest moved into a VM built for it",
    "adopt": "so its keeper drives it on: it is the same VM throughout",
}

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm demo`."""
    parser.add_argument("--guest", choices=("ticker", "sentinel"), default="ticker", help="default: ticker")
    parser.add_argument("--handovers", type=int, default=HANDOVERS, metavar="N", help=f"default {HANDOVERS}")
    parser.add_argument("--memory", default=MEMORY, metavar="SIZE", help=f"guest RAM, default {MEMORY}")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="number of vCPUs, default 1")
    parser.add_argument(
        "--mode",
        choices=tuple(MODES),
        default="both",
        help="how the guest gets into the new VMM: into a VM built for it (rebuild), with its very VM, "
        "which a keeper process holds (adopt), or one guest of each kind (both, the default)",
    )
    add_timeout(parser, "seconds for each handover, and for whatever else is waited for")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Show it. Raises GuestHarm, once all is said, if something was lost or wrong."""
    from vmm.machine.config import from_mapping

    if arguments.handovers < 1:
        raise UsageError(f"--handovers {arguments.handovers}: one is the least there is to show")
    config = from_mapping({"memory": arguments.memory, "cpus": arguments.cpus}, "vmm demo")
    interruptible()
    say: Say = (lambda _: None) if arguments.json else _say
    records = [_show(arguments, mode, config, say) for mode in MODES[arguments.mode]]
    _say(json.dumps(as_dict(arguments.mode, records)) if arguments.json else "\n".join(text(records)))
    if not all(record.good for record in records):
        raise GuestHarm("something of the guest was lost or wrong; see the figures")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _show(arguments: argparse.Namespace, mode: str, config: MachineConfig, say: Say) -> Record:
    from vmm.cli.series import Series
    from vmm.report.table import milliseconds
    from vmm.units import format_size

    ram = format_size(config.memory)
    say(f"--- {mode}: {arguments.guest}, RAM: {ram}, vCPUs: {config.cpus}; what it says is indented")
    with Series(
        arguments.guest,
        mode=mode,
        memory=config.memory,
        cpus=config.cpus,
        timeout_s=arguments.timeout,
        on_line=lambda line: say(f"  {_shortened(line)}"),
        on_handover=say,
    ) as series:
        say(f"the guest runs in pid {series.vmm.pid}")
        series.hear()
        for _ in range(arguments.handovers):
            step = series.hand_over()
            say(f"it saw a pause of {milliseconds(step.guest_us)}")
        return series.finish()


def _shortened(line: str) -> str:
    """A line of the guest's; the sentinel's report in a few words."""
    if not line.startswith("{"):
        return line
    try:
        said = json.loads(line)
        return f"sentinel: {said['ticks']} ticks, {said['rounds']} rounds, {said['errors']} errors"
    except (json.JSONDecodeError, KeyError):
        return line


def as_dict(mode: str, records: Sequence[Record]) -> dict[str, Any]:
    """What `--json` prints. With several records the figures on top are the last one's, lost and errors are
    everybody's, and `modes` has each in full.
    """
    if len(records) == 1:
        return records[0].as_dict()
    top = records[-1].as_dict()
    for key in ("lost", "errors"):
        top["guest"][key] = sum(getattr(record.ending, key) for record in records)
    return {**top, "mode": mode, "modes": {record.mode: record.as_dict() for record in records}}


def text(records: Sequence[Record]) -> list[str]:
    """The tables, every mode beside the others."""
    from vmm.report.table import milliseconds, table

    def rows(named: Sequence[tuple[str, Sequence[Quantiles | None]]]) -> list[list[str]]:
        return [
            [label, *(milliseconds(figure) for each in figures for figure in _columns(each))]
            for label, figures in named
        ]

    columns = [f"{record.mode} {column}" for record in records for column in COLUMNS]
    pauses = [record.pauses() for record in records]
    phases = [record.phases() for record in records]
    labels = {
        "guest": "as the guest saw it",
        "control": "  as long a time without a handover",
        "host": "as the host saw it",
        "exit": "what an exit waited that came then",
    }
    lines = [""]
    lines += table(
        ("pause", *columns),
        rows([(label, [pause[key] for pause in pauses]) for key, label in labels.items()]),
    )
    names = list(dict.fromkeys(name for phase in phases for name in phase))
    lines.append("")
    lines += table(
        ("phase", *columns), rows([(name, [phase.get(name) for phase in phases]) for name in names])
    )
    for record in records:
        ending = record.ending
        lines += [
            "",
            f"{record.mode}: {len(record.steps)} handovers through {len(record.pids)} VMM processes",
            f"  ticks: {ending.ticks}, lost: {ending.lost}, errors: {ending.errors}",
            *([f"  it found: {ending.violation}"] if ending.violation else []),
            f"  the VM fd: received by each; the kernel says {record.probe}, {DRIVEN[record.mode]}",
        ]
    return lines


def _columns(figures: Quantiles | None) -> tuple[float | None, ...]:
    return (None,) * len(COLUMNS) if figures is None else (figures.p50, figures.p99, figures.max)
