"""What is fuzzed: each module has `one(data)`, which raises where a promise is broken, and `seeds()`."""

from __future__ import annotations

import importlib
from pathlib import Path

from hypothesis import strategies as st

NAMES = ("elf", "config", "qmp", "cpr", "arena", "keeper", "replies", "serial", "chardev", "guest")
CORPUS = Path(__file__).parents[1] / "corpus"
LONGEST = 4096


def committed(target: str) -> list[bytes]:
    """The inputs in tests/fuzz/corpus: what once broke a promise, or was hard to reach."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]


def inputs(target: str) -> st.SearchStrategy[bytes]:
    """Inputs for hypothesis: a seed with changes, pieces of two seeds, or any bytes."""
    seeds = [*importlib.import_module(f"{__name__}.{target}").seeds(), *committed(target)]
    seed = st.sampled_from(seeds)
    change = st.tuples(st.integers(0, LONGEST), st.integers(0, 8), st.binary(max_size=8))
    return st.one_of(
        st.builds(_changed, seed, st.lists(change, max_size=8)),
        st.builds(
            lambda a, b, at, to: a[: at % (len(a) + 1)] + b[to % (len(b) + 1) :], seed, seed, _places, _places
        ),
        st.binary(max_size=LONGEST),
    )


_places = st.integers(0, LONGEST)


def _changed(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    content = bytearray(data)
    for at, length, new in changes:
        start = at % (len(content) + 1)
        content[start : start + length] = new
    return bytes(content)
