"""A supervisor's patience, and what it tells the VMMs that it starts."""

from __future__ import annotations

import pytest

from vmm.cli.supervise import BACK_OFF_S, MOST_RESTARTS, WINDOW_S, BackOff, attach_options


def restarts(lives_s: float, most: int = 200) -> int:
    """How many VMMs are started that live for so long each, before it gives up; `most` where it does not."""
    back_off, now = BackOff(), 1000.0
    for count in range(most):
        wait_s = back_off.before_restart(now)
        if wait_s is None:
            return count
        now += wait_s + lives_s
    return most


@pytest.mark.parametrize("lives_s", [0.0, 0.3, 1.0, 3.0])
def test_it_gives_up_where_no_vmm_lasts(lives_s: float) -> None:
    assert restarts(lives_s) == MOST_RESTARTS


@pytest.mark.parametrize("lives_s", [7.0, 60.0])
def test_it_does_not_where_they_last_for_a_while(lives_s: float) -> None:
    assert restarts(lives_s) == 200


def test_the_waits_grow_and_shrink() -> None:
    back_off, now = BackOff(), 0.0
    waits = []
    for _ in BACK_OFF_S:
        wait_s = back_off.before_restart(now)
        assert wait_s is not None
        waits.append(wait_s)
        now += wait_s
    assert waits == list(BACK_OFF_S)
    assert back_off.before_restart(now + 1 + WINDOW_S) == BACK_OFF_S[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["ticker", "--name=a"], []),
        (
            [
                "ticker",
                "--qmp",
                "unix:/a",
                "--name=a",
                "-vv",
                "--qmp=unix:/b",
                "--sandbox",
                "log",
                "--cpus=2",
            ],
            ["--qmp=unix:/a", "--qmp=unix:/b", "--sandbox=log", "-v", "-v"],
        ),
        (["one.toml", "--verbose", "kernel.elf"], ["-v"]),
    ],
)
def test_the_next_vmm_is_told_what_the_first_one_was(given: list[str], expected: list[str]) -> None:
    assert attach_options(given) == expected
