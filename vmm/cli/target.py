"""Which VM a verb means: one by its name, or one by the path of its control socket."""

from __future__ import annotations

import argparse
from pathlib import Path

from vmm.errors import UsageError


def add_qmp_option(parser: argparse.ArgumentParser) -> None:
    """`--qmp PATH`, for a VM without a name."""
    parser.add_argument("--qmp", metavar="PATH", help="the VM's control socket, instead of a name")


def add_target(parser: argparse.ArgumentParser) -> None:
    """`NAME` or `--qmp PATH`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="the VM's name (see 'vmm list')")
    add_qmp_option(parser)


def monitor_path(name: str | None, qmp: str | None) -> Path:
    """The control socket meant by either. Raises UsageError for none, both, or a name that no VM has."""
    from vmm.cli.rundir import RunDir

    if (name is None) == (qmp is None):
        raise UsageError("say which VM is meant: by its name (see 'vmm list') or with --qmp PATH")
    if name is not None:
        return RunDir(name).running()
    assert qmp is not None
    return Path(qmp.removeprefix("unix:"))
