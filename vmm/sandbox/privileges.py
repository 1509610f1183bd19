"""Privileges and limits of the process: none that it does not need.

A process of root's keeps its uid, so that its files stay its own, and loses what makes that uid more than
another.
"""

from __future__ import annotations

import resource
import struct
from typing import Final

from vmm.sandbox import kernel

CAPSET: Final = 126  # asm/unistd_64.h
CAPABILITY_VERSION_3: Final = 0x20080522  # linux/capability.h
MOST_CAPABILITIES: Final = 64
OPEN_FILES: Final = (
    8192  # a handover's fds come beside the process's own: 255 vCPUs in a keeper have over 1000
)


def limit_resources() -> None:
    """No core dump, which would hold the guest's memory; room for the fds of a large guest, and no more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def drop_privileges() -> None:
    """No new privileges, no capabilities, in this thread and those it starts. Raises HostError."""
    kernel.prctl("PR_SET_NO_NEW_PRIVS", kernel.PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(MOST_CAPABILITIES):
        try:
            kernel.prctl("PR_CAPBSET_DROP", kernel.PR_CAPBSET_DROP, capability)
        except kernel.Absent:
            break  # the last one there is, or (without CAP_SETPCAP) none that could be gained anyway
    kernel.prctl("PR_CAP_AMBIENT", kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    kernel.syscall("capset", CAPSET, header, bytes(24))  # effective, permitted, inheritable: twice 32 bits
