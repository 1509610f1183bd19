"""For every piece of state: lost or damaged on the way, somebody notices.
The rows are those of docs/state.md.

A piece is dropped by giving it the value that it had at the machine's birth, which is what a new VM has where
nobody loads anything. Each guest runs with the one check that is to notice.
"""

from __future__ import annotations

import ctypes
import os
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import pytest

from tests.guests.running import symbol
from tests.handover.rig import NoReactor, Rig, Step, rig
from tests.native import need_native_instructions
from tests.patience import at_most
from vmm.boot.image import find_image
from vmm.errors import GuestCrash, StateError
from vmm.kvm import MpState, Vcpu, abi
from vmm.machine import lapic_state as lapic
from vmm.machine.config import kept_config
from vmm.machine.cpuid_state import kept_cpuid
from vmm.machine.lapic_state import INITIAL_COUNT, LVT_TIMER, write_register
from vmm.machine.machine import Machine
from vmm.machine.msr_state import MsrState
from vmm.machine.vcpu_thread import VcpuThread
from vmm.state import Arena, Section

pytestmark = pytest.mark.kvm

STALL = "stall_ms=300"
NOTICED_S = 15.0
CRASH = "crash"
WALL_CLOCK = 0x4B56_4D00  # MSR_KVM_WALL_CLOCK_NEW, which the check writes
EXCEPTION = f"debug-exit with status {101 << 1 | 1}"  # one that sentinel did not ask for


def content(arena: Arena, section: Section) -> memoryview:
    """The bytes of a section, in place."""
    whole = arena.place(section.name, section.instance, ctypes.c_ubyte * section.size, section.version)
    return memoryview(whole).cast("B")


def at_birth(*names: str) -> Step:
    """These sections as they were when the machine was made."""

    def drop(machine: Machine) -> None:
        fresh = Arena(machine.fds.get("fresh"), create=False)
        dropped = [section for section in machine.arena if section.name in names]
        assert dropped
        for section in dropped:
            born = fresh.find(section.name, section.instance)
            assert born is not None
            content(machine.arena, section)[:] = content(fresh, born)

    return drop


def changed(name: str, change: Callable[[Any], object]) -> Step:
    """That piece of every vCPU, changed."""

    def damage(machine: Machine) -> None:
        for state in machine.hypervisor.vcpu_states:
            change(state.sections[name])

    return damage


def cleared(*names: str) -> Step:
    """Sections of devices, all zeros."""

    def clear(machine: Machine) -> None:
        for section in machine.arena:
            if section.name in names:
                content(machine.arena, section)[:] = bytes(section.size)

    return clear


def set_to(**values: int) -> Callable[[Any], None]:
    def change(section: Any) -> None:
        for field, value in values.items():
            setattr(section, field, value)

    return change


def no_timer(section: Any) -> None:
    write_register(section.registers, INITIAL_COUNT, 0)
    write_register(section.registers, LVT_TIMER, 1 << 16)


def other_apic_base(sregs: Any) -> None:
    sregs.apic_base ^= 1 << 8  # the flag of the first processor


def no_requests(section: Any) -> None:
    for at in range(0x200, 0x280, 0x10):
        write_register(section.registers, at, 0)


def no_wall_clock(section: Any) -> None:
    [entry] = [entry for entry in section.entries if entry.index == WALL_CLOCK]
    assert entry.data
    entry.data = 0


def no_clock_line(machine: Machine) -> None:
    machine.hypervisor.clock.line.over = 0


def no_tsc_offset(machine: Machine) -> None:
    for tsc in machine.hypervisor.tscs:
        tsc.section.has_offset = 0


def tsc_ahead(machine: Machine) -> None:
    """By 20 ms: no step back, but away from kvmclock."""
    for tsc in machine.hypervisor.tscs:
        tsc.section.offset = (tsc.section.offset + 20 * tsc.section.khz) % (1 << 64)


def other_pattern(machine: Machine) -> None:
    for gpa in range(0x400000, 0x800000, 0x1000):  # firmware/README.md: the first 4 MiB of sentinel's pattern
        machine.memory.write(gpa, b"\xa5" * 16)


def other_cpuid(machine: Machine) -> None:
    """The brand string, which is no feature: nothing but the guest can tell."""
    for index in range(machine.config.cpus):
        for entry in kept_cpuid(machine.arena, index).entries:
            if entry.function == 0x8000_0002:
                entry.eax ^= 1


@dataclass(frozen=True)
class Row:
    """What is damaged, when, and which check of sentinel's notices."""

    piece: str
    check: str
    damage: Step
    when: tuple[str, ...] = ("saved",)
    cpus: int = 1
    options: str = ""
    irqchip: str = "kernel"
    handovers: int = 1
    crash: bool = False  # or the guest ends as a crash

    def __str__(self) -> str:
        return f"{self.piece}-{self.check}"


ROWS = (
    Row("ram", "pattern", other_pattern),
    Row("cpuid", "cpuid", other_cpuid, when=("offered",)),
    Row("kvmclock", "kvmclock", no_clock_line, when=("offered",)),
    Row("pic-master", "pic", at_birth("vm/pic-master")),
    Row("pic-slave", "pic", at_birth("vm/pic-slave")),
    Row("ioapic", "ioapic", at_birth("vm/ioapic")),
    Row("pit2", "pit", at_birth("vm/pit2")),
    Row("regs", "registers", at_birth("vcpu/regs"), crash=True),
    Row("sregs2", "control", changed("sregs2", set_to(cr2=0x1234_5000))),
    Row("sregs2-idt", "control", changed("sregs2", lambda sregs: set_to(limit=0xFFE)(sregs.idt))),
    Row("sregs2-gdt", "control", changed("sregs2", lambda sregs: set_to(limit=0xFFF)(sregs.gdt))),
    Row("sregs2-cr8", "control", changed("sregs2", set_to(cr8=0)), irqchip="none", handovers=5),
    Row("sregs2-apic-base", "msr", changed("sregs2", other_apic_base)),
    Row("xsave", "xmm", at_birth("vcpu/xsave")),
    Row("xsave", "x87", at_birth("vcpu/xsave")),
    Row("debugregs", "debug", at_birth("vcpu/debugregs")),
    Row("msrs", "msr", at_birth("vcpu/msrs")),
    Row("msrs", "mtrr", at_birth("vcpu/msrs")),
    Row("msrs-wall-clock", "kvmclock", changed("msrs", no_wall_clock)),
    Row("lapic", "lapic", at_birth("vcpu/lapic")),
    Row("lapic-timer", "timer", changed("lapic", no_timer), options=STALL),
    Row("mp_state", "cpus", at_birth("vcpu/mp_state"), cpus=2, options=STALL),
    Row("testdev", "pio", cleared("testdev")),
    Row("testdev", "mmio", cleared("testdev")),
    Row("testdev", "posted", cleared("testdev")),
    Row("serial", "ports", cleared("serial")),
    Row("reset", "ports", cleared("reset"), handovers=30),
)


def noticed(one: Rig, row: Row) -> str:
    """Which check noticed, after as many handovers as it may take."""
    for _ in range(row.handovers):
        one.hand_over(**dict.fromkeys(row.when, row.damage))
        if found := finding(one, NOTICED_S if row.handovers == 1 else 0.02):
            return found
    return finding(one, 1.0) or "nobody"


def finding(one: Rig, timeout_s: float) -> str:
    """What the guest found within that time, or how it ended; empty if neither."""
    deadline = time.monotonic() + at_most(timeout_s)
    while not (found := one.violation()):
        if (end := one.end(timeout_s=0.01)) is not None:
            found = one.violation()
            return found or (CRASH if isinstance(end, GuestCrash) or end == EXCEPTION else str(end))
        if time.monotonic() > deadline:
            break
    return found


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_loss_is_noticed(row: Row) -> None:
    append = f"checks={row.check} pattern=4M {row.options}"
    with rig(kernel="sentinel", append=append, cpus=row.cpus, irqchip=row.irqchip, testdev=True) as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        seen = noticed(one, row)
        assert seen.startswith(f"{row.check} ") or (row.crash and seen == CRASH), seen


def test_a_lost_interrupt_request_is_noticed() -> None:
    """One vCPU stands still until the other has sent it an interrupt; that is dropped."""
    row = Row("lapic-requests", "ipi", changed("lapic", no_requests))
    with rig(kernel="sentinel", append="checks=ipi pattern=4M stall_ms=2000", cpus=2) as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        one.machine.threads[1].pause()
        time.sleep(0.1)
        assert noticed(one, row).startswith("ipi ")


def test_a_halted_vcpu_that_goes_on_is_noticed() -> None:
    """It is loaded as one that runs, and no interrupt comes that would wake it."""

    def wake(machine: Machine) -> None:
        changed("mp_state", set_to(mp_state=MpState.RUNNABLE))(machine)
        changed("lapic", no_timer)(machine)
        changed("lapic", no_requests)(machine)

    with rig(kernel="sentinel", append="checks=timer,hlt pattern=1M") as one:
        one.wait_for(lambda results: True)
        deadline = time.monotonic() + at_most(30.0)
        while True:
            one.machine.stop()
            state = abi.kvm_mp_state()
            one.machine.hypervisor.vcpus[0].get_mp_state(state)
            if state.mp_state == MpState.HALTED:
                break
            assert time.monotonic() < deadline
            one.machine.cont()
            time.sleep(0.0005)
        one.hand_over(saved=wake)
        one.machine.cont()
        assert finding(one, NOTICED_S).startswith("hlt ")


@pytest.fixture
def _exits_left_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VMM that saves a vCPU without having KVM complete its last exit."""
    serve = VcpuThread._serve

    class NeverRuns:
        def __init__(self, vcpu: Any) -> None:
            object.__setattr__(self, "_vcpu", vcpu)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._vcpu, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self._vcpu, name, value)

        def run(self) -> bool:
            return False if self._vcpu.immediate_exit else self._vcpu.run()

    def serve_without_end(self: VcpuThread) -> None:
        vcpu = self.vcpu
        self.vcpu = NeverRuns(vcpu)  # type: ignore[assignment]
        try:
            serve(self)
        finally:
            self.vcpu = vcpu

    monkeypatch.setattr(VcpuThread, "_serve", serve_without_end)


@pytest.mark.usefixtures("_exits_left_half_done")
def test_string_io_left_half_done_is_noticed() -> None:
    row = Row("exit", "pio", lambda machine: None, handovers=200)
    with rig(kernel="sentinel", append="checks=pio pattern=4M", testdev=True) as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        assert noticed(one, row).startswith("pio ")


@pytest.mark.usefixtures("_exits_left_half_done")
def test_memory_io_left_half_done_is_noticed() -> None:
    row = Row("exit", "mmio", lambda machine: None, handovers=200)
    with rig(kernel="sentinel", append="checks=mmio pattern=4M", testdev=True) as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        assert noticed(one, row).startswith("mmio ")


def test_a_changed_register_is_noticed() -> None:
    """Changed while nothing but the check relies on it."""
    start = symbol(find_image("sentinel"), "registers.S", "registers_hold")
    regs = abi.kvm_regs()

    def holds(machine: Machine) -> bool:
        machine.hypervisor.vcpus[0].get_regs(regs)
        filled = (regs.r15 - regs.rbp) % 2**64 == 13 * 0x1111  # the last one that is
        return start < regs.rip < start + 0x200 and regs.rcx in range(1, 9) and filled

    with rig(kernel="sentinel", append="checks=registers pattern=1M") as one:
        one.wait_for(lambda results: True)
        deadline = time.monotonic() + at_most(30.0)
        one.machine.stop()
        while not holds(one.machine):
            assert time.monotonic() < deadline
            one.machine.cont()
            time.sleep(0.0005)
            one.machine.stop()
        one.hand_over(saved=changed("regs", set_to(r15=regs.r15 ^ 1 << 40)))
        one.machine.cont()
        assert finding(one, NOTICED_S).startswith("registers ")


def test_a_periodic_timer_that_comes_too_rarely_is_noticed() -> None:
    """Every four seconds: none is early and none is due for long, but they are too few."""
    registers = abi.kvm_lapic_state()

    def is_periodic(machine: Machine) -> bool:
        machine.hypervisor.vcpus[0].get_lapic(registers)
        return lapic.timer_mode(registers) is lapic.TimerMode.PERIODIC

    def slow_down(machine: Machine) -> None:
        [state] = machine.hypervisor.vcpu_states
        write_register(state.sections["lapic"].registers, INITIAL_COUNT, 4_000_000_000)

    with rig(kernel="sentinel", append="checks=timer pattern=1M gap_us=5000") as one:
        one.wait_for(lambda results: True)
        deadline = time.monotonic() + at_most(30.0)
        one.machine.stop()
        while not is_periodic(one.machine):
            assert time.monotonic() < deadline
            one.machine.cont()
            time.sleep(0.1)
            one.machine.stop()
        one.hand_over(saved=slow_down)
        before = one.results().cpus[0]
        one.machine.cont()
        found = finding(one, NOTICED_S)
        results = one.results()
        [after] = results.cpus
        gaps, cycles = after.gap_count - before.gap_count, after.gap_cycles - before.gap_cycles
        due = (after.last_tsc - before.last_tsc) / (20 * results.tsc_khz)  # every 20 ms
        if not found and gaps + cycles / (20 * results.tsc_khz) > due / 2:
            pytest.skip(
                f"the vCPU stood still {gaps} times in {due:.0f} periods, and each may have hidden one"
            )
        assert found.startswith("timer ")
        assert found.endswith("where 0x3")


def test_what_kvm_writes_to_its_wall_clock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes when it is told the address; what the guest had there is not put back."""
    monkeypatch.setattr(MsrState, "_read_ram", lambda self, gpa: b"")
    with rig(kernel="sentinel", append="checks=kvmclock pattern=1M") as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        one.hand_over()
        found = finding(one, NOTICED_S)
        assert found.startswith("kvmclock ")
        assert found.endswith("where 0x5")


def test_a_lost_nmi_is_noticed() -> None:
    """One vCPU stands still until the other has sent it an NMI; that is dropped."""

    def drop(machine: Machine) -> None:
        pending = [state.sections["events"].nmi.pending for state in machine.hypervisor.vcpu_states]
        assert pending[1]
        changed("events", lambda events: set_to(pending=0)(events.nmi))(machine)

    with rig(kernel="sentinel", append="checks=nmi pattern=4M stall_ms=2000", cpus=2) as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        one.machine.threads[1].pause()
        time.sleep(0.1)
        assert noticed(one, Row("events", "nmi", drop)).startswith("nmi ")


# --- what is about to happen ---

SCRATCH = 0x3FF  # of COM1: read by check_exception.c and check_shadow.c, and here by nobody else
IN_AL_DX = b"\xec"
SHADOW_VECTOR = 0x42  # firmware/include/interrupt.h
DEBUG_EXCEPTION = 1
SHADOW_INT_STI = 2  # KVM_X86_SHADOW_INT_STI, asm/kvm.h
RFLAGS_IF, DR6_BS = 1 << 9, 1 << 14


class StopsAt:
    """The ports, on which a read of one makes the vCPU stop once it is done."""

    def __init__(self, thread: VcpuThread, port: int) -> None:
        self.stopped = threading.Event()
        self._thread, self._port, self._pio = thread, port, thread._pio
        thread._pio = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pio, name)

    def read(self, address: int, size: int) -> bytes:
        if address == self._port:
            self._thread.stop_after_exit()
            self.stopped.set()
        return self._pio.read(address, size)


def stop_at_scratch(one: Rig) -> Vcpu:
    """The vCPU, after the one instruction of a check that reads there: what it leads to is still to come."""
    [thread] = one.machine.threads
    assert StopsAt(thread, SCRATCH).stopped.wait(at_most(20))
    on_thread(thread, lambda: None)
    regs = abi.kvm_regs()
    thread.vcpu.get_regs(regs)
    assert one.machine.memory.read(regs.rip - 1, 1) == IN_AL_DX
    return thread.vcpu


def on_thread(thread: VcpuThread, job: Callable[[], object]) -> None:
    """Have a vCPU's thread do that, after what it does now."""
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def report() -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 -- raised by the caller
            done.put(error)
        else:
            done.put(None)

    thread.submit(report)
    if (error := done.get(timeout=at_most(20))) is not None:
        raise error


def begin_delivery(one: Rig, vcpu: Vcpu) -> None:
    """Have KVM begin to deliver what waits, and be called off by a signal: it is injected then. (Where the
    processor tells KVM when an interrupt can be taken, KVM looks before that only after its events were set.)
    """
    [thread] = one.machine.threads
    events = abi.kvm_vcpu_events()
    vcpu.get_events(events)
    vcpu.set_events(events)
    on_thread(thread, thread.settle)


def back_into_shadow(one: Rig, vcpu: Vcpu) -> None:
    """To the state between STI and the instruction after it, which has changed nothing but AL."""
    regs, events = abi.kvm_regs(), abi.kvm_vcpu_events()
    vcpu.get_regs(regs)
    vcpu.get_events(events)
    assert regs.rflags & RFLAGS_IF
    assert not events.interrupt.shadow
    regs.rip -= len(IN_AL_DX)
    events.interrupt.shadow = SHADOW_INT_STI
    events.flags |= abi.KVM_VCPUEVENT_VALID_SHADOW
    vcpu.set_regs(regs)
    vcpu.set_events(events)
    vcpu.get_events(events)
    if not events.interrupt.shadow & SHADOW_INT_STI:
        pytest.skip("this KVM does not keep an interrupt shadow between two ioctls")


def requested(events: Any, lapic_section: Any) -> bool:
    return bool(
        lapic.read_register(lapic_section.registers, lapic.REQUEST + SHADOW_VECTOR // 32 * 0x10)
        & 1 << SHADOW_VECTOR % 32
    )


def no_exception(events: Any) -> None:
    events.exception.pending = events.exception.injected = events.exception_has_payload = 0


def no_payload(events: Any) -> None:
    events.exception_has_payload = 0


def no_interrupt(events: Any) -> None:
    events.interrupt.injected = 0


def no_shadow(events: Any) -> None:
    events.interrupt.shadow = 0


@dataclass(frozen=True)
class Event:
    """Something that is about to happen: the check that waits for it, how the vCPU gets there, how KVM then
    says so, what is lost, and where the check says that it notices.
    """

    check: str
    arrange: Callable[[Rig, Vcpu], object] | None
    is_there: Callable[[Any, Any], bool]  # given the sections of events and LAPIC
    loss: Callable[[Any], object]
    where: int


EVENTS = {
    "exception-pending": Event(
        "exception",
        None,
        lambda events, _: (events.exception.pending, events.exception.nr) == (1, DEBUG_EXCEPTION),
        no_exception,
        where=1,  # it comes after the next instruction: TF is still set
    ),
    "exception-payload": Event(
        "exception",
        None,
        lambda events, _: (events.exception_has_payload, events.exception_payload) == (1, DR6_BS),
        no_payload,
        where=2,
    ),
    "exception-injected": Event(
        "exception",
        begin_delivery,
        lambda events, _: (events.exception.injected, events.exception.nr) == (1, DEBUG_EXCEPTION),
        no_exception,
        where=1,
    ),
    "interrupt-injected": Event(
        "shadow",
        begin_delivery,
        lambda events, lapic_section: (
            (events.interrupt.injected, events.interrupt.nr) == (1, SHADOW_VECTOR)
            and not requested(events, lapic_section)
        ),
        no_interrupt,
        where=0,
    ),
    "interrupt-shadow": Event(
        "shadow",
        back_into_shadow,
        lambda events, lapic_section: (
            bool(events.interrupt.shadow & SHADOW_INT_STI) and requested(events, lapic_section)
        ),
        no_shadow,
        where=1,
    ),
}


@pytest.mark.parametrize("kept", [True, False], ids=["moved", "dropped"])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_what_is_about_to_happen(event: Event, kept: bool) -> None:
    """It happens after the handover, and where it is lost, the check notices."""

    def look(machine: Machine) -> None:
        [state] = machine.hypervisor.vcpu_states
        events, lapic_section = state.sections["events"], state.sections["lapic"]
        assert event.is_there(events, lapic_section)
        if not kept:
            event.loss(events)
            assert not event.is_there(events, lapic_section)

    with rig(kernel="sentinel", append=f"checks={event.check} pattern=1M {STALL}") as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=20)
        for _ in range(3 if kept else 1):
            vcpu = stop_at_scratch(one)
            if event.arrange is not None:
                event.arrange(one, vcpu)
            one.hand_over(saved=look)
            if kept:
                one.go_on(turns=20)
        if kept:
            assert one.results().errors == 0
        else:
            found = finding(one, NOTICED_S)
            assert found.startswith(f"{event.check} ")
            assert found.endswith(f"where {event.where:#x}")


# --- what a guest does not see, but whoever has it next ---


def test_an_msr_that_only_can_be_read_is_compared() -> None:
    def change(machine: Machine) -> None:
        for section in machine.arena:
            if section.name == "vcpu/msrs-fixed":
                value = content(machine.arena, section)
                if len(value) < 24:  # struct kvm_msrs with one entry, whose value is its last 8 bytes
                    pytest.skip("every MSR of this KVM can be set")
                value[-1] ^= 1

    with rig(kernel="sentinel", append="checks=counter pattern=1M") as one:
        one.wait_for(lambda results: True)
        with pytest.raises(StateError, match=r"MSR 0x\w+ is 0x\w+ in the guest and 0x\w+ on this host"):
            one.hand_over(saved=change)
        one.go_on()


@pytest.mark.parametrize("kept", [True, False], ids=["moved", "dropped"])
def test_a_reset_that_is_asked_for_meanwhile(kept: bool) -> None:
    def ask(machine: Machine) -> None:
        assert not machine.reset()
        if not kept:
            cleared("machine")(machine)

    with rig(kernel="sentinel", append="checks=counter pattern=1M") as one:
        first = one.wait_for(lambda results: True).start_tsc
        one.hand_over(saved=ask)
        if kept:
            one.wait_for(lambda results: results.start_tsc != first)
        else:
            one.go_on()
        assert (one.results().start_tsc != first) == kept


@pytest.mark.parametrize("kept", [True, False], ids=["moved", "dropped"])
def test_what_a_guest_is_told_after_a_reset(kept: bool) -> None:
    """The frequency of its TSC: a VMM does not ask KVM again."""
    with rig(kernel="sentinel", append="checks=counter pattern=1M") as one:
        first = one.wait_for(lambda results: True)
        one.hand_over(offered=None if kept else cleared("hypervisor"))
        assert (one.machine.hypervisor.facts.tsc_khz == first.tsc_khz) == kept


class DeafReactor(NoReactor):
    """An event loop that never calls: nobody types at the terminal."""

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> None:
        pass

    def remove_reader(self, fd: int, /) -> None:
        pass

    def add_writer(self, fd: int, callback: Callable[[], object], /) -> None:
        pass

    def remove_writer(self, fd: int, /) -> None:
        pass


@contextmanager
def as_terminal() -> Iterator[int]:
    """A terminal that is this process's stdin and stdout."""
    master, slave = os.openpty()
    kept = [os.dup(fd) for fd in (0, 1)]
    try:
        for fd in (0, 1):
            os.dup2(slave, fd)
        yield slave
    finally:
        for fd, original in enumerate(kept):
            os.dup2(original, fd)
        for fd in (master, slave, *kept):
            os.close(fd)


@pytest.mark.parametrize("kept", [True, False], ids=["moved", "dropped"])
def test_the_mode_that_a_terminal_had(kept: bool) -> None:
    """The VMM that ends the guest gives it back. Lost, it is taken for what the last VMM had made of it."""
    with as_terminal() as terminal:
        before = termios.tcgetattr(terminal)
        append = "checks=counter pattern=1M"
        with rig(kernel="sentinel", append=append, serial="stdio", reactor=DeafReactor()) as one:
            one.wait_for(lambda results: True)
            raw = termios.tcgetattr(terminal)
            assert raw != before
            one.hand_over(saved=None if kept else cleared("chardev"))
            one.go_on(turns=20)
            assert termios.tcgetattr(terminal) == raw
        assert termios.tcgetattr(terminal) == (before if kept else raw)


def test_damaged_state_at_birth_is_refused() -> None:
    def damage(machine: Machine) -> None:
        fresh = Arena(machine.fds.get("fresh"), create=False)
        for section in fresh:
            if section.name == "vcpu/msrs":
                content(fresh, section)[:] = bytes(section.size)

    with rig(kernel="sentinel", append="checks=counter pattern=1M") as one:
        one.wait_for(lambda results: True)
        with pytest.raises(StateError, match=r"vcpu/msrs/0: it counts 0 MSRs"):
            one.hand_over(offered=damage)
        one.go_on()


def test_a_lost_configuration_is_refused() -> None:
    with rig(kernel="sentinel", append="checks=counter pattern=1M") as one:
        assert kept_config(one.machine.arena).kernel == "sentinel"
        cleared("config")(one.machine)
        with pytest.raises(StateError, match="no machine configuration in it"):
            kept_config(one.machine.arena)


@pytest.mark.lab
@pytest.mark.parametrize(
    "row",
    [
        Row("xsave", "ymm", at_birth("vcpu/xsave")),
        Row("xcrs", "ymm", at_birth("vcpu/xcrs"), crash=True),
        Row("tsc", "tsc", no_tsc_offset, when=("offered", "saved")),
        Row("tsc-ahead", "kvmclock", tsc_ahead),
    ],
    ids=str,
)
def test_a_loss_is_noticed_by_native_instructions(row: Row) -> None:
    need_native_instructions()
    with rig(kernel="sentinel", append=f"checks={row.check} fpu=1 pattern=4M", testdev=True) as one:
        one.wait_for(lambda results: True)
        one.go_on(turns=100)
        seen = noticed(one, row)
        assert seen.startswith(f"{row.check} ") or (row.crash and seen == CRASH), seen
