"""The VMM process's own confinement: all parts, in the one order that works.

Landlock and the capabilities are a thread's own and inherited, so this is done while there is one thread.
Privileges go first (an unprivileged thread may restrict itself only once it can gain none), seccomp last: it
forbids the rest.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vmm.errors import VmmError
from vmm.sandbox import landlock, seccomp
from vmm.sandbox.kernel import Absent
from vmm.sandbox.landlock import Access, Grant
from vmm.sandbox.privileges import drop_privileges
from vmm.sandbox.profile import REFUSED, keeper_rules, vmm_rules
from vmm.sandbox.seccomp import Action


class Mode(Enum):
    """How a process confines itself; LOG carries system calls beyond the profile out, and the kernel logs
    them.
    """

    OFF = "off"
    LOG = "log"
    ON = "on"


OTHERWISE = {Mode.LOG: Action.LOG, Mode.ON: Action.KILL_PROCESS}


@dataclass(frozen=True)
class Report:
    """What was done, and for each part that the kernel lacks a sentence that says so."""

    done: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def confine(mode: Mode, grants: Iterable[Grant]) -> Report:
    """Give up all but `grants` and the profile, for good. Raises HostError where something fails that is
    there.
    """
    if mode is Mode.OFF:
        return Report()
    if threading.active_count() > 1:
        raise VmmError(
            "the sandbox comes before the first thread: those that run already would stay outside of it"
        )
    sys.dont_write_bytecode = True
    done, missing = ["no new privileges", "no capabilities"], []
    drop_privileges()
    try:
        done.append(f"Landlock ABI {landlock.restrict([*grants, *python_files()])}")
    except Absent as error:
        missing.append(f"files are not restricted: this kernel has no Landlock ({error})")
    try:
        seccomp.require(Action.KILL_PROCESS, Action.LOG, Action.ERRNO)
        seccomp.install(seccomp.assemble(vmm_rules(os.getpid(), _refused(mode)), OTHERWISE[mode]))
        done.append(f"seccomp ({mode.value})")
    except Absent as error:
        missing.append(f"system calls are not restricted: this kernel has no seccomp filters ({error})")
    return Report(tuple(done), tuple(missing))


def _refused(mode: Mode) -> int:
    return REFUSED if mode is Mode.ON else OTHERWISE[mode]


def keeper_program(mode: Mode, pid: int, ioctls: Iterable[int]) -> bytes:
    """The filter for a keeper `pid` to install; empty where there is none to be. KVM_RUN is best the first of
    `ioctls`.
    """
    if mode is Mode.OFF:
        return b""
    try:
        seccomp.require(Action.KILL_PROCESS, Action.LOG, Action.ERRNO)
    except Absent:
        return b""  # as `confine` says of this process itself
    return seccomp.assemble(keeper_rules(pid, ioctls, _refused(mode)), OTHERWISE[mode])


def keeper_ruleset(mode: Mode, path: str | None) -> int:
    """An fd of the Landlock ruleset for a keeper that listens at `path`, which it removes at its end; -1
    where there is none to be.
    """
    grants = [] if path is None else [Grant(os.path.dirname(os.path.abspath(path)), Access.REMOVE_FILE)]
    try:
        return -1 if mode is Mode.OFF else landlock.ruleset(grants)
    except Absent:
        return -1  # as `confine` says of this process itself


def python_files() -> list[Grant]:
    """Reading the interpreter's and this program's own files: some modules are imported late."""
    own = str(Path(__file__).resolve().parents[1])
    paths = {own, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
    return [Grant(path, Access.READ) for path in sorted(paths)]
