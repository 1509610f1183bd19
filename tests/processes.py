"""Child processes of tests: they die with pytest, their output is kept, and none of them outlives a test.

The fixture `spawn` of conftest.py hands these out; `Spawn` and `Spawned` are here for annotations.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.patience import at_most

ROOT = Path(__file__).resolve().parent.parent
RUN_VMM = "import sys; from vmm.cli import main; sys.exit(main())"  # as the console script does
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.01
ENDING_S = 5.0  # from SIGTERM to SIGKILL

# Asks for SIGKILL at the parent's death, then becomes the program. (A preexec_fn would do so too, and is
# unsafe in a process with threads.) The parent may have died before the call: hence getppid.
DIE_WITH_PARENT = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the test that started this process is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def become_subreaper() -> None:
    """Make orphaned grandchildren this process's own, so that one left behind by a test is seen and ended."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def children() -> set[int]:
    """The pids of this process's children, ended and not yet waited for included."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()  # the usual case, and the cheap one
    own = os.getpid()
    return {int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and _parent_of(int(pid)) == own}


def end_adopted(pids: Iterable[int]) -> list[str]:
    """End and reap `pids`, which no Popen owns; describes those that had not ended by themselves."""
    left = []
    for pid in pids:
        deadline = time.monotonic() + at_most(1.0)  # one that is just ending is no leak
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                left.append(f"{pid} ({_command_of(pid)})")
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED)
                break
            time.sleep(POLL_S)
    return left


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None  # it ended meanwhile
    return int(stat.rpartition(")")[2].split()[1])  # proc(5): after the command's name come state and ppid


def _command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


class Spawned:
    """One child process. stdout and stderr go to files that can be read while it runs; stdin is a pipe."""

    def __init__(
        self,
        argv: tuple[str, ...],
        folder: Path,
        env: Mapping[str, str] | None,
        cwd: Path | None,
        pass_fds: tuple[int, ...],
    ) -> None:
        self.argv = argv
        self.stdout_path = folder / "stdout"
        self.stderr_path = folder / "stderr"
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *argv],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=None if env is None else {**os.environ, **env},
                cwd=cwd,
                pass_fds=pass_fds,
            )
        self.pid = self.popen.pid

    @property
    def stdout(self) -> str:
        """All that it has written to stdout so far."""
        return self.stdout_path.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """All that it has written to stderr so far."""
        return self.stderr_path.read_text(errors="replace")

    def write(self, data: bytes) -> None:
        """Write to its stdin."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(data)
        self.popen.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Its exit status, negative for a signal. Raises AssertionError when it has not ended in time."""
        try:
            return self.popen.wait(at_most(timeout_s))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} has not ended in {at_most(timeout_s):g} s{self.output()}") from None

    def expect(self, text: str, timeout_s: float = 20.0, *, stream: str = "stdout") -> str:
        """Wait until `text` stands on its stdout (or stderr); all that stands there, or AssertionError."""
        path = {"stdout": self.stdout_path, "stderr": self.stderr_path}[stream]
        deadline = time.monotonic() + at_most(timeout_s)
        while True:
            ended = self.popen.poll() is not None  # asked before reading, so that its last words count
            written = path.read_text(errors="replace")
            if text in written:
                return written
            if ended or time.monotonic() > deadline:
                why = f"ended with {self.popen.returncode}" if ended else f"ran {at_most(timeout_s):g} s"
                raise AssertionError(f"{self} {why} without {text!r} on {stream}{self.output()}")
            time.sleep(POLL_S)

    def end(self) -> None:
        """End it: close stdin, SIGTERM, SIGKILL after `ENDING_S`. Harmless when it has ended."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(at_most(ENDING_S))
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.close()
        except BrokenPipeError:
            assert self.popen.returncode is not None  # what was buffered for it has nowhere to go

    def output(self) -> str:
        """Both streams, headed, for a failure report."""
        return f"\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"

    def __str__(self) -> str:
        return f"process {self.pid} ({' '.join(self.argv)})"


class Spawn:
    """`spawn("vmm", "run", …)`: starts a process and ends it, at the latest, with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = ROOT  # the `vmm` that is run
        self.spawned: list[Spawned] = []

    def __call__(
        self,
        *argv: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> Spawned:
        """Start `argv`; `env` is added to this process's own.

        Call it from the main thread: the kernel takes the end of the calling *thread* for the parent's death.
        """
        folder = self.folder / str(len(self.spawned))
        folder.mkdir(parents=True)
        process = Spawned(tuple(str(argument) for argument in argv), folder, env, cwd, pass_fds)
        self.spawned.append(process)
        return process

    def vmm(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Spawned:
        """Start `vmm` with these arguments: the code under test, unless `root` says otherwise."""
        env = {"PYTHONPATH": str(self.root), **(env or {})}
        return self(sys.executable, "-P", "-c", RUN_VMM, *arguments, env=env)

    def end_all(self) -> None:
        """End every process, the last one first."""
        for process in reversed(self.spawned):
            process.end()
