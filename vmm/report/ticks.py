"""Is a guest's output whole? Follows the lines of the prebuilt guests through any number of VMMs.

Fed with bytes as they come, in any pieces; it must never hold more than a line of them. Every line has to be
one that such a guest writes: a byte lost, repeated or changed anywhere is seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TICK = re.compile(rb"tick (\d{1,18})")
_DONE = b"done"  # ticker's last line
LONGEST_LINE = 1 << 16


@dataclass
class Ticks:
    """What was counted so far: `ticks` lines; numbers `lost` between them; `errors`: other lines that are not
    as written, and numbers that are repeated or out of order.
    """

    ticks: int = 0
    lost: int = 0
    errors: int = 0
    last: int | None = None
    _partial: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[str]:
        """Count what is in `data`; the complete lines, without their ends, as they are counted."""
        self._partial += data
        while (end := self._partial.find(b"\n")) >= 0:
            line = bytes(self._partial[:end]).removesuffix(b"\r")
            del self._partial[: end + 1]
            self._count(line)
            yield line.decode("ascii", "replace")
        if len(self._partial) > LONGEST_LINE:
            self.errors += 1
            self._partial.clear()

    def _count(self, line: bytes) -> None:
        match = _TICK.fullmatch(line)
        if match is None:
            self.errors += line != _DONE and not _is_report(line)
            return
        number = int(match[1])
        self.ticks += 1
        expected = number if self.last is None else self.last + 1
        if number > expected:
            self.lost += number - expected
        elif number < expected:
            self.errors += 1
        self.last = number


def _is_report(line: bytes) -> bool:
    """Whether it is one of sentinel's JSON lines."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
