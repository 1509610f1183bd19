"""`vmm doctor`: can guests run here, what of their handover works, and what is lost for want of what.

The proof is three guests that do run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vmm.errors import HostError

if TYPE_CHECKING:
    from vmm.machine.host_report import HostReport, KvmFacts

HELLO = {"hello16": "real mode", "hello32": "protected mode", "hello64": "long mode"}
HELLO_S = 30.0
GUEST_ENDED_WELL = 1  # (0 << 1) | 1: the debug-exit port's code 0


@dataclass(frozen=True)
class Proof:
    """One guest that was to run: what it said, or what went wrong."""

    name: str
    mode: str
    ran: bool
    said: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Report; status 0 where guests can run, else that of a host that lacks something."""
    from vmm.machine.host_report import examine

    report = examine()
    proofs = [prove(name) for name in HELLO] if report.usable else []
    good = bool(proofs) and all(proof.ran for proof in proofs)
    print(
        json.dumps(as_dict(report, proofs, good)) if arguments.json else "\n".join(text(report, proofs, good))
    )
    return 0 if good else HostError.exit_code


def prove(name: str) -> Proof:
    """Run that guest in a VMM process of its own."""
    from vmm.cli.launch import command, environment

    try:
        ended = subprocess.run(
            [*command(), "run", name, "--serial=stdio", "--no-keeper"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=HELLO_S,
            env=environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Proof(name, HELLO[name], False, f"did not end within {HELLO_S:g} s")
    said = ended.stdout.strip()
    if ended.returncode == GUEST_ENDED_WELL and said == f"hello from {HELLO[name]}":
        return Proof(name, HELLO[name], True, said)
    why = ended.stderr.strip().removeprefix("vmm: ") or f"it said {said!r}"
    return Proof(name, HELLO[name], False, f"status {ended.returncode}: {why}")


# --- for programs ---


def as_dict(report: HostReport, proofs: list[Proof], good: bool) -> dict[str, Any]:
    """Plain values."""
    kvm = report.kvm
    return {
        "usable": good,
        "kernel": platform.release(),
        "kvm_error": report.kvm_error,
        "kvm_api": None if kvm is None else kvm.api_version,
        "capabilities": [] if kvm is None else _capabilities(kvm),
        "time": None if kvm is None or kvm.time is None else asdict(kvm.time),
        "sealed_memfd": report.sealed_memfd,
        "huge_pages": [asdict(pool) for pool in report.huge_pages],
        "guests": [asdict(proof) for proof in proofs],
    }


def _capabilities(kvm: KvmFacts) -> list[dict[str, Any]]:
    return [
        {
            "name": one.capability.name,
            "value": one.value,
            "present": one.present,
            "required": one.capability.required,
            "purpose": one.capability.purpose,
            "without": one.capability.without,
        }
        for one in kvm.capabilities
    ]


# --- for people ---


def text(report: HostReport, proofs: list[Proof], good: bool) -> list[str]:
    """Lines; what is missing says what is lost."""
    lines = [*_kvm_lines(report), "", *_memory_lines(report), ""]
    lines += [f"{'ok' if p.ran else 'FAILED':7} {p.name} in {p.mode}: {p.said}" for p in proofs]
    return [*lines, "guests run here" if good else "guests do not run here; see above"]


def _kvm_lines(report: HostReport) -> list[str]:
    kvm = report.kvm
    if kvm is None:
        return [f"KVM: {report.kvm_error}"]
    lines = [f"/dev/kvm: API {kvm.api_version}, Linux {platform.release()}", ""]
    for one in kvm.capabilities:
        capability = one.capability
        lost = "" if one.present else f"; without it: {capability.without}"
        mark = "yes" if one.present else "MISSING" if capability.required else "no"
        name = capability.name.removeprefix("KVM_CAP_")
        lines.append(f"{mark:7} {name:22} {capability.purpose}{lost}")
    return lines + _time_lines(kvm)


def _time_lines(kvm: KvmFacts) -> list[str]:
    time = kvm.time
    if time is None:
        return []
    clock = "to some nanoseconds" if time.kvmclock_from_tsc else "to about a microsecond: no stable TSC here"
    moves = "to the cycle" if time.tsc_moves else "not at all: it jumps"
    return [
        "",
        f"TSC: {time.tsc_khz} kHz, the host's clock source is {time.clocksource}",
        f"in a handover to a new VM the guest's TSC moves {moves}, its kvmclock {clock}",
    ]


def _memory_lines(report: HostReport) -> list[str]:
    pools = ", ".join(f"{pool.free} of {pool.total} free of {pool.size}" for pool in report.huge_pages)
    sealed = "can be sealed" if report.sealed_memfd else "CANNOT BE SEALED: no machine can be made"
    return [f"memory: a memfd {sealed}; huge pages: {pools}"]
