"""The guest as one VMM process has it: fds, run token, machine; and whether its VM ends with the process."""

from __future__ import annotations

import select
from collections.abc import Callable
from pathlib import Path

from vmm.boot.image import Image
from vmm.cpr.token import RunToken
from vmm.errors import HostError, PeerError, VmmError
from vmm.fds import FdStore
from vmm.machine.config import MachineConfig
from vmm.machine.hypervisor import Origin
from vmm.machine.machine import Machine, MachineListener, open_files
from vmm.machine.ports import Port, direct_port, start_keeper
from vmm.process.loop import Loop
from vmm.process.options import Options
from vmm.trace import Tracer


class Guest:
    """There from the start; its `machine` comes with `start`, a handover, or a keeper that has one."""

    def __init__(
        self,
        options: Options,
        loop: Loop,
        tracer: Tracer,
        listener: MachineListener,
        crashed: Callable[[VmmError], None],
    ) -> None:
        self.fds = FdStore()
        self.token: RunToken | None = None
        self.machine: Machine | None = None
        self.ours = False  # it runs here, or is about to
        self.held = options.paused  # it is to stay paused when it arrives
        self.moved_out = False  # it may have left our VM for another VMM's
        self._options = options
        self._loop = loop
        self._tracer = tracer
        self._listener = listener
        self._crashed = crashed  # called on the loop's thread when it has ended with its VM
        self._claimed = False  # who looks for it finds it here
        self._ends_vm = False  # the VM is to end with this process
        self._lifeline: int | None = None  # readable once the VM that we own has ended
        self._spare: Port | None = None  # a keeper that is started and not needed yet

    # --- its VM ---

    def start(self, confine: Callable[[], None]) -> None:
        """Make a new machine and run it; nothing of an image's is interpreted before `confine` was called."""
        config = self._options.config
        assert config is not None
        image = open_files(config, self.fds)
        port = self.new_port()
        confine()
        self.token = RunToken.open(self.fds)
        machine = self.make(config, port, Origin.NEW, image)
        machine.state.orphan_ms = self._options.orphan_ms
        if not self.token.take(0):
            raise VmmError("a new machine's run token is held by another process")
        self.own()
        machine.start(paused=self._options.paused)

    def prepare_keeper(self) -> None:
        """Start a keeper, in case this process will make the VM."""
        self._spare = self._start_keeper()

    def new_port(self) -> Port:
        """A way to KVM for a VM of this process's making."""
        if not self._options.keeper:
            return direct_port()
        port, self._spare = self._spare or self._start_keeper(), None
        try:
            self.fds.deposit(port)
        except BaseException:
            port.close(for_good=True)
            raise
        return port

    def _start_keeper(self) -> Port:
        return start_keeper(self._options.keeper_path, self._options.sandbox)

    def end_spare(self) -> None:
        """End the keeper that was started in case this process would make the VM: it does not."""
        if self._spare is not None:
            self._spare.close(for_good=True)
            self._spare = None
            if self._options.keeper_path is not None:
                Path(self._options.keeper_path).unlink(missing_ok=True)

    def make(self, config: MachineConfig, port: Port, origin: Origin, image: Image | None = None) -> Machine:
        """The machine, built from `fds`, that may run while we hold the run token."""
        assert self.token is not None
        token = self.token
        self._ends_vm = origin is not Origin.ADOPTED
        try:
            self.machine = Machine(
                config,
                self.fds,
                port=port,
                origin=origin,
                tracer=self._tracer,
                reactor=self._loop.asyncio,
                listener=self._listener,
                may_run=lambda: token.held,
                image=image,
            )
        except BaseException:
            port.close(for_good=self._ends_vm)
            raise
        return self.machine

    # --- whose it is ---

    def take(self) -> None:
        """It is ours. Any thread; `own` follows on the loop's."""
        self.ours = self._ends_vm = True

    def own(self) -> None:
        """It is here: be found by who looks for it, and hear of its VM's end. The loop's thread."""
        if self._loop.ending:
            return
        self.take()
        self._claim()
        assert self.machine is not None
        port = self.machine.hypervisor.port
        if port.lifeline is not None:
            self._lifeline = port.lifeline
            self._loop.asyncio.add_reader(port.lifeline, self._vm_ended, port)

    def let_go(self) -> None:
        """It is another VMM's, or its keeper's alone."""
        self.ours = self._ends_vm = False

    @property
    def may_run(self) -> bool:
        """Whether we hold its run token."""
        return self.token is not None and self.token.held

    @property
    def lives_without_us(self) -> bool:
        """Whether its VM is in another process."""
        return self.machine is not None and self.machine.hypervisor.port.outlives

    def has_ended(self, within_s: float) -> bool:
        """Whether its VM's process has ended, or does in that time: a dying one closes its sockets first."""
        assert self.machine is not None
        lifeline, end = self.machine.hypervisor.port.lifeline, select.poll()
        if lifeline is None:
            return False
        end.register(lifeline, select.POLLIN)
        return bool(end.poll(within_s * 1000))

    def _claim(self) -> None:
        if not self._claimed:
            self._claimed = True
            self._options.owned()

    def _vm_ended(self, port: Port) -> None:
        """What the VM lived in has ended, and we have not asked it to: the VMM that serves it may have."""
        self._let_go_of_lifeline()
        port.lost()
        if self.ours and self.may_run:
            self._crashed(keeper_ended())

    def _let_go_of_lifeline(self) -> None:
        if self._lifeline is not None:
            self._loop.asyncio.remove_reader(self._lifeline)
            self._lifeline = None

    # --- the end ---

    def close(self) -> None:
        """End its machine here, and its VM where that is to end with us."""
        if self.ours:
            self._claim()  # what is left of who had it before goes too
        self._let_go_of_lifeline()
        self.end_spare()
        if self.machine is not None:
            stale = self.moved_out and not self.machine.is_home
            try:
                self.machine.close(for_good=self._ends_vm or stale)
            except PeerError:  # it could not be ended: whoever looks for it is to find it
                self.let_go()
                raise

    def give_up(self) -> None:
        """Close what others may wait for, last of all: what it is found by, its run token, its fds."""
        if self.ours:
            self._options.disowned()
        if self.token is not None:
            self.token.close()
        self.fds.close()


def keeper_ended() -> HostError:
    """What a VMM ends with whose guest has gone with its keeper."""
    return HostError("the keeper of the VM has ended, and the guest with it")
