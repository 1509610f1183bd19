"""Plain text tables: columns as wide as their widest cell, the first one left-aligned, figures
right-aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table without rules. Every row has as many cells as `header`."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        GAP.join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def milliseconds(us: float | None) -> str:
    """Microseconds as `1.234 ms`, `–` for none."""
    return "–" if us is None else f"{us / 1000:.3f} ms"
