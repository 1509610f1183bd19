"""Least privilege: what a VMM process gives up for good before it reads a byte from a guest, image or peer.

    privileges  limits: no core dump, no more fds than needed; no new privileges; no capability at all
    landlock    files: the given ones and no others; no TCP; no signals and abstract sockets to the outside
    seccomp     system calls: those of `profile`, with their arguments; another one ends the process

Everything is inherited by threads, and nothing can be taken back; so it is done while there is one thread.
What the kernel lacks is left out and said. Nothing here knows what a VMM is but `profile`, which is a table.
"""

from __future__ import annotations

from vmm.sandbox.confine import Mode, Report, confine, keeper_program, keeper_ruleset
from vmm.sandbox.landlock import Access, Grant
from vmm.sandbox.privileges import limit_resources

__all__ = [
    "Access",
    "Grant",
    "Mode",
    "Report",
    "confine",
    "keeper_program",
    "keeper_ruleset",
    "limit_resources",
]
