"""Keeps the processes of a handover off the CPUs that the guest's vCPUs compute on.

With a keeper the vCPUs are not stopped. What a handover has to do, in two VMMs and the keeper, would be put
wherever the kernel's scheduler pleases, and that is at times where a vCPU computes, which then waits. A vCPU
that needs its VMM all the time does not compute: what serves it is better off with every CPU.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

LOOK_S, FEW_SLEEPS = 0.02, 2  # a vCPU that waits for its VMM more often meanwhile is in exits all the time
_STATE, _PROCESSOR = 0, 36  # of what follows the name in /proc/PID/stat (proc_pid_stat(5): fields 3 and 39)


class Aside:
    """A context: what `keep_off` did is undone at its end. (A process that is killed before leaves the others
    on fewer CPUs.)

    It does nothing where the vCPUs run in the VMM itself, nor where they have every CPU.
    """

    def __init__(self, vmm: int, vcpu_threads: Sequence[int], say: Callable[[str], None]) -> None:
        """Of the guest whose vCPUs run in these threads, and of the VMM that is to hand it over. `say` is
        told what cannot be done: no more than that the guest may notice.
        """
        self._say = say
        self._vcpus = frozenset(vcpu_threads)
        self._usual: dict[int, set[int]] = {}  # process -> its CPUs, before
        try:
            home = _home(vmm, vcpu_threads[0]) if vcpu_threads else vmm
            if home != vmm:
                self._usual = {pid: os.sched_getaffinity(pid) for pid in (os.getpid(), vmm, home)}
        except OSError as error:
            say(f"the guest may notice the handover: where its vCPUs run cannot be told: {error.strerror}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._place(self._usual)

    def keep_off(self, started: int | None = None) -> None:
        """Have this process, the VMM, and the threads of the keeper that are no vCPU's run elsewhere than
        vCPUs compute now; and the process `started` here meanwhile, which is to have this one's usual CPUs.
        """
        if started is not None and self._usual:
            self._usual[started] = self._usual[os.getpid()]
        if self._usual:
            busy = _computes_on(self._vcpus)
            self._place({process: cpus - busy or cpus for process, cpus in self._usual.items()})

    def _place(self, wanted: dict[int, set[int]]) -> None:
        for process, cpus in wanted.items():
            try:
                self._place_process(process, cpus)
            except OSError as error:
                self._say(f"process {process} cannot be kept to CPUs {sorted(cpus)}: {error.strerror}")

    def _place_process(self, process: int, cpus: set[int]) -> None:
        """All its threads, and those that they start meanwhile, but the vCPUs'."""
        placed: set[int] = set(self._vcpus)
        while fresh := _threads(process) - placed:
            for thread in fresh:
                with suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(thread, cpus)
            placed |= fresh


def _threads(process: int) -> set[int]:
    try:
        return {int(name) for name in os.listdir(f"/proc/{process}/task")}
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return set()


def _home(vmm: int, thread: int) -> int:
    """The process of a thread that the VMM has named: the VMM itself, or another of the same user. OSError
    where it is none, or its number may mean another one here.
    """
    if not os.path.samefile(f"/proc/{vmm}/ns/pid", "/proc/self/ns/pid"):
        raise OSError(errno.EXDEV, "the VMM is in another PID namespace")
    if "Tgid" not in (status := _status(thread)):
        raise OSError(errno.ESRCH, f"the thread {thread} that it names is not there")
    home = int(status["Tgid"])
    if os.stat(f"/proc/{home}").st_uid != os.stat(f"/proc/{vmm}").st_uid:
        raise OSError(errno.EPERM, "the VMM names another user's thread")
    return home


def _computes_on(threads: Iterable[int]) -> set[int]:
    """The CPUs of those of these threads that hardly sleep for a while, and have something to run."""
    before = {thread: _sleeps(thread) for thread in threads}
    time.sleep(LOOK_S)
    awake = [thread for thread, sleeps in before.items() if _sleeps(thread) - sleeps <= FEW_SLEEPS]
    return {cpu for thread in awake if (cpu := _runs_on(thread)) is not None}


def _sleeps(thread: int) -> int:
    """How often a thread has gone to sleep; 0 where it has ended."""
    return int(_status(thread).get("voluntary_ctxt_switches", 0))


def _runs_on(thread: int) -> int | None:
    """The CPU that a thread runs on or waits for; None where it sleeps or has ended."""
    stat = _read(f"/proc/{thread}/stat")
    fields = stat.rpartition(")")[2].split()
    return int(fields[_PROCESSOR]) if fields and fields[_STATE] == "R" else None


def _status(thread: int) -> dict[str, str]:
    """/proc/PID/status; empty where there is no such thread (any more)."""
    lines = _read(f"/proc/{thread}/status").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
