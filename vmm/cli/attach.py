"""`vmm attach`: a fresh VMM for a guest that has lost its own, from the keeper that still has it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.cli.rundir import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm attach`."""
    from vmm.cli.run import add_sandbox_option

    parser.add_argument("name", metavar="NAME", help="the VM's name")
    parser.add_argument(
        "--qmp", action="append", default=[], metavar="unix:PATH", help="a further control socket"
    )
    add_sandbox_option(parser)
    parser.add_argument("--verbose", "-v", action="count", default=0, help="more in the log; twice for all")


def run(arguments: argparse.Namespace) -> int:
    """Take the guest over and serve it to its end; returns the exit status."""
    from vmm.cli.run import qmp_path, sandbox_mode, start_logging
    from vmm.cli.rundir import RunDir
    from vmm.errors import UsageError
    from vmm.process import Options, VmmProcess

    start_logging(arguments.verbose)
    directory = RunDir(arguments.name)
    if directory.lives() and not _has_given_its_guest_away(directory):
        raise UsageError(
            f"the VM {directory.name!r} has its VMM; to replace it use 'vmm handover {directory.name}'"
        )
    if not directory.kept():
        raise UsageError(
            f"no keeper has a VM named {directory.name!r}; start it with 'vmm run --name {directory.name}'"
        )
    directory.tidy()  # of the sockets that the last VMM has left
    paths = [str(directory.own_qmp()), *(qmp_path(text) for text in arguments.qmp)]
    options = Options(
        attach=tuple(str(path) for path in directory.keepers()),
        qmp_paths=tuple(paths),
        owned=directory.claim,
        disowned=directory.disclaim,
        sandbox=sandbox_mode(arguments.sandbox),
        grants=directory.grants(),
    )
    return VmmProcess(options).run()


def _has_given_its_guest_away(directory: RunDir) -> bool:
    """Whether the VMM that is found by the VM's name has handed the guest over, to one that had not said yet
    that it is to be found now.
    """
    from vmm.errors import VmmError
    from vmm.qmp.client import QmpClient

    try:
        with QmpClient.connect(directory.qmp) as client:
            return bool(client.execute("query-status")["status"] == "postmigrate")
    except VmmError:
        return False
