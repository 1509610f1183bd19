"""A guest on a machine in the test's own process: a test can stop it and change what it must not lose."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from vmm.boot.image import find_image, load_image
from vmm.errors import GuestCrash
from vmm.fds import FdStore
from vmm.kvm import Vcpu
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine
from vmm.machine.runstate import RunState
from vmm.memory import layout
from vmm.report.results import GuestState, Results, parse_results
from vmm.trace import Tracer

POLL_S = 0.02


class RunningGuest:
    """The machine and what it told its listener: an exit status, or an error."""

    def __init__(self, config: MachineConfig, output: Path) -> None:
        self.output = output
        self._ended: SimpleQueue[int | BaseException] = SimpleQueue()
        self._fds = FdStore()
        self._loop = asyncio.new_event_loop()
        self._results = load_image(find_image(config.kernel or ""), ram=layout(config.memory)).results
        self.machine = Machine(
            config,
            self._fds,
            received=False,
            tracer=Tracer("test"),
            reactor=self._loop,
            listener=self,
            may_run=lambda: True,
        )

    # --- MachineListener ---

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        assert old is not new

    def guest_exited(self, status: int, reason: str) -> None:
        self._ended.put(status)

    def guest_crashed(self, error: GuestCrash) -> None:
        self._ended.put(error)

    def reset_requested(self) -> None:
        self._ended.put(AssertionError("the guest asked for a reset"))

    def failed(self, error: BaseException) -> None:
        self._ended.put(error)

    # --- what tests call ---

    @property
    def said(self) -> str:
        """All that came out of COM1."""
        return self.output.read_text(errors="replace")

    def results(self) -> Results:
        """The results area, as the host reads it at this moment."""
        assert self._results is not None
        return parse_results(self.machine.memory.read(*self._results))

    def vcpu(self, index: int) -> Vcpu:
        """A vCPU, whose state may be changed in `stopped`."""
        return self.machine.threads[index].vcpu

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The guest paused, and then let go on."""
        self.machine.stop()
        yield
        self.machine.cont()

    def wait_for(self, what: Callable[[Results], bool], timeout_s: float = 20.0) -> Results:
        """Let it run until its results are so; AssertionError if it ends before or the time is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self._ended.empty():
                raise AssertionError(f"the guest ended: {self._ended.get()}\n{self.said}")
            if self.machine.memory.read(self._results[0], 4) != bytes(4):
                results = self.results()
                if results.state is not GuestState.STARTING and what(results):
                    return results
            time.sleep(POLL_S)
        raise AssertionError(f"not within {timeout_s} s\n{self.said}")

    def wait_for_more(self, check: str, more: int = 3, timeout_s: float = 20.0) -> Results:
        """Let it run until that check has had `more` turns on each vCPU that has it."""
        before = self.wait_for(lambda results: check in {c.name for c in results.checks}, timeout_s)
        number = next(c.id for c in before.checks if c.name == check)
        had = {cpu.apic_id: cpu.counts[number] for cpu in before.cpus if cpu.counts[number]}
        return self.wait_for(
            lambda results: all(
                results.cpus[index].counts[number] >= count + more for index, count in (had or {0: 0}).items()
            ),
            timeout_s,
        )

    def status_after(self, change: Callable[[], None], timeout_s: float = 20.0) -> int:
        """Make that change while the guest is stopped, let it go on, and wait for its end.

        Where it stops just between reading and writing what is changed, the change is lost: then once more.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self.stopped():
                change()
            try:
                return self.exit_status(timeout_s=1.0)
            except TimeoutError:
                continue
        raise AssertionError(f"nothing noticed within {timeout_s} s\n{self.said}")

    def exit_status(self, timeout_s: float = 20.0) -> int:
        """Wait for its end: what the process would end with. Raises TimeoutError if it does not come."""
        try:
            ended = self._ended.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f"still running after {timeout_s} s\n{self.said}") from None
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def close(self) -> None:
        """End whatever is left of it."""
        self.machine.close()
        self.machine.memory.close()
        self.machine.arena.close()
        self._fds.close()
        self._loop.close()
        del self.machine  # a failed test's traceback keeps this object, and must not keep what it maps


@contextmanager
def running(
    folder: Path, kernel: str, append: str = "", **machine: int | bool | str
) -> Iterator[RunningGuest]:
    """A guest that runs; `machine` is what else its MachineConfig says."""
    output = folder / "com1"
    values = {"memory": 64 << 20, "serial": f"file:{output}", **machine}
    guest = RunningGuest(MachineConfig(kernel=kernel, append=append, **values), output)
    try:
        guest.machine.start()
        yield guest
    finally:
        guest.close()
