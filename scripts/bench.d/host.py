"""What a benchmark's figures depend on, stated beside them; and what a process holds, from /proc."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vmm

TIMEOUT = "seconds for each handover, and for whatever else is waited for"  # what --timeout is

_RSS = re.compile(r"RssAnon:\s+(\d+) kB")
_THREADS = re.compile(r"Threads:\s+(\d+)")


def description() -> dict[str, Any]:
    """The machine and the versions that a figure was got with."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "vmm": vmm.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def say(text: str) -> None:
    """Progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Holdings:
    """What a process holds: fds, of these memfds, threads, and KiB of memory that is its own."""

    fds: int
    memfds: int
    threads: int
    rss_anon_kib: int


def holdings(pid: int) -> Holdings:
    """Those of process `pid`."""
    links = list(_links(pid))
    status = Path(f"/proc/{pid}/status").read_text()
    rss, threads = _RSS.search(status), _THREADS.search(status)
    assert rss is not None
    assert threads is not None
    memfds = sum(link.startswith("/memfd:") for link in links)
    return Holdings(len(links), memfds, int(threads[1]), int(rss[1]))


def _links(pid: int) -> Iterator[str]:
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile


def descendants() -> int:
    """How many processes come from this one, those that its children have started and those that have ended
    and are not waited for included.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = children.get(os.getpid(), [])
    for pid in found:  # which grows meanwhile
        found.extend(children.get(pid, ()))
    return len(found)
