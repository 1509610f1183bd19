"""`vmm run`: one VMM process, with a new guest or with one that another VMM hands over."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from vmm.sandbox import Mode

LOG_FORMAT = "%(asctime)s.%(msecs)03d vmm[%(process)d] %(levelname)s %(message)s"
STDERR = 2  # an fd: sys.stderr may be an object that has none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm run`; those of the machine override the configuration file."""
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="[CONFIG.toml] [KERNEL]",
        help="configuration file, guest image or prebuilt guest",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--name", help="a name for 'vmm list', 'vmm ctl' and 'vmm handover'")
    machine.add_argument("--memory", metavar="SIZE", help="guest RAM, such as 256M (default 128M)")
    machine.add_argument(
        "--memory-backend",
        choices=("memfd", "guest-memfd"),
        help="what guest RAM is: a memfd, or memory that is bound to the VM (default memfd)",
    )
    machine.add_argument("--hugepages", metavar="SIZE", help="back RAM with huge pages of 2M or 1G")
    machine.add_argument("--cpus", type=int, metavar="N", help="number of vCPUs (default 1)")
    machine.add_argument("--append", metavar="TEXT", help="the guest's command line")
    machine.add_argument(
        "--serial", metavar="WHERE", help="COM1: stdio, file:PATH, unix:PATH, unix, pty, null (default stdio)"
    )
    machine.add_argument(
        "--irqchip", choices=("kernel", "split", "none"), help="where the interrupt controllers are"
    )
    machine.add_argument(
        "--entry-mode", choices=("real16", "protected32", "long64"), help="how to enter the image"
    )
    machine.add_argument(
        "--load-address", type=lambda text: int(text, 0), metavar="ADDR", help="where a flat binary goes"
    )
    machine.add_argument(
        "--testdev", action="store_const", const=True, help="the sentinel guest's test device"
    )
    process = parser.add_argument_group("process")
    process.add_argument(
        "--qmp", action="append", default=[], metavar="unix:PATH", help="a control socket; may be given again"
    )
    process.add_argument(
        "--incoming",
        action="append",
        default=[],
        metavar="CHANNEL",
        help="take a guest over; once for the main channel (unix:PATH) and once for the cpr channel "
        "(cpr,addr.transport=socket,addr.type=unix,addr.path=PATH, or its JSON)",
    )
    process.add_argument(
        "--handover",
        choices=("auto", "adopt", "rebuild"),
        default="auto",
        help="how to take a guest over (default auto)",
    )
    process.add_argument(
        "--keeper",
        action=argparse.BooleanOptionalAction,
        help="have a keeper process own the VM, so that the guest outlives this process",
    )
    process.add_argument(
        "--orphan-timeout",
        type=float,
        metavar="S",
        help="seconds that the guest lives on without a VMM (default: for ever)",
    )
    process.add_argument(
        "--restart",
        choices=("never", "always"),
        help="always: start a fresh VMM whenever the guest has lost its own (needs --name)",
    )
    process.add_argument("--paused", "-S", action="store_true", help="do not start the guest until 'cont'")
    add_sandbox_option(process)
    process.add_argument("--verbose", "-v", action="count", default=0, help="more in the log; twice for all")


def given_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the operator said of the machine, in the file and in options (which win). Raises ConfigError,
    UsageError.
    """
    from vmm.machine.config import read_toml
    from vmm.units import parse_size

    inputs = list(arguments.inputs)
    values: dict[str, Any] = {}
    if inputs and inputs[0].endswith(".toml"):
        values = read_toml(inputs.pop(0))
    if len(inputs) > 1:
        raise UsageError(f"one kernel at most: {' '.join(inputs)}")
    if inputs:
        values["kernel"] = (
            str(Path(inputs[0]).absolute()) if os.sep in inputs[0] or Path(inputs[0]).exists() else inputs[0]
        )
    for key in (
        "name",
        "memory_backend",
        "hugepages",
        "cpus",
        "append",
        "serial",
        "irqchip",
        "entry_mode",
        "load_address",
        "testdev",
    ):
        if (value := getattr(arguments, key)) is not None:
            values[key] = value
    if arguments.memory is not None:
        values["memory"] = parse_size(arguments.memory, "--memory")
    return values


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values as a machine's configuration has them, sizes as numbers. Raises ConfigError."""
    from vmm.machine.config import from_mapping

    # the serial line of a named VM may be `unix`: its directory, which is none of the machine's, has the path
    named = values.get("name") is not None and values.get("serial") == "unix"
    config = from_mapping({**values, "serial": "null"} if named else values, "configuration")
    return {key: values[key] if key == "serial" else getattr(config, key) for key in values}


def run(arguments: argparse.Namespace) -> int:
    """Run the process to its end; returns its exit status."""
    start_logging(arguments.verbose)
    from vmm.cli.rundir import RunDir
    from vmm.machine.config import from_mapping
    from vmm.process import Options, VmmProcess

    values = given_values(arguments)
    keeper = _process_option(values, arguments, "keeper", bool, True)
    orphan_timeout_s = _orphan_timeout(_process_option(values, arguments, "orphan_timeout", float, 0.0))
    restart = _process_option(values, arguments, "restart", str, "never")
    values = checked(values)
    incoming = _incoming(arguments.incoming) if arguments.incoming else None
    paths = [qmp_path(text) for text in arguments.qmp]
    options = Options(
        given=values,
        incoming=incoming,
        paused=arguments.paused,
        method=arguments.handover,
        keeper=keeper,
        orphan_timeout_s=orphan_timeout_s,
        sandbox=sandbox_mode(arguments.sandbox),
    )
    if "name" in values:
        directory = RunDir(values["name"]).make()
        if incoming is None and (directory.lives() or directory.kept()):
            hint = "use 'vmm handover'" if directory.lives() else "use 'vmm attach'"
            raise UsageError(f"a VM named {directory.name!r} runs already; choose another name or {hint}")
        if restart == "always":
            from vmm.cli.supervise import Supervisor

            return Supervisor(directory).run([*sys.argv[2:], "--restart=never", "--keeper"])
        paths.append(str(directory.own_qmp()))
        options.owned, options.disowned = directory.claim, directory.disclaim
        options.grants = directory.grants()
        if keeper:
            options.keeper_path = str(directory.own_keeper())
        if values.get("serial") == "unix":
            values["serial"] = f"unix:{directory.console}"
    elif restart == "always":
        raise UsageError("--restart always needs a --name to find the guest by")
    options.qmp_paths = tuple(paths)
    if incoming is None:
        options.config = from_mapping(values, "configuration")
    return VmmProcess(options).run()


def add_sandbox_option(parser: argparse._ActionsContainer) -> None:
    """The option that `sandbox_mode` reads."""
    parser.add_argument(
        "--sandbox",
        choices=("on", "log", "off"),
        help="give up what is not needed once set up; log: a system call beyond the profile goes to the "
        "kernel's log and does not end the process (default: $VMM_SANDBOX, else on)",
    )


def sandbox_mode(given: str | None) -> Mode:
    """How this process confines itself. Raises UsageError."""
    from vmm.sandbox import Mode

    text = given or os.environ.get("VMM_SANDBOX") or Mode.ON.value
    try:
        return Mode(text)
    except ValueError:
        raise UsageError(f"VMM_SANDBOX is {text!r}; it takes on, log or off") from None


def start_logging(verbose: int) -> None:
    """Log to stderr: warnings, with one -v what happens, with two everything; and where a fatal signal met
    the process.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(STDERR)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format=LOG_FORMAT, datefmt="%H:%M:%S")


def _process_option(
    values: dict[str, Any], arguments: argparse.Namespace, key: str, kind: type, default: Any
) -> Any:
    """An option of the process: the command line's, else the configuration file's, else the default."""
    in_file = values.pop(key, None)
    given = getattr(arguments, key)
    if given is not None:
        return given
    if in_file is None:
        return default
    if not isinstance(in_file, (int, float) if kind is float else kind):
        raise ConfigError(f"configuration: {key} is {in_file!r}; it takes a {kind.__name__}")
    return in_file


def _orphan_timeout(seconds: float) -> float:
    from vmm.machine.ports import ORPHAN_MAX_S

    if seconds != 0 and not 0.001 <= seconds <= ORPHAN_MAX_S:  # NaN is none of these
        raise ConfigError(f"orphan timeout: {seconds:g} s; 0.001 to {ORPHAN_MAX_S:.0f}, or 0, for ever")
    return seconds


def qmp_path(text: str) -> str:
    kind, _, path = text.partition(":")
    if kind != "unix" or not path:
        raise UsageError(f"--qmp {text}: only unix:PATH is served")
    return path.partition(",")[0]


def _incoming(texts: list[str]) -> Any:
    from vmm.process import Incoming
    from vmm.qmp.backend import QmpError
    from vmm.qmp.channels import parse_incoming
    from vmm.qmp.schema import ChannelType, UnixSocket

    paths: dict[ChannelType, str] = {}
    for text in texts:
        try:
            channel = parse_incoming(text)
        except QmpError as error:
            raise UsageError(f"--incoming {text}: {error}") from error
        if channel is None:
            raise UsageError(
                "--incoming defer: not served; name the main channel, such as --incoming unix:PATH"
            )
        if not isinstance(channel.addr, UnixSocket):
            raise UsageError(
                f"--incoming {text}: bad {channel.channel_type.value} channel address; must be unix"
            )
        if channel.channel_type in paths:
            raise UsageError(f"--incoming: more than one {channel.channel_type.value} channel")
        paths[channel.channel_type] = channel.addr.path
    if ChannelType.CPR not in paths:
        raise ConfigError(
            "--incoming: missing 'cpr' channel; add "
            "--incoming cpr,addr.transport=socket,addr.type=unix,addr.path=PATH"
        )
    if ChannelType.MAIN not in paths:
        raise ConfigError("--incoming: missing 'main' channel; add --incoming unix:PATH")
    return Incoming(cpr_path=paths[ChannelType.CPR], main_path=paths[ChannelType.MAIN])
