"""A part of the matrix that `scripts/bench faults` runs in full: real VMMs killed, stopped and cut off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.handover import fault_matrix
from tests.handover.fault_matrix import (
    KINDS,
    MODES,
    NEW,
    NOBODY,
    OLD,
    PROBLEMS,
    STEPS,
    Cell,
    Matrix,
    Outcome,
    cells,
    choose,
)
from tests.processes import ROOT, Spawn
from vmm.cpr import faults
from vmm.errors import UsageError

Run = Callable[[list[Cell]], list[Outcome]]

CHOSEN = {
    "the old VMM dies before the state is told": ["outgoing:pause:kill", "outgoing:send_state:kill"],
    "the old VMM dies once it is": [
        "outgoing:after-send_state:kill",
        "outgoing:receive_running:kill",
    ],
    "the new VMM dies before it has the token": [
        "incoming:load:kill",
        "incoming:take_token:kill",
    ],
    "the new VMM dies with the guest": ["incoming:after-take_token:kill", "incoming:after-send_running:kill"],
    "the old VMM stops": ["outgoing:after-send_state:stop", "outgoing:after-release_token:stop"],
    "the new VMM stops": ["incoming:receive_commit:stop", "incoming:after-take_token:stop"],
    "the new VMM has it all, and the old one dies": [
        "outgoing:keep_token:kill (incoming:send_prepared:stop)",
        "outgoing:after-roll_back:kill (incoming:send_prepared:stop)",
    ],
    "a step fails": ["outgoing:send_commit:break", "incoming:send_running:break"],
    "a connection is lost": ["outgoing:after-connect_main:hang-up", "incoming:send_prepared:hang-up"],
    "it is cancelled": ["outgoing:begin_commit:cancel", "outgoing:after-begin_commit:cancel"],
    "adopt: a VMM dies, and the guest lives in its keeper": [
        "outgoing:send_state:kill",
        "incoming:after-take_token:kill",
        "outgoing:pause:kill paused",
    ],
    "adopt: the guest stays or goes": [
        "outgoing:after-send_state:kill",
        "outgoing:after-release_token:stop",
        "incoming:load:fail",
    ],
    "the guest is paused": ["outgoing:receive_prepared:fail paused", "outgoing:after-send_state:kill paused"],
}


@pytest.fixture
def run_cells(request: pytest.FixtureRequest, kvm_device: Path, tmp_socket_dir: Path) -> Iterator[Run]:
    """Runs cells in a matrix of their own, of the mode that the parameter says."""
    matrix = Matrix(tmp_socket_dir, mode=getattr(request, "param", "rebuild"))
    yield lambda chosen: list(matrix.run(chosen))
    matrix.close()


@pytest.mark.slow
@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("run_cells", "names"),
    [("adopt" if what.startswith("adopt") else "rebuild", names) for what, names in CHOSEN.items()],
    indirect=["run_cells"],
    ids=CHOSEN,
)
def test_never_two_never_none(run_cells: Run, names: list[str]) -> None:
    by_name = {str(cell): cell for cell in cells()}
    for outcome in run_cells([by_name[name] for name in names]):
        assert outcome.problems == [], f"{outcome.mode} {outcome.cell}: {outcome.problems}"
        if outcome.mode == "adopt" and outcome.cell.expected == NOBODY:
            assert outcome.who == "keeper"


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_the_matrix_sees_what_is_wrong(run_cells: Run) -> None:
    """A fault that never strikes, and a guest that is elsewhere than it should be."""
    (outcome,) = run_cells([Cell("outgoing", "nap", "delay", OLD)])
    assert [kind for kind, _ in outcome.problems] == ["wrong place", "silence"]
    assert outcome.who == "new"


def test_the_matrix_is_whole() -> None:
    """Every step of both sides is there, before and after, in every kind that makes sense."""
    every = cells()
    assert len({str(cell) for cell in every}) == len(every) >= 200
    assert {cell.kind for cell in every} == set(KINDS)
    # `nap` is between two processes' instructions: nothing can be struck there for certain
    for side, known in faults.STEPS.items():
        struck = {cell.point.removeprefix("after-") for cell in every if cell.side == side}
        assert struck == known - {"nap"}
        assert set(STEPS[side]) <= known
    for cell in every:
        assert [str(fault) for fault in faults.parse(cell.fault)] == [cell.fault]
    kills = {cell.point: cell.expected for cell in every if cell.kind == "kill" and not cell.provoke}
    assert kills["after-send_state"] == NEW
    assert kills["take_token"] == OLD
    assert len(PROBLEMS) == len(set(PROBLEMS))


@pytest.mark.parametrize(
    "text",
    [
        "outgoing",
        "outgoing:load:kill",
        "sideways:load:kill",
        "incoming:load:explode",
        "incoming:load:delay",
        "incoming:load:delay:-1",
        "incoming:load:kill:9",
        "incoming:enter:kill",
    ],
)
def test_faults_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="VMM_FAULT"):
        faults.parse(text)


def test_without_the_variable_there_is_nothing(spawn: Spawn) -> None:
    """Not even an import; and the world that is driven is the real one."""
    code = """
import sys
from vmm.process.faults import faulty
world = object()
assert faulty(world) is world
assert "vmm.cpr.faults" not in sys.modules
"""
    python = spawn(sys.executable, "-c", code, cwd=ROOT)
    assert python.wait() == 0, python.output()


# --- which cells, and several at a time ---


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["incoming:send_prepared:stop"], ["incoming:send_prepared:stop"]),  # and not what it leads to
        (["outgoing:ask_token:kill"], ["outgoing:ask_token:kill (incoming:receive_commit:stop)"]),
        (["incoming:load:fail paused"], ["incoming:load:fail paused"]),
        (["incoming:load:fail"], ["incoming:load:fail", "incoming:load:fail paused"]),
        (["after-load:kill", "outgoing:offer:kill"], ["outgoing:offer:kill", "incoming:after-load:kill"]),
    ],
)
def test_cells_are_chosen_by_their_own_fault(texts: list[str], names: list[str]) -> None:
    assert [str(cell) for cell in choose(texts)] == names


def test_all_cells_the_paused_ones_and_none() -> None:
    assert choose([]) == cells()
    assert {cell.paused for cell in choose(["paused"])} == {True}
    with pytest.raises(UsageError, match="--only explode: there is no such cell"):
        choose(["offer", "explode"])


INSTEAD_OF_VMMS = """
import os, sys, time
from tests.handover import fault_matrix

def run_mode(mode, guest, places):
    for at, cell in places:
        time.sleep(0.02 * (at % 3))
        {then}
        yield at, fault_matrix.Outcome(cell, mode, who=guest, old=str(os.getpid()))

fault_matrix._run_mode = run_mode
fault_matrix.work(int(sys.argv[1]))
"""


def test_outcomes_of_several_workers_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_matrix, "WORKER", INSTEAD_OF_VMMS.format(then="pass"))
    chosen, shown = cells()[:40], []
    outcomes = fault_matrix.run_matrix(chosen, guest="x", jobs=3, show=shown.append)
    assert [(outcome.mode, outcome.cell) for outcome in outcomes] == [
        (mode, cell) for mode in MODES for cell in chosen
    ]
    assert sorted(map(id, shown)) == sorted(map(id, outcomes))
    assert {outcome.who for outcome in outcomes} == {"x"}
    assert 1 < len({outcome.old for outcome in outcomes}) <= 3


@pytest.mark.parametrize(("then", "status"), [("os._exit(7)", 7), ("os.kill(os.getpid(), 15)", 130)])
def test_a_worker_that_ends_is_no_outcome(monkeypatch: pytest.MonkeyPatch, then: str, status: int) -> None:
    """The others are ended, too."""
    then = f"at == 9 and {then}"
    monkeypatch.setattr(fault_matrix, "WORKER", INSTEAD_OF_VMMS.format(then=then))
    with pytest.raises(RuntimeError, match=f"a worker ended with {status}"):
        fault_matrix.run_matrix(cells()[:40], jobs=3, show=lambda outcome: None)


def test_workers_end_with_who_has_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(outcome: Outcome) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fault_matrix, "WORKER", INSTEAD_OF_VMMS.format(then="at > 5 and time.sleep(60)"))
    with pytest.raises(KeyboardInterrupt):
        fault_matrix.run_matrix(cells()[:40], jobs=3, show=stop)


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_two_at_a_time(kvm_device: Path) -> None:
    chosen = choose(["outgoing:send_state:kill", "incoming:load:fail"])
    outcomes = fault_matrix.run_matrix(chosen, modes=["adopt"], jobs=2, show=lambda outcome: None)
    assert [(outcome.cell, outcome.problems) for outcome in outcomes] == [(cell, []) for cell in chosen]
