"""Tests of instructions that an emulating KVM lacks (SSE, AVX, XSAVE) call `need_native_instructions`,
and skip with the reason.
"""

from __future__ import annotations

from functools import cache

import pytest

from vmm.machine.native import what_is_missing

_missing = cache(what_is_missing)


def need_native_instructions() -> None:
    """Skip the test where guests cannot execute XSAVE and SSE."""
    if missing := _missing():
        pytest.skip(missing)
