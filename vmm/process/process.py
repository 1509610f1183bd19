"""The process itself: how it starts, what ends it, and which exit status it ends with."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack

from vmm.errors import GuestCrash, HandoverError, PeerError, VmmError
from vmm.machine.machine import Machine
from vmm.machine.runstate import RunState
from vmm.process.attaching import attach
from vmm.process.guest import Guest, keeper_ended
from vmm.process.loop import Loop
from vmm.process.migration import Migration
from vmm.process.monitor import Monitor
from vmm.process.new_side import NewSide
from vmm.process.old_side import OldSide
from vmm.process.options import Options
from vmm.qmp.commands import COMMANDS
from vmm.qmp.server import QmpServer
from vmm.sandbox import Mode, confine, limit_resources
from vmm.trace import Tracer

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005  # how long a thread that computes may keep the interpreter from one that wakes up


class VmmProcess:
    """`run` returns its exit status. It is the listener of its machine, which calls on any thread."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._loop = loop = Loop()
        tracer = Tracer("new" if options.incoming else "old")
        self._guest = guest = Guest(options, loop, tracer, self, self._crashed)
        monitor = Monitor(options, guest, self._on_quit, self._on_reset)
        self._server = server = QmpServer(loop.asyncio, monitor, COMMANDS)
        self._migration = monitor.migration = migration = Migration(loop, server)
        parts = guest, migration, loop, server, tracer, self.failed
        self._old_side = monitor.old_side = OldSide(*parts, self._leave_guest)
        self._new_side = NewSide(*parts, options)

    # --- life ---

    def run(self) -> int:
        """Run the process to its end. Raises what start-up raises; afterwards every failure is an exit status
        and a log line.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.asyncio.add_signal_handler(number, self._on_signal, number)
        if self._options.sandbox is not Mode.OFF:
            limit_resources()
        try:
            for path in self._options.qmp_paths:
                self._server.listen_unix(path)
            if self._options.attach:
                self._confine()
                attach(self._guest, self._options.attach, self._migration.timeouts.commit_s)
            elif self._options.incoming is None:
                self._guest.start(self._confine)
            else:
                self._new_side.prepare()
                self._confine()
                self._new_side.await_guest()
            return self._loop.run()
        finally:
            self._close()

    def _confine(self) -> None:
        """Give up what is not needed from here on: nothing of a guest's or a peer's is read before this."""
        report = confine(self._options.sandbox, self._options.all_grants())
        for missing in report.missing:
            log.warning("sandbox: %s", missing)
        if report.done:
            log.info("sandbox: %s", ", ".join(report.done))

    def _close(self) -> None:
        with ExitStack() as rest:  # the last one first, and each whatever becomes of the others
            rest.callback(self._guest.give_up)
            rest.callback(self._loop.close)
            rest.callback(self._server.close)
            rest.callback(self._new_side.close)
            rest.callback(self._guest.close)
            rest.callback(self._migration.join)
            self._old_side.cancel("the VMM is ending")
            self._new_side.cancel("the VMM is ending")

    # --- MachineListener: any thread ---

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """STOP and RESUME, as QEMU has them."""
        if new is RunState.RUNNING:
            self._migration.tell("RESUME")
        elif old is RunState.RUNNING and new in (RunState.PAUSED, RunState.FINISH_MIGRATE):
            self._migration.tell("STOP")

    def guest_exited(self, status: int, reason: str) -> None:
        """The guest ended by itself."""
        self._loop.post(self._ended, status, reason)

    def guest_crashed(self, error: GuestCrash) -> None:
        """The guest cannot go on."""
        self._loop.post(self._crashed, error)

    def reset_requested(self) -> None:
        """The guest asked for a reset."""
        self._loop.post(self._on_guest_reset)

    def failed(self, error: BaseException) -> None:
        """One of our own threads failed: nothing can be promised any more."""
        self._loop.post(self._on_failure, error)

    # --- what ends it: the loop's thread ---

    def _shut_down(self, status: int, reason: str, *, guest: bool) -> None:
        if not self._loop.ending:
            self._server.emit("SHUTDOWN", {"guest": guest, "reason": reason})
            self._loop.end(status)

    def _on_signal(self, number: int) -> None:
        log.info("%s: ending the guest", signal.Signals(number).name)
        self._shut_down(0, "host-signal", guest=False)

    def _on_quit(self) -> None:
        self._shut_down(0, "host-qmp-quit", guest=False)

    def _ended(self, status: int, reason: str) -> None:
        self._settle(RunState.SHUTDOWN)
        self._shut_down(status, reason, guest=True)

    def _crashed(self, error: BaseException) -> None:
        log.error("%s", str(error) or repr(error))
        self._settle(RunState.INTERNAL_ERROR)
        status = error.exit_code if isinstance(error, VmmError) else VmmError.exit_code
        self._shut_down(status, "guest-panic", guest=True)

    def _settle(self, state: RunState) -> None:
        if self._guest.machine is not None:
            self._guest.machine.settle(state)

    def _on_failure(self, error: BaseException) -> None:
        if self._loop.ending or not self._guest.lives_without_us:
            self._crashed(error)
        elif self._guest.has_ended(within_s=1.0 if isinstance(error, PeerError) else 0.0):
            self._crashed(keeper_ended())
        else:
            self._leave_guest(error, VmmError.exit_code)

    def _leave_guest(self, why: object, status: int) -> None:
        """End this process, but not the guest, which lives on where the next VMM finds it."""
        log.error("%s; the guest lives on in its keeper, see 'vmm attach'", why)
        self._guest.let_go()
        self._shut_down(status, "host-error", guest=False)

    # --- resets: the loop's thread ---

    def _on_guest_reset(self) -> None:
        self._reset(Machine.reset_if_due, guest=True)

    def _on_reset(self) -> None:
        self._reset(Machine.reset, guest=False)

    def _reset(self, reset: Callable[[Machine], bool], *, guest: bool) -> None:
        assert self._guest.machine is not None
        try:
            done = reset(self._guest.machine)
        except HandoverError:  # it is not ours to reset: nothing has happened
            raise
        except Exception as error:  # noqa: BLE001 -- whatever it was: half a reset is no guest
            self._crashed(error)
            return
        if done:
            reason = "guest-reset" if guest else "host-qmp-system-reset"
            self._migration.tell("RESET", {"guest": guest, "reason": reason})
