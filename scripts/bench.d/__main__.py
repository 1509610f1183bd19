"""The parser of all benchmarks; each is a module with add_arguments(parser) and run(arguments) -> record,
text, good.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys

from vmm.errors import VmmError

BENCHMARKS = {
    "pause": "how long a guest stands still in a handover, at several RAM sizes, QEMU beside it if asked for",
    "leak": "whether hundreds of handovers in a row leave anything behind",
    "exits": "what a write to a port costs: an exit, directly and through a keeper, and the ways without one",
    "crash": "SIGKILLs of VMMs at random moments: guests alive, errors that they found",
    "storm": "handovers back to back under a busy guest: errors, and what they cost it",
    "faults": "either VMM killed, stopped, cut off at every step of a handover: who runs the guest then",
}
WRONG = 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Benchmarks of vmm.")
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, line in BENCHMARKS.items():
        one = names.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        one.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        importlib.import_module(f"bench_{name}").add_arguments(one)
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # end as with Ctrl-C: nothing stays behind
    try:
        record, text, good = importlib.import_module(f"bench_{arguments.name}").run(arguments)
    except VmmError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(json.dumps(record) if arguments.json else "\n".join(text))
    return 0 if good else WRONG


if __name__ == "__main__":
    sys.exit(main())
