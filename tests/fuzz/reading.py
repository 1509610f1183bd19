"""A fuzzer's bytes read as numbers, choices and pieces; at their end there are only zeros."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Reader:
    """Reads `data` from its start."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def bytes(self, size: int) -> bytes:
        """The next bytes, `size` at most."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        """All that is left."""
        return self.bytes(len(self._data))

    def number(self, size: int = 1) -> int:
        """The next `size` bytes, little endian."""
        return int.from_bytes(self.bytes(size), "little")

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`, by one byte."""
        return options[self.number() % len(options)]


def open_fds() -> dict[int, str]:
    """Every open fd of this process, and what it is."""
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the directory's own
    return fds
