"""What a rebuild maps before the guest is stopped, so that it need not fault on it after the pause."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vmm.machine.hypervisor
from tests.handover.rig import rig
from vmm.machine.machine import Machine
from vmm.units import KIB, MIB

pytestmark = pytest.mark.kvm

PATTERN = {"kernel": "sentinel", "append": "checks=counter,pattern pattern=8M"}


def resident(machine: Machine) -> int:
    """Bytes of the machine's RAM that this process has mapped."""
    (region,) = machine.memory.regions
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{region.hva:x}-.*?^Rss: *(\d+) kB$", smaps, re.MULTILINE | re.DOTALL)
    assert found is not None
    return int(found[1]) * KIB


def test_what_the_guest_uses_is_mapped_ahead() -> None:
    """And nothing that it does not use, for that would have to be made."""
    found = []
    with rig(**PATTERN) as one:
        one.wait_for(lambda results: results.rounds > 0, 60.0)
        one.hand_over(built=lambda machine: found.append(resident(machine)))
        one.go_on()
    assert 8 * MIB <= found[0] < 16 * MIB


def test_it_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest with more than can be mapped in it is handed over all the same."""
    monkeypatch.setattr(vmm.machine.hypervisor, "PREFAULT_S", -1.0)
    with rig(**PATTERN) as one:
        one.wait_for(lambda results: True)
        one.hand_over()
        one.go_on()
        assert one.results().errors == 0
