"""One thread for each vCPU: it alone enters KVM_RUN for its vCPU and serves the exits; everything else
reaches it as a job.

    jobs:   run -> [pause + kick] -> save -> run            the old VMM, a handover that failed
            load -> run                                     the new VMM
            run -> [leave] -> go on                         a VMM whose vCPUs can run without it

A kick is a signal that is blocked in every thread and let through only while KVM_RUN runs
(KVM_SET_SIGNAL_MASK), so no handler ever runs and a kick that comes early stays pending and ends the next
KVM_RUN at once. A run job ends only between instructions: a pending I/O or MMIO exit is completed first, by
entering once more with `immediate_exit` (KVM API, 5. The kvm_run structure).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from enum import IntEnum
from queue import SimpleQueue
from typing import Protocol

from vmm.bus import Bus
from vmm.errors import GuestCrash, VmmError
from vmm.kvm import Exit, InternalError, SystemEvent, Vcpu, abi
from vmm.machine.journal import Journal
from vmm.machine.posted import PostedWrites

log = logging.getLogger(__name__)

MOMENT_S = 0.0001


class ExitSink(Protocol):
    """What a vCPU thread reports upwards; called on the vCPU's thread, must not block."""

    def guest_reset(self) -> None:
        """The guest asked for a reset (triple fault included where the platform makes it one)."""

    def guest_shutdown(self, reason: str) -> None:
        """The guest ended in an orderly way."""

    def guest_crashed(self, index: int, error: GuestCrash) -> None:
        """The guest cannot go on; the error says why."""

    def thread_failed(self, index: int, error: BaseException) -> None:
        """The thread met an error of the VMM's own."""


class VcpuThread:
    """The thread of one vCPU. `submit` and `pause` may be called from any other thread."""

    def __init__(
        self,
        vcpu: Vcpu,
        pio: Bus,
        mmio: Bus,
        sink: ExitSink,
        may_run: Callable[[], bool],
        journal: Journal | None,
        turn: AbstractContextManager[object],
        posted: PostedWrites | None = None,
    ) -> None:
        """`turn` is held while an exit is served; with a `journal` it must let one vCPU at a time. What has
        been `posted` by then reaches the devices first.
        """
        self.vcpu = vcpu
        self.index = vcpu.index
        self._pio = pio
        self._mmio = mmio
        self._sink = sink
        self._may_run = may_run
        self._journal = journal
        self._turn = turn
        self._posted = posted
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._order = threading.Lock()
        self._wanted = False  # what `_stop` is the opposite of, but for a moment of `run_on`
        self._stop = False
        self._leaving = False
        self._running = False
        self._taken_over = False
        self.stall_ns: int | None = None  # how long an exit had waited when this VMM took the vCPU over
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"vcpu-{vcpu.index}", daemon=True)
        self._handlers: dict[int, Callable[[], None]] = {
            Exit.IO: self._on_io,
            Exit.MMIO: self._on_mmio,
            Exit.HLT: self._on_halt,
            Exit.SHUTDOWN: self._on_triple_fault,
            Exit.SYSTEM_EVENT: self._on_system_event,
            Exit.FAIL_ENTRY: self._on_fail_entry,
            Exit.INTERNAL_ERROR: self._on_internal_error,
            Exit.INTR: self._on_interrupted,
            Exit.IRQ_WINDOW_OPEN: self._on_interrupted,
            Exit.SET_TPR: self._on_interrupted,  # no LAPIC: nothing here waits for a lower CR8
            Exit.IOAPIC_EOI: self._on_interrupted,  # split irqchip: there is no IOAPIC here that would care
        }

    def start(self) -> None:
        """Start the thread; returns once it waits for jobs."""
        self._thread.start()
        self._ready.wait()

    def submit(self, job: Callable[[], None]) -> None:
        """Have the thread do `job` after those that it has already."""
        self._jobs.put(job)

    def resume(self) -> None:
        """Have the thread run the guest until `pause`."""
        with self._order:
            self._stop = self._leaving = False
            self._running = self._wanted = True
        self._jobs.put(self._run)

    def pause(self) -> None:
        """End the run job at the next instruction boundary. Does not wait: `submit` a job to learn when it
        has ended.
        """
        self._leaving = False
        self._want_no_more()
        self.kick()

    def _want_no_more(self) -> None:
        with self._order:
            self._wanted = False
            self._stop = True

    def halt(self) -> None:
        """Stop a vCPU that may run without this process, the exit that it may wait with served. Does not
        wait.
        """
        self._leaving = False
        self._running = True
        self._want_no_more()
        self._jobs.put(self._run)
        self.kick()

    def leave(self) -> None:
        """End the run job without stopping the vCPU; does not wait. `go_on` is a job of its own, after it."""
        self._leaving = True
        self._want_no_more()
        if self._running:
            self.vcpu.leave()

    def kick(self) -> None:
        """Make KVM_RUN return, now or the next time it is entered."""
        if self._running:
            self.vcpu.kick()

    def stop_after_exit(self) -> None:
        """Called on this thread, by what serves an exit: end the run job once the exit is served."""
        self._want_no_more()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.get_ident() == self._thread.ident

    def finish(self, timeout_s: float = 5.0) -> None:
        """End the thread and wait for it. Raises VmmError where it does not end in time."""
        self.pause()
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise VmmError(f"vCPU {self.index}: its thread did not end within {timeout_s} s")

    def _main(self) -> None:
        self.vcpu.bind_thread()
        self._ready.set()
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 -- reported whole
                self._sink.thread_failed(self.index, error)

    def _run(self) -> None:
        self._running = True  # before `_stop` is looked at: who sets that kicks a vCPU that is running
        try:
            self._serve()
        finally:
            self._running = False

    def _serve(self) -> None:
        vcpu, handlers, page, turn = self.vcpu, self._handlers, self.vcpu.run_page, self._turn
        if not self._may_run():
            raise VmmError(f"vCPU {self.index}: refused to enter the guest without the run token")
        if self._taken_over:
            self._taken_over = False
            self.stall_ns = vcpu.waiting_ns
        while not self._stop:
            if vcpu.run():
                with turn:
                    self._drain()
                    handlers.get(page.exit_reason, self._on_unknown)()
        if self._leaving:
            return
        vcpu.immediate_exit = True
        try:
            while vcpu.run():  # completes the exit in progress; what that leads to is served too
                with turn:
                    self._drain()
                    handlers.get(page.exit_reason, self._on_unknown)()
        finally:
            vcpu.immediate_exit = False
        with turn:
            self._drain()

    def _drain(self) -> None:
        if self._posted is not None and self._posted.waiting:
            self._posted.drain()

    def _steps(self, bus: Bus, address: int, size: int, count: int) -> Iterable[int]:
        """Which of the `count` accesses of the exit at hand are still to be made; each is journaled that
        changes a device's state.
        """
        state = None if self._journal is None else bus.state_at(address, size)
        if self._journal is None or state is None:
            return range(count)
        return self._journal.steps(self.vcpu.pending_exit, count, state)

    def settle(self) -> None:
        """On this thread, between two run jobs: enter KVM_RUN and leave it at once. No instruction is
        executed; KVM takes note of the timers that have expired since the last time.
        """
        self.vcpu.kick()
        if self.vcpu.run():
            raise VmmError(f"vCPU {self.index}: KVM_RUN gave an exit where it was only to be left at once")

    def run_on(self) -> None:
        """On this thread, after a run job: run the guest for a moment more, as that job would have."""
        self._stop = False
        end = threading.Timer(MOMENT_S, self._end_moment)
        end.start()
        self._run()
        end.join()
        with self._order:
            self._stop = not self._wanted  # who waited for this thread may have lost patience meanwhile

    def _end_moment(self) -> None:
        self._stop = True
        self.kick()

    def recover(self) -> None:
        """Undo what a VMM that is gone had begun and not ended. Before the first run, the VM being ours."""
        self.vcpu.immediate_exit = False
        self._taken_over = True
        if self._journal is not None and self._journal.recover(self.vcpu.pending_exit):
            log.info("vCPU %d: an exit that was being served will be served again", self.index)

    def begin_anew(self) -> None:
        """The VM is a new one, and so are the numbers of its exits. Before the first run."""
        if self._journal is not None:
            self._journal.clear()

    def _on_io(self) -> None:
        io = self.vcpu.run_page.io
        size, port, pio = io.size, io.port, self._pio
        data = self.vcpu.io_data(io.data_offset, size * io.count)
        if io.direction == abi.KVM_EXIT_IO_OUT:
            for step in self._steps(pio, port, size, io.count):
                pio.write(port, bytes(data[step * size : step * size + size]))
        else:
            for step in self._steps(pio, port, size, io.count):
                data[step * size : step * size + size] = pio.read(port, size)

    def _on_mmio(self) -> None:
        mmio = self.vcpu.run_page.mmio
        length, address = mmio.len, mmio.phys_addr
        for _ in self._steps(self._mmio, address, length, 1):
            if mmio.is_write:
                self._mmio.write(address, bytes(mmio.data[:length]))
            else:
                mmio.data[:length] = self._mmio.read(address, length)

    def _on_halt(self) -> None:
        # Only without an in-kernel LAPIC does HLT reach user space; then nothing can ever wake this vCPU.
        self._stop = True
        self._sink.guest_shutdown("guest-halt")

    def _on_triple_fault(self) -> None:
        self._crash("triple fault (KVM_EXIT_SHUTDOWN)")

    def _on_system_event(self) -> None:
        event = self.vcpu.run_page.system_event
        self._stop = True
        if event.type == SystemEvent.SHUTDOWN:
            self._sink.guest_shutdown("guest-shutdown")
        elif event.type == SystemEvent.RESET:
            self._sink.guest_reset()
        else:
            self._crash(f"system event {event.type} (KVM_EXIT_SYSTEM_EVENT)")

    def _on_fail_entry(self) -> None:
        reason = self.vcpu.run_page.fail_entry.hardware_entry_failure_reason
        self._crash(f"the CPU refused to enter the guest, hardware reason {reason:#x} (KVM_EXIT_FAIL_ENTRY)")

    def _on_internal_error(self) -> None:
        error = self.vcpu.run_page.internal
        data = " ".join(f"{word:#x}" for word in error.data[: min(error.ndata, 16)])
        what = _word(InternalError, error.suberror)
        self._crash(f"KVM internal error: {what} (KVM_EXIT_INTERNAL_ERROR; data: {data or 'none'})")

    def _on_interrupted(self) -> None:
        """The kernel had nothing to say but that it came back."""

    def _on_unknown(self) -> None:
        reason = self.vcpu.run_page.exit_reason
        self._crash(f"exit reason {reason} ({_word(Exit, reason)}) that this VMM does not serve")

    def _crash(self, why: str) -> None:
        self._stop = True
        self._sink.guest_crashed(self.index, GuestCrash(f"vCPU {self.index}: {why}"))


def _word(kind: type[IntEnum], value: int) -> str:
    """The enum's name for `value` in words, or the number where it has none."""
    return kind(value).name.lower().replace("_", " ") if value in kind.__members__.values() else str(value)
