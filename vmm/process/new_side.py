"""The new side of a handover: wait for the old VMM, build the machine from what it sends, take the guest."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from vmm.cpr import incoming
from vmm.cpr.live import Choice, IncomingMachine, LiveIncoming, refusal, run
from vmm.cpr.token import RunToken
from vmm.errors import HandoverError, PeerError, VmmError
from vmm.fds import FdStore
from vmm.machine.config import decode, differences
from vmm.machine.hypervisor import Origin
from vmm.machine.machine import Machine
from vmm.machine.ports import adopt_from_keeper, direct_port, has_keeper, retire_keeper, take_keeper
from vmm.machine.probe import OLD_VM_FDS, WORKS, drop_old_vm, probe_received_vm
from vmm.memory.guest import GUEST_MEMFD
from vmm.process.checks import check_complete, check_keepers_fds, refuse_surplus, surplus
from vmm.process.faults import faulty
from vmm.process.options import Options
from vmm.process.side import Side
from vmm.qmp.moving import ArrivingClients

log = logging.getLogger(__name__)


class _View:
    """The machine as an incoming handover sees it; `held` says that it is to stay paused on arrival,
    `resumed` hears that it is served, and what it arrived by: whether it ran, and what `held` said.
    """

    def __init__(
        self, machine: Machine, held: Callable[[], bool], resumed: Callable[[bool, bool], None]
    ) -> None:
        self._machine = machine
        self._held = held
        self._resumed = resumed
        self.load = machine.load

    def resume(self, *, running: bool) -> None:
        held = self._held()
        self._machine.resume(running=running and not held)
        self._resumed(running, held)


@dataclass
class NewSide(Side):
    """Receives a guest, once."""

    options: Options
    _world: LiveIncoming | None = field(default=None, init=False)
    _arriving: ArrivingClients | None = field(default=None, init=False)
    _retired: socket.socket | None = field(default=None, init=False)  # to the keeper that the guest has left

    def prepare(self) -> None:
        """Start what the guest may need and a confined process cannot start."""
        if self.options.keeper and self.options.method != "adopt":
            self.guest.prepare_keeper()

    def await_guest(self) -> None:
        """Listen, and leave the rest to a thread."""
        assert self.options.incoming is not None
        self._world = world = LiveIncoming(
            cpr_path=self.options.incoming.cpr_path,
            main_path=self.options.incoming.main_path,
            build=self._build,
            timeouts=lambda: self.migration.timeouts,
            tracer=self.tracer,
            on_phase=self._on_phase,
        )
        self.guest.fds = world.fds
        self.migration.carry(lambda: self._carry_in(world))

    def cancel(self, why: str) -> None:
        """Give up, unless the guest is ours already: then it is as good as over."""
        if self._world is not None and self._world.phase is not incoming.Phase.TAKEN:
            self._world.cancel.set(why)

    def close(self) -> None:
        """Leave the keeper alone that the guest was in."""
        if self._retired is not None:
            self._retired.close()
            self._retired = None

    # --- the carrying thread ---

    def _carry_in(self, world: LiveIncoming) -> None:
        try:
            phase = run(incoming.incoming(faulty(world)))
        except BaseException as error:
            self.failed(error)
            raise
        finally:
            world.close()
        self.loop.post(self._received if phase is incoming.Phase.COMPLETED else self._not_received)

    def _on_phase(self, phase: incoming.Phase, error: str | None) -> None:
        if phase is incoming.Phase.TAKEN:
            self.guest.take()
            self._set_orphan_timeout()
        self.migration.set_status(incoming.STATUS[phase], error)

    def _set_orphan_timeout(self) -> None:
        """What it was before holds on, where no other is given."""
        machine = self.guest.machine
        assert machine is not None
        if self.options.orphan_timeout_s:
            machine.state.orphan_ms = self.options.orphan_ms

    def _build(self, described: bytes, fds: FdStore, token: RunToken) -> tuple[IncomingMachine, Choice]:
        config = decode(described, "the old VMM's machine")
        differing = differences(self.options.given, config)
        if differing:
            raise refusal(differing)
        check_complete(config, fds)
        self._arriving = ArrivingClients(fds)
        choice = self._choose(fds)
        if choice.method == "rebuild" and config.memory_backend == GUEST_MEMFD:
            raise HandoverError(
                f"rebuild ({choice.why}) cannot be: the guest's memory is guest_memfd, which is bound to its "
                "VM, and no other VM can have it; adopt a VM that has a keeper"
            )
        guest = self.guest
        guest.token = token
        if choice.method == "rebuild":
            self._retired = take_keeper(fds)
            drop_old_vm(fds)
            machine = guest.make(config, guest.new_port(), Origin.REBUILT)
        elif choice.probe == WORKS:
            machine = guest.make(config, direct_port(), Origin.ADOPTED)
        else:
            guest.end_spare()
            check_keepers_fds(config, fds)
            port = adopt_from_keeper(fds, findable=config.name is not None)
            machine = guest.make(config, port, Origin.ADOPTED)
        unused = OLD_VM_FDS if choice.probe == WORKS else frozenset()  # a keeper's, which is not needed then
        refuse_surplus([row for row in surplus(fds) if row[0] not in unused])
        return _View(machine, lambda: guest.held, partial(self.loop.post, self._arrived)), choice

    def _choose(self, fds: FdStore) -> Choice:
        """Adopt or rebuild: by what the kernel says, what there is, and what was asked for."""
        probe = probe_received_vm(fds)
        received = fds.find("vm") is not None
        wanted = self.options.method
        kept = has_keeper(fds)
        if wanted == "rebuild":
            return Choice("rebuild", "asked for", received, probe)
        if probe == WORKS:
            return Choice("adopt", "the kernel lets this process drive the VM", received, probe)
        if kept:
            return Choice("adopt", f"the kernel says {probe}; the keeper drives the VM", received, probe)
        if wanted == "adopt":
            raise HandoverError(
                f"adopt was asked for, but the kernel says {probe} and the VM has no keeper; "
                "start the guest with a keeper, or use rebuild"
            )
        return Choice("rebuild", f"the kernel says {probe}, and there is no keeper", received, probe)

    # --- the loop's thread ---

    def _arrived(self, ran: bool, held: bool) -> None:
        """It is here; what the monitor was told of it meanwhile is done now."""
        self.guest.own()
        machine = self.guest.machine
        assert machine is not None
        if ran and held != self.guest.held and not self.loop.ending:
            try:
                machine.stop() if self.guest.held else machine.cont()
            except VmmError as error:
                log.warning("%s: %s", "stop" if self.guest.held else "cont", error)

    def _received(self) -> None:
        if self.loop.ending:  # the guest has ended already
            return
        self.tracer.role = "old"
        assert self._arriving is not None
        assert self._world is not None
        self._arriving.arrive(self.monitor, self._world.clients)
        self.migration.release_events()
        if self._retired is not None:
            retired, self._retired = self._retired, None
            try:
                retire_keeper(retired)
            except PeerError as error:
                log.warning("the keeper that the guest was in: %s", error)
        elif self.options.orphan_timeout_s:
            self._tell_keeper()
        name = self.guest.machine.config.name if self.guest.machine else None
        if name is not None and "name" not in self.options.given:
            log.warning("the guest is named %r; no verb finds it here, without --name %s", name, name)
        if self.migration.error is None:
            log.info("the guest runs here")
        else:
            log.warning("%s", self.migration.error)

    def _tell_keeper(self) -> None:
        assert self.guest.machine is not None
        try:
            self.guest.machine.live_on()
        except PeerError as error:
            log.warning("the orphan timeout: %s", error)

    def _not_received(self) -> None:
        self.migration.release_events()
        log.error("no guest was taken over: %s", self.migration.error)
        self.loop.end(HandoverError.exit_code)
