"""`python -m tests.model`: explore the protocol, say how much was looked at and what was found."""

from __future__ import annotations

import sys
import time

from tests.model.explore import Explorer, Result, Variant


def describe(result: Result, seconds: float) -> str:
    """The result in a few lines."""
    lines = [
        f"{result.states} states, {result.transitions} transitions, "
        f"{result.positions[0]} + {result.positions[1]} positions in {seconds:.1f} s; "
        f"{len(result.violations)} violations"
    ]
    for (old, new, where), count in sorted(result.ends.items()):
        lines.append(f"  {count:7} ends: old {old:9} new {new:9} guest: {where}")
    for rule, story in result.violations.items():
        lines.append(f"VIOLATED: {rule}")
        lines += [f"    {step}" for step in story]
    return "\n".join(lines)


def main() -> int:
    """Explore; 1 where a rule is broken."""
    start = time.monotonic()
    result = Explorer(Variant()).explore()
    print(describe(result, time.monotonic() - start))
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
