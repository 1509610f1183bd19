"""The command line: one file per verb, each imported only when it is called, so that `vmm --help` is
instant.
"""

from vmm.cli.main import main

__all__ = ["main"]
