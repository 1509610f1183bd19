"""The handover's protocol, explored exhaustively: never two, never none, no wait for ever, no lie."""

from __future__ import annotations

import inspect
import sys

import pytest

from tests.model.explore import Explorer, Result, Variant
from tests.model.world import STEPS, ModelIncoming, ModelOutgoing
from vmm.cpr.incoming import IncomingWorld
from vmm.cpr.outgoing import OutgoingWorld

# How old, new and guest may end. Where nobody has the guest, the VMM that had it is dead or stopped, or the
# old one died before the new one had the whole state.
ENDS = {
    ("completed", "completed", "new"),
    ("completed", "dead", "nobody"),
    ("completed", "stopped", "new"),
    ("completed", "stopped", "nobody"),  # stopped between taking the guest and running it
    ("failed", "failed", "old"),
    ("failed", "dead", "old"),
    ("failed", "stopped", "old"),
    ("cancelled", "failed", "old"),
    ("cancelled", "dead", "old"),
    ("cancelled", "stopped", "old"),
    ("lost", "dead", "nobody"),
    ("dead", "completed", "new"),
    ("dead", "failed", "nobody"),
    ("dead", "dead", "nobody"),
    ("dead", "stopped", "new"),
    ("dead", "stopped", "nobody"),
    ("stopped", "completed", "new"),
    ("stopped", "failed", "old"),
    ("stopped", "failed", "nobody"),  # stopped with the guest paused or the token released
    ("stopped", "dead", "old"),
    ("stopped", "dead", "nobody"),
    ("stopped", "stopped", "old"),
    ("stopped", "stopped", "new"),
    ("stopped", "stopped", "nobody"),
}


# In an adopt an operator can attach a third VMM, wherever the old one is dead and the token is free.
ENDS_OF_ADOPT = ENDS | {("dead", new, "attached") for new in ("dead", "failed", "stopped")}


def explored(variant: Variant) -> Result:
    return Explorer(variant).explore()


@pytest.mark.parametrize(("adopt", "ends"), [(False, ENDS), (True, ENDS_OF_ADOPT)], ids=["rebuild", "adopt"])
def test_no_rule_can_be_broken(adopt: bool, ends: set[tuple[str, str, str]]) -> None:
    result = explored(Variant(adopt=adopt))
    sys.stdout.write(f"\n{result.summary()}\n")
    assert result.violations == {}, result.summary()
    assert set(result.ends) == ends
    assert result.states > 10_000


def test_without_faults_the_guest_always_moves() -> None:
    result = explored(Variant(faults=False))
    assert result.violations == {}, result.summary()
    assert set(result.ends) == {("completed", "completed", "new")}


def test_the_model_knows_every_step() -> None:
    for protocol, model in ((OutgoingWorld, ModelOutgoing), (IncomingWorld, ModelIncoming)):
        calls = {name for name, _ in inspect.getmembers(protocol, inspect.iscoroutinefunction)}
        assert calls
        assert {name for name in calls if name not in STEPS and name not in vars(model)} == set()
