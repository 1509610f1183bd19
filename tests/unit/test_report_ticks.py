"""The guest's output, checked line by line: what is lost, repeated or mangled is seen."""

from __future__ import annotations

import random

import pytest

from vmm.report.ticks import LONGEST_LINE, Ticks


def fed(data: bytes) -> Ticks:
    ticks = Ticks()
    list(ticks.feed(data))
    return ticks


@pytest.mark.parametrize(
    ("data", "ticks", "lost", "errors", "last"),
    [
        (b"", 0, 0, 0, None),
        (b"tick 1\r\ntick 2\r\n", 2, 0, 0, 2),
        (b"tick 7\r\ntick 8\r\n", 2, 0, 0, 8),
        (b"tick 1\r\ntick 4\r\n", 2, 2, 0, 4),
        (b"tick 1\r\ntick 1\r\n", 2, 0, 1, 1),
        (b"tick 5\r\ntick 3\r\n", 2, 0, 1, 3),
        (b"tick 1\r\ntik 2\r\n", 1, 0, 1, 1),
        (b"tick 1tick 2\r\n", 0, 0, 1, None),
        (b"tick 1\r\ndone\r\n", 1, 0, 0, 1),
        (b"tick 1\r\n\r\n", 1, 0, 1, 1),
        (b'{"guest":"sentinel"}\r\n', 0, 0, 0, None),
        (b'{"guest":"sentin\r\n', 0, 0, 1, None),
        (b"12\r\n", 0, 0, 1, None),
        (b"tick 1\r\ntick 2", 1, 0, 0, 1),
    ],
)
def test_lines(data: bytes, ticks: int, lost: int, errors: int, last: int | None) -> None:
    counted = fed(data)
    assert (counted.ticks, counted.lost, counted.errors, counted.last) == (ticks, lost, errors, last)


def test_any_pieces() -> None:
    data = b"".join(b"tick %d\r\n" % number for number in range(1, 200))
    choose = random.Random(1)
    ticks, at, lines = Ticks(), 0, []
    while at < len(data):
        size = choose.randrange(1, 12)
        lines += ticks.feed(data[at : at + size])
        at += size
    assert lines == [f"tick {number}" for number in range(1, 200)]
    assert (ticks.ticks, ticks.lost, ticks.errors) == (199, 0, 0)


def test_a_line_without_end_is_an_error_and_not_kept() -> None:
    ticks = fed(b"x" * (LONGEST_LINE + 1))
    assert ticks.errors == 1
    assert len(ticks._partial) == 0
