"""One VMM process: its event loop, its machine, its monitor and the handover it may be in.

The main thread runs the loop: monitor, console input, signals. vCPU threads run the guest. One more thread
carries a handover while there is one. What those threads have to tell the monitor is posted to the loop;
inside a pause it is kept back until the pause is over, so that nothing competes with the guest for the
processors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from vmm.boot.image import Image
from vmm.cpr import incoming, outgoing
from vmm.cpr.live import Choice, IncomingMachine, LiveIncoming, LiveOutgoing, Timeouts, refusal, run
from vmm.cpr.report import Report
from vmm.cpr.token import RunToken
from vmm.devices.chardev import CharKind, needed_fds, parse_serial
from vmm.errors import GuestCrash, HandoverError, HostError, PeerError, StateError, VmmError
from vmm.fds import FdStore
from vmm.machine.config import MachineConfig, decode, differences, encode, kept_config
from vmm.machine.host import HOST_DEVICES
from vmm.machine.hypervisor import Origin
from vmm.machine.machine import Machine, home_of, open_files
from vmm.machine.ports import (
    Port,
    adopt_from_keeper,
    direct_port,
    end_stale_keeper,
    find_keeper,
    has_keeper,
    retire_keeper,
    start_keeper,
    take_keeper,
)
from vmm.machine.probe import OLD_VM_FDS, WORKS, drop_old_vm, probe_received_vm
from vmm.machine.runstate import RunState
from vmm.memory import layout
from vmm.memory.guest import FD_NAMES, GUEST_MEMFD
from vmm.qmp.backend import QmpError
from vmm.qmp.commands import COMMANDS
from vmm.qmp.moving import ArrivingClients, LeavingClients
from vmm.qmp.schema import MigrationMode, UnixSocket
from vmm.qmp.server import QmpServer
from vmm.sandbox import Access, Grant, Mode, confine, limit_resources
from vmm.state import Arena
from vmm.trace import Tracer

log = logging.getLogger(__name__)

W = TypeVar("W", outgoing.OutgoingWorld, incoming.IncomingWorld)
T = TypeVar("T")

NAP_S = 0.01
LOOP_ANSWER_S = 1.0  # for the loop's thread to begin with something
LOOP_FINISH_S = 5.0  # and to be done with it
PER_VCPU = frozenset({"vcpu", "kvm-go", "kvm-done"})
KEEPERS_FDS = PER_VCPU | {"kvm-slots"}
SWITCH_INTERVAL_S = 0.0005  # how long a thread that computes may keep the interpreter from one that wakes up


def _faulty(world: W) -> W:
    """`world`, with the faults that a test asks for in VMM_FAULT."""
    if "VMM_FAULT" not in os.environ:
        return world
    from vmm.cpr.faults import inject

    return inject(world)


def _check_complete(config: MachineConfig, fds: FdStore) -> None:
    """What did not come with a guest must not be made anew, and empty, or opened by a path that the other VMM
    names. Raises StateError that names it.
    """
    ram = FD_NAMES[config.memory_backend]
    for name in ("state", "fresh", "token", "image"):
        fds.get(name)
    for index in range(len(layout(config.memory))):
        fds.get(ram, index)
    for name, index in needed_fds(parse_serial(config.serial)):
        fds.get(name, index)


def _check_keepers_fds(config: MachineConfig, fds: FdStore) -> None:
    """What a keeper's VM is driven with is there, and no more of it. Raises StateError."""
    wanted = {("kvm-slots", 0), *((name, index) for name in PER_VCPU for index in range(config.cpus))}
    for name, index in sorted(wanted):
        fds.get(name, index)
    came = {(name, index) for name, index, _ in fds.items() if name in KEEPERS_FDS}
    _refuse_surplus(sorted(came - wanted))


def _surplus(fds: FdStore) -> list[tuple[str, int]]:
    """What came, and no part of the machine that is built wants."""
    fds.find("kvm-stats")  # wanted as soon as the monitor is asked which VM it is
    return fds.unasked()


def _refuse_surplus(rows: list[tuple[str, int]]) -> None:
    if rows:
        names = ", ".join(f"{name}/{index}" for name, index in rows)
        raise StateError(f"the fd table has what this machine has no use for: {names}; refused")


@dataclass(frozen=True)
class Incoming:
    """Where a new VMM waits for the old one."""

    cpr_path: str
    main_path: str


@dataclass
class Options:
    """What one VMM process was started with; the machine's own part is `given`."""

    given: Mapping[str, Any] = field(default_factory=dict)
    config: MachineConfig | None = None
    qmp_paths: tuple[str, ...] = ()
    incoming: Incoming | None = None
    method: Literal["auto", "adopt", "rebuild"] = "auto"
    keeper: bool = False
    keeper_path: str | None = None  # where the keeper listens for VMMs that come after a crash
    orphan_timeout_s: float = 0.0
    attach: tuple[str, ...] = ()  # take over from the keeper at one of these paths, whose VMM is gone
    paused: bool = False
    sandbox: Mode = Mode.OFF
    grants: tuple[Grant, ...] = ()  # files, besides what the other options name
    owned: Callable[[], None] = lambda: None  # called once this process runs the machine
    disowned: Callable[[], None] = lambda: None  # called at the end, if it still does


class _OutgoingView:
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


class _IncomingView:
    """The machine as an incoming handover sees it; `held` says that it is to stay paused on arrival,
    `resumed` hears that it is served.
    """

    def __init__(self, machine: Machine, held: Callable[[], bool], resumed: Callable[[], None]) -> None:
        self._machine = machine
        self._held = held
        self._resumed = resumed
        self.load = machine.load

    def resume(self, *, running: bool) -> None:
        self._machine.resume(running=running and not self._held())
        self._resumed()


class VmmProcess:
    """The process. `run` returns its exit status."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._monitor = QmpServer(self._loop, self, COMMANDS)
        self._tracer = Tracer("new" if options.incoming else "old")
        self._fds = FdStore()
        self._token: RunToken | None = None
        self._machine: Machine | None = None
        self._owner = False  # the guest runs here, or is about to
        self._claimed = False  # and who looks for it finds it here
        self._ends_vm = False  # the VM is to end with this process
        self._rebuilt_elsewhere = False  # the guest may have left our VM for another VMM's
        self._retired: socket.socket | None = None  # the keeper of the VM that the guest has left
        self._lifeline: int | None = None  # readable once the VM we own has ended
        self._spare: Port | None = None  # a keeper that is started and not needed yet
        self._held = options.paused
        self._mode = "normal"
        self._timeouts = Timeouts()
        self._capabilities = {"events": False}
        self._carrier: threading.Thread | None = None
        self._kept_back: list[tuple[str, dict[str, Any] | None, float]] = []
        self._status: str | None = None
        self._outgoing: LiveOutgoing | None = None
        self._arriving: ArrivingClients | None = None
        self._incoming: LiveIncoming | None = None
        self._report: Report | None = None
        self._error: str | None = None

    # --- life ---

    def run(self) -> int:
        """Run the process to its end. Raises what start-up raises; afterwards every failure is an exit status
        and a log line.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._on_signal, number)
        if self._options.sandbox is not Mode.OFF:
            limit_resources()
        try:
            for path in self._options.qmp_paths:
                self._monitor.listen_unix(path)
            if self._options.attach:
                self._confine()
                self._attach()
            elif self._options.incoming is None:
                self._cold_start()
            else:
                if self._options.keeper and self._options.method != "adopt":
                    self._spare = self._start_keeper()
                self._confine()
                self._await_handover()
            return self._loop.run_until_complete(self._exit)
        finally:
            self._close()

    def _cold_start(self) -> None:
        config = self._options.config
        assert config is not None
        image = open_files(config, self._fds)
        port = self._new_port(self._fds)
        self._confine()
        self._token = RunToken.open(self._fds)
        self._machine = self._new_machine(config, self._fds, self._token, port, Origin.NEW, image)
        self._machine.state.orphan_ms = self._orphan_ms()
        if not self._token.take(0):
            raise VmmError("a new machine's run token is held by another process")
        self._own()
        self._machine.start(paused=self._options.paused)

    def _new_port(self, fds: FdStore) -> Port:
        """A way to KVM for a VM of this process's making."""
        if not self._options.keeper:
            return direct_port()
        port, self._spare = self._spare or self._start_keeper(), None
        try:
            fds.deposit(port)
        except BaseException:
            port.close(for_good=True)
            raise
        return port

    def _orphan_ms(self) -> int:
        return round(self._options.orphan_timeout_s * 1000)

    def _start_keeper(self) -> Port:
        return start_keeper(self._options.keeper_path, self._options.sandbox)

    def _end_spare(self) -> None:
        """End the keeper that was started in case this process would make the VM: it does not."""
        if self._spare is not None:
            self._spare.close(for_good=True)
            self._spare = None
            if self._options.keeper_path is not None:
                Path(self._options.keeper_path).unlink(missing_ok=True)

    def _confine(self) -> None:
        """Give up what is not needed from here on: nothing of a guest's or a peer's is read before this."""
        report = confine(self._options.sandbox, self._grants())
        for missing in report.missing:
            log.warning("sandbox: %s", missing)
        if report.done:
            log.info("sandbox: %s", ", ".join(report.done))

    def _grants(self) -> list[Grant]:
        """The files that are opened, made or removed later on; see docs/security.md."""
        options = self._options
        paths = [*options.qmp_paths]
        if options.incoming is not None:
            paths += [options.incoming.cpr_path, options.incoming.main_path]
        serial = options.config.serial if options.config is not None else options.given.get("serial")
        if serial is not None and (spec := parse_serial(serial)).kind is CharKind.UNIX:
            paths.append(spec.path)
        directories = {os.path.dirname(os.path.abspath(path)) for path in paths}
        return [
            *(Grant(path, Access.DEVICE) for path in HOST_DEVICES),
            *(Grant(path, Access.SOCKETS) for path in sorted(directories)),
            *options.grants,
        ]

    def _attach(self) -> None:
        """Take over from its keeper a guest whose VMM is gone."""
        port = self._find_guest()
        config = kept_config(Arena.open(self._fds))
        _check_complete(config, self._fds)
        self._token = token = RunToken.open(self._fds)
        self._machine = self._new_machine(config, self._fds, token, port, Origin.ADOPTED)
        deadline = time.monotonic() + self._timeouts.commit_s
        while not token.take(token.epoch()):
            if time.monotonic() > deadline:  # who was just killed may hold it for a moment
                raise HandoverError("another VMM runs the guest; use 'vmm handover' to replace it")
            time.sleep(NAP_S)
        self._machine.load()
        self._machine.resume(running=not self._machine.state.paused, after_crash=True)
        for name, index in _surplus(self._fds):
            log.warning("fd %s/%d came with the guest, and nothing here needs it; closed", name, index)
            self._fds.remove(name, index)
        self._own()

    def _find_guest(self) -> Port:
        """The port to the guest's VM. Keepers whose VM the guest has left, without ending them, are ended."""
        found: Port | None = None
        failure: VmmError = HandoverError(
            "no keeper has the guest: it ended with the VMM that it was handed to"
        )
        for path in self._options.attach:
            try:
                port = self._look_into(path)
            except VmmError as error:
                log.warning("%s: %s", path, error)
                failure = error
            else:
                found = found or port
        if found is None:
            raise failure
        return found

    def _look_into(self, path: str) -> Port | None:
        """The port to the VM of the keeper at `path`, its fds being ours from here on, if that is the guest's
        VM; if not, that keeper is ended. Raises PeerError, StateError.
        """
        fds = FdStore()
        try:
            return self._if_at_home(find_keeper(path, fds), fds, path)
        finally:
            if fds is not self._fds:
                fds.close()

    def _if_at_home(self, port: Port, fds: FdStore, path: str) -> Port | None:
        try:
            fds.get("state")
            fds.received()
            if home_of(Arena.open(fds)) == port.identity:
                self._fds = fds
                return port
            log.warning("%s: the guest has left that keeper's VM; it is ended", path)
        except BaseException:
            port.close(for_good=False)
            raise
        end_stale_keeper(port)
        return None

    def _new_machine(
        self,
        config: MachineConfig,
        fds: FdStore,
        token: RunToken,
        port: Port,
        origin: Origin,
        image: Image | None = None,
    ) -> Machine:
        self._ends_vm = origin is not Origin.ADOPTED
        try:
            return Machine(
                config,
                fds,
                port=port,
                origin=origin,
                tracer=self._tracer,
                reactor=self._loop,
                listener=self,
                may_run=lambda: token.held,
                image=image,
            )
        except BaseException:
            port.close(for_good=self._ends_vm)
            raise

    def _own(self) -> None:
        """The guest is here: be found by who looks for it, and hear of its VM's end. The loop's thread."""
        if self._exit.done():
            return
        self._owner = self._ends_vm = True
        self._claim()
        assert self._machine is not None
        port = self._machine.hypervisor.port
        if port.lifeline is not None:
            self._lifeline = port.lifeline
            self._loop.add_reader(port.lifeline, self._vm_ended, port)

    def _claim(self) -> None:
        if not self._claimed:
            self._claimed = True
            self._options.owned()

    def _vm_ended(self, port: Port) -> None:
        """What the VM lived in has ended, and we have not asked it to: the VMM that serves it may have."""
        self._let_go_of_lifeline()
        port.lost()
        if self._owner and self._token is not None and self._token.held:
            self._crashed(HostError("the keeper of the VM has ended, and the guest with it"))

    def _let_go_of_lifeline(self) -> None:
        if self._lifeline is not None:
            self._loop.remove_reader(self._lifeline)
            self._lifeline = None

    def _on_signal(self, number: int) -> None:
        log.info("%s: ending the guest", signal.Signals(number).name)
        self._shut_down(0, "host-signal", guest=False)

    def _shut_down(self, status: int, reason: str, *, guest: bool) -> None:
        if not self._exit.done():
            self._monitor.emit("SHUTDOWN", {"guest": guest, "reason": reason})
            self._exit.set_result(status)

    def _close(self) -> None:
        for world in (self._outgoing, self._incoming):
            if world is not None and world.phase is not incoming.Phase.TAKEN:  # then it is as good as over
                world.cancel.set("the VMM is ending")
        if self._carrier is not None:
            self._carrier.join(self._timeouts.setup_s)
        if self._owner:
            self._claim()  # what is left of who had the guest before goes too
        self._let_go_of_lifeline()
        self._end_spare()
        if self._machine is not None:
            stale = self._rebuilt_elsewhere and not self._machine.is_home
            self._machine.close(for_good=self._ends_vm or stale)
        if self._retired is not None:
            self._retired.close()
        self._monitor.close()
        if self._owner:
            self._options.disowned()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        if self._token is not None:
            self._token.close()
        self._fds.close()

    # --- MachineListener: any thread ---

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _on_loop(self, call: Callable[[], T]) -> T:
        """What `call` returns on the loop's thread. Raises PeerError where the loop does not come to it, or
        not to its end.
        """
        future: Future[T] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except Exception as error:  # noqa: BLE001 -- raised in the thread that asked
                    future.set_exception(error)

        self._post(answer)
        try:
            return future.result(LOOP_ANSWER_S)
        except TimeoutError:
            if future.cancel():
                raise PeerError("the monitor is busy") from None
        try:
            return future.result(LOOP_FINISH_S)
        except TimeoutError:
            raise PeerError("the monitor does not come to an end with it") from None

    def _tell(self, event: str, data: dict[str, Any] | None = None) -> None:
        """An event for the monitor's clients; kept back while the thread that tells it carries a handover."""
        at = time.time()
        if threading.current_thread() is self._carrier:
            self._kept_back.append((event, data, at))
        else:
            self._emit(event, data, at)

    def _emit(self, event: str, data: dict[str, Any] | None, at: float) -> None:
        if not self._loop.is_closed():
            self._monitor.emit(event, data, at)

    def _release_events(self) -> None:
        kept, self._kept_back = self._kept_back, []
        for event, data, at in kept:
            self._emit(event, data, at)

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """STOP and RESUME, as QEMU has them."""
        if new is RunState.RUNNING:
            self._tell("RESUME")
        elif old is RunState.RUNNING and new in (RunState.PAUSED, RunState.FINISH_MIGRATE):
            self._tell("STOP")

    def guest_exited(self, status: int, reason: str) -> None:
        """The guest ended by itself."""
        self._post(self._ended, status, reason)

    def guest_crashed(self, error: GuestCrash) -> None:
        """The guest cannot go on."""
        self._post(self._crashed, error)

    def reset_requested(self) -> None:
        """The guest asked for a reset."""
        self._post(self._reset)

    def failed(self, error: BaseException) -> None:
        """One of our own threads failed: nothing can be promised any more."""
        self._post(self._failed, error)

    def _failed(self, error: BaseException) -> None:
        machine = self._machine
        if machine is None or not machine.hypervisor.port.outlives or self._exit.done():
            self._crashed(error)
            return
        self._leave_guest(error, VmmError.exit_code)

    def _leave_guest(self, why: object, status: int) -> None:
        """End this process, but not the guest, which lives on where the next VMM finds it."""
        log.error("%s; the guest lives on in its keeper, see 'vmm attach'", why)
        self._owner = self._ends_vm = False
        self._shut_down(status, "host-error", guest=False)

    def _ended(self, status: int, reason: str) -> None:
        assert self._machine is not None
        self._machine.settle(RunState.SHUTDOWN)
        self._shut_down(status, reason, guest=True)

    def _crashed(self, error: BaseException) -> None:
        log.error("%s", error)
        if self._machine is not None:
            self._machine.settle(RunState.INTERNAL_ERROR)
        self._shut_down(
            error.exit_code if isinstance(error, VmmError) else VmmError.exit_code, "guest-panic", guest=True
        )

    def _reset(self) -> None:
        assert self._machine is not None
        self._do_reset(self._machine.reset_if_due, guest=True)

    def _do_reset(self, reset: Callable[[], bool], *, guest: bool) -> None:
        try:
            done = reset()
        except (VmmError, OSError) as error:
            self._crashed(error)
            return
        if done:
            reason = "guest-reset" if guest else "host-qmp-system-reset"
            self._tell("RESET", {"guest": guest, "reason": reason})

    # --- Backend: the monitor's commands, main thread ---

    def _the_machine(self) -> Machine:
        if self._machine is None:
            raise QmpError("Guest is waiting for an incoming migration")
        return self._machine

    def status(self) -> tuple[str, bool]:
        """QMP `query-status`."""
        if self._machine is None:
            return RunState.INMIGRATE.value, False
        return self._machine.run_state.value, self._machine.running

    def name(self) -> str | None:
        """QMP `query-name`."""
        config = self._machine.config if self._machine else self._options.config
        return config.name if config else None

    def cpus(self) -> list[tuple[int, int]]:
        """QMP `query-cpus-fast`."""
        return [(thread.index, thread.native_id) for thread in self._machine.threads] if self._machine else []

    def memory_size(self) -> int:
        """QMP `query-memory-size-summary`."""
        return self._machine.config.memory if self._machine else 0

    def _awaits_guest(self) -> bool:
        """Whether the guest is still on its way; then `stop` and `cont` say how it is to arrive, as in
        QEMU.
        """
        return self._machine is None or self._machine.run_state is RunState.INMIGRATE

    def stop(self) -> None:
        """QMP `stop`."""
        if self._awaits_guest():
            self._held = True
            return
        machine = self._the_machine()
        if machine.run_state is RunState.FINISH_MIGRATE:
            raise QmpError("the guest is being handed over; wait for it or use migrate_cancel")
        self._guarded(machine.stop)

    def cont(self) -> None:
        """QMP `cont`. Refused where the guest is another VMM's: the run token says so."""
        if self._awaits_guest():
            self._held = False
            return
        machine = self._the_machine()
        if self._token is None or not self._token.held:
            raise QmpError("the guest was handed over and runs in another VMM; this one can only quit")
        try:
            machine.cont()
        except VmmError as error:
            raise QmpError(str(error)) from error

    def quit(self) -> None:
        """QMP `quit`."""
        self._shut_down(0, "host-qmp-quit", guest=False)

    def reset(self) -> None:
        """QMP `system_reset`."""
        machine = self._the_machine()
        self._guarded(machine.memory.check_mapped)  # the image goes there again
        self._do_reset(machine.reset, guest=False)

    def inject_nmi(self) -> None:
        """QMP `inject-nmi`."""
        self._guarded(self._the_machine().inject_nmi)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """QMP `x-vmm-read-memory`."""
        return self._guarded(lambda: self._the_machine().memory.read(gpa, size))

    def guest_clock(self) -> dict[str, Any]:
        """QMP `x-vmm-guest-clock`."""
        return self._guarded(self._the_machine().guest_clock)

    def fds(self) -> list[dict[str, Any]]:
        """QMP `x-vmm-fds`."""
        return [{"name": name, "id": index, "fd": fd} for name, index, fd in self._the_machine().fd_table()]

    def stats(self) -> dict[str, Any]:
        """QMP `x-vmm-stats`."""
        return self._the_machine().stats()

    @staticmethod
    def _guarded(call: Callable[[], T]) -> T:
        try:
            return call()
        except VmmError as error:
            raise QmpError(str(error)) from error

    # --- Backend: migration ---

    def migration_parameters(self) -> dict[str, Any]:
        """QMP `query-migrate-parameters`."""
        return {
            "mode": self._mode,
            "x-vmm-setup-timeout": round(self._timeouts.setup_s * 1000),
            "x-vmm-prepare-timeout": round(self._timeouts.prepare_s * 1000),
            "x-vmm-commit-timeout": round(self._timeouts.commit_s * 1000),
        }

    def set_migration_parameters(self, values: dict[str, Any]) -> None:
        """QMP `migrate-set-parameters`. What a handover under way was started with stays as it is."""
        self._mode = values.get("mode", self._mode)
        changed = {
            f"{key}_s": values[f"x-vmm-{key}-timeout"] / 1000
            for key in ("setup", "prepare", "commit")
            if values.get(f"x-vmm-{key}-timeout") is not None
        }
        self._timeouts = replace(self._timeouts, **changed)

    def migration_capabilities(self) -> dict[str, bool]:
        """QMP `query-migrate-capabilities`."""
        return dict(self._capabilities)

    def set_migration_capabilities(self, values: dict[str, bool]) -> None:
        """QMP `migrate-set-capabilities`."""
        self._capabilities.update(values)

    def migrate(self, mode: MigrationMode, main: UnixSocket, cpr: UnixSocket) -> None:
        """QMP `migrate`: check, connect, and leave the rest to a thread. The mode was decided with the
        channels, once.
        """
        machine = self._the_machine()
        if self._carrier is not None and self._carrier.is_alive():
            raise QmpError("There's a migration process in progress")
        if machine.run_state is RunState.POSTMIGRATE:
            raise QmpError("Can't migrate the vm that was paused due to previous migration")
        if machine.run_state not in (RunState.RUNNING, RunState.PAUSED):
            raise QmpError(f"the guest cannot be handed over in run state {machine.run_state.value}")
        assert self._token is not None
        self._report = Report(mode=mode.value)
        self._error = None
        clients = LeavingClients(self._monitor)
        world = LiveOutgoing(
            _OutgoingView(machine, clients),
            self._token,
            cpr_path=cpr.path,
            main_path=main.path,
            timeouts=self._timeouts,
            tracer=self._tracer,
            report=self._report,
            on_phase=self._on_outgoing_phase,
            farewell=lambda: self._on_loop(lambda: self._let_go(clients)),
        )
        self._outgoing = world
        self._tracer.clear()
        try:
            world.connect_cpr()
        except HandoverError as error:
            world.close()
            clients.close()
            self._status, self._error = "failed", str(error)
            raise QmpError(str(error)) from error
        self._carrier = threading.Thread(
            target=self._carry_out, args=(world, clients), name="handover", daemon=True
        )
        self._set_status("setup")
        self._carrier.start()

    def _let_go(self, clients: LeavingClients) -> list[tuple[int, bytes]]:
        """The clients that move hear what happened here, and no more."""
        self._release_events()
        self._monitor.send_events()
        return clients.leave()

    def migrate_cancel(self) -> None:
        """QMP `migrate_cancel`: nothing where no handover is under way or its commit has begun."""
        if self._outgoing is not None and self._carrier is not None and self._carrier.is_alive():
            self._outgoing.cancel.set("cancelled by migrate_cancel")

    def migrate_incoming(self, main: UnixSocket) -> None:
        """QMP `migrate-incoming`, for a VMM started with `-incoming defer`."""
        raise QmpError("The incoming migration has already been started")

    def query_migrate(self) -> dict[str, Any]:
        """QMP `query-migrate`, with QEMU's fields."""
        if self._status is None:
            return {}
        answer: dict[str, Any] = {"status": self._status}
        if self._error is not None:
            answer["error-desc"] = self._error
        if self._status == "completed" and self._report is not None:
            answer.update(self._report.as_query_migrate())
        return answer

    def report(self) -> dict[str, Any]:
        """QMP `x-vmm-report`."""
        if self._report is None:
            raise QmpError("no handover has taken place from this VMM; use migrate first")
        return self._report.as_dict()

    def _set_status(self, status: str | None) -> None:
        if status != self._status:
            self._status = status
            if status is not None and self._capabilities["events"]:
                self._tell("MIGRATION", {"status": status})

    def _on_outgoing_phase(self, phase: outgoing.Phase, error: str | None) -> None:
        assert self._machine is not None
        if phase is outgoing.Phase.OFFERED:
            self._machine.offered()
        elif phase is outgoing.Phase.COMMITTED:
            self._machine.let_go()
        self._error = error
        self._set_status(outgoing.STATUS[phase])

    def _carry_out(self, world: LiveOutgoing, clients: LeavingClients) -> None:
        try:
            phase = run(outgoing.outgoing(_faulty(world)))
        except BaseException as error:
            self.failed(error)
            raise
        finally:
            world.close()
            clients.close()
            self._release_events()
        if phase in (outgoing.Phase.COMPLETED, outgoing.Phase.LOST):
            self._owner = self._ends_vm = False
            self._rebuilt_elsewhere = world.report.method == "rebuild"
            if phase is outgoing.Phase.LOST and self._lives_on():
                self._post(self._leave_guest, self._error, HandoverError.exit_code)
        log.log(
            logging.INFO if phase is outgoing.Phase.COMPLETED else logging.WARNING,
            "handover %s%s",
            phase.value,
            f": {self._error}" if self._error else "",
        )

    def _lives_on(self) -> bool:
        """Whether the guest, which was taken from us, lives in a keeper now: the one it was in or another."""
        assert self._machine is not None
        return bool(self._machine.state.home)

    # --- the new side ---

    def _await_handover(self) -> None:
        assert self._options.incoming is not None
        world = LiveIncoming(
            cpr_path=self._options.incoming.cpr_path,
            main_path=self._options.incoming.main_path,
            build=self._build_received,
            timeouts=lambda: self._timeouts,
            tracer=self._tracer,
            on_phase=self._on_incoming_phase,
        )
        self._incoming = world
        self._fds = world.fds
        self._carrier = threading.Thread(target=self._carry_in, args=(world,), name="handover", daemon=True)
        self._carrier.start()

    def _build_received(
        self, described: bytes, fds: FdStore, token: RunToken
    ) -> tuple[IncomingMachine, Choice]:
        config = decode(described, "the old VMM's machine")
        differing = differences(self._options.given, config)
        if differing:
            raise refusal(differing)
        _check_complete(config, fds)
        self._arriving = ArrivingClients(fds)
        choice = self._choose(fds)
        if choice.method == "rebuild" and config.memory_backend == GUEST_MEMFD:
            raise HandoverError(
                f"rebuild ({choice.why}) cannot be: the guest's memory is guest_memfd, which is bound to its "
                "VM, and no other VM can have it; adopt a VM that has a keeper"
            )
        self._token = token
        if choice.method == "rebuild":
            self._retired = take_keeper(fds)
            drop_old_vm(fds)
            machine = self._new_machine(config, fds, token, self._new_port(fds), Origin.REBUILT)
        elif choice.probe == WORKS:
            machine = self._new_machine(config, fds, token, direct_port(), Origin.ADOPTED)
        else:
            self._end_spare()
            _check_keepers_fds(config, fds)
            machine = self._new_machine(config, fds, token, adopt_from_keeper(fds), Origin.ADOPTED)
        self._machine = machine
        unused = OLD_VM_FDS if choice.probe == WORKS else frozenset()  # a keeper's, which is not needed then
        _refuse_surplus([row for row in _surplus(fds) if row[0] not in unused])
        return _IncomingView(machine, lambda: self._held, lambda: self._post(self._own)), choice

    def _choose(self, fds: FdStore) -> Choice:
        """Adopt or rebuild: by what the kernel says, what there is, and what was asked for."""
        probe = probe_received_vm(fds)
        received = fds.find("vm") is not None
        wanted = self._options.method
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

    def _on_incoming_phase(self, phase: incoming.Phase, error: str | None) -> None:
        if phase is incoming.Phase.TAKEN:
            self._owner = self._ends_vm = True
            self._keep_orphan_timeout()
        self._error = error
        self._set_status(incoming.STATUS[phase])

    def _keep_orphan_timeout(self) -> None:
        """That of the VM which the guest leaves holds for a new one as well, where no other is given."""
        assert self._machine is not None
        if self._machine.hypervisor.origin is Origin.REBUILT and self._options.orphan_timeout_s:
            self._machine.state.orphan_ms = self._orphan_ms()

    def _carry_in(self, world: LiveIncoming) -> None:
        try:
            phase = run(incoming.incoming(_faulty(world)))
        except BaseException as error:
            self.failed(error)
            raise
        finally:
            world.close()
        self._post(self._received if phase is incoming.Phase.COMPLETED else self._not_received)

    def _received(self) -> None:
        if self._exit.done():  # the guest has ended already
            return
        self._tracer.role = "old"
        assert self._machine is not None
        assert self._arriving is not None
        assert self._incoming is not None
        self._arriving.arrive(self._monitor, self._incoming.clients)
        self._release_events()
        if self._retired is not None:
            retired, self._retired = self._retired, None
            try:
                retire_keeper(retired)
            except PeerError as error:
                log.warning("the keeper that the guest was in: %s", error)
        if self._error is None:
            log.info("the guest runs here")
        else:
            log.warning("%s", self._error)

    def _not_received(self) -> None:
        self._release_events()
        log.error("no guest was taken over: %s", self._error)
        if not self._exit.done():
            self._exit.set_result(HandoverError.exit_code)
