"""`vmm run --restart always`: a parent that sees to it that the guest always has a VMM, and does nothing
else.

It looks at what is there and not at what it did: while a keeper has the VM and no VMM serves it, it starts
one. So a handover to a VMM that somebody else started, or a crash of that one, is no special case.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import subprocess
import time
from collections import deque

from vmm.cli.launch import command, environment
from vmm.cli.rundir import RunDir
from vmm.errors import HandoverError, PeerError
from vmm.machine.ports import end_keeper
from vmm.qmp.client import QmpClient

log = logging.getLogger(__name__)

LOOK_S = 0.05  # between two looks at what is just ending or cannot be waited for
WAIT_S = 1.0  # between two looks at who serves the guest
ENDING_S = 30.0  # for a guest that is told to end, while its VMM or its keeper does not answer
BACK_OFF_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MOST_RESTARTS, WINDOW_S = 10, 60.0  # the waits before these ten are 24 s: the rest is for VMMs to start in


class BackOff:
    """How long to wait before a restart, by how many there were lately."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=MOST_RESTARTS)

    def before_restart(self, now: float) -> float | None:
        """Seconds to wait; None where there were too many restarts before `now`, a moment in seconds."""
        recent = sum(1 for start in self._starts if start > now - WINDOW_S)
        if recent >= MOST_RESTARTS:
            return None
        wait = BACK_OFF_S[min(recent, len(BACK_OFF_S) - 1)]
        self._starts.append(now + wait)
        return wait


def attach_options(arguments: list[str]) -> list[str]:
    """What of the arguments of `vmm run` holds for the VMMs that come after it as well."""
    from vmm.cli.run import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = parser.parse_intermixed_args(arguments)
    sandbox = [] if given.sandbox is None else [f"--sandbox={given.sandbox}"]
    return [*(f"--qmp={where}" for where in given.qmp), *sandbox, *["-v"] * given.verbose]


class Supervisor:
    """One VM's supervisor."""

    def __init__(self, directory: RunDir) -> None:
        self._directory = directory
        self._child: subprocess.Popen[bytes] | None = None
        self._back_off = BackOff()
        self._told: int | None = None
        self._wake = os.eventfd(0)  # readable once it was told

    def run(self, first: list[str]) -> int:
        """Start `vmm run` with the arguments `first`; see to it until the guest has ended. Its exit
        status.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        status = self._serve(["run", *first])
        while self._directory.kept():
            if self._told is not None:
                self._end_guest()
            elif (pid := self._directory.served_by()) is not None:
                self._wait_ended(pid)
            else:
                log.warning("%s: VMM gone (status %d), guest not", self._directory.name, status)
                self._wait()
                if self._told is None:
                    status = self._serve(["attach", self._directory.name, *attach_options(first)])
        return status

    def _serve(self, arguments: list[str]) -> int:
        self._child = subprocess.Popen([*command(), *arguments], env=environment())
        if self._told is not None:
            self._child.send_signal(self._told)  # it came before there was a child
        status = self._child.wait()
        return status if status >= 0 else 128 - status

    def _wait_ended(self, pid: int) -> None:
        """Wait until somebody else's VMM has ended, or this is told to end. Not for long: it may have given
        the guest to another, and linger.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # it has ended, or cannot be seen from here
            time.sleep(LOOK_S)
            return
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            poller.register(self._wake, select.POLLIN)
            poller.poll(WAIT_S * 1000)
        finally:
            os.close(pidfd)

    def _end_guest(self) -> None:
        """Told to end, though the guest is in a VMM that somebody else has started, or in none. Raises
        PeerError.
        """
        deadline = time.monotonic() + ENDING_S
        while self._directory.kept():
            try:
                if self._directory.lives():
                    with QmpClient.connect(self._directory.qmp) as client:
                        client.execute("quit")
                else:
                    for path in self._directory.keepers():
                        end_keeper(str(path))
            except PeerError as error:  # it may just be ending
                if time.monotonic() > deadline:
                    raise
                log.info("%s: %s; trying again", self._directory.name, error)
            time.sleep(LOOK_S)

    def _wait(self) -> None:
        wait_s = self._back_off.before_restart(time.monotonic())
        if wait_s is None:
            raise HandoverError(
                f"{self._directory.name}: {MOST_RESTARTS} VMMs within {WINDOW_S:g} s did not last; the guest "
                f"waits in its keeper: see the log, then 'vmm attach {self._directory.name}'"
            )
        time.sleep(wait_s)

    def _pass_on(self, number: int, _frame: object) -> None:
        self._told = number
        os.eventfd_write(self._wake, 1)
        if self._child is not None and self._child.poll() is None:
            os.kill(self._child.pid, number)
