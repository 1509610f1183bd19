"""What the monitor asks of this process: `vmm.qmp.backend.Backend`, on the loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vmm.errors import VmmError
from vmm.machine.machine import Machine
from vmm.machine.runstate import RunState
from vmm.process.guest import Guest
from vmm.process.migration import Migration
from vmm.process.old_side import OldSide
from vmm.process.options import Options
from vmm.qmp.backend import QmpError
from vmm.qmp.schema import MigrationMode, UnixSocket

T = TypeVar("T")


class Monitor:
    """The commands, by what they are about: the guest, or its handover. What carries a handover speaks to the
    monitor's clients, and so is made after this and given to it.
    """

    migration: Migration
    old_side: OldSide

    def __init__(
        self, options: Options, guest: Guest, on_quit: Callable[[], None], on_reset: Callable[[], None]
    ) -> None:
        self._options = options
        self._guest = guest
        self._on_quit = on_quit
        self._on_reset = on_reset

    # --- the guest ---

    def status(self) -> tuple[str, bool]:
        """QMP `query-status`."""
        machine = self._guest.machine
        if machine is None:
            return RunState.INMIGRATE.value, False
        return machine.run_state.value, machine.running

    def name(self) -> str | None:
        """QMP `query-name`."""
        config = self._guest.machine.config if self._guest.machine else self._options.config
        return config.name if config else None

    def cpus(self) -> list[tuple[int, int]]:
        """QMP `query-cpus-fast`."""
        machine = self._guest.machine
        return [(thread.index, thread.vcpu.thread_id) for thread in machine.threads] if machine else []

    def memory_size(self) -> int:
        """QMP `query-memory-size-summary`."""
        return self._guest.machine.config.memory if self._guest.machine else 0

    def stop(self) -> None:
        """QMP `stop`."""
        if self._awaits_guest():
            self._guest.held = True
            return
        machine = self._machine()
        if machine.run_state is RunState.FINISH_MIGRATE:
            raise QmpError("the guest is being handed over; wait for it or use migrate_cancel")
        _guarded(machine.stop)

    def cont(self) -> None:
        """QMP `cont`. Refused where the guest is another VMM's: the run token says so."""
        if self._awaits_guest():
            self._guest.held = False
            return
        machine = self._machine()
        if not self._guest.may_run:
            raise QmpError("the guest was handed over and runs in another VMM; this one can only quit")
        _guarded(machine.cont)

    def quit(self) -> None:
        """QMP `quit`."""
        self._on_quit()

    def reset(self) -> None:
        """QMP `system_reset`."""
        _guarded(self._machine().memory.check_mapped)  # the image goes there again
        _guarded(self._on_reset)

    def inject_nmi(self) -> None:
        """QMP `inject-nmi`."""
        _guarded(self._machine().inject_nmi)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """QMP `x-vmm-read-memory`."""
        machine = self._machine()
        return _guarded(lambda: machine.memory.read(gpa, size))

    def guest_clock(self) -> dict[str, Any]:
        """QMP `x-vmm-guest-clock`."""
        return _guarded(self._machine().guest_clock)

    def fds(self) -> list[dict[str, Any]]:
        """QMP `x-vmm-fds`."""
        return [{"name": name, "id": index, "fd": fd} for name, index, fd in self._machine().fd_table()]

    def stats(self) -> dict[str, Any]:
        """QMP `x-vmm-stats`."""
        return self._machine().stats()

    def _machine(self) -> Machine:
        if self._guest.machine is None:
            raise QmpError("Guest is waiting for an incoming migration")
        return self._guest.machine

    def _awaits_guest(self) -> bool:
        """Whether the guest is still on its way; then `stop` and `cont` say how it is to arrive, as in
        QEMU.
        """
        return self._guest.machine is None or self._guest.machine.run_state is RunState.INMIGRATE

    # --- its handover ---

    def migration_parameters(self) -> dict[str, Any]:
        """QMP `query-migrate-parameters`."""
        return self.migration.parameters()

    def set_migration_parameters(self, values: dict[str, Any]) -> None:
        """QMP `migrate-set-parameters`."""
        self.migration.set_parameters(values)

    def migration_capabilities(self) -> dict[str, bool]:
        """QMP `query-migrate-capabilities`."""
        return self.migration.capabilities()

    def set_migration_capabilities(self, values: dict[str, bool]) -> None:
        """QMP `migrate-set-capabilities`."""
        self.migration.set_capabilities(values)

    def migrate(self, mode: MigrationMode, main: UnixSocket, cpr: UnixSocket) -> None:
        """QMP `migrate`."""
        self.old_side.migrate(self._machine(), mode, main, cpr)

    def migrate_cancel(self) -> None:
        """QMP `migrate_cancel`: nothing where no handover is under way or its commit has begun."""
        self.old_side.cancel("cancelled by migrate_cancel")

    def migrate_incoming(self, main: UnixSocket) -> None:
        """QMP `migrate-incoming`, for a VMM started with `-incoming defer`."""
        raise QmpError("The incoming migration has already been started")

    def query_migrate(self) -> dict[str, Any]:
        """QMP `query-migrate`."""
        return self.migration.query()

    def report(self) -> dict[str, Any]:
        """QMP `x-vmm-report`."""
        return self.migration.report()


def _guarded(call: Callable[[], T]) -> T:
    try:
        return call()
    except VmmError as error:
        raise QmpError(str(error)) from error
