"""A part of the matrix that `scripts/bench faults` runs in full: real VMMs killed, stopped and cut off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.handover.fault_matrix import KINDS, NEW, NOBODY, OLD, PROBLEMS, STEPS, Cell, Matrix, Outcome, cells
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
