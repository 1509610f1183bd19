"""The whole machine moves: many vCPUs, what is in flight, interrupts without a VM, time. What must not move
is refused, with the guest unharmed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

import vmm.machine.hypervisor
import vmm.machine.machine
from tests.handover.rig import Rig, rig
from tests.native import need_native_instructions
from tests.patience import at_most
from vmm.boot.cpuid import KVM_FEATURES_LEAF, PV_UNHALT, CpuidEntry, guest_cpuid
from vmm.errors import HandoverError, StateError, VmmError
from vmm.kvm import Cap, IoctlError, MpState, Vcpu, Vm, abi, sized
from vmm.machine import kvm_state
from vmm.machine import lapic_state as lapic
from vmm.machine.cpuid_state import kept_cpuid
from vmm.machine.irqfd import FIRST_MSI
from vmm.machine.machine import Machine
from vmm.machine.runstate import RunState
from vmm.process import Options
from vmm.process.monitor import Monitor
from vmm.qmp.backend import QmpError
from vmm.report.results import CpuState

pytestmark = pytest.mark.kvm

SENTINEL = {"kernel": "sentinel", "testdev": True}
GSI = 10  # a line of the slave PIC that nothing drives
MSI_VECTOR = 0x66
MSI_ADDRESS = 0xFEE0_0000  # to APIC id 0, physical
NESTED_FORMAT_SVM, NESTED_GUEST_MODE, NESTED_GIF_SET = 1, 1 << 0, 1 << 8  # asm/kvm.h
EFER_SVME, CR4_VMXE = 1 << 12, 1 << 13
IA32_FEATURE_CONTROL, VMXON_ALLOWED = 0x3A, 5  # locked, outside SMX


def settled(one: Rig, turns: int = 60) -> None:
    """The guest runs with all its vCPUs, and took so many turns."""
    one.wait_for(lambda results: all(cpu.state is CpuState.RUNNING for cpu in results.cpus), 60.0)
    one.go_on(turns, 60.0)


# --- many vCPUs ---


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_nothing_is_lost_however_many_vcpus(cpus: int) -> None:
    with rig(**SENTINEL, cpus=cpus, append="pattern=4M") as one:
        settled(one)
        for _ in range(6):
            one.hand_over()
            one.go_on(turns=20, timeout_s=60.0)
        results = one.results()
        assert results.errors == 0
        assert len(results.cpus) == cpus


def test_sixteen_vcpus() -> None:
    """Without the checks of time: a vCPU here may stand still for longer than their periods."""
    with rig(**SENTINEL, cpus=16, append="pattern=4M skip=timer,hlt,pit") as one:
        settled(one, turns=20)
        for _ in range(2):
            one.hand_over()
            one.go_on(turns=5, timeout_s=60.0)
        assert one.results().errors == 0


def test_vcpus_that_are_being_started() -> None:
    """They wait for INIT and SIPI, and get them in the next VM; those may be on their way in a handover."""
    with rig(**SENTINEL, cpus=4, append="checks=cpus,ipi pattern=1M", paused=True) as one:
        one.hand_over()
        states = [state.sections["mp_state"].mp_state for state in one.machine.hypervisor.vcpu_states]
        assert states == [MpState.RUNNABLE, *3 * [MpState.UNINITIALIZED]]
        one.machine.cont()
        for _ in range(12):
            one.hand_over()
        settled(one)
        assert one.results().errors == 0


def test_vcpus_are_saved_only_when_all_have_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last one has, it can send the others interrupts."""
    stopped: list[int] = []
    at_save: list[int] = []
    look, save = kvm_state.VcpuState.look, kvm_state.VcpuState.save

    def note_stop(self: kvm_state.VcpuState, *how: Any) -> None:
        if self.vcpu.index == 0:
            time.sleep(0.05)
        look(self, *how)
        stopped.append(self.vcpu.index)

    def note_save(self: kvm_state.VcpuState) -> None:
        at_save.append(len(stopped))
        save(self)

    with rig(**SENTINEL, cpus=4, append="checks=counter pattern=1M") as one:
        settled(one)
        monkeypatch.setattr(kvm_state.VcpuState, "look", note_stop)
        # Of the new machine only the state at birth would be saved; that comes before.
        one.hand_over(built=lambda machine: monkeypatch.setattr(kvm_state.VcpuState, "save", note_save))
        assert at_save == [4, 4, 4, 4]


# --- a vCPU that does not stop ---

STOP_S = at_most(0.3)
IN_TIME = re.escape(f"within {STOP_S} s")
LATE = rf"1 vCPU threads did not answer {IN_TIME}"


@contextmanager
def held(machine: Machine, index: int) -> Iterator[None]:
    """That vCPU's thread is busy with something; afterwards it has done whatever it was given meanwhile."""
    thread, begun, over, done = (
        machine.threads[index],
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )

    def hold() -> None:
        begun.set()
        over.wait(at_most(20))

    thread.submit(hold)
    thread.kick()
    try:
        yield
    finally:
        over.set()
        thread.submit(done.set)
        thread.pause()
        assert begun.wait(at_most(20))
        assert done.wait(at_most(20))


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmm.machine.machine, "STOP_TIMEOUT_S", STOP_S)


@pytest.mark.usefixtures("with_irqfd", "_impatient")
def test_a_vcpu_that_stops_too_late_does_not_undo_the_roll_back() -> None:
    """What it was to do when all have stopped (release the eventfds) is not done any more."""
    one = paused_rig("kernel")
    try:
        with (
            held(one.machine, 0),
            pytest.raises(VmmError, match=LATE),
        ):
            one.hand_over()
        signal(one.machine)
        assert raised(one.machine)
        one.hand_over()
        assert raised(one.machine)
    finally:
        one.close()


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("late", [0, 1])
def test_the_guest_goes_on_after_a_vcpu_stopped_too_late(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late in the look at its timer, for which it runs the guest for a moment more."""
    over, tried = threading.Event(), threading.Event()
    look = kvm_state.VcpuState.look

    def dawdle(self: kvm_state.VcpuState, settle: Any, run_on: Any) -> None:
        if self.vcpu.index == late and not tried.is_set():
            over.wait(at_most(20))
            run_on()
            tried.set()
        look(self, settle, run_on)

    with rig(**SENTINEL, cpus=2, append="checks=counter,ipi pattern=1M") as one:
        settled(one)
        with monkeypatch.context() as patched:
            patched.setattr(kvm_state.VcpuState, "look", dawdle)
            with pytest.raises(VmmError, match=IN_TIME):
                one.hand_over()
            over.set()
            assert tried.wait(at_most(20))
        one.go_on(turns=100)
        one.hand_over()
        one.go_on(turns=20)
        assert one.results().errors == 0


def test_a_vcpu_that_fails_is_heard_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failed_s = []

    def fail(self: kvm_state.VcpuState, *how: Any) -> None:
        if self.vcpu.index == 1:
            failed_s.append(time.monotonic())
            raise StateError("this vCPU is to fail")

    with rig(**SENTINEL, cpus=3, append="checks=counter pattern=1M") as one:
        settled(one)
        with monkeypatch.context() as patched:
            patched.setattr(kvm_state.VcpuState, "look", fail)
            patched.setattr(vmm.machine.machine, "STOP_TIMEOUT_S", at_most(5.0))
            with pytest.raises(StateError, match="this vCPU is to fail"):
                one.hand_over()
        assert time.monotonic() - failed_s[0] < at_most(5.0) / 2
        one.go_on(turns=20)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    "call", [Machine.stop, Machine.inject_nmi, Machine.reset], ids=lambda one: one.__name__
)
def test_the_guest_runs_on_where_a_vcpu_does_not_stop(call: Callable[[Machine], object]) -> None:
    with rig(**SENTINEL, cpus=2, append="checks=counter pattern=1M") as one:
        settled(one)
        machine = one.machine
        over = threading.Event()
        machine.threads[0].submit(lambda: over.wait(at_most(20)) and None)
        with pytest.raises(VmmError, match=LATE):
            call(machine)
        over.set()
        assert machine.run_state is RunState.RUNNING
        one.go_on(turns=100)
        assert one.results().nmis <= 1  # the first vCPU has got none afterwards
        assert machine.reset_if_due() == (call is Machine.reset)


@pytest.mark.usefixtures("_impatient")
def test_the_monitor_says_that_a_vcpu_does_not_stop() -> None:
    with rig(**SENTINEL, append="checks=counter pattern=1M") as one:
        settled(one)
        guest: Any = SimpleNamespace(machine=one.machine)
        monitor = Monitor(Options(), guest, pytest.fail, pytest.fail)
        with held(one.machine, 0), pytest.raises(QmpError, match=LATE):
            monitor.stop()


# --- interrupts ---


def test_nmis_of_a_running_guest() -> None:
    with rig(**SENTINEL, cpus=2, append="checks=counter pattern=1M") as one:
        settled(one)
        for count in range(1, 4):
            one.machine.inject_nmi()
            one.wait_for(lambda results, count=count: results.nmis == 2 * count)  # type: ignore[misc]


@pytest.mark.parametrize("kept", [True, False], ids=["moved", "dropped"])
def test_an_nmi_that_waits(kept: bool) -> None:
    """Injected into a paused guest, it is pending when the guest moves; dropped, it never comes."""

    def drop(machine: Machine) -> None:
        machine.hypervisor.vcpu_states[0].sections["events"].nmi.pending = 0

    with rig(**SENTINEL, append="checks=counter pattern=1M") as one:
        settled(one)
        one.machine.stop()
        one.machine.inject_nmi()
        one.hand_over(saved=None if kept else drop)
        assert one.machine.run_state is RunState.PAUSED
        one.machine.cont()
        one.go_on()
        assert one.results().nmis == (1 if kept else 0)


@pytest.mark.parametrize("kept", [True, False], ids=["moved", "dropped"])
def test_what_needs_a_capability_to_be_enabled(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page fault that is pending, with the address that CR2 will have: the VM must have been told to show
    it, before the handover and after.
    """
    one = Rig(kernel="hello64", paused=True)
    try:
        if not one.machine.hypervisor.vm.check(Cap.EXCEPTION_PAYLOAD):
            pytest.skip("this kernel has no KVM_CAP_EXCEPTION_PAYLOAD (Linux 4.20)")
        events = abi.kvm_vcpu_events()
        one.machine.hypervisor.vcpus[0].get_events(events)
        events.flags |= abi.KVM_VCPUEVENT_VALID_PAYLOAD
        events.exception.pending, events.exception.nr = 1, 14
        events.exception.has_error_code, events.exception.error_code = 1, 2
        events.exception_has_payload, events.exception_payload = 1, 0x1234_5000
        one.machine.hypervisor.vcpus[0].set_events(events)
        if not kept:
            enable = Vm.enable_cap

            def enable_others(self: Vm, cap: Cap, *arguments: int) -> None:
                if cap != Cap.EXCEPTION_PAYLOAD:
                    enable(self, cap, *arguments)

            monkeypatch.setattr(Vm, "enable_cap", enable_others)
            with pytest.raises(IoctlError, match="KVM_SET_VCPU_EVENTS"):
                one.hand_over()
            return
        one.hand_over()
        one.machine.hypervisor.vcpus[0].get_events(events)
        assert (events.exception.pending, events.exception.nr) == (1, 14)
        assert (events.exception_has_payload, events.exception_payload) == (1, 0x1234_5000)
    finally:
        one.close()


def test_no_nmi_in_the_middle_of_a_handover() -> None:
    with rig(**SENTINEL, append="checks=counter pattern=1M") as one:
        settled(one)

        def inject(machine: Machine) -> None:
            with pytest.raises(VmmError, match="no NMI can be injected in run state finish-migrate"):
                machine.inject_nmi()

        one.hand_over(saved=inject)


def test_a_wake_up_that_is_due_in_the_pause() -> None:
    """The vCPU halts nearly always, until its timer comes. That is in the pause: it wakes late, and once."""
    with rig(**SENTINEL, append="checks=timer,hlt pattern=1M halt_us=20000 halt_every_us=0") as one:
        settled(one)
        halted = 0
        for _ in range(40):
            one.hand_over(saved=lambda machine: time.sleep(0.03))
            [state] = one.machine.hypervisor.vcpu_states
            halted += state.sections["mp_state"].mp_state == MpState.HALTED
            one.go_on(turns=10)
            if halted == 3:
                break
        assert one.results().errors == 0
        assert halted == 3


@pytest.fixture
def with_irqfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines with a device that is nothing but an eventfd: a line of the PIC or, with split, a message."""
    build = Machine._build_devices

    def build_more(machine: Machine, reactor: Any) -> None:
        build(machine, reactor)
        gsi = GSI
        if machine.config.irqchip == "split":
            gsi = FIRST_MSI
            machine.routes.route_msi(gsi, MSI_ADDRESS, MSI_VECTOR)
        machine.irqfds.open(0, gsi)

    monkeypatch.setattr(Machine, "_build_devices", build_more)


def signal(machine: Machine) -> None:
    os.eventfd_write(machine.fds.get("irqfd"), 1)


def raised(machine: Machine) -> bool:
    """Whether the interrupt has reached a chip. The kernel does it from a work queue."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if machine.config.irqchip == "split":
            state = abi.kvm_lapic_state()
            machine.hypervisor.vcpus[0].get_lapic(state)
            if lapic.read_register(state, lapic.REQUEST + MSI_VECTOR // 32 * 0x10) & 1 << MSI_VECTOR % 32:
                return True
        else:
            chip = abi.kvm_irqchip()
            machine.hypervisor.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_SLAVE, chip)
            if chip.chip.pic.irr & 1 << GSI - 8:
                return True
        time.sleep(0.005)
    return False


def enable_lapic(machine: Machine) -> None:
    state = abi.kvm_lapic_state()
    vcpu = machine.hypervisor.vcpus[0]
    vcpu.get_lapic(state)
    lapic.write_register(state, lapic.SPURIOUS, lapic.SOFTWARE_ENABLE | 0xFF)
    vcpu.set_lapic(state)


def paused_rig(irqchip: str) -> Rig:
    """A guest that stands still, so that what is raised stays where it is."""
    one = Rig(kernel="hello64", irqchip=irqchip, paused=True)
    if irqchip == "split":
        enable_lapic(one.machine)
    return one


@pytest.mark.usefixtures("with_irqfd")
@pytest.mark.parametrize("irqchip", ["kernel", "split"])
@pytest.mark.parametrize("when", ["offered", "saved", "loaded", "after"])
def test_an_eventfd_raises_its_interrupt_whenever_it_is_signalled(irqchip: str, when: str) -> None:
    """Before the handover, or while no VM listens: it is in the new VM then."""
    one = paused_rig(irqchip)
    try:
        assert not raised(one.machine)
        eventfd = one.machine.fds.get("irqfd")
        if when == "after":
            one.hand_over()
            signal(one.machine)
        else:
            one.hand_over(**{when: lambda _: os.eventfd_write(eventfd, 1)})
        assert raised(one.machine)
    finally:
        one.close()


@pytest.mark.usefixtures("with_irqfd")
def test_what_is_lost_of_an_eventfds_count_raises_nothing() -> None:
    one = paused_rig("kernel")
    try:

        def lose(machine: Machine) -> None:
            signal(machine)
            os.eventfd_read(machine.fds.get("irqfd"))

        one.hand_over(saved=lose)
        assert not raised(one.machine)
    finally:
        one.close()


@pytest.mark.usefixtures("with_irqfd")
@pytest.mark.parametrize("step", ["saved", "loaded"])
def test_an_eventfd_raises_its_interrupt_after_a_handover_that_failed(step: str) -> None:
    one = paused_rig("kernel")
    try:
        eventfd = one.machine.fds.get("irqfd")

        def fail(_: Machine) -> None:
            os.eventfd_write(eventfd, 1)
            raise RuntimeError("this handover is to fail")

        with pytest.raises(RuntimeError, match="to fail"):
            one.hand_over(**{step: fail})
        assert raised(one.machine)
        one.hand_over()
        assert raised(one.machine)
    finally:
        one.close()


@pytest.mark.usefixtures("with_irqfd")
def test_nobody_listens_before_the_old_vm_has_stopped_listening() -> None:
    """Where the kernel lets only one VM have an eventfd, the other order would fail."""
    one = paused_rig("kernel")
    seen: list[str] = []

    def try_early(new: Machine) -> None:
        eventfd = new.fds.get("irqfd")
        try:
            new.hypervisor.vm.assign_irqfd(eventfd, GSI)
        except IoctlError as error:
            seen.append(errno.errorcode[error.errno or 0])
        else:
            new.hypervisor.vm.deassign_irqfd(eventfd, GSI)
            seen.append("allowed")

    try:
        one.hand_over(built=try_early)
        assert seen in (["EBUSY"], ["allowed"])
        signal(one.machine)
        assert raised(one.machine)
    finally:
        one.close()


def test_a_message_moves() -> None:
    """KVM_SIGNAL_MSI to the LAPIC of a machine without other chips; requested, it moves with the LAPIC."""
    one = paused_rig("split")
    try:
        assert one.machine.hypervisor.vm.signal_msi(MSI_ADDRESS, MSI_VECTOR)
        one.hand_over()
        assert raised(one.machine)
    finally:
        one.close()


@pytest.mark.parametrize(("irqchip", "cpus"), [("split", 1), ("split", 4), ("none", 1)])
def test_machines_with_fewer_chips(irqchip: str, cpus: int) -> None:
    with rig(**SENTINEL, irqchip=irqchip, cpus=cpus, append="pattern=4M") as one:
        settled(one)
        for _ in range(5):
            one.hand_over()
            one.go_on(turns=20)
        assert one.results().errors == 0


def test_cr8_without_a_lapic_after_a_reset() -> None:
    """KVM_RUN takes it from the run page, which still has the guest's."""
    with rig(**SENTINEL, irqchip="none", append="checks=control pattern=1M") as one:
        settled(one)
        one.machine.stop()
        [vcpu], [thread] = one.machine.hypervisor.vcpus, one.machine.threads
        sregs, settles = abi.kvm_sregs(), SimpleQueue[None]()
        vcpu.get_sregs(sregs)
        assert sregs.cr8
        one.machine.reset()
        thread.submit(lambda: settles.put(thread.settle()))
        settles.get(timeout=at_most(20))
        vcpu.get_sregs(sregs)
        assert not sregs.cr8


# --- time ---


def test_kvmclock_does_not_drift() -> None:
    """Each handover misses by some nanoseconds; forty of them miss by no more."""
    with rig(**SENTINEL, append="checks=kvmclock pattern=1M") as one:
        settled(one)
        ahead = []
        for _ in range(40):
            one.hand_over()
            ahead.append(one.machine.hypervisor.clock.error_ns())
        one.go_on()
        assert one.results().errors == 0
        assert max(abs(ns) for ns in ahead) < 1_000  # measured: 15


def test_the_clock_goes_on_from_the_same_tsc() -> None:
    with rig(**SENTINEL, cpus=2, append="checks=tsc,tscsync pattern=1M") as one:
        settled(one)
        offsets = [tsc.section.offset for tsc in one.machine.hypervisor.tscs]
        for _ in range(5):
            one.hand_over()
            assert [vcpu.section.offset for vcpu in one.machine.hypervisor.tscs] == offsets
            one.machine.stop()
            assert [vcpu.tsc_offset for vcpu in one.machine.hypervisor.vcpus] == offsets
            one.machine.cont()


def test_a_deadline_set_before_the_mode_is_lost_and_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of loading matters: MSRs before the LAPIC, and KVM drops the TSC deadline."""
    order = [name for name in kvm_state.LOAD_ORDER if name != "msrs"]
    order.insert(order.index("lapic"), "msrs")
    with rig(**SENTINEL, append="checks=timer pattern=1M stall_ms=300") as one:
        settled(one)
        monkeypatch.setattr(kvm_state, "LOAD_ORDER", tuple(order))
        for _ in range(60):
            try:
                one.hand_over()
            except HandoverError:  # the guest has ended meanwhile
                break
            if one.end(timeout_s=0.1) is not None:
                break
        assert one.violation().startswith("timer ")


# --- what must not move ---


def offering(change: Callable[[CpuidEntry], CpuidEntry]) -> Callable[..., Sequence[CpuidEntry]]:
    def offer(*how: Any, **more: Any) -> tuple[CpuidEntry, ...]:
        return tuple(change(entry) for entry in guest_cpuid(*how, **more))

    return offer


def test_a_host_that_offers_less_does_not_get_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_cmov(entry: CpuidEntry) -> CpuidEntry:
        return replace(entry, edx=entry.edx & ~(1 << 15)) if entry.function == 1 else entry

    with rig(**SENTINEL, append="checks=cpuid pattern=1M") as one:
        settled(one)
        monkeypatch.setattr(vmm.machine.hypervisor, "guest_cpuid", offering(without_cmov))
        with pytest.raises(StateError, match=r"CPUID 0x1\.0\.EDX bits 0x8000"):
            one.hand_over()
        one.go_on()
        assert one.results().errors == 0


def test_a_guest_that_was_born_with_the_paravirtual_kick_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one does not get it; an old one is not to lose it."""

    def features(machine: Machine) -> int:
        entries = kept_cpuid(machine.arena, 0).entries
        return next(int(entry.eax) for entry in entries if entry.function == KVM_FEATURES_LEAF)

    def with_kick(*how: Any, **more: Any) -> Sequence[CpuidEntry]:
        return guest_cpuid(*how, **{**more, "pv_unhalt": True})

    with monkeypatch.context() as patched:
        patched.setattr(vmm.machine.hypervisor, "guest_cpuid", with_kick)
        one = Rig(kernel="sentinel", append="checks=cpuid pattern=1M")
    try:
        if not features(one.machine) & PV_UNHALT:
            pytest.skip("this KVM has no paravirtual kick")
        settled(one)
        one.hand_over()
        assert features(one.machine) & PV_UNHALT
        one.go_on()
    finally:
        one.close()
    with rig(kernel="sentinel", append="checks=cpuid pattern=1M") as new:
        assert not features(new.machine) & PV_UNHALT


def test_a_vmm_that_offers_more_does_not_change_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    def more(entry: CpuidEntry) -> CpuidEntry:
        if entry.function == 0x8000_0002:
            return replace(entry, eax=entry.eax ^ 1)
        return replace(entry, ebx=entry.ebx | 1 << 31) if entry.function == 7 else entry

    with rig(**SENTINEL, append="checks=cpuid pattern=1M") as one:
        settled(one)
        monkeypatch.setattr(vmm.machine.hypervisor, "guest_cpuid", offering(more))
        one.hand_over()
        one.go_on()
        assert one.results().errors == 0


def test_state_from_the_future_is_refused() -> None:
    def add(machine: Machine) -> None:
        machine.arena.place("vcpu/future", 0, abi.kvm_regs, 1)

    with rig(**SENTINEL, append="checks=counter pattern=1M") as one:
        settled(one)
        with pytest.raises(StateError, match=r"neither this VMM nor this host's KVM knows: vcpu/future/0"):
            one.hand_over(offered=add)
        one.go_on()


def test_an_msr_that_cannot_be_restored_is_refused_and_the_guest_goes_on() -> None:
    def damage(machine: Machine) -> None:
        """All ones in the first MSR that does not take it (an address that is not canonical, say)."""
        values = machine.hypervisor.vcpu_states[0].sections["msrs"]
        vcpu = machine.hypervisor.vcpus[0]
        single = type(values)(nmsrs=1)
        for entry in values.entries:
            single.entries[0] = abi.kvm_msr_entry(index=entry.index, data=2**64 - 1)
            if not vcpu.set_msrs(single):
                entry.data = 2**64 - 1
                return
            single.entries[0].data = entry.data
            assert vcpu.set_msrs(single) == 1
        raise AssertionError("every MSR takes all ones here")

    with rig(**SENTINEL, append="checks=counter,msr pattern=1M") as one:
        settled(one)
        with pytest.raises(StateError, match=r"vCPU 0: MSR 0x\w+ cannot be restored to 0xffffffffffffffff"):
            one.hand_over(saved=damage)
        one.go_on()
        one.hand_over()
        one.go_on()
        assert one.results().errors == 0


def test_a_handover_that_fails_late_loses_nothing() -> None:
    def fail(_: Machine) -> None:
        raise RuntimeError("this handover is to fail")

    with rig(**SENTINEL, cpus=2, append="pattern=4M") as one:
        settled(one)
        for step in ("built", "saved", "loaded") * 4:
            with pytest.raises(RuntimeError, match="to fail"):
                one.hand_over(**{step: fail})
            one.go_on(turns=20)
        assert one.results().errors == 0


@pytest.mark.lab
@pytest.mark.parametrize("cpus", [1, 2])
def test_native_instructions_go_on(cpus: int) -> None:
    need_native_instructions()
    append = "checks=counter,x87,xmm,ymm,registers,control,debug,tsc,tscsync,kvmclock,ipi fpu=1 pattern=4M"
    with rig(**SENTINEL, cpus=cpus, append=append) as one:
        settled(one, turns=1000)
        for _ in range(5):
            one.hand_over()
            one.go_on(turns=1000, timeout_s=60.0)
        assert one.results().errors == 0


def test_a_guest_that_was_moved_can_be_reset() -> None:
    with rig(**SENTINEL, cpus=2, append="checks=counter,lapic,pic,ioapic,msr pattern=1M") as one:
        settled(one)
        one.hand_over()
        first_tsc = one.results().start_tsc
        one.machine.reset()
        one.wait_for(lambda results: results.start_tsc > first_tsc)
        settled(one)
        assert one.results().errors == 0


def enter_guest(vcpu: Vcpu, state: Any) -> None:
    """A vCPU's nested state, `state` being as yet untouched: it runs a guest (SVM), or did VMXON (VMX)."""
    sregs = abi.kvm_sregs2()
    vcpu.get_sregs2(sregs)
    if state.format != NESTED_FORMAT_SVM:
        sregs.cr4 |= CR4_VMXE
        vcpu.set_sregs2(sregs)
        msr = sized(abi.kvm_msrs, 1)(nmsrs=1)
        msr.entries[0] = abi.kvm_msr_entry(index=IA32_FEATURE_CONTROL, data=VMXON_ALLOWED)
        assert vcpu.set_msrs(msr) == 1
        state.hdr.vmx.vmxon_pa = 0x1000
        vcpu.set_nested_state(state)
        return
    sregs.efer |= EFER_SVME
    vcpu.set_sregs2(sregs)
    state.flags |= NESTED_GUEST_MODE
    state.size = ctypes.sizeof(state)
    state.hdr.svm.vmcb_pa = 0x1000
    for offset, value in (  # AMD64 APM vol. 2, appendix B
        (0x10, 1),  # VMRUN is intercepted
        (0x58, 1),  # ASID
        (0x464, 0x77),  # limit of GDTR
        (0x484, 0x77),  # and IDTR
        (0x4D0, EFER_SVME),
        (0x558, 0x8000_0011),  # CR0: PG, ET, PE
        (0x570, 2),  # RFLAGS
    ):
        ctypes.c_uint32.from_buffer(state.data, offset).value = value
    vcpu.set_nested_state(state)


@pytest.mark.lab
def test_a_reset_of_a_guest_that_has_a_guest() -> None:
    with rig(**SENTINEL, append="checks=counter,control pattern=1M") as one:
        settled(one)
        one.machine.stop()
        hypervisor = one.machine.hypervisor
        [vcpu] = hypervisor.vcpus
        if "nested" not in hypervisor.vcpu_states[0].sections:
            pytest.skip("this KVM has no nested state: its guests run no guests")
        state = type(hypervisor.vcpu_states[0].sections["nested"])()

        def look() -> bytes:
            state.size = ctypes.sizeof(state)
            vcpu.get_nested_state(state)
            return bytes(state)

        before = look()
        enter_guest(vcpu, state)
        assert look() != before
        hypervisor.restore_birth_state()
        look()
        born, sregs = hypervisor._fresh_vcpus[0].sections, abi.kvm_sregs2()
        vcpu.get_sregs2(sregs)
        assert not state.flags & NESTED_GUEST_MODE
        assert bytes(state)[:128] == bytes(born["nested"])[:128]
        assert bytes(sregs) == bytes(born["sregs2"])
        first_tsc = one.results().start_tsc
        one.machine.reset()
        one.machine.cont()
        one.wait_for(lambda results: results.start_tsc > first_tsc)
        settled(one)
        assert one.results().errors == 0
