"""The composition root: builds a machine from its configuration, on new fds or on those of the previous VMM,
and runs it.

Cold start and handover are one code path: RAM, state memfd and devices ask the FdStore for what they need and
find it or make it. What differs is one line: a new machine gets its image and boot registers, a received one
gets `load`.

Threads: `start`, `stop`, `cont`, `reset`, `close` belong to the main thread; `quiesce`, `load`, `resume`,
`roll_back` to the thread that carries a handover. One lock orders them; the run state says what is possible.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import ClassVar, Protocol

from vmm.boot.image import Image, load_image, open_image, resolve_kernel
from vmm.boot.x86 import BootFlags, apply_boot_state, prepare_memory
from vmm.bus import Bus
from vmm.devices.chardev import Reactor, open_chardev, open_fds, parse_serial
from vmm.devices.debug_exit import DebugExit
from vmm.devices.power import PowerOff
from vmm.devices.reset import I8042, RESET_PORTS, ResetControl, ResetState
from vmm.devices.serial import Serial, SerialState
from vmm.devices.testdev import PAGE as TESTDEV_PAGE_SIZE
from vmm.devices.testdev import PORTS as TESTDEV_PORTS
from vmm.devices.testdev import TestDevice, TestState
from vmm.errors import ConfigError, GuestCrash, HandoverError, HostError, StateError, VmmError
from vmm.fds import FdStore, check_received
from vmm.irq import IrqLine, UnconnectedIrq
from vmm.kvm import Cap, Port, Vcpu, Vm, abi
from vmm.machine.config import MachineConfig, keep_config
from vmm.machine.hypervisor import Hypervisor, Origin
from vmm.machine.irqfd import GsiRoutes, IrqFds
from vmm.machine.journal import Journal, JournaledReactor
from vmm.machine.ports import ORPHAN_MAX_S
from vmm.machine.posted import PostedWrites
from vmm.machine.runstate import RunState, check_transition
from vmm.machine.vcpu_thread import VcpuThread
from vmm.memory import GuestMemory, layout
from vmm.memory.guest import GUEST_MEMFD
from vmm.state import Arena
from vmm.trace import Tracer

log = logging.getLogger(__name__)

COM1_PORT, COM1_IRQ = 0x3F8, 4
DEBUG_EXIT_PORT = 0xF4
I8042_PORT = 0x60
RESET_CONTROL_PORT = 0xCF8  # the register is at 0xCF9
POWER_OFF_PORT = 0x604  # PM1a control, as QEMU's q35 has it
TESTDEV_PORT, TESTDEV_PAGE = 0x5F0, 0xFED1_0000  # firmware/README.md
PIO_SPACE, MMIO_SPACE = 1 << 16, 1 << 52
STOP_TIMEOUT_S = 5.0


class MachineListener(Protocol):
    """Who hears of what the machine does. Called on vCPU threads as well: must not block."""

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """The run state is now `new`."""

    def guest_exited(self, status: int, reason: str) -> None:
        """The guest ended; `status` is what the process should end with."""

    def guest_crashed(self, error: GuestCrash) -> None:
        """The guest cannot go on."""

    def reset_requested(self) -> None:
        """The guest asked for a reset; `Machine.reset_if_due` is to be called on the main thread."""

    def failed(self, error: BaseException) -> None:
        """A thread of the machine met an error of the VMM's own."""


class MachineState(ctypes.LittleEndianStructure):
    """The machine's own section: what must be known of it to whoever runs it next."""

    VERSION: ClassVar[int] = 1
    _fields_ = (
        ("reset_pending", ctypes.c_uint32),
        ("ended", ctypes.c_uint32),
        ("exit_status", ctypes.c_uint32),
        ("resets", ctypes.c_uint32),
        ("paused", ctypes.c_uint32),
        ("orphan_ms", ctypes.c_uint32),  # how long the VM lives on without a VMM, where it can; 0: for ever
        ("home", ctypes.c_uint64),  # what the VM lives in: see `Port.identity`
    )


def home_of(arena: Arena) -> int:
    """`Port.identity` of what the guest's VM lives in."""
    return int(arena.peek("machine", 0, MachineState).home)


class _KernelIrqLine:
    """A wire into the in-kernel interrupt controllers."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi

    def set(self, level: bool) -> None:
        self._vm.irq_line(self._gsi, level)


class _Latch:
    """Waits until `count` jobs have reported, and hands on the first error among them."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._guard = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None
        self.given_up = False  # nobody waits any more: a job that has not begun is not to be done

    def report(self, error: BaseException | None = None) -> None:
        with self._guard:
            self._left -= 1
            self._error = self._error or error
            if self._left == 0:
                self._done.release()

    def wait(self, timeout_s: float, what: str) -> None:
        answered = self._done.acquire(timeout=timeout_s)
        self.given_up = True
        if self._error is not None:
            raise self._error
        if not answered:
            raise VmmError(f"{what}: {self._left} vCPU threads did not answer within {timeout_s} s")


class _Rendezvous:
    """Where vCPU threads meet once all of them have stopped; one does what is to be done then, and all go on.

    Until the last has stopped it may send the others interrupts, INIT and SIPI: nothing of them is settled.
    Once one has failed, or nobody waits for them any more, it is called off: the others hear of it at once,
    and who comes late must not do what has been undone by then.
    """

    def __init__(self, count: int, then: Callable[[], None], timeout_s: float) -> None:
        self._then = then
        self._timeout_s = timeout_s
        self._error: BaseException | None = None
        self._acting = threading.Lock()
        self._barrier = threading.Barrier(count, self._act, timeout_s)

    def _act(self) -> None:
        with self._acting:
            if self._error is not None:
                return
            try:
                self._then()
            except BaseException as error:  # noqa: BLE001 -- raised in every thread that waits
                self._error = error

    def call_off(self, error: BaseException) -> None:
        """From any thread: `error` is what all of them raise. What is being done is done when this returns,
        and nothing is begun.
        """
        with self._acting:
            self._error = self._error or error
        self._barrier.abort()

    def check(self) -> None:
        """Raises what it was called off with, if it was."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Called by each vCPU thread. Raises what the action raised, or what it was called off with."""
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            self.check()
            raise VmmError(f"not every vCPU stopped within {self._timeout_s} s") from None
        self.check()


def open_files(config: MachineConfig, fds: FdStore) -> Image:
    """Open what a new machine wants by its path, so that `Machine` opens /dev/kvm and nothing else; the
    image, loaded. Raises ConfigError, ImageError, HostError.
    """
    image = load_kernel(config, fds)
    open_fds(parse_serial(config.serial), fds)
    return image


def load_kernel(config: MachineConfig, fds: FdStore) -> Image:
    """The image of `config`: of the file that a reset comes back to, whatever its path is by then."""
    if config.kernel is None:
        raise ConfigError("no kernel given; name an ELF image or a prebuilt guest such as 'ticker'")
    kernel = config.kernel
    fd = fds.get_or_open("image", 0, lambda: open_image(resolve_kernel(kernel)))
    check_received("image", 0, fd)
    return load_image(
        kernel,
        ram=layout(config.memory),
        entry_mode=config.boot_mode(),
        load_address=config.load_address,
        fd=fd,
    )


class Machine:
    """One guest machine in this process."""

    def __init__(
        self,
        config: MachineConfig,
        fds: FdStore,
        *,
        port: Port,
        origin: Origin,
        tracer: Tracer,
        reactor: Reactor,
        listener: MachineListener,
        may_run: Callable[[], bool],
        image: Image | None = None,
    ) -> None:
        """Build the machine; unless `origin` is NEW, `fds` and the state in them came from another VMM. The
        VM is driven through `port`. `image` is a new machine's, where `open_files` has loaded it already.

        Raises ConfigError, ImageError, HostError or StateError before anything runs; then nothing of it is
        left behind but `fds`.
        """
        self.config = config
        self.fds = fds
        self.tracer = tracer
        self.run_state = RunState.PRELAUNCH if origin is Origin.NEW else RunState.INMIGRATE
        self._listener = listener
        self._lock = threading.RLock()
        self._resume_to = RunState.RUNNING
        self._keeps_running = False
        self._let_go = False  # another VMM may have the guest
        self._turn: AbstractContextManager[object] = threading.Lock() if port.outlives else nullcontext()
        if origin is Origin.NEW and image is None:
            image = load_kernel(config, fds)  # a bad one is refused before any VM is
        bound = config.memory_backend == GUEST_MEMFD
        memory = None if bound else GuestMemory.map(fds, config.memory, config.hugepages)
        self.arena = Arena.open(fds)
        self.state = self.arena.place("machine", 0, MachineState)
        keep_config(self.arena, config)
        self.hypervisor = Hypervisor(config, fds, memory, self.arena, port, origin)
        try:
            self._furnish(image, reactor, may_run)
        except BaseException:
            self.hypervisor.close(for_good=origin is not Origin.ADOPTED)
            raise

    def _furnish(self, image: Image | None, reactor: Reactor, may_run: Callable[[], bool]) -> None:
        """Everything but the VM itself."""
        self.memory = self.hypervisor.memory
        self.pio, self.mmio = Bus("PIO", PIO_SPACE), Bus("MMIO", MMIO_SPACE)
        self.routes = GsiRoutes(self.hypervisor.vm, chips=self.config.irqchip == "kernel")
        self.irqfds = IrqFds(self.hypervisor.vm, self.fds)
        if self.hypervisor.origin is Origin.ADOPTED:
            self.irqfds.taken_over()
        self.posted = self._posted_writes()
        self.threads = [self._thread(vcpu, may_run) for vcpu in self.hypervisor.vcpus]
        self._build_devices(reactor)
        if self.hypervisor.origin is not Origin.ADOPTED and self.posted is not None:
            self._let_post()
        if unknown := self.arena.unplaced():
            names = ", ".join(f"{section.name}/{section.instance}" for section in unknown)
            raise StateError(
                f"the guest has state that neither this VMM nor this host's KVM knows: {names}; "
                "hand over to a VMM of a version that does"
            )
        if image is not None:
            self._boot(image)
        for thread in self.threads:
            thread.start()

    # --- building ---

    def _posted_writes(self) -> PostedWrites | None:
        journal = Journal(self.arena, "journal-posted", 0)
        ring = self.hypervisor.vcpus[0].coalesced
        used = journal if self.hypervisor.port.outlives else None
        return None if ring is None else PostedWrites(ring, self.pio, self.mmio, used)

    def _let_post(self) -> None:
        """Have KVM put aside those writes that a device takes late. For a KVM that cannot each is an exit."""
        vm = self.hypervisor.vm
        for bus, needed in ((self.mmio, Cap.COALESCED_MMIO), (self.pio, Cap.COALESCED_PIO)):
            if vm.check(needed):
                for address, size in bus.posted:
                    vm.register_coalesced(address, size, pio=bus is self.pio)

    def _thread(self, vcpu: Vcpu, may_run: Callable[[], bool]) -> VcpuThread:
        journal = Journal(self.arena, "journal", vcpu.index)  # in any case: the guest may move into a keeper
        used = journal if self.hypervisor.port.outlives else None
        return VcpuThread(vcpu, self.pio, self.mmio, self, may_run, used, self._turn, self.posted)

    def _irq(self, gsi: int) -> IrqLine:
        return (
            _KernelIrqLine(self.hypervisor.vm, gsi) if self.config.irqchip == "kernel" else UnconnectedIrq()
        )

    def _build_devices(self, reactor: Reactor) -> None:
        state = self.arena.place("serial", 0, SerialState)
        journal = Journal(self.arena, "journal-console", 0)
        self._console_steps: JournaledReactor | None = None
        if self.hypervisor.port.outlives:
            reactor = self._console_steps = JournaledReactor(reactor, self._turn, journal, state)
        self.chardev = open_chardev(parse_serial(self.config.serial), self.fds, self.arena, reactor)
        self.serial = Serial(self.arena, self._irq(COM1_IRQ), self.chardev)
        self.pio.attach(COM1_PORT, 8, self.serial, "serial", state)
        self.pio.attach(DEBUG_EXIT_PORT, 4, DebugExit(self._debug_exit), "debug-exit")
        self.pio.attach(I8042_PORT, 5, I8042(self.guest_reset), "i8042")
        reset_control = ResetControl(self.arena, self.guest_reset)
        control = self.arena.place("reset", 0, ResetState)
        self.pio.attach(RESET_CONTROL_PORT, RESET_PORTS, reset_control, "reset-control", control)
        self._zero_at_reset: list[ctypes.Structure] = [control]
        self.pio.attach(POWER_OFF_PORT, 2, PowerOff(self._power_off), "power-off")
        if self.config.testdev:
            device, counts = TestDevice(self.arena), self.arena.place("testdev", 0, TestState)
            self._zero_at_reset.append(counts)
            ports, registers = device.ports, device.registers
            self.pio.attach(TESTDEV_PORT, TESTDEV_PORTS, ports, "testdev", counts, ports.posted)
            self.mmio.attach(TESTDEV_PAGE, TESTDEV_PAGE_SIZE, registers, "testdev", counts, registers.posted)

    def _boot(self, image: Image, *, again: bool = False) -> None:
        """Put the image and the boot protocol's tables into RAM and the first vCPU at its entry."""
        kernel_irqchip = self.config.irqchip == "kernel"
        if again:
            for segment in image.segments:
                self.memory.clear(segment.gpa, segment.memory_size)
        regions = layout(self.config.memory)
        prepare_memory(
            self.memory.write,
            image,
            ram_below_4g=regions[0][1],
            ram_above_4g=regions[1][1] if len(regions) > 1 else 0,
            cpus=self.config.cpus,
            tsc_khz=self.hypervisor.facts.tsc_khz,
            flags=BootFlags.IRQCHIP * kernel_irqchip | BootFlags.PIT * self.hypervisor.has_pit,
            cmdline=self.config.append,
            pdpe1gb=bool(self.hypervisor.facts.gigabyte_pages),
        )
        vcpu = self.threads[0].vcpu
        regs, sregs = abi.kvm_regs(), abi.kvm_sregs()
        vcpu.get_regs(regs)
        vcpu.get_sregs(sregs)
        apply_boot_state(regs, sregs, image)
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)

    def _console_step(self, call: Callable[[], None]) -> None:
        """`call`, which may change the UART's state, in turn with the vCPUs."""
        if self._console_steps is None:
            call()
        else:
            self._console_steps.step(call)

    # --- the main thread's calls ---

    @property
    def running(self) -> bool:
        """Whether the guest runs."""
        return self.run_state is RunState.RUNNING

    def _enter(self, new: RunState) -> None:
        old = self.run_state
        check_transition(old, new)
        self.run_state = new
        if new in (RunState.RUNNING, RunState.PAUSED):
            self.state.paused = new is RunState.PAUSED
        self._listener.run_state_changed(old, new)

    @property
    def is_home(self) -> bool:
        """Whether the guest lives in this VM, whoever serves it."""
        return bool(self.state.home == self.hypervisor.port.identity)

    def start(self, *, paused: bool = False) -> None:
        """Run a new machine for the first time, or leave it `paused`."""
        with self._lock:
            self._console_step(self.chardev.start)
            self._settle_in()
            self._go(RunState.PAUSED if paused else RunState.RUNNING)

    def live_on(self) -> None:
        """Have the VM live on without a VMM, where it can, for as long as the state says."""
        self.hypervisor.port.live_on(min(self.state.orphan_ms / 1000, ORPHAN_MAX_S))

    def _settle_in(self) -> None:
        """From here on the guest lives in this VM, and nowhere else: one that is its home must live on."""
        self.live_on()
        self.state.home = self.hypervisor.port.identity

    def _go(self, to: RunState) -> None:
        """Enter `to`; where that is RUNNING, let the vCPUs go (a reset asked for earlier is done first)."""
        self._enter(to)
        self.irqfds.listen()
        if to is not RunState.RUNNING:
            return
        if self.state.reset_pending:
            self._reset_stopped()
        for thread in self.threads:
            thread.resume()

    def stop(self) -> None:
        """QMP `stop`: pause the vCPUs; nothing where they are paused already."""
        with self._lock:
            if self.run_state is RunState.RUNNING:
                self._pause_running(None)
                self._enter(RunState.PAUSED)

    def cont(self) -> None:
        """QMP `cont`: run on. Raises VmmError in a run state that does not allow it."""
        with self._lock:
            if self.run_state is RunState.PAUSED:
                self._go(RunState.RUNNING)
            elif self.run_state is not RunState.RUNNING:
                raise VmmError(f"the guest cannot run: run state is {self.run_state.value}")

    def reset(self) -> bool:
        """Start the guest afresh from its image, RAM otherwise kept. Whether it was done: in the middle of a
        handover the next VMM does it. Raises HandoverError where the guest is another VMM's.
        """
        with self._lock:
            if self.run_state is RunState.INMIGRATE:
                raise HandoverError("the guest is still another VMM's; wait until it has arrived")
            if self._let_go:
                raise HandoverError(
                    "the guest was handed over and runs in another VMM; this one can only quit"
                )
            self.state.reset_pending = 1
            return self.reset_if_due()

    def reset_if_due(self) -> bool:
        """As `reset`, where the guest has asked for it and nobody has done it yet. Whether it was done."""
        with self._lock:
            due = bool(self.state.reset_pending)
            if not due:
                return False
            if self.run_state is RunState.RUNNING:
                self._pause_running(None)
                self._reset_stopped()
                self._let_run()
            elif self.run_state is RunState.PAUSED:
                self._reset_stopped()
            return not self.state.reset_pending

    def _reset_stopped(self) -> None:
        image = load_kernel(self.config, self.fds)
        self.hypervisor.restore_birth_state()
        self.serial.reset()
        for state in self._zero_at_reset:
            ctypes.memset(ctypes.byref(state), 0, ctypes.sizeof(state))
        self._boot(image, again=True)
        self.state.resets += 1
        self.state.reset_pending = 0

    def settle(self, final: RunState) -> None:
        """The guest has ended by itself: its threads have stopped, the run state says how."""
        with self._lock:
            if self.run_state in (RunState.RUNNING, RunState.PAUSED):
                self._enter(final)

    def stats(self) -> dict[str, object]:
        """Counts of what no device claimed, and of resets; which VM it is, that the kernel knows by `id` and
        that lives in `process`; how long an exit of each vCPU had waited when the VM was taken over.
        """
        return {
            "vm": {"process": self.hypervisor.port.process, "id": self.hypervisor.stats_id(self.fds)},
            "unclaimed": {
                bus.name: {
                    **{f"{address:#x}": count for address, count in bus.unclaimed.items()},
                    "elsewhere": bus.unclaimed_elsewhere,
                }
                for bus in (self.pio, self.mmio)
            },
            "resets": self.state.resets,
            "stalls-us": [
                None if thread.stall_ns is None else thread.stall_ns / 1000 for thread in self.threads
            ],
        }

    def inject_nmi(self) -> None:
        """QMP `inject-nmi`: an NMI to every vCPU, as QEMU has it. Raises VmmError during a handover.

        KVM_NMI waits for KVM_RUN to return: so the vCPUs stop for it, each does it itself, and they go on.
        Where one does not stop in time, VmmError, and only those that did have got it.
        """
        with self._lock:
            if self.run_state not in (RunState.RUNNING, RunState.PAUSED):
                raise VmmError(f"no NMI can be injected in run state {self.run_state.value}")
            if self.run_state is RunState.PAUSED:
                self._pause_vcpus(lambda index: self.threads[index].vcpu.nmi())
            else:
                self._pause_running(lambda index: self.threads[index].vcpu.nmi())
                self._let_run()

    def close(self, *, for_good: bool) -> None:
        """End the threads and give everything but the fds back; with `for_good`, the VM itself ends too.

        After this only `fds.close()` is left to do. Raises VmmError where a vCPU does not end, or the VM
        lives on; all else is done.
        """
        with self._lock, ExitStack() as rest:
            stuck = []
            for thread in self.threads:
                try:
                    thread.finish()
                except VmmError as error:
                    stuck.append(error)
            rest.callback(self.hypervisor.port.close if stuck else self.hypervisor.close, for_good=for_good)
            rest.callback(self.chardev.close)
            if not for_good and self.run_state not in (RunState.INMIGRATE, RunState.POSTMIGRATE):
                self.chardev.freeze()  # it is the next VMM's to tidy up
            if stuck:
                raise stuck[0]

    # --- the handover's calls ---

    def _pause_vcpus(self, job: Callable[[int], None] | None) -> None:
        """Stop every vCPU between two instructions and, on its own thread, do `job(index)`."""
        for thread in self.threads:
            thread.pause()
        self._on_vcpus(job, STOP_TIMEOUT_S)

    def _pause_running(self, job: Callable[[int], None] | None) -> None:
        """The same for a guest that runs, and that runs on where it fails."""
        try:
            self._pause_vcpus(job)
        except BaseException:
            self._let_run()
            raise

    def _let_run(self) -> None:
        if not self.state.ended:
            for thread in self.threads:
                thread.resume()

    def _on_vcpus(self, job: Callable[[int], None] | None, timeout_s: float) -> None:
        latch = _Latch(len(self.threads))

        def work(index: int) -> Callable[[], None]:
            def run() -> None:
                error: BaseException | None = None
                try:
                    if job is not None and not latch.given_up:
                        job(index)
                except BaseException as caught:  # noqa: BLE001 -- handed to the waiting thread
                    error = caught
                latch.report(error)

            return run

        for thread in self.threads:
            thread.submit(work(thread.index))
        latch.wait(timeout_s, "stopping the vCPUs")

    def quiesce(self, *, keep_running: bool) -> bool:
        """Stop serving the guest, all of its state being where the next VMM finds it. Returns whether it ran.

        Its vCPUs are stopped and saved or, with `keep_running`, let run on until they need a VMM. Raises
        HandoverError where the guest has ended meanwhile; any failure leaves it as it was.
        """
        with self._lock:
            was = self.run_state
            if was not in (RunState.RUNNING, RunState.PAUSED) or self.state.ended:
                raise HandoverError(
                    f"the guest has ended (run state {was.value}); there is nothing to hand over"
                )
            if not keep_running and (lacking := self.hypervisor.cannot_be_saved()):
                raise HandoverError(
                    f"this host's KVM has no {', '.join(lacking)}, so the guest's state cannot be saved; "
                    "start such a guest with a keeper to hand it over"
                )
            self._resume_to = was
            self._keeps_running = keep_running
            self._enter(RunState.FINISH_MIGRATE)
            try:
                self.tracer.mark("pause")
                self.chardev.quiet()  # first: from here on nothing but a vCPU moves an interrupt line
                if keep_running:
                    self._leave_vcpus(was is RunState.RUNNING)
                else:
                    self._save()
                self.chardev.freeze()  # not before: a vCPU that is being stopped may print
                self.tracer.mark("vcpus-saved")
                if self.state.ended:
                    raise HandoverError("the guest ended while it was being stopped")
                self.tracer.mark("saved")
            except BaseException:
                self.roll_back()
                raise
            return was is RunState.RUNNING

    def _save(self) -> None:
        """Stop the vCPUs; then store the chips, and after them, in parallel, the vCPUs."""

        def save_chips() -> None:
            self.irqfds.release()
            self.hypervisor.save_chips()

        stopped = _Rendezvous(len(self.threads), save_chips, STOP_TIMEOUT_S)

        def save(index: int) -> None:
            state, thread = self.hypervisor.vcpu_states[index], self.threads[index]
            may_run_on = self._resume_to is RunState.RUNNING and not self.state.ended
            try:
                stopped.check()
                state.look(thread.settle, thread.run_on if may_run_on else None)
                stopped.wait()
            except BaseException as error:
                stopped.call_off(error)
                raise
            self.hypervisor.save_vcpu(index)

        try:
            self._pause_vcpus(save)
        except BaseException as error:
            stopped.call_off(error)
            raise

    def _leave_vcpus(self, running: bool) -> None:
        """Serve the vCPUs no more; let them run on where they run, but not past the guest's end."""
        for thread in self.threads:
            thread.leave()

        def go_on(index: int) -> None:
            if running and not self.state.ended and not self.state.reset_pending:
                self.threads[index].vcpu.go_on()

        self._on_vcpus(go_on, STOP_TIMEOUT_S)

    def _gather(self) -> None:
        """Stop those vCPUs that run, though nobody serves them."""
        for thread in self.threads:
            thread.halt()
        self._on_vcpus(None, STOP_TIMEOUT_S)

    def roll_back(self) -> None:
        """The handover failed after `quiesce`: be as before it."""
        with self._lock:
            self._let_go = False
            if self._keeps_running:
                self.hypervisor.port.attach()
                if self.state.reset_pending:
                    self._gather()
            self._console_step(self.chardev.thaw)
            if self.state.ended:
                self._enter(RunState.SHUTDOWN)
            else:
                self._go(self._resume_to)
            self.tracer.mark("rolled-back")

    def let_go(self) -> None:
        """The commit: from here on another VMM may have the guest, and drive the very VM."""
        with self._lock:
            self._let_go = True
            if self._keeps_running:
                self.hypervisor.port.detach()

    def gave_up(self) -> None:
        """The handover is committed: the guest is another VMM's for good."""
        with self._lock:
            self._enter(RunState.POSTMIGRATE)

    def load(self) -> None:
        """Give vCPUs and VM the state in the state memfd; an adopted VM has it.

        Raises StateError; then the old VMM still has the guest.
        """
        with self._lock:
            self.arena.convert()
            if self.hypervisor.origin is Origin.REBUILT:
                if len(self.threads) == 1:
                    self.hypervisor.load_vcpu(0)  # one hop less
                else:
                    self._on_vcpus(self.hypervisor.load_vcpu, STOP_TIMEOUT_S)
                self.hypervisor.load_chips()
            self.tracer.mark("loaded")

    def resume(self, *, running: bool, after_crash: bool = False) -> None:
        """Run the guest that was received, or hold it paused where it was paused before.

        After a crash of its last VMM, what that one was in the middle of is undone or made good first.
        """
        with self._lock:
            if self.hypervisor.origin is Origin.ADOPTED:
                self._take_over(running=running, after_crash=after_crash)
            else:
                for thread in self.threads:
                    thread.begin_anew()
                if self.posted is not None:
                    self.posted.begin_anew()
                self._settle_in()
            self.arena.settle()
            self.chardev.quiet()  # a vCPU may print at once; the rest can wait for it to run
            if after_crash and self.state.ended:
                self._enter(RunState.PAUSED)
                self._listener.guest_exited(self.state.exit_status, "guest-shutdown")
            else:
                self._go(RunState.RUNNING if running else RunState.PAUSED)
            self.tracer.mark("resumed")
            self._console_step(self.chardev.start)

    def _take_over(self, *, running: bool, after_crash: bool) -> None:
        """Drive the very VM that another VMM drove."""
        port = self.hypervisor.port
        port.attach()
        if port.outlives:
            self.fds.vault = port
        for thread in self.threads:
            thread.recover()
        if self._console_steps is not None:
            self._console_steps.recover()
        if self.posted is not None:
            self.posted.recover()
        self.arena.convert()  # again: what was undone is where the last VMM had it
        if after_crash:
            state = self.arena.place("serial", 0, SerialState)
            self._irq(COM1_IRQ).set(bool(state.irq_level))  # it may not have come to that
            self.irqfds.release()  # as the last VMM may have done, or not: they are given to the VM again
            self.live_on()  # as the last VMM was told to; the keeper may not have been
        if self.state.reset_pending or not running:
            self._gather()

    def hold_fds(self) -> None:
        """From here on no fd is opened or closed: what `fd_table` says stays true until `roll_back` or
        `release_fds`.
        """
        self.chardev.hold()
        self.hypervisor.announce()

    def offered(self) -> None:
        """What `fd_table` offered has been sent."""
        self.hypervisor.port.close_offer()

    def release_fds(self) -> None:
        """Undo `hold_fds`, where the handover ended before the guest was stopped."""
        self.hypervisor.port.close_offer()
        self.chardev.thaw()

    def fd_table(self, *, offer: bool = False) -> list[tuple[str, int, int]]:
        """Every fd of the machine, the KVM ones included, as `(name, id, fd)`; on `offer`, with what the next
        VMM needs to drive the same VM.
        """
        vcpus = [("vcpu", vcpu.index, vcpu.fd) for vcpu in self.hypervisor.vcpus]
        rows = self.hypervisor.port.fd_rows(offer=offer)
        return [*self.fds.items(), ("vm", 0, self.hypervisor.vm.fd), *vcpus, *rows]

    def guest_clock(self) -> dict[str, int]:
        """One moment on three clocks: CLOCK_MONOTONIC ns, guest TSC cycles, and how far apart the readings
        can be (ns).
        """
        data = abi.kvm_clock_data()
        before = time.monotonic_ns()
        self.hypervisor.vm.get_clock(data)
        after = time.monotonic_ns()
        if not data.flags & abi.KVM_CLOCK_HOST_TSC:
            raise HostError("this host's KVM_GET_CLOCK gives no host TSC (KVM_CLOCK_HOST_TSC, Linux 5.16)")
        guest_tsc = (data.host_tsc + self.hypervisor.tscs[0].section.offset) % (1 << 64)
        return {
            "monotonic-ns": (before + after) // 2,
            "uncertainty-ns": after - before,
            "guest-tsc": guest_tsc,
            "tsc-khz": self.hypervisor.facts.tsc_khz,
        }

    # --- what the guest does (ExitSink; vCPU threads) ---

    def _stop_all(self) -> None:
        for thread in self.threads:
            if thread.is_current:
                thread.stop_after_exit()
            else:
                thread.pause()

    def _debug_exit(self, status: int) -> None:
        self._end(status, "debug-exit")

    def _end(self, status: int, reason: str) -> None:
        self.state.exit_status = status
        self.state.ended = 1
        self._stop_all()
        self._listener.guest_exited(status, reason)

    def _power_off(self) -> None:
        self.guest_shutdown("guest-shutdown")

    def guest_shutdown(self, reason: str) -> None:
        """The guest powered the machine off."""
        self._end(0, reason)

    def guest_reset(self) -> None:
        """The guest asked for a reset: every vCPU stops, the main thread does the rest."""
        self.state.reset_pending = 1
        self._stop_all()
        self._listener.reset_requested()

    def guest_crashed(self, index: int, error: GuestCrash) -> None:
        """Stop everything; the report carries registers and the bytes at RIP."""
        self.state.ended = 1
        self.state.exit_status = error.exit_code
        self._stop_all()
        self._listener.guest_crashed(GuestCrash(f"{error}\n{self.describe_vcpu(index)}"))

    def thread_failed(self, index: int, error: BaseException) -> None:
        """A vCPU thread's own failure."""
        log.error("vCPU %d: %s", index, error, exc_info=error)
        self._stop_all()
        self._listener.failed(error)

    def describe_vcpu(self, index: int) -> str:
        """Registers and the bytes at RIP of a stopped vCPU, for a crash report."""
        vcpu = self.threads[index].vcpu
        regs, sregs = abi.kvm_regs(), abi.kvm_sregs()
        vcpu.get_regs(regs)
        vcpu.get_sregs(sregs)
        general = " ".join(f"{name}={getattr(regs, name):#x}" for name, *_ in abi.kvm_regs._fields_)
        control = " ".join(
            f"{name}={getattr(sregs, name):#x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")
        )
        linear = regs.rip + (0 if sregs.efer & 0x400 else sregs.cs.base)
        code = self._code(index, linear)
        return f"registers: {general}\n{control} cs={sregs.cs.selector:#x}\nbytes at RIP: {code}"

    def _code(self, index: int, linear: int) -> str:
        found = self.threads[index].vcpu.translate(linear)
        if found is None:
            return "not mapped"
        try:
            return self.memory.read(found, 16).hex(" ")
        except VmmError as error:
            return str(error)
