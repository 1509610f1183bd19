"""What released VMMs have written, kept as they wrote it: one folder for each release that changed a layout.

    state.xz     a state memfd of a sentinel with two vCPUs, its guest stopped for a handover
    state.json   what is in the sections that are this project's own (the others are the kernel's structures)
    words.bin    one of each message of the handover, as it goes over the wire

`python -m tests.golden` writes the folder of the present version, for a release to be committed with.
"""

from __future__ import annotations

import ctypes
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vmm.cpr import protocol
from vmm.devices.reset import ResetState
from vmm.devices.serial import SerialState
from vmm.devices.testdev import TestState
from vmm.machine.config import KeptConfig
from vmm.machine.guest_clock import ClockLine
from vmm.machine.hypervisor import HypervisorFacts
from vmm.machine.journal import JournalState
from vmm.machine.machine import MachineState
from vmm.machine.tsc_state import SECTION as TSC_SECTION
from vmm.machine.tsc_state import TscSection

FOLDER = Path(__file__).parent
KINDS: dict[str, Any] = {
    "config": KeptConfig,
    "hypervisor": HypervisorFacts,
    "journal": JournalState,
    "journal-console": JournalState,
    "journal-posted": JournalState,
    "machine": MachineState,
    "reset": ResetState,
    "serial": SerialState,
    "testdev": TestState,
    TSC_SECTION: TscSection,
    "vm/kvmclock": ClockLine,
}
WORDS: tuple[protocol.AnyMessage, ...] = (
    protocol.Offer(
        "0.1.0",
        "cpr-transfer",
        msgspec.Raw(b'{"kernel":"ticker","memory":134217728}'),
        [protocol.FdEntry("ram", 0), protocol.FdEntry("vcpu", 1)],
    ),
    protocol.Refuse("cpus: 2 was given here, the running machine has 1"),
    protocol.Ready("rebuild", "the kernel says EIO, and there is no keeper", True, "EIO"),
    protocol.State(7, True),
    protocol.Prepared(),
    protocol.Commit(),
    protocol.Cancel("cancelled by migrate_cancel"),
    protocol.Running(4711, [protocol.TraceEvent("resumed", 123456789)]),
    protocol.Farewell([(3, b"half a request")]),
)


def releases() -> Iterator[Path]:
    """The folders that there are."""
    return (path for path in sorted(FOLDER.iterdir()) if (path / "state.xz").exists())


def plain(value: Any) -> Any:
    """A structure's content as JSON has it."""
    if isinstance(value, ctypes.Structure):
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return list(value) if isinstance(value, ctypes.Array) else value


def state_memfd(release: Path) -> int:
    """A new memfd with what is in `state.xz`."""
    content = lzma.decompress((release / "state.xz").read_bytes())
    fd = os.memfd_create("golden", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def write(folder: Path) -> None:
    """Make the files, on a machine with /dev/kvm."""
    from tests.handover.rig import rig

    with rig(kernel="sentinel", append="pattern=1M", cpus=2, testdev=True, name="golden") as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        machine = one.machine
        machine.hold_fds()
        machine.quiesce(keep_running=False)
        state = machine.fds.get("state")
        content = os.pread(state, os.fstat(state).st_size, 0)
        fields = {}
        for section in machine.arena:
            if (kind := KINDS.get(section.name)) is not None:
                found = machine.arena.peek(section.name, section.instance, kind)
                fields[section.label] = {"version": section.version, "fields": plain(found)}
        machine.roll_back()
    folder.mkdir(exist_ok=True)
    (folder / "state.xz").write_bytes(lzma.compress(content, preset=9))
    (folder / "state.json").write_text(json.dumps(fields, indent=1) + "\n")
    (folder / "words.bin").write_bytes(b"".join(protocol.encode(word) for word in WORDS))
