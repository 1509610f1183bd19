"""Starts a VMM process of its own: detached from this one's terminal, its log in a file, its monitor waited
for.

The process is this one's child and nothing else of it: it must be able to outlive the command that started
it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmm.errors import (
    ConfigError,
    GuestCrash,
    HandoverError,
    HostError,
    PeerError,
    UsageError,
    VmmError,
)
from vmm.qmp.client import QmpClient

POLL_S = 0.01
ENDING_S = 5.0  # from SIGTERM to SIGKILL
LAST_WORDS_BYTES = 4096
_BY_STATUS: dict[int, type[VmmError]] = {
    kind.exit_code: kind for kind in (UsageError, ConfigError, HostError, GuestCrash, HandoverError)
}


def command(python: str | None = None) -> list[str]:
    """What runs `vmm`: as it is installed now for this interpreter, or for the interpreter `python`."""
    return [python or sys.executable, "-P", "-m", "vmm"]


def environment(python: str | None = None) -> Mapping[str, str]:
    """This process's environment; where `vmm` is run from a source folder, its child finds the same one."""
    here = Path(__file__).resolve().parents[2]
    if python is not None or here == Path(sysconfig.get_path("purelib")).resolve():
        return os.environ
    given = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{given}" if given else str(here)}


class LaunchedVmm:
    """`vmm run ARGUMENTS…`, or another `verb`, started. `monitor` is where it answers QMP."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        monitor: Callable[[int], Path],
        log: Path,
        python: str | None = None,
        stdout: int | None = None,
        verb: str = "run",
    ) -> None:
        """Start it; `monitor` tells the control socket's path from its pid. Its stderr is appended to `log`,
        and so is its stdout where no fd is given for that. Raises HostError where it cannot be started.
        """
        self._log = log
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._log_start = os.fstat(output).st_size
            self.process = subprocess.Popen(
                [*command(python), verb, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=output,
                env=environment(python),
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(f"cannot start {command(python)[0]}: {error.strerror}") from error
        finally:
            os.close(output)
        self.pid = self.process.pid
        self.monitor = monitor(self.pid)

    def connect(self, deadline: float) -> QmpClient:
        """Its monitor, once it answers (`deadline` on time.monotonic). Raises what ended it, or PeerError."""
        while True:
            try:
                return QmpClient.connect(self.monitor, max(deadline - time.monotonic(), POLL_S))
            except PeerError as error:
                if (status := self.process.poll()) is not None:
                    raise self.failure(status) from None
                if time.monotonic() > deadline:
                    raise PeerError(
                        f"the VMM (pid {self.pid}) does not answer in time, see {self._log}: {error}"
                    ) from error
            time.sleep(POLL_S)

    def failure(self, status: int) -> VmmError:
        """The error that its end with `status` stands for, in its own last words."""
        if status == -signal.SIGSYS:
            return VmmError(
                f"the VMM (pid {self.pid}) was ended by its sandbox, for a system call beyond its profile: "
                "the kernel's log names the call (audit type 1326); VMM_SANDBOX=log lets it go on"
            )
        if status < 0:
            return VmmError(
                f"the VMM (pid {self.pid}) was ended by {signal.Signals(-status).name}; see {self._log}"
            )
        kind = _BY_STATUS.get(status, VmmError)
        return kind(
            self.last_words() or f"the VMM (pid {self.pid}) ended with status {status} and said nothing"
        )

    def last_words(self) -> str:
        """The sentence that it ended with, or the last line of its log; empty where it said nothing."""
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        sentences = [line.removeprefix("vmm: ") for line in lines if line.startswith("vmm: ")]
        return (sentences or lines or [""])[-1]

    def wait(self, timeout_s: float) -> int:
        """Its exit status, negative for a signal. Raises PeerError where it does not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise PeerError(f"the VMM (pid {self.pid}) has not ended within {timeout_s:g} s") from None

    def end(self) -> int:
        """End it, gently first; its exit status. Harmless where it has ended."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(ENDING_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()
