"""The old side of a handover: the monitor asks for it, a thread carries it out, and the guest is let go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.cpr import outgoing
from vmm.cpr.live import LiveOutgoing, run
from vmm.cpr.report import Report
from vmm.errors import HandoverError
from vmm.machine.config import encode
from vmm.machine.machine import Machine
from vmm.machine.runstate import RunState
from vmm.process.faults import faulty
from vmm.process.side import Side
from vmm.qmp.backend import QmpError
from vmm.qmp.moving import LeavingClients
from vmm.qmp.schema import MigrationMode, UnixSocket

log = logging.getLogger(__name__)


class _View:
    """The machine as an outgoing handover sees it."""

    def __init__(self, machine: Machine, clients: LeavingClients) -> None:
        self._machine = machine
        self._clients = clients
        self.hold_fds = machine.hold_fds
        self.release_fds = machine.release_fds
        self.quiesce = machine.quiesce
        self.roll_back = machine.roll_back
        self.gave_up = machine.gave_up

    def fd_table(self) -> list[tuple[str, int, int]]:
        return [*self._machine.fd_table(offer=True), *self._clients.rows()]

    def runs_alone(self) -> bool:
        return self._machine.hypervisor.port.outlives

    def describe(self) -> bytes:
        return encode(self._machine.config)


@dataclass
class OldSide(Side):
    """Hands the guest on, whenever it is asked to. `leave` ends this process, and not the guest."""

    leave: Callable[[object, int], None]
    _world: LiveOutgoing | None = field(default=None, init=False)

    def migrate(self, machine: Machine, mode: MigrationMode, main: UnixSocket, cpr: UnixSocket) -> None:
        """QMP `migrate`: check, connect, and leave the rest to a thread. The mode was decided with the
        channels, once.
        """
        if self.migration.under_way:
            raise QmpError("There's a migration process in progress")
        if machine.run_state is RunState.POSTMIGRATE:
            raise QmpError("Can't migrate the vm that was paused due to previous migration")
        if machine.run_state not in (RunState.RUNNING, RunState.PAUSED):
            raise QmpError(f"the guest cannot be handed over in run state {machine.run_state.value}")
        assert self.guest.token is not None
        self.migration.outcome = report = Report(mode=mode.value)
        clients = LeavingClients(self.monitor)
        self._world = world = LiveOutgoing(
            _View(machine, clients),
            self.guest.token,
            cpr_path=cpr.path,
            main_path=main.path,
            timeouts=self.migration.timeouts,
            tracer=self.tracer,
            report=report,
            on_phase=self._on_phase,
            farewell=lambda: self.loop.ask(lambda: self._let_go(clients)),
        )
        self.tracer.clear()
        try:
            world.connect_cpr()
        except HandoverError as error:
            world.close()
            clients.close()
            self.migration.status, self.migration.error = "failed", str(error)
            raise QmpError(str(error)) from error
        self.migration.set_status("setup", None)
        self.migration.carry(lambda: self._carry_out(world, clients))

    def cancel(self, why: str) -> None:
        """Give up a handover whose commit has not begun, if there is one."""
        if self._world is not None and self.migration.under_way:
            self._world.cancel.set(why)

    def _let_go(self, clients: LeavingClients) -> list[tuple[int, bytes]]:
        """The clients that move hear what happened here, and no more."""
        self.migration.release_events()
        self.monitor.send_events()
        return clients.leave()

    def _on_phase(self, phase: outgoing.Phase, error: str | None) -> None:
        assert self.guest.machine is not None
        if phase is outgoing.Phase.OFFERED:
            self.guest.machine.offered()
        elif phase is outgoing.Phase.COMMITTED:
            self.guest.machine.let_go()
        self.migration.set_status(outgoing.STATUS[phase], error)

    def _carry_out(self, world: LiveOutgoing, clients: LeavingClients) -> None:
        try:
            phase = run(outgoing.outgoing(faulty(world)))
        except BaseException as error:
            self.failed(error)
            raise
        finally:
            world.close()
            clients.close()
            self.migration.release_events()
        why = self.migration.error
        if phase in (outgoing.Phase.COMPLETED, outgoing.Phase.LOST):
            self.guest.let_go()
            self.guest.moved_out = world.report.method == "rebuild"
            if phase is outgoing.Phase.LOST and self._lives_on():
                self.loop.post(self.leave, why, HandoverError.exit_code)
        log.log(
            logging.INFO if phase is outgoing.Phase.COMPLETED else logging.WARNING,
            "handover %s%s",
            phase.value,
            f": {why}" if why else "",
        )

    def _lives_on(self) -> bool:
        """Whether the guest, which was taken from us, lives in a keeper now: the one it was in or another."""
        assert self.guest.machine is not None
        return bool(self.guest.machine.state.home)
