"""`vmm version` says each version that something else is refused by, and the oldest that is not."""

from __future__ import annotations

import json

import pytest

from vmm.cli.main import main
from vmm.cpr import protocol
from vmm.kvm import keeper
from vmm.state.arena import LAYOUT_VERSION


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)
    assert (versions["oldest-protocol"], versions["protocol"]) == (protocol.OLDEST_VERSION, protocol.VERSION)
    assert versions["keeper-protocol"] == keeper.PROTOCOL
    assert versions["oldest-state-layout"] <= versions["state-layout"] == LAYOUT_VERSION
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"keeper         {keeper.PROTOCOL} (understands no other)" in lines
