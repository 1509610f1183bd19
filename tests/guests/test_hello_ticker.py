"""hello and ticker, run as users run them."""

from __future__ import annotations

import pytest

from tests.guests.conftest import Run
from tests.processes import Spawn

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize(
    ("image", "mode"), [("hello16", "real"), ("hello32", "protected"), ("hello64", "long")]
)
def test_hello(spawn: Spawn, image: str, mode: str) -> None:
    guest = spawn.vmm("run", image, "--memory", "8M")
    assert guest.wait() == 1
    assert guest.stdout.splitlines() == [f"hello from {mode} mode"]


@pytest.mark.parametrize("irqchip", ["kernel", "split", "none"])
@pytest.mark.parametrize("wait", ["halt", "spin"])
def test_ticker_counts_and_ends(spawn: Spawn, irqchip: str, wait: str) -> None:
    guest = spawn.vmm(
        "run", "ticker", "--append", f"count=4 rate=50 wait={wait}", "--irqchip", irqchip, "--memory", "8M"
    )
    assert guest.wait() == 1
    assert guest.stdout.splitlines() == ["tick 1", "tick 2", "tick 3", "tick 4", "done"]


def test_ticker_ends_on_q(spawn: Spawn) -> None:
    guest = spawn.vmm("run", "ticker", "--append", "rate=50", "--memory", "8M")
    guest.expect("tick 3")
    guest.write(b"q")
    assert guest.wait() == 1
    assert guest.stdout.splitlines()[-1] == "done"


@pytest.mark.parametrize("wait", ["halt", "spin"])
def test_ticker_keeps_its_rate(run: Run, wait: str) -> None:
    guest = run("ticker", f"rate=20 wait={wait}")
    first = guest.wait_for(lambda results: results.ticks >= 2)
    last = guest.wait_for(lambda results: results.ticks >= first.ticks + 20)
    passed = last.microseconds(last.cpus[0].last_tsc - first.cpus[0].last_tsc) / 1e6
    assert 0.8 < passed < 3
