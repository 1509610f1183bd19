"""`python -m vmm`."""

from __future__ import annotations

import sys

from vmm.cli import main

if __name__ == "__main__":
    sys.exit(main())
