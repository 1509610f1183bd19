"""A machine of the product that is handed over to another one in the same process, by the calls that a
handover makes and in their order. No sockets: a test can look into both machines, and reach into the state
between them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from tests.patience import at_most
from vmm.devices.chardev import Reactor
from vmm.errors import GuestCrash, HandoverError, VmmError
from vmm.fds import FdStore
from vmm.kvm import DirectPort
from vmm.machine.config import MachineConfig
from vmm.machine.hypervisor import Origin
from vmm.machine.machine import Machine
from vmm.machine.runstate import RunState
from vmm.report.results import RESULTS_SIZE, GuestState, Results, parse_results
from vmm.trace import Tracer

RESULTS_GPA = 0x200000  # firmware/include/results.h
POLL_S = 0.005
Step = Callable[[Machine], object]


class NoReactor:
    """An event loop for machines whose serial line is nobody's."""

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> None:
        raise AssertionError("a null character device has nothing to read")

    def remove_reader(self, fd: int, /) -> None:
        raise AssertionError("a null character device has nothing to read")

    def add_writer(self, fd: int, callback: Callable[[], object], /) -> None:
        raise AssertionError("a null character device never blocks")

    def remove_writer(self, fd: int, /) -> None:
        raise AssertionError("a null character device never blocks")

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> None:
        """It would follow what is to be watched, and there is nothing."""


class Rig:
    """One guest, in the machine that has it now."""

    def __init__(self, *, paused: bool = False, reactor: Reactor | None = None, **config: Any) -> None:
        """A guest as `MachineConfig` describes it, running or `paused`."""
        self._reactor = reactor or NoReactor()
        self.config = MachineConfig(**{"serial": "null", "memory": 64 << 20, **config}).check()
        self.ends: SimpleQueue[str | BaseException] = SimpleQueue()
        self.machine = self._build(FdStore(), Origin.NEW)
        self.machine.start(paused=paused)

    def _build(self, fds: FdStore, origin: Origin) -> Machine:
        try:
            return Machine(
                self.config,
                fds,
                port=DirectPort(),
                origin=origin,
                tracer=Tracer(origin.value),
                reactor=self._reactor,
                listener=self,
                may_run=lambda: True,
            )
        except BaseException:
            fds.close()
            raise

    # --- MachineListener ---

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """Nobody needs to know."""

    def guest_exited(self, status: int, reason: str) -> None:
        self.ends.put(f"{reason} with status {status}")

    def guest_crashed(self, error: GuestCrash) -> None:
        self.ends.put(error)

    def reset_requested(self) -> None:
        self.ends.put("reset")

    def failed(self, error: BaseException) -> None:
        self.ends.put(error)

    # --- the handover ---

    def hand_over(
        self,
        *,
        offered: Step | None = None,
        built: Step | None = None,
        saved: Step | None = None,
        loaded: Step | None = None,
    ) -> None:
        """To a new machine. `offered` and `saved` are given the old machine at that step, `built` and
        `loaded` the new one. What fails is rolled back, and raised.
        """
        old = self.machine
        old.hold_fds()
        new: Machine | None = None
        try:
            _do(offered, old)
            new = self._build(_copies(old.fds), Origin.REBUILT)
            _do(built, new)
            was_running = old.quiesce(keep_running=False)
        except BaseException as error:
            old.release_fds()
            if new is not None:
                _close(new)
            if isinstance(error, HandoverError):
                self.check_alive()
            raise
        try:
            _do(saved, old)
            new.load()
            _do(loaded, new)
        except BaseException:
            old.roll_back()
            _close(new)
            raise
        new.resume(running=was_running)
        self.machine = new
        old.gave_up()
        _close(old)

    # --- the guest ---

    def results(self) -> Results:
        """What the guest says of itself now."""
        return parse_results(self.machine.memory.read(RESULTS_GPA, RESULTS_SIZE))

    def wait_for(self, what: Callable[[Results], bool], timeout_s: float = 20.0) -> Results:
        """The guest's results, once they are so. AssertionError where it ends or does not get there."""
        deadline = time.monotonic() + at_most(timeout_s)
        while time.monotonic() < deadline:
            self.check_alive()
            if self.machine.memory.read(RESULTS_GPA, 4) != bytes(4):
                results = self.results()
                if results.state is GuestState.RUNNING and what(results):
                    return results
            time.sleep(POLL_S)
        raise AssertionError(f"not within {at_most(timeout_s):g} s: {self.results()}")

    def check_alive(self) -> None:
        """AssertionError where the guest has ended."""
        if not self.ends.empty():
            raise AssertionError(f"the guest ended: {self.ends.get()}; {self.violation()}")

    def go_on(self, turns: int = 300, timeout_s: float = 20.0) -> Results:
        """Let every vCPU take so many turns more."""
        before = [cpu.turns for cpu in self.results().cpus]
        return self.wait_for(
            lambda results: all(
                cpu.turns >= turns + had for cpu, had in zip(results.cpus, before, strict=True)
            ),
            timeout_s,
        )

    def end(self, timeout_s: float = 20.0) -> str | BaseException | None:
        """How the guest ends, None where it does not."""
        try:
            return self.ends.get(timeout=at_most(timeout_s))
        except Empty:
            return None

    def violation(self) -> str:
        """The check that found something, and what; empty where none did."""
        results = self.results()
        if results.violation is None:
            return ""
        names = {check.id: check.name for check in results.checks}
        found = results.violation
        return (
            f"{names[found.check]} (vCPU {found.cpu}): expected {found.expected:#x}, seen {found.seen:#x}, "
            f"where {found.where:#x}"
        )

    def close(self) -> None:
        _close(self.machine)


def _do(step: Step | None, machine: Machine) -> None:
    if step is not None:
        step(machine)


def _copies(fds: FdStore) -> FdStore:
    copies = FdStore()
    for name, index, fd in fds.items():
        copies.add(name, index, os.dup(fd))
    return copies


def _close(machine: Machine) -> None:
    machine.close(for_good=True)
    machine.memory.close()
    machine.fds.close()


@contextmanager
def rig(**config: Any) -> Iterator[Rig]:
    """A guest that ends with the context, and must have run in good order until then."""
    one = Rig(**config)
    try:
        yield one
    finally:
        one.close()


__all__ = ["Rig", "VmmError", "rig"]
