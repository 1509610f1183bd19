"""`vmm doctor`: what proves that a guest ran. (That guests do run: tests/guests.)"""

from __future__ import annotations

import pytest

from vmm.cli import doctor, launch


@pytest.mark.parametrize(
    ("script", "ran", "said"),
    [
        ("echo hello from long mode; exit 1", True, "hello from long mode"),
        ("exit 1", False, "status 1: it said ''"),
        ("echo hello from real mode; exit 1", False, "status 1: it said 'hello from real mode'"),
        ("echo hello from long mode; exit 3", False, "status 3: it said 'hello from long mode'"),
        ("echo vmm: the guest crashed >&2; exit 8", False, "status 8: the guest crashed"),
        ("echo Traceback >&2; exit 1", False, "status 1: Traceback"),
    ],
)
def test_proof(monkeypatch: pytest.MonkeyPatch, script: str, ran: bool, said: str) -> None:
    monkeypatch.setattr(launch, "command", lambda: ["/bin/sh", "-c", script])
    assert doctor.prove("hello64") == doctor.Proof("hello64", "long mode", ran, said)
