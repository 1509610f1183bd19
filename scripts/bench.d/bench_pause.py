"""Pauses at several RAM sizes, in turns, so that what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import host
from qemu_peer import QemuSeries, qemu_version

from vmm.cli.handover import add_timeout
from vmm.cli.series import Series, Step
from vmm.errors import UsageError
from vmm.report.pause import Quantiles, plain, quantiles
from vmm.report.table import milliseconds, table
from vmm.units import format_size, parse_size

BLOCK = 5  # handovers of one guest before the next one's turn
SIZES = "128M,4G"
# What a turn costs is how finely a pause is seen; so this computes and next to never needs its VMM,
GAP_US = 120
APPEND = f"checks=tsc gap_us={GAP_US} poll_us=300000"
IN_EXITS = "checks=counter,tsc,pio gap_us=200"  # and this needs it all the time
ALIKE = (0.15, 100.0)  # a share of the smaller p50, and microseconds on top
ENOUGH = 10  # handovers of each from which on a median that is not alike is no accident


@dataclass
class Subject:
    """What is measured: `open` gives a guest in a VMM whose `hand_over` is called `BLOCK` times."""

    who: str
    memory: int
    open: Callable[[], AbstractContextManager[Any]]
    steps: list[Step] = field(default_factory=list)
    errors: int = 0

    def figures(self) -> dict[str, Quantiles | None]:
        """Microseconds."""
        return {
            "guest": quantiles(step.guest_us for step in self.steps),
            "control": quantiles(step.control_us for step in self.steps),
            "exit": quantiles(us for step in self.steps for us in step.stalls_us),
            "host": quantiles(step.host_us for step in self.steps),
        }

    def phases(self) -> dict[str, Quantiles | None]:
        """Microseconds."""
        names = dict.fromkeys(name for step in self.steps for name in step.report["phases-us"])
        return {
            name: quantiles(
                step.report["phases-us"][name] for step in self.steps if name in step.report["phases-us"]
            )
            for name in names
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "who": self.who,
            "memory_bytes": self.memory,
            "handovers": len(self.steps),
            "errors": self.errors,
            "pause_us": {name: plain(figures) for name, figures in self.figures().items()},
            "phases_us": {name: plain(figures) for name, figures in self.phases().items()},
        }

    @property
    def p50_us(self) -> float:
        """The median of what the guest saw."""
        figures = self.figures()["guest"]
        return figures.p50 if figures else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--handovers", type=int, default=50, metavar="N", help="of each size and VMM, default 50"
    )
    parser.add_argument("--sizes", default=SIZES, metavar="SIZE,…", help=f"guest RAM, default {SIZES}")
    parser.add_argument(
        "--mode", choices=("rebuild", "adopt", "both"), default="rebuild", help="default: rebuild"
    )
    parser.add_argument("--peer", choices=("qemu",), help="measure this VMM's cpr-transfer in the same run")
    add_timeout(parser, host.TIMEOUT)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    if arguments.handovers < 1:
        raise UsageError(f"--handovers {arguments.handovers}: one is the least there is to measure")
    sizes = [parse_size(text, "--sizes") for text in arguments.sizes.split(",")]
    modes = ("rebuild", "adopt") if arguments.mode == "both" else (arguments.mode,)
    timeout_s = arguments.timeout
    subjects = [
        Subject(mode, memory, opener(mode, memory, APPEND, timeout_s)) for memory in sizes for mode in modes
    ]
    if "adopt" in modes:  # which a guest that computes does not notice
        subjects.append(Subject("adopt, in exits", sizes[0], opener("adopt", sizes[0], IN_EXITS, timeout_s)))
    version = None
    if arguments.peer:
        version = ".".join(map(str, qemu_version()))
        tsc_khz = guest_tsc_khz()
        subjects += [Subject("qemu", memory, qemu_opener(memory, tsc_khz)) for memory in sizes]
    for done in range(0, arguments.handovers, BLOCK):
        for subject in subjects:
            measure(subject, min(BLOCK, arguments.handovers - done))
        host.say(f"{min(done + BLOCK, arguments.handovers)} handovers of each")
    alike = {mode: compare(mode, subjects) for mode in modes}
    record = {
        "benchmark": "pause",
        "host": host.description(),
        "qemu": version,
        "gap_us": GAP_US,  # shorter ones are not seen: a median of so much says that there was none
        "subjects": [subject.as_dict() for subject in subjects],
        "alike": alike,
        "ratio_to_qemu": ratios(subjects),
    }
    return record, text(subjects, alike, ratios(subjects)), verdict(subjects, alike)


def opener(
    mode: str, memory: int, append: str, timeout_s: float
) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: Series("sentinel", mode=mode, memory=memory, cpus=1, append=append, timeout_s=timeout_s)


def qemu_opener(memory: int, tsc_khz: int) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: QemuSeries(memory=memory, append=APPEND, tsc_khz=tsc_khz)


def guest_tsc_khz() -> int:
    """The TSC rate of guests here, as KVM says."""
    with Series("ticker", mode="rebuild", memory=parse_size("64M"), cpus=1) as series:
        khz: int = series.client.execute("x-vmm-guest-clock")["tsc-khz"]
        series.finish()
    return khz


def measure(subject: Subject, handovers: int) -> None:
    """A block of handovers of a fresh guest."""
    with subject.open() as series:
        for _ in range(handovers):
            subject.steps.append(series.hand_over())
        if isinstance(series, Series):
            ending = series.finish().ending
            subject.errors += ending.errors + ending.lost
        else:
            subject.errors += series.results().errors


def compare(mode: str, subjects: list[Subject]) -> dict[str, Any]:
    """Whether the pause is alike at all sizes: the medians, as the guest saw them."""
    medians = [subject.p50_us for subject in subjects if subject.who == mode]
    share, slack_us = ALIKE
    return {
        "p50_us": [round(each, 1) for each in medians],
        "alike": max(medians) <= min(medians) * (1 + share) + slack_us,
    }


def verdict(subjects: list[Subject], alike: dict[str, Any]) -> bool:
    """Whether no guest found an error, and the pause is alike at all sizes where that can be told."""
    told = all(len(subject.steps) >= ENOUGH for subject in subjects)
    return all(subject.errors == 0 for subject in subjects) and (
        not told or all(each["alike"] for each in alike.values())
    )


def ratios(subjects: list[Subject]) -> dict[str, float]:
    """How many times longer QEMU's pause is, as the guest saw it, by mode and size."""
    peers = {subject.memory: subject.p50_us for subject in subjects if subject.who == "qemu"}
    return {
        f"{subject.who} {format_size(subject.memory)}": round(peers[subject.memory] / subject.p50_us, 2)
        for subject in subjects
        if subject.who != "qemu" and subject.memory in peers
    }


def text(subjects: list[Subject], alike: dict[str, Any], ratio: dict[str, float]) -> list[str]:
    """For people."""
    labels = {
        "guest": "as the guest saw it",
        "control": "  without a handover",
        "host": "as the host saw it",
        "exit": "what an exit waited that came then",
    }
    rows = [
        [
            f"{subject.who} {format_size(subject.memory)}: {labels[name]}",
            *(milliseconds(each) for each in (figures.min, figures.p50, figures.p99, figures.max)),
        ]
        for subject in subjects
        for name, figures in subject.figures().items()
        if figures
    ]
    lines = table(("pause", "min", "p50", "p99", "max"), rows)
    phases = [(subject, subject.phases()) for subject in subjects if subject.who != "qemu"]
    names = list(dict.fromkeys(name for _, each in phases for name in each))
    header = ("phase, p50", *(f"{subject.who} {format_size(subject.memory)}" for subject, _ in phases))
    cells = [
        [name, *(milliseconds(figures.p50 if (figures := each.get(name)) else None) for _, each in phases)]
        for name in names
    ]
    lines += ["", *table(header, cells), ""]
    for mode, verdict in alike.items():
        lines.append(f"{mode}: the median is {'' if verdict['alike'] else 'NOT '}alike at all sizes")
    unseen = {f"{each.who} {format_size(each.memory)}" for each in subjects if each.p50_us <= GAP_US}
    lines += [
        f"QEMU's pause is {'at least ' if which in unseen else ''}{times:g} times that of {which}"
        for which, times in ratio.items()
    ]
    return lines
