"""`python -m tests.model`: explore the protocol, say how much was looked at and what was found."""

from __future__ import annotations

import sys
import time

from tests.model.explore import Explorer, Variant


def main() -> int:
    """Explore; 1 where a rule is broken."""
    start = time.monotonic()
    result = Explorer(Variant()).explore()
    sys.stdout.write(f"{result.summary()}\n{time.monotonic() - start:.1f} s\n")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
