"""`vmm demo`: a guest that goes on while the VMM process under it is replaced, again and again, and what that
cost.

Text for people, or one JSON object for programs; both are made from the same record, and both end with a
status that is not 0 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmm.errors import UsageError

HANDOVERS = 5
MEMORY = "128M"
WRONG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm demo`."""
    parser.add_argument("--guest", choices=("ticker", "sentinel"), default="ticker", help="default: ticker")
    parser.add_argument("--handovers", type=int, default=HANDOVERS, metavar="N", help=f"default {HANDOVERS}")
    parser.add_argument("--memory", default=MEMORY, metavar="SIZE", help=f"guest RAM, default {MEMORY}")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="number of vCPUs, default 1")
    parser.add_argument(
        "--mode", choices=("rebuild",), default="rebuild", help="how the guest gets into the new VMM"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


@dataclass(frozen=True)
class Outcome:
    """What a demo found out; `as_dict` is what `--json` prints."""

    mode: str
    image: str
    memory_bytes: int
    cpus: int
    steps: tuple[Any, ...]
    ending: Any

    @property
    def good(self) -> bool:
        """Whether nothing was lost and nothing was wrong."""
        return bool(self.ending.lost == 0 and self.ending.errors == 0)

    @property
    def pids(self) -> list[int]:
        """Every VMM process that the guest was in, in order."""
        return [step.report["pids"]["old"] for step in self.steps] + [self.steps[-1].report["pids"]["new"]]

    @property
    def probe(self) -> str:
        """What the kernel said of the VM fd that each new VMM received."""
        return ", ".join(sorted({step.report["vm-fd"]["probe"] for step in self.steps}))

    def pauses(self) -> dict[str, Any]:
        """Quantiles in microseconds: as the guest saw it, as the host did, and the control window's."""
        from vmm.report.pause import quantiles

        return {
            "host": quantiles(step.host_us for step in self.steps),
            "guest": quantiles(step.guest_us for step in self.steps),
            "control": quantiles(step.control_us for step in self.steps),
        }

    def phases(self) -> dict[str, Any]:
        """Quantiles in microseconds of each phase."""
        from vmm.report.pause import quantiles

        names = self.steps[0].report["phases-us"]
        return {name: quantiles(step.report["phases-us"][name] for step in self.steps) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "mode": self.mode,
            "handovers": len(self.steps),
            "pids": self.pids,
            "memory_bytes": self.memory_bytes,
            "cpus": self.cpus,
            "guest": {
                "image": self.image,
                "rounds": self.ending.rounds,
                "ticks": self.ending.ticks,
                "lost": self.ending.lost,
                "errors": self.ending.errors,
            },
            "pause_us": {name: figures.as_dict() for name, figures in self.pauses().items()},
            "phases_us": {name: figures.as_dict() for name, figures in self.phases().items()},
            "vm_fd": {
                "received": all(step.report["vm-fd"]["received"] for step in self.steps),
                "probe": self.probe,
            },
        }


def run(arguments: argparse.Namespace) -> int:
    """Show it. Status 0 if all went well, 1 if something was lost or wrong."""
    from vmm.machine.config import from_mapping

    if arguments.handovers < 1:
        raise UsageError(f"--handovers {arguments.handovers}: one is the least there is to show")
    values = {"memory": arguments.memory, "cpus": arguments.cpus, "serial": "null"}
    config = from_mapping(values, "vmm demo")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # end as with Ctrl-C: nothing stays behind
    say: Callable[[str], None] = (lambda _: None) if arguments.json else _say
    outcome = _show(arguments.guest, config.memory, config.cpus, arguments.handovers, arguments.mode, say)
    _say(json.dumps(outcome.as_dict()) if arguments.json else "\n".join(_text(outcome)))
    if not outcome.good:
        print("vmm: something of the guest was lost or wrong; see the figures", file=sys.stderr)
    return 0 if outcome.good else WRONG


def _say(text: str) -> None:
    print(text, flush=True)


def _show(
    image: str, memory: int, cpus: int, handovers: int, mode: str, say: Callable[[str], None]
) -> Outcome:
    from vmm.cli.series import Series
    from vmm.report.table import milliseconds
    from vmm.units import format_size

    say(f"{image}, {format_size(memory)} of RAM, vCPUs: {cpus}; its console below, over one connection")
    with Series(
        image, memory=memory, cpus=cpus, on_line=lambda line: say(f"  {_shortened(line)}"), on_handover=say
    ) as series:
        say(f"the guest runs in pid {series.vmm.pid}")
        series.hear()
        steps = []
        for _ in range(handovers):
            step = series.hand_over()
            steps.append(step)
            say(f"paused for {milliseconds(step.guest_us)}, as the guest saw it")
        ending = series.finish()
    return Outcome(mode, image, memory, cpus, tuple(steps), ending)


def _shortened(line: str) -> str:
    """A line of the guest's; the sentinel's report in a few words."""
    if not line.startswith("{"):
        return line
    try:
        said = json.loads(line)
        return f"sentinel: {said['ticks']} ticks, {said['rounds']} rounds, {said['errors']} errors"
    except (json.JSONDecodeError, KeyError):
        return line


def _text(outcome: Outcome) -> list[str]:
    from vmm.report.table import milliseconds, table

    def row(label: str, figures: Any) -> list[str]:
        return [label, *(milliseconds(us) for us in (figures.p50, figures.p99, figures.max))]

    pauses, ending = outcome.pauses(), outcome.ending
    columns = ("p50", "p99", "max")
    return [
        "",
        *table(
            ("pause", *columns),
            [
                row("as the guest saw it", pauses["guest"]),
                row("  as long a time without a handover", pauses["control"]),
                row("as the host saw it", pauses["host"]),
            ],
        ),
        "",
        *table(("phase", *columns), [row(name, figures) for name, figures in outcome.phases().items()]),
        "",
        f"handovers: {len(outcome.steps)} through {len(outcome.pids)} VMM processes, by {outcome.mode}",
        f"VM fd: received by each new VMM; the kernel's answer to its use there: {outcome.probe}",
        f"ticks: {ending.ticks}, lost: {ending.lost}; errors: {ending.errors}",
    ]
