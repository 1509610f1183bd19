"""Where a test breaks a handover: the environment's VMM_FAULT (see vmm/cpr/faults.py), without it nothing."""

from __future__ import annotations

import os
from typing import TypeVar

from vmm.cpr.incoming import IncomingWorld
from vmm.cpr.outgoing import OutgoingWorld

W = TypeVar("W", OutgoingWorld, IncomingWorld)


def faulty(world: W) -> W:
    """`world`, with the faults that are asked for."""
    if "VMM_FAULT" not in os.environ:
        return world
    from vmm.cpr.faults import inject

    return inject(world)
