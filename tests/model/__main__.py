"""`python -m tests.model`: explore the protocol, say how much was looked at and what was found."""

from __future__ import annotations

import sys
import time

from tests.model.explore import Explorer, Variant


def main() -> int:
    """Explore; 1 where a rule is broken."""
    good = True
    for mode in ("rebuild", "adopt"):
        start = time.monotonic()
        result = Explorer(Variant(adopt=mode == "adopt")).explore()
        sys.stdout.write(f"{mode}: {result.summary()}\n{time.monotonic() - start:.1f} s\n")
        good = good and not result.violations
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
