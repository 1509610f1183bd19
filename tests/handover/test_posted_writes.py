"""Posted writes of a real guest, through KVM's ring: none is lost or doubled by handovers and kills."""

from __future__ import annotations

from typing import Any

import pytest

from tests.handover.rig import Rig, rig
from vmm.kvm import Cap, System, Vm
from vmm.machine.posted import PostedWrites

pytestmark = pytest.mark.kvm

SENTINEL = {"kernel": "sentinel", "append": "checks=counter,posted pattern=1M", "testdev": True}


@pytest.fixture
def _kvm_can() -> None:
    with System() as system:
        if not (system.check(Cap.COALESCED_MMIO) and system.check(Cap.COALESCED_PIO)):
            pytest.skip("this KVM puts no writes aside")


def started(one: Rig) -> None:
    one.wait_for(lambda results: True)
    one.go_on(turns=100)


@pytest.mark.usefixtures("_kvm_can")
def test_they_come_by_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    apply = PostedWrites._apply

    def note(self: PostedWrites, at: int) -> None:
        came.append(self._ring.coalesced_mmio[at].pio)
        apply(self, at)

    monkeypatch.setattr(PostedWrites, "_apply", note)
    with rig(**SENTINEL, cpus=2) as one:
        started(one)
        for _ in range(3):
            one.hand_over()
            del came[:]
            one.go_on(turns=100)
            assert set(came) == {0, 1}
        assert one.results().errors == 0


@pytest.mark.usefixtures("_kvm_can")
def test_one_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(**SENTINEL) as one:
        started(one)
        monkeypatch.setattr(PostedWrites, "_apply", lambda self, at: None)
        assert one.end() == "debug-exit with status 57"
        assert one.violation().startswith("posted ")


def test_a_kvm_that_puts_none_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Any, capability: int) -> int:
        return 0 if capability in (Cap.COALESCED_MMIO, Cap.COALESCED_PIO) else has(self, capability)

    has = Vm.check
    monkeypatch.setattr(Vm, "check", check)
    monkeypatch.setattr(PostedWrites, "_apply", lambda self, at: pytest.fail("there is a ring"))
    with rig(**SENTINEL) as one:
        started(one)
        one.hand_over()
        one.go_on(turns=100)
        assert one.results().errors == 0
