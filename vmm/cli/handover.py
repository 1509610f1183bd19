"""`vmm handover`: a freshly started VMM takes the guest of a running one, over QMP, as an operator would do
by hand.

Everything that decides where the guest is happens in the two VMMs; this side only asks. It must never end a
VMM that may hold the guest: the new one only where the old one says that the guest is there, the old one only
after the new one says that it has it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmm.cli.aside import Aside
from vmm.cli.launch import POLL_S, LaunchedVmm
from vmm.cli.target import add_target, monitor_path
from vmm.errors import HandoverError, PeerError, VmmError
from vmm.qmp.backend import QmpError
from vmm.qmp.client import QmpClient

TIMEOUT_S = 60.0
CANCEL_S = 10.0  # from migrate_cancel to the old VMM's last word on it
QUIT_S = 10.0
ENDED = ("completed", "failed", "cancelled")
KEEPER_OPTION: dict[bool | None, list[str]] = {None: [], True: ["--keeper"], False: ["--no-keeper"]}
HOLDING = ("running", "paused")  # run states in which a VMM has the guest

Progress = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm handover`."""
    add_target(parser)
    add_timeout(parser, "seconds in all")
    parser.add_argument(
        "--mode",
        choices=("auto", "adopt", "rebuild"),
        default="auto",
        help="how the new VMM takes the guest (default auto: adopt where that can be)",
    )
    parser.add_argument(
        "--keeper",
        action=argparse.BooleanOptionalAction,
        help="whether a VM that is built for the guest gets a keeper (default: as 'vmm run' has it)",
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as one JSON object")
    parser.add_argument("--python", metavar="EXE", help="the Python whose vmm takes over (default: this one)")


def add_timeout(parser: argparse.ArgumentParser, what: str) -> None:
    """The option `--timeout`, whose number is `what`."""
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"{what} (default {TIMEOUT_S:g})"
    )


@dataclass(frozen=True)
class Handed:
    """A handover that took place: the report of it, and the VMM that has the guest now with its monitor."""

    report: dict[str, Any]
    vmm: LaunchedVmm
    client: QmpClient


def unix_channel(kind: str, path: Path) -> dict[str, Any]:
    """One of the `channels` of `migrate`."""
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}


def hand_over(
    old: QmpClient,
    monitor: Path,
    *,
    name: str | None,
    log: Path,
    mode: str = "auto",
    keeper: bool | None = None,
    timeout_s: float = TIMEOUT_S,
    python: str | None = None,
    progress: Progress = lambda _: None,
) -> Handed:
    """Start a VMM and have the guest of `old`, whose control socket is `monitor`, move into it; end `old`.

    With a `name` the new VMM's control socket is the named VM's own; without one it takes the place of
    `monitor`. Raises a HandoverError that says what went wrong and where the guest is.

    A KeyboardInterrupt cancels it. Where it is too late for that, the handover is completed first.
    """
    deadline = time.monotonic() + timeout_s
    vcpu_threads = [cpu["thread-id"] for cpu in old.execute("query-cpus-fast")] if mode != "rebuild" else []
    with (
        Aside(old.pid, vcpu_threads, progress) as aside,
        tempfile.TemporaryDirectory(prefix="handover-", dir=monitor.parent) as folder,
    ):
        aside.keep_off()
        main, cpr = Path(folder, "main"), Path(folder, "cpr")
        options = ["-v", f"--handover={mode}", *KEEPER_OPTION[keeper]]
        vmm = _start(monitor, main, cpr, options, name=name, log=log, python=python)
        try:
            new = vmm.connect(deadline)
            progress(f"started the new VMM (pid {vmm.pid})")
            _set_up(old)
            aside.keep_off(vmm.pid)
        except BaseException:
            vmm.end()  # nobody has told the old VMM of it
            raise
        with ExitStack() as on_error:
            on_error.callback(new.close)
            try:
                _begin(old, vmm, main, cpr)
                interrupted = _wait_ended(old, vmm, deadline)
                report: dict[str, Any] = old.execute("x-vmm-report")
                progress(f"the guest runs in pid {vmm.pid}; ending the old VMM (pid {report['pids']['old']})")
                if not quit_and_wait(old, max(deadline - time.monotonic(), QUIT_S)):
                    raise HandoverError(
                        f"the guest was handed over, but the old VMM (pid {report['pids']['old']}) does not "
                        "end; kill it"
                    )
            except PeerError as error:
                raise HandoverError(f"{error}; {_whereabouts(vmm, new)}") from error
            on_error.pop_all()
        if name is None:
            os.replace(vmm.monitor, monitor)
            vmm.monitor = monitor
        if interrupted:
            new.close()
            raise KeyboardInterrupt
    return Handed(report, vmm, new)


def _start(
    monitor: Path,
    main: Path,
    cpr: Path,
    options: list[str],
    *,
    name: str | None,
    log: Path,
    python: str | None,
) -> LaunchedVmm:
    """The new VMM, which waits for the old one on the two channels."""
    options = [
        *options,
        f"--incoming=unix:{main}",
        f"--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path={_keyval(cpr)}",
    ]
    if name is None:
        # a name of its own: a VMM that ends removes the path that it once listened at
        aside = monitor.with_name(f"{monitor.name}.{secrets.token_hex(4)}")
        return LaunchedVmm([f"--qmp=unix:{aside}", *options], monitor=lambda _: aside, log=log, python=python)
    return LaunchedVmm(
        [f"--name={name}", *options],
        monitor=lambda pid: monitor.with_name(f"qmp-{pid}.sock"),
        log=log,
        python=python,
    )


def _keyval(path: Path) -> str:
    """A path as a value in QEMU's `key=value,…` form."""
    return str(path).replace(",", ",,")


def _set_up(old: QmpClient) -> None:
    """Tell the old VMM what is to come, while it is not yet to begin."""
    old.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    old.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    old.events.clear()


def _begin(old: QmpClient, vmm: LaunchedVmm, main: Path, cpr: Path) -> None:
    """Have the old VMM begin. Raises HandoverError where it refuses."""
    try:
        old.execute("migrate", {"channels": [unix_channel("main", main), unix_channel("cpr", cpr)]})
    except QmpError as error:
        vmm.end()
        raise HandoverError(f"the old VMM refuses: {error}; the guest stays there") from error


def _wait_ended(old: QmpClient, vmm: LaunchedVmm, deadline: float) -> bool:
    """Wait for the handover to complete; cancel it at the deadline, or if interrupted. Whether it was, too
    late.

    Raises HandoverError where the guest has not moved, KeyboardInterrupt where that was the user's wish.
    """
    interrupted = False
    try:
        _wait_event(old, deadline)
    except (PeerError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if not interrupted and time.monotonic() < deadline:
            raise
        old.execute("migrate_cancel")
        _wait_event(old, time.monotonic() + CANCEL_S)
    outcome = old.execute("query-migrate")
    if outcome["status"] == "completed":
        return interrupted
    why = outcome.get("error-desc", outcome["status"])
    state = old.execute("query-status")["status"]
    if state not in HOLDING:
        raise HandoverError(f"{why}; the guest is not in the old VMM any more (run state {state})")
    vmm.end()
    if interrupted and outcome["status"] == "cancelled":
        raise KeyboardInterrupt
    raise HandoverError(f"{why}; the guest is {state} in the old VMM, as before")


def _wait_event(old: QmpClient, deadline: float) -> None:
    while old.wait_event("MIGRATION", max(deadline - time.monotonic(), 0)).data["status"] not in ENDED:
        pass


def _whereabouts(vmm: LaunchedVmm, new: QmpClient) -> str:
    """Where the guest is once the old VMM does not answer any more, for an error's second half."""
    try:
        deadline = time.monotonic() + CANCEL_S
        while (state := new.execute("query-status")["status"]) not in HOLDING:
            if time.monotonic() > deadline:
                return f"the new VMM (pid {vmm.pid}) waits for it, in run state {state}"
            time.sleep(POLL_S)
    except VmmError:
        return f"the new VMM has ended: {vmm.last_words()}"
    return f"the guest is {state} in the new VMM (pid {vmm.pid})"


def quit_and_wait(vmm: QmpClient, timeout_s: float) -> bool:
    """Tell a VMM to end; whether it has within `timeout_s`. Closes the connection. Raises PeerError."""
    pidfd = os.pidfd_open(vmm.pid)
    try:
        vmm.execute("quit")
        vmm.close()
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


def run(arguments: argparse.Namespace) -> int:
    """Hand a VM over to the code that is installed now."""
    path = monitor_path(arguments.name, arguments.qmp).absolute()
    log = path.with_name("vmm.log") if arguments.name else path.with_name(f"{path.name}.log")
    with QmpClient.connect(path) as old:
        try:
            handed = hand_over(
                old,
                path,
                name=arguments.name,
                log=log,
                mode=arguments.mode,
                keeper=arguments.keeper,
                timeout_s=arguments.timeout,
                python=arguments.python,
                progress=lambda text: print(f"vmm: {text}", file=sys.stderr),
            )
        except HandoverError:
            raise
        except VmmError as error:
            raise HandoverError(f"{error}; see {log}") from error
    handed.client.close()
    print(json.dumps(handed.report) if arguments.json else "\n".join(_text(handed.report)))
    return 0


def _text(report: dict[str, Any]) -> list[str]:
    from vmm.report.table import milliseconds, table

    rows = [[phase, milliseconds(us)] for phase, us in report["phases-us"].items()]
    pids = report["pids"]
    return [
        f"handed over by {report['method']} from pid {pids['old']} to pid {pids['new']}",
        f"the guest was paused for {milliseconds(report['pause-us'])}",
        *table(("phase", "time"), rows),
    ]
