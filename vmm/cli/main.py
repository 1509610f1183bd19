"""The parser of all verbs and the one place where an error becomes a sentence on stderr and an exit code.

Nothing of the VMM is imported here: a verb's module is, when it is called.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from vmm import __version__

# verb -> (module, one line); each module has add_arguments(parser) and run(arguments) -> exit status
VERBS: dict[str, tuple[str, str]] = {
    "run": ("vmm.cli.run", "run a guest, or take one over (--incoming)"),
    "attach": ("vmm.cli.attach", "give a guest that lost its VMM a fresh one"),
    "handover": ("vmm.cli.handover", "replace the VMM under a running guest"),
    "ctl": ("vmm.cli.ctl", "send QMP commands to a VM"),
    "console": ("vmm.cli.console", "talk to a VM's serial line"),
    "list": ("vmm.cli.list", "list the named VMs that run"),
    "demo": ("vmm.cli.demo", "watch a guest tick while its VMM is replaced"),
    "doctor": ("vmm.cli.doctor", "say whether guests can run here, and what is lost for want of what"),
    "version": ("vmm.cli.version", "say the versions of all that matters in a handover"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the process's exit status (the README has the table)."""
    given = sys.argv[1:] if argv is None else argv
    verb = next((word for word in given if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="vmm", description="A minimal KVM VMM whose guest outlives it.")
    parser.add_argument("--version", action="version", version=f"vmm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, line) in VERBS.items():
        one = verbs.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == verb:
            importlib.import_module(module).add_arguments(one)
    arguments, left = parser.parse_known_args(given)
    if left and (arguments.verb != "run" or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:  # argparse takes positional ones only where they stand together
        arguments.inputs += left
    return _guarded(VERBS[arguments.verb][0], arguments)


def _guarded(module: str, arguments: argparse.Namespace) -> int:
    from vmm.errors import HostError, VmmError

    try:
        status: int = importlib.import_module(module).run(arguments)
        sys.stdout.flush()  # so that what cannot be written is met here
    except VmmError as error:
        print(f"vmm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        _give_up_stdout()  # whoever read our output has gone; there is nobody to tell
        return VmmError.exit_code
    except OSError as error:  # what nobody expected: the table of fds is full, a disk, …
        print(f"vmm: {_sentence(error)}", file=sys.stderr)
        _give_up_stdout()
        return HostError.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:  # noqa: BLE001 -- shown whole; Python's own status for it, 1, is a guest's
        traceback.print_exc()
        return VmmError.exit_code
    return status


def _give_up_stdout() -> None:
    """Forget what cannot be written: Python would try again at its end, and end with a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


def _sentence(error: OSError) -> str:
    """The kernel's, with the file or ioctl that it is about, and without a number."""
    said = error.strerror or str(error) or type(error).__name__
    return said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}"
