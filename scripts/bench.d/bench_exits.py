"""What a write to a port costs the guest, by the way that it takes: an exit that this process serves, driving
the VM itself or through a keeper, and the ways that need no VMM: the coalescing ring and ioeventfd. Where
both sides of a keeper spin for a moment before they sleep, that is a row of its own.

The guest writes in a loop, in real mode; the rounds are interleaved, so that all ways see the same machine.
The loop's own instructions are in every figure.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import host

from vmm.errors import GuestCrash, UsageError
from vmm.kvm import DirectPort, Exit, Port, System, Vcpu, abi
from vmm.kvm.keeper_port import KeeperPort
from vmm.report.table import table

RAM_SIZE = 0x10000
ENTRY = 0x1000
MOST_WRITES = 0xFFFF  # what CX counts
FLAGS = 2  # bit 1 of FLAGS is always set
WARM_UP_ROUNDS = 1
WRITES = 2 * abi.KVM_COALESCED_MMIO_MAX  # a ring that is full, and the write that finds it so, twice
VALUE = 0x55


class Way(Enum):
    """How the guest's write reaches whom it is for; the value is the port that it writes to."""

    EXIT = 0x100
    COALESCED = 0x200
    IOEVENTFD = 0x300


WHAT = {
    Way.EXIT: "an exit, served",
    Way.COALESCED: "coalesced, the ring drained when it is full",
    Way.IOEVENTFD: "ioeventfd",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=101, metavar="N", help="of each way, default 101")
    parser.add_argument(
        "--writes", type=int, default=WRITES, metavar="N", help=f"in a round, default {WRITES}"
    )


def program(writes: int) -> bytes:
    """Real-mode code: writes AL to port DX `writes` times, then halts."""
    return (
        b"\xb9" + writes.to_bytes(2, "little") + b"\xee\xe2\xfd\xf4"
    )  # mov cx, N; l: out dx, al; loop l; hlt


@dataclass
class Subject:
    """A VM with one vCPU and a port to it; `ns[way]` are the nanoseconds of one write, a round each."""

    name: str
    vcpu: Vcpu
    bell: int
    ns: dict[Way, list[float]] = field(default_factory=lambda: {way: [] for way in Way})

    def round(self, way: Way, writes: int) -> float:
        """Nanoseconds of one write. Raises GuestCrash where not every write arrived."""
        vcpu = self.vcpu
        vcpu.set_regs(abi.kvm_regs(rip=ENTRY, rax=VALUE, rdx=way.value, rflags=FLAGS))
        page, seen = vcpu.run_page, 0
        start = time.monotonic_ns()
        while vcpu.run() and page.exit_reason == Exit.IO:
            seen += self._drain() + (vcpu.io_data(page.io.data_offset, 1)[0] == VALUE)
        seen += self._drain()
        taken = time.monotonic_ns() - start
        if way is Way.IOEVENTFD:
            seen += os.eventfd_read(self.bell)
        if (page.exit_reason, seen) != (Exit.HLT, writes):
            raise GuestCrash(
                f"{self.name}, {WHAT[way]}: {seen} of {writes} writes arrived, exit {page.exit_reason}"
            )
        return taken / writes

    def _drain(self) -> int:
        """Take what is in the ring; how many writes it was."""
        ring = self.vcpu.coalesced
        assert ring is not None
        count = 0
        while ring.first != ring.last:
            count += ring.coalesced_mmio[ring.first].data[0] == VALUE
            ring.first = (ring.first + 1) % abi.KVM_COALESCED_MMIO_MAX
        return count


@contextmanager
def subject(name: str, port: Port, writes: int) -> Iterator[Subject]:
    """The VM of one subject, driven through `port`; closes it."""
    with ExitStack() as stack:
        stack.callback(port.close, for_good=True)
        memfd = os.memfd_create("bench", os.MFD_CLOEXEC)
        stack.callback(os.close, memfd)
        os.ftruncate(memfd, RAM_SIZE)
        ram = mmap.mmap(memfd, RAM_SIZE)
        code = program(writes)
        ram[ENTRY : ENTRY + len(code)] = code
        system = stack.enter_context(System(port=port))
        vm = stack.enter_context(system.create_vm())
        vm.set_tss_address()
        vm.set_identity_map()
        hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        vm.set_memory(slot=0, gpa=0, size=RAM_SIZE, hva=hva, memfd=memfd, offset=0)
        vm.register_coalesced(Way.COALESCED.value, 1, pio=True)
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, bell)
        vm.assign_ioeventfd(bell, Way.IOEVENTFD.value, 1, pio=True)
        vcpu = stack.enter_context(vm.create_vcpu(0))
        sregs = abi.kvm_sregs()
        vcpu.get_sregs(sregs)
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        yield Subject(name, vcpu, bell)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    if not 1 <= arguments.writes <= MOST_WRITES:
        raise UsageError(f"--writes {arguments.writes}: outside 1..{MOST_WRITES}")
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds}: at least one")
    with ExitStack() as stack:
        subjects = [
            stack.enter_context(subject(name, port, arguments.writes))
            for name, port in (
                ("direct", DirectPort()),
                ("keeper", KeeperPort.start(spin=False)),
                ("keeper, spinning", KeeperPort.start(spin=True)),
            )
        ]
        pairs = [(one, way) for way in Way for one in subjects]
        for number in range(WARM_UP_ROUNDS + arguments.rounds):
            first = number % len(pairs)  # who follows whom differs from round to round
            for one, way in pairs[first:] + pairs[:first]:
                ns = one.round(way, arguments.writes)
                if number >= WARM_UP_ROUNDS:
                    one.ns[way].append(ns)
    floor = subjects[0].ns[Way.EXIT]
    rows: list[dict[str, Any]] = []
    for one, way in pairs:
        ns = one.ns[way]
        ratios = [mine / floors for mine, floors in zip(ns, floor, strict=True)]
        rows.append(
            {
                "way": way.name.lower(),
                "port": one.name,
                "us": {
                    "p50": round(statistics.median(ns) / 1000, 2),
                    "min": round(min(ns) / 1000, 2),
                    "max": round(max(ns) / 1000, 2),
                },
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    result = {
        "benchmark": "exits",
        "host": host.description(),
        "rounds": arguments.rounds,
        "writes": arguments.writes,
        "ways": rows,
    }
    lines = [
        [
            WHAT[Way[row["way"].upper()]],
            row["port"],
            *(f"{row['us'][key]:.2f} us" for key in ("p50", "min", "max")),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    text = [
        f"one write of the guest's to a port, {arguments.rounds} rounds of {arguments.writes}",
        *table(("way", "port", "p50", "min", "max", "ratio"), lines),
        "ratio: to the exit that this process serves itself, of the same round; the median",
    ]
    return result, text, True
