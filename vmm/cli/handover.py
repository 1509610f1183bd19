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
from vmm.cli.rundir import RunDir
from vmm.cli.signals import interruptible, uninterrupted
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

    With a `name` the new VMM's control socket is the named VM's own. Where `monitor` is another, one of the
    new VMM's takes its place. Raises a HandoverError that says what went wrong and where the guest is.

    A KeyboardInterrupt cancels it. Where it is too late for that, the handover is completed first. For the
    main thread.
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
        with ExitStack() as on_error:
            with uninterrupted():
                vmm = _start(monitor, main, cpr, options, name=name, log=log, python=python)
                on_error.callback(vmm.end)  # nobody has told the old VMM of it
            new = vmm.connect(deadline)
            on_error.callback(new.close)
            progress(f"started the new VMM (pid {vmm.pid})")
            _set_up(old)
            aside.keep_off(vmm.pid)
            on_error.pop_all()
        with ExitStack() as on_error:
            on_error.callback(new.close)
            try:
                stopped = _carry_out(old, vmm, main, cpr, deadline)
                with uninterrupted():
                    _settle(old, vmm, stopped)
                    report: dict[str, Any] = old.execute("x-vmm-report")
                    pid = report["pids"]["old"]
                    progress(f"the guest runs in pid {vmm.pid}; ending the old VMM (pid {pid})")
                    if not quit_and_wait(old, max(deadline - time.monotonic(), QUIT_S)):
                        raise HandoverError(
                            f"the guest was handed over, but the old VMM (pid {pid}) does not end; kill it"
                        )
                    if not _own(monitor, name):
                        os.replace(vmm.monitor, monitor)
                        vmm.monitor = monitor
            except PeerError as error:
                raise HandoverError(f"{error}; {_whereabouts(old, vmm, new)}") from error
            if isinstance(stopped, KeyboardInterrupt):
                raise stopped
            on_error.pop_all()
    return Handed(report, vmm, new)


def _own(monitor: Path, name: str | None) -> bool:
    """Whether a control socket is in the named VM's directory, where each VMM has its own."""
    return name is not None and monitor.parent.samefile(RunDir(name).path)


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
    if name is not None:
        options.append(f"--name={name}")
    if _own(monitor, name):
        return LaunchedVmm(
            options, monitor=lambda pid: monitor.with_name(f"qmp-{pid}.sock"), log=log, python=python
        )
    # a name of its own: a VMM that ends removes the path that it once listened at
    aside = monitor.with_name(f"{monitor.name}.{secrets.token_hex(4)}")
    return LaunchedVmm([*options, f"--qmp=unix:{aside}"], monitor=lambda _: aside, log=log, python=python)


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


def _carry_out(
    old: QmpClient, vmm: LaunchedVmm, main: Path, cpr: Path, deadline: float
) -> PeerError | KeyboardInterrupt | None:
    """Have the old VMM begin, and wait for the handover to end. What stopped that: the deadline, or an
    interrupt.
    """
    try:
        with uninterrupted():
            _begin(old, vmm, main, cpr)
        _wait_event(old, deadline)
    except KeyboardInterrupt as interrupt:
        return interrupt
    except PeerError as error:
        if time.monotonic() < deadline:
            raise
        return error
    return None


def _settle(old: QmpClient, vmm: LaunchedVmm, stopped: PeerError | KeyboardInterrupt | None) -> None:
    """See that the handover has completed; cancel it first where waiting for that was stopped.

    Raises HandoverError where the guest has not moved, KeyboardInterrupt where that was the user's wish.
    """
    if stopped is not None:
        old.execute("migrate_cancel")
        _wait_event(old, time.monotonic() + CANCEL_S)
    outcome = old.execute("query-migrate")
    if outcome["status"] == "completed":
        return
    why = outcome.get("error-desc", outcome["status"])
    state = old.execute("query-status")["status"]
    if state not in HOLDING:
        raise HandoverError(f"{why}; the guest is not in the old VMM any more (run state {state})")
    vmm.end()
    if isinstance(stopped, KeyboardInterrupt) and outcome["status"] == "cancelled":
        raise stopped
    raise HandoverError(f"{why}; the guest is {state} in the old VMM, as before")


def _wait_event(old: QmpClient, deadline: float) -> None:
    while old.wait_event("MIGRATION", max(deadline - time.monotonic(), 0)).data["status"] not in ENDED:
        pass


def _whereabouts(old: QmpClient, vmm: LaunchedVmm, new: QmpClient) -> str:
    """Where the guest is once the old VMM does not answer, or not in time, for an error's second half."""
    try:
        deadline = time.monotonic() + CANCEL_S
        while (state := new.execute("query-status")["status"]) not in HOLDING:
            if time.monotonic() > deadline:
                return f"the new VMM (pid {vmm.pid}) waits for it, in run state {state}"
            time.sleep(POLL_S)
    except VmmError:
        if vmm.process.poll() is not None:
            return f"the new VMM has ended: {vmm.last_words()}"
        silent = f"the new VMM (pid {vmm.pid}) does not answer and may hold the guest; continue it"
        return f"{silent}, or end it and the old one has the guest again" if _waits(old) else silent
    return f"the guest is {state} in the new VMM (pid {vmm.pid})"


def _waits(old: QmpClient) -> bool:
    """Whether the old VMM still waits to see who has the guest, and can have it back."""
    try:
        return old.execute("query-migrate").get("status", "none") not in ENDED
    except VmmError:
        return False


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
    interruptible()
    path = monitor_path(arguments.name, arguments.qmp).absolute()
    with QmpClient.connect(path) as old:
        name = arguments.name or _name(old)
        log = RunDir(name).log if name else path.with_name(f"{path.name}.log")
        try:
            handed = hand_over(
                old,
                path,
                name=name,
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


def _name(old: QmpClient) -> str | None:
    """The name under which users find this VMM; None where there is none."""
    name: str | None = (old.execute("query-name") or {}).get("name")
    return name if name is not None and RunDir(name).served_by() == old.pid else None


def _text(report: dict[str, Any]) -> list[str]:
    from vmm.report.table import milliseconds, table

    rows = [[phase, milliseconds(us)] for phase, us in report["phases-us"].items()]
    pids = report["pids"]
    return [
        f"handed over by {report['method']} from pid {pids['old']} to pid {pids['new']}",
        f"the guest was paused for {milliseconds(report['pause-us'])}",
        *table(("phase", "time"), rows),
    ]
