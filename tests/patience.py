"""How long tests wait for what is to happen. Where everything takes longer than usual (KVM in an emulated
machine, say), VMM_TEST_PATIENCE=N multiplies every such wait, and every test's time, by N.

For waits that end as soon as what is waited for has come; never for how long a test looks on while nothing
is to happen, and never for what is measured.
"""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("VMM_TEST_PATIENCE", "1"))


def at_most(seconds: float) -> float:
    """How long that is here."""
    return seconds * PATIENCE
