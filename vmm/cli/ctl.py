"""`vmm ctl`: one QMP command to a VM, its return value as JSON on stdout."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from vmm.cli.target import add_qmp_option, monitor_path
from vmm.errors import UsageError
from vmm.qmp.client import QmpClient

TIMEOUT_S = 10.0
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm ctl`."""
    parser.usage = "vmm ctl [--timeout S] (NAME | --qmp PATH) COMMAND [KEY=VALUE ... | JSON]"
    add_qmp_option(parser)
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"seconds (default {TIMEOUT_S:g})"
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="WORD",
        help="the VM's name (unless --qmp is given), a command such as query-status, and its arguments: "
        "KEY=VALUE, where VALUE may be JSON, or all of them as one JSON object",
    )


def run(arguments: argparse.Namespace) -> int:
    """Execute the command. A refusal is QEMU's sentence on stderr and exit status 12."""
    words = list(arguments.words)
    name = words.pop(0) if arguments.qmp is None else None
    if not words:
        raise UsageError(
            "vmm ctl: no command; say what to execute, such as 'query-status' or 'query-commands'"
        )
    given = command_arguments(words[1:])
    with QmpClient.connect(monitor_path(name, arguments.qmp), arguments.timeout) as client:
        print(json.dumps(client.execute(words[0], given), indent=2))
    return 0


def command_arguments(words: list[str]) -> dict[str, Any] | None:
    """A command's arguments: one JSON object, or `KEY=VALUE` words. Raises UsageError."""
    if not words:
        return None
    if words[0].startswith("{"):
        try:
            given = json.loads(" ".join(words))
        except json.JSONDecodeError as error:
            raise UsageError(f"the arguments are not a JSON object: {error}") from error
        assert isinstance(given, dict)
        return given
    parsed: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"argument {word!r} is not KEY=VALUE; or give all arguments as one JSON object")
        if key in parsed:
            raise UsageError(f"argument {key!r} was given twice")
        parsed[key] = _value(value)
    return parsed


def _value(text: str) -> Any:
    """JSON where it is, a hexadecimal number where it looks like one, otherwise the text itself."""
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
