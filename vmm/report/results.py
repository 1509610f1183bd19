"""The results area that a guest keeps in its RAM, as the host reads it: mirrors firmware/include/results.h.

It turns a copy of guest memory into frozen records and must never trust it: sizes, counts and states are
checked before use, and what the guest was writing while the copy was made is left out. It does not read guest
memory itself.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from vmm.errors import VmmError

RESULTS_MAGIC = 0x524D4D56  # "VMMR"
RESULTS_VERSION = 1
CHECK_SLOTS = 48
GAP_SLOTS = 1024
MAX_CPUS = 64


class ResultsError(VmmError):
    """A guest's results area is not there yet, or is not what this version of the layout says."""


class GuestState(Enum):
    """What the guest says it is doing."""

    STARTING = 0
    RUNNING = 1
    ENDED = 2
    VIOLATED = 3


class CheckState(Enum):
    """UNAVAILABLE: wanted, but the machine has not got what it checks."""

    OFF = 0
    ON = 1
    UNAVAILABLE = 2


class CpuState(Enum):
    """How far a vCPU's start has come."""

    ABSENT = 0
    STARTING = 1
    RUNNING = 2


_Choice = TypeVar("_Choice", GuestState, CheckState, CpuState)


class ViolationLayout(ctypes.LittleEndianStructure):
    """`struct violation`."""

    _fields_ = (
        ("check", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("expected", ctypes.c_uint64),
        ("seen", ctypes.c_uint64),
        ("where", ctypes.c_uint64),
        ("tsc", ctypes.c_uint64),
    )


class CheckLayout(ctypes.LittleEndianStructure):
    """`struct check_results`."""

    _fields_ = (
        ("id", ctypes.c_uint32),
        ("state", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("errors", ctypes.c_uint64),
        ("expected", ctypes.c_uint64),
        ("seen", ctypes.c_uint64),
        ("where", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


class GapLayout(ctypes.LittleEndianStructure):
    """`struct gap`."""

    _fields_ = (("start_tsc", ctypes.c_uint64), ("cycles", ctypes.c_uint64))


class CpuLayout(ctypes.LittleEndianStructure):
    """`struct cpu_results`."""

    _fields_ = (
        ("apic_id", ctypes.c_uint32),
        ("state", ctypes.c_uint32),
        ("first_tsc", ctypes.c_uint64),
        ("last_tsc", ctypes.c_uint64),
        ("turns", ctypes.c_uint64),
        ("counts", ctypes.c_uint64 * CHECK_SLOTS),
        ("reserved", ctypes.c_uint64 * 3),
        ("gaps_done", ctypes.c_uint64),
        ("gap_cycles", ctypes.c_uint64),
        ("largest_gap_start", ctypes.c_uint64),
        ("largest_gap_cycles", ctypes.c_uint64),
        ("gaps", GapLayout * GAP_SLOTS),
        ("gaps_begun", ctypes.c_uint64),
        ("reserved2", ctypes.c_uint64 * 68),
    )


class HeaderLayout(ctypes.LittleEndianStructure):
    """`struct results` up to its array of vCPUs, which follows without a hole."""

    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("cpus", ctypes.c_uint32),
        ("tsc_khz", ctypes.c_uint32),
        ("check_slots", ctypes.c_uint32),
        ("gap_slots", ctypes.c_uint32),
        ("gap_threshold", ctypes.c_uint64),
        ("start_tsc", ctypes.c_uint64),
        ("state", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("ticks", ctypes.c_uint64),
        ("rounds", ctypes.c_uint64),
        ("pattern_bytes", ctypes.c_uint64),
        ("nmis", ctypes.c_uint64),
        ("errors", ctypes.c_uint64),
        ("violation", ViolationLayout),
        ("reserved2", ctypes.c_uint8 * 376),
        ("checks", CheckLayout * CHECK_SLOTS),
        ("reserved3", ctypes.c_uint8 * 512),
    )


HEADER_SIZE = ctypes.sizeof(HeaderLayout)
CPU_SIZE = ctypes.sizeof(CpuLayout)
RESULTS_SIZE = HEADER_SIZE + MAX_CPUS * CPU_SIZE


@dataclass(frozen=True, slots=True)
class Violation:
    """The first thing that was wrong; `where` is what the check says it is (firmware/README.md)."""

    check: int
    cpu: int
    expected: int
    seen: int
    where: int
    tsc: int


@dataclass(frozen=True, slots=True)
class CheckResults:
    """One check over all vCPUs; `expected`, `seen` and `where` are those of its last error, `value` is a
    figure that the check keeps (firmware/README.md).
    """

    id: int
    name: str
    state: CheckState
    count: int
    errors: int
    expected: int
    seen: int
    where: int
    value: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A step between two loop turns that was longer than the threshold, in TSC cycles of the guest."""

    start_tsc: int
    cycles: int

    @property
    def end_tsc(self) -> int:
        return self.start_tsc + self.cycles


@dataclass(frozen=True, slots=True)
class CpuResults:
    """One vCPU. `counts` says, by number, how often each check has had its turn here. `gaps` holds the latest
    ones, oldest first; `gap_count` counts all since the start.

    `settled` is False if the guest was recording a gap while the area was copied: `gap_cycles` and
    `largest_gap` may then be of different moments, and another copy will do better. `gaps` is whole in any
    case.
    """

    apic_id: int
    state: CpuState
    first_tsc: int
    last_tsc: int
    turns: int
    counts: tuple[int, ...]
    gap_count: int
    gap_cycles: int
    largest_gap: Gap | None
    gaps: tuple[Gap, ...]
    settled: bool

    def largest_gap_within(self, start_tsc: int, end_tsc: int) -> Gap | None:
        """The largest gap that overlaps `[start_tsc, end_tsc)`; None if no step there was over the threshold.

        Raises ResultsError if gaps that old may have left the ring: the answer would be a guess.
        """
        if self.gap_count > len(self.gaps) and (not self.gaps or start_tsc < self.gaps[0].end_tsc):
            raise ResultsError(
                f"vCPU {self.apic_id}: some gaps since TSC {start_tsc} have left the ring of {GAP_SLOTS}; "
                "read the results area sooner after the window"
            )
        within = [gap for gap in self.gaps if gap.start_tsc < end_tsc and gap.end_tsc > start_tsc]
        return max(within, key=lambda gap: gap.cycles, default=None)


@dataclass(frozen=True, slots=True)
class Results:
    """All that a guest says about itself. Times are cycles of its TSC, which runs at `tsc_khz`."""

    version: int
    state: GuestState
    tsc_khz: int
    start_tsc: int
    gap_threshold: int
    ticks: int
    rounds: int
    pattern_bytes: int
    nmis: int
    errors: int
    violation: Violation | None
    checks: tuple[CheckResults, ...]
    cpus: tuple[CpuResults, ...]

    def microseconds(self, cycles: int) -> float:
        """A length in cycles as time."""
        return cycles * 1000 / self.tsc_khz


def parse_results(data: bytes) -> Results:
    """The records of a results area, copied from guest RAM, low addresses first, while the guest may run.

    `data` may end after the last vCPU that the header counts. Raises ResultsError if it is too short, or if
    its header, or any part that it counts, is not of this layout.
    """
    if len(data) < HEADER_SIZE:
        raise ResultsError(
            f"results area: {len(data)} bytes are not even its header; read {HEADER_SIZE} or more"
        )
    header = HeaderLayout.from_buffer_copy(data)
    _check_header(header)
    needed = HEADER_SIZE + header.cpus * CPU_SIZE
    if len(data) < needed:
        raise ResultsError(f"results area: {len(data)} bytes do not hold {header.cpus} vCPUs; read {needed}")
    layouts = (CpuLayout * header.cpus).from_buffer_copy(data, HEADER_SIZE)
    return Results(
        version=header.version,
        state=_choice(GuestState, header.state, "guest state"),
        tsc_khz=header.tsc_khz,
        start_tsc=header.start_tsc,
        gap_threshold=header.gap_threshold,
        ticks=header.ticks,
        rounds=header.rounds,
        pattern_bytes=header.pattern_bytes,
        nmis=header.nmis,
        errors=header.errors,
        violation=_violation(header.violation) if header.errors else None,
        checks=tuple(
            _check(slot, check, sum(cpu.counts[slot] for cpu in layouts))
            for slot, check in enumerate(header.checks)
            if check.id
        ),
        cpus=tuple(_cpu(number, cpu) for number, cpu in enumerate(layouts)),
    )


def _check_header(header: HeaderLayout) -> None:
    if header.magic == 0:
        raise ResultsError("results area: empty; the guest has not come so far yet, or keeps no results")
    expected = {
        "magic": RESULTS_MAGIC,
        "version": RESULTS_VERSION,
        "size": RESULTS_SIZE,
        "check_slots": CHECK_SLOTS,
        "gap_slots": GAP_SLOTS,
    }
    for name, value in expected.items():
        seen = getattr(header, name)
        if seen != value:
            raise ResultsError(
                f"results area: {name} is {seen:#x}, not {value:#x}; use the image that came with this vmm"
            )
    if not 1 <= header.cpus <= MAX_CPUS:
        raise ResultsError(f"results area: {header.cpus} vCPUs, not 1 to {MAX_CPUS}; the guest is damaged")
    if header.tsc_khz == 0:
        raise ResultsError("results area: tsc_khz is 0, so no time can be told; the boot info must give it")


def _choice(kind: type[_Choice], value: int, what: str) -> _Choice:
    try:
        return kind(value)
    except ValueError as error:
        raise ResultsError(f"results area: {what} {value} is unknown; the guest is damaged") from error


def _violation(layout: ViolationLayout) -> Violation:
    return Violation(layout.check, layout.cpu, layout.expected, layout.seen, layout.where, layout.tsc)


def _check(slot: int, layout: CheckLayout, count: int) -> CheckResults:
    if layout.id != slot:
        raise ResultsError(f"results area: check slot {slot} holds number {layout.id}; the guest is damaged")
    name: bytes = layout.name
    if not name.isascii() or not name.decode("ascii").isprintable():
        raise ResultsError(f"results area: check {slot} has the name {name!r}; the guest is damaged")
    return CheckResults(
        id=slot,
        name=name.decode("ascii"),
        state=_choice(CheckState, layout.state, f"check {slot}: state"),
        count=count,
        errors=layout.errors,
        expected=layout.expected,
        seen=layout.seen,
        where=layout.where,
        value=layout.value,
    )


def _cpu(number: int, layout: CpuLayout) -> CpuResults:
    done, begun = layout.gaps_done, layout.gaps_begun
    if begun < done:
        raise ResultsError(
            f"results area: vCPU {number} has done {done} gaps and begun {begun}; copy low addresses first"
        )
    whole = range(max(0, begun - GAP_SLOTS), done)
    slots = layout.gaps
    largest = Gap(layout.largest_gap_start, layout.largest_gap_cycles) if done else None
    return CpuResults(
        apic_id=layout.apic_id,
        state=_choice(CpuState, layout.state, f"vCPU {number}: state"),
        first_tsc=layout.first_tsc,
        last_tsc=layout.last_tsc,
        turns=layout.turns,
        counts=tuple(layout.counts),
        gap_count=done,
        gap_cycles=layout.gap_cycles,
        largest_gap=largest,
        gaps=tuple(Gap(slots[i % GAP_SLOTS].start_tsc, slots[i % GAP_SLOTS].cycles) for i in whole),
        settled=begun == done,
    )
