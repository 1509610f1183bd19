"""What the old and the new side of a handover both work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.process.guest import Guest
from vmm.process.loop import Loop
from vmm.process.migration import Migration
from vmm.qmp.server import QmpServer
from vmm.trace import Tracer


@dataclass
class Side:
    """Parts of one VMM process; `failed` hears of an error of our own."""

    guest: Guest
    migration: Migration
    loop: Loop
    monitor: QmpServer
    tracer: Tracer
    failed: Callable[[BaseException], None]
