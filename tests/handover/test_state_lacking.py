"""A kernel that lacks a capability: the rest works, what cannot is refused by name, and doctor says it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vmm.machine.hypervisor
from tests.handover.rig import Rig, rig
from tests.patience import at_most
from tests.processes import ROOT
from vmm.cli import doctor
from vmm.errors import HandoverError, HostError
from vmm.kvm import CAPABILITIES, Cap, Capability, System, Vm
from vmm.machine import host_report
from vmm.machine.cpuid_state import can_nest, kept_cpuid
from vmm.machine.kvm_state import STATE_NEEDS

pytestmark = pytest.mark.kvm

NEEDED_TO_REBUILD = frozenset({*STATE_NEEDS, Cap.PIT_STATE2})
NOT_HERE = frozenset({Cap.IRQCHIP, Cap.GET_TSC_KHZ})  # chips: below; sentinel must be told the frequency
CHECKS = "checks=counter,control,debug,msr,lapic pattern=1M"


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cap], None]:
    """A kernel that says it has not got that capability."""

    def lack(cap: Cap) -> None:
        for kind in (System, Vm):
            check = kind.check

            def answer(self: Any, asked: int, check: Callable[[Any, int], int] = check) -> int:
                return 0 if asked == cap else check(self, asked)

            monkeypatch.setattr(kind, "check", answer)

    return lack


def nested(one: Rig) -> set[Cap]:
    """What a guest needs that can run guests of its own."""
    return {Cap.NESTED_STATE} if can_nest(kept_cpuid(one.machine.arena, 0).entries) else set()


@pytest.mark.parametrize(
    "capability",
    [one for one in CAPABILITIES if not one.required and one.number not in NOT_HERE],
    ids=lambda one: one.number.name,
)
def test_the_rest_works(capability: Capability, lacking: Callable[[Cap], None]) -> None:
    lacking(capability.number)
    with rig(kernel="sentinel", append=CHECKS) as one:
        one.wait_for(lambda results: True)
        if capability.number in NEEDED_TO_REBUILD | nested(one):
            with pytest.raises(HandoverError, match=rf"no {capability.name}, so the guest's state cannot be"):
                one.hand_over()
        else:
            one.hand_over()
        one.go_on(turns=50)
        assert one.results().errors == 0


def test_without_the_tscs_frequency(lacking: Callable[[Cap], None]) -> None:
    lacking(Cap.GET_TSC_KHZ)
    one = Rig(kernel="hello64", paused=True)
    try:
        one.hand_over()
        one.machine.cont()
        assert one.end() == "debug-exit with status 1"
    finally:
        one.close()


@pytest.mark.parametrize(
    ("irqchip", "cap"), [("kernel", Cap.IRQCHIP), ("split", Cap.SPLIT_IRQCHIP)], ids=["kernel", "split"]
)
def test_chips_that_are_not_there_are_named(irqchip: str, cap: Cap, lacking: Callable[[Cap], None]) -> None:
    lacking(cap)
    with pytest.raises(HostError, match=f"no KVM_CAP_{cap.name}, so '{irqchip}' cannot be had"):
        Rig(kernel="hello64", irqchip=irqchip)


def test_what_is_lost_is_said_at_the_start(
    lacking: Callable[[Cap], None], caplog: pytest.LogCaptureFixture
) -> None:
    lacking(Cap.DEBUGREGS)
    caplog.set_level("INFO")
    with rig(kernel="sentinel", append=CHECKS):
        said = [(record.levelname, record.message) for record in caplog.records]
    assert ("INFO", "KVM_CAP_DEBUGREGS: without it, a handover that rebuilds the VM cannot move it") in said
    assert (
        "WARNING",
        "this guest cannot be handed over to a new VM: this host's KVM has no KVM_CAP_DEBUGREGS",
    ) in said


@pytest.mark.parametrize(
    ("cap", "says"),
    [
        (Cap.VCPU_ATTRIBUTES, "KVM_CAP_VCPU_ATTRIBUTES: without it, the TSC jumps in such a handover"),
        (
            Cap.ADJUST_CLOCK,
            "KVM_CAP_ADJUST_CLOCK: without it, kvmclock jumps in a handover that rebuilds the VM",
        ),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_what_would_change_the_guest_is_a_warning(
    cap: Cap, says: str, lacking: Callable[[Cap], None], caplog: pytest.LogCaptureFixture
) -> None:
    lacking(cap)
    with rig(kernel="sentinel", append=CHECKS):
        assert ("WARNING", says) in [(record.levelname, record.message) for record in caplog.records]


@pytest.mark.parametrize("nests", [True, False])
def test_a_guest_that_can_run_guests_needs_nested_state(
    nests: bool, lacking: Callable[[Cap], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(Cap.NESTED_STATE)
    monkeypatch.setattr(vmm.machine.hypervisor, "can_nest", lambda entries: nests)
    with rig(kernel="sentinel", append=CHECKS) as one:
        one.wait_for(lambda results: True)
        if nests:
            with pytest.raises(HandoverError, match="no KVM_CAP_NESTED_STATE, so the guest's state cannot"):
                one.hand_over()
        else:
            one.hand_over()
        one.go_on(turns=50)


# --- doctor ---


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "vmm", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=at_most(50),
        check=False,
        cwd="/",
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


def test_doctor_where_guests_run() -> None:
    ended = run_doctor()
    assert ended.returncode == 0, ended.stderr
    for capability in CAPABILITIES:
        assert capability.name.removeprefix("KVM_CAP_") in ended.stdout
    for mode in ("real", "protected", "long"):
        assert f"hello from {mode} mode" in ended.stdout
    assert ended.stdout.endswith("guests run here\n")


def test_doctor_for_programs() -> None:
    ended = run_doctor("--json")
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["usable"] is True
    assert said["kvm_api"] == 12
    assert [one["name"] for one in said["capabilities"]] == [one.name for one in CAPABILITIES]
    assert [guest["ran"] for guest in said["guests"]] == [True, True, True]
    assert said["time"]["tsc_khz"] > 0
    assert said["sealed_memfd"] is True
    assert {pool["size"] for pool in said["huge_pages"]} == {"2M", "1G"}


def test_doctor_says_what_is_lost(lacking: Callable[[Cap], None], capsys: pytest.CaptureFixture[str]) -> None:
    lacking(Cap.VCPU_ATTRIBUTES)
    report = host_report.examine()
    assert report.usable
    lines = doctor.text(report, [doctor.Proof("hello64", "long mode", True, "hello")], True)
    [line] = [line for line in lines if "VCPU_ATTRIBUTES" in line]
    assert line.startswith("no ")
    assert line.endswith("; without it: the TSC jumps in such a handover")
    assert any("the guest's TSC moves not at all: it jumps" in line for line in lines)


def test_doctor_without_what_guests_need(lacking: Callable[[Cap], None]) -> None:
    lacking(Cap.IMMEDIATE_EXIT)
    report = host_report.examine()
    assert not report.usable
    lines = doctor.text(report, [], False)
    assert any(line.startswith("MISSING IMMEDIATE_EXIT") for line in lines)
    assert lines[-1] == "guests do not run here; see above"
    assert doctor.as_dict(report, [], False)["time"] is None


def test_doctor_without_kvm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise HostError("/dev/kvm does not exist; load a module")

    monkeypatch.setattr(host_report, "_kvm", refuse)
    parser_free = type("Arguments", (), {"json": True})()
    assert doctor.run(parser_free) == HostError.exit_code
    said = json.loads(capsys.readouterr().out)
    assert said["usable"] is False
    assert said["kvm_error"] == "/dev/kvm does not exist; load a module"
    assert said["guests"] == []


def test_a_guest_that_does_not_run_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(doctor.HELLO, "no-such-guest", "no mode")
    monkeypatch.chdir(tmp_path)
    proof = doctor.prove("no-such-guest")
    assert not proof.ran
    assert proof.said.startswith("status ")
    assert "no-such-guest" in proof.said
