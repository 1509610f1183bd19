"""The state of vCPUs and chips from one VM to the next, by the classes that a handover uses; no guest runs.

Times on CLOCK_MONOTONIC, which is what KVM's own timers count on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.kvm.real_mode import ENTRY, Ram, ram_of
from tests.native import need_native_instructions
from vmm.boot.cpuid import cpuid_table, guest_cpuid
from vmm.fds import FdStore
from vmm.kvm import Cap, Exit, IoctlError, MpState, System, Vcpu, Vm, abi
from vmm.machine import lapic_state as lapic
from vmm.machine.kvm_state import VcpuFacts, VcpuState, VmState, vm_pieces
from vmm.machine.msr_state import IA32_DEBUGCTL, IA32_TSC, WALL_CLOCKS, MsrList, guest_msrs
from vmm.machine.tsc_state import TscState
from vmm.state import Arena

pytestmark = pytest.mark.kvm

MS = 1_000_000
TIMER_VECTOR = 0x51
MSR_TSC_DEADLINE = 0x6E0
DEBUGCTL_LBR, DEBUGCTL_BTF = 1 << 0, 1 << 1
OFF_NS = 5 * MS  # what a reading here may miss by on a busy host; undisturbed, 20 µs
SLOW_NS = 50_000
NESTED_FORMAT_SVM, NESTED_GIF_SET, EFER_SVME = 1, 1 << 8, 1 << 12  # asm/kvm.h; AMD64 APM vol. 2, 3.1.7
SPIV_ENABLED = lapic.SOFTWARE_ENABLE | 0xFF


class Side:
    """A VM with its vCPUs, on a state memfd that it shares with others."""

    def __init__(self, arena: Arena, ram: Ram, cpus: int = 1) -> None:
        self.ram = ram
        with ExitStack() as stack:
            self.system = stack.enter_context(System())
            self.vm: Vm = stack.enter_context(self.system.create_vm())
            self.vm.set_tss_address()
            self.vm.set_identity_map()
            for cap in (Cap.EXCEPTION_PAYLOAD, Cap.X86_TRIPLE_FAULT_EVENT):
                if self.vm.check(cap):
                    self.vm.enable_cap(cap, 0, 1)
            ram.give(self.vm)  # entering KVM_RUN, if only to leave it, wants some
            self.vm.create_irqchip()
            self.vm.create_pit()
            self.vcpus: list[Vcpu] = [stack.enter_context(self.vm.create_vcpu(n)) for n in range(cpus)]
            block = self.system.supported_cpuid()
            supported = block.entries[: block.nent]
            for vcpu in self.vcpus:
                vcpu.set_cpuid(cpuid_table(guest_cpuid(supported, vcpu.index, cpus, tsc_deadline=True)))
                vcpu.bind_thread()
            nested = self.vm.check(Cap.NESTED_STATE)
            facts = VcpuFacts(self.vm.check, self.vm.xsave_size, True, nested)
            msrs = MsrList.probe(self.vcpus[0], guest_msrs(self.system, self.vcpus[0]))
            self.states = [VcpuState(arena, vcpu, facts, msrs, ram) for vcpu in self.vcpus]
            self.tscs = [TscState(arena, vcpu) for vcpu in self.vcpus]
            self.chips = VmState(arena, self.vm, vm_pieces(irqchip=True, pit=True))
            self.close = stack.pop_all().close

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    def settle(self) -> None:
        self.vcpu.kick()
        assert not self.vcpu.run()

    def save(self) -> None:
        self.states[0].look(self.settle, None)
        self.chips.save()
        for tsc, vcpu in zip(self.tscs, self.vcpus, strict=True):
            tsc.save(self.vm, vcpu)
        for state in self.states:
            state.save()

    def load(self) -> None:
        for tsc, vcpu in zip(self.tscs, self.vcpus, strict=True):
            tsc.prepare(self.vm, vcpu)
        for state in self.states:
            state.load()
        self.chips.load()

    def lapic(self) -> abi.kvm_lapic_state:
        state = abi.kvm_lapic_state()
        self.vcpu.get_lapic(state)
        return state

    def get(self, name: str) -> Any:
        structure = {
            "events": abi.kvm_vcpu_events,
            "mp_state": abi.kvm_mp_state,
            "regs": abi.kvm_regs,
            "xsave": abi.kvm_xsave,
            "xcrs": abi.kvm_xcrs,
            "debugregs": abi.kvm_debugregs,
            "sregs2": abi.kvm_sregs2,
        }[name]()
        getattr(self.vcpu, f"get_{name}")(structure)
        return structure

    def change(self, name: str, **values: Any) -> None:
        structure = self.get(name)
        for path, value in values.items():
            *inner, last = path.split("__")
            target = structure
            for step in inner:
                target = getattr(target, step)
            setattr(target, last, value)
        getattr(self.vcpu, f"set_{name}")(structure)


@pytest.fixture
def fds() -> Iterator[FdStore]:
    store = FdStore()
    yield store
    store.close()


@contextmanager
def sides(fds: FdStore, cpus: int = 1) -> Iterator[tuple[Side, Callable[[], Side]]]:
    """A VM, and a maker of further ones; making one ends the one before, as a handover does."""
    arena = Arena.open(fds)
    with ram_of(b"\xf4") as ram:
        current = Side(arena, ram, cpus)

        def hand_over() -> Side:
            nonlocal current
            new = Side(arena, ram, cpus)
            try:
                current.save()
                new.load()
            except BaseException:
                new.close()
                raise
            current.close()
            current = new
            return new

        try:
            yield current, hand_over
        finally:
            current.close()


# --- what is in flight ---

EVENTS = {
    "nmi-pending": {"nmi__pending": 1, "flags": abi.KVM_VCPUEVENT_VALID_NMI_PENDING},
    "nmi-masked": {"nmi__masked": 1},
    "interrupt-injected": {"interrupt__injected": 1, "interrupt__nr": 0x51},
    "soft-interrupt-injected": {"interrupt__injected": 1, "interrupt__nr": 0x80, "interrupt__soft": 1},
    "exception-injected": {"exception__injected": 1, "exception__nr": 13, "exception__has_error_code": 1},
    "triple-fault-pending": {"triple_fault__pending": 1, "flags": abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT},
    "smi-pending": {"smi__pending": 1, "flags": abi.KVM_VCPUEVENT_VALID_SMM},
    "interrupt-shadow": {"interrupt__shadow": 1, "flags": abi.KVM_VCPUEVENT_VALID_SHADOW},
}


@pytest.mark.parametrize("changes", EVENTS.values(), ids=EVENTS)
def test_what_is_about_to_happen(changes: dict[str, int], fds: FdStore) -> None:
    with sides(fds) as (old, hand_over):
        fresh = bytes(old.get("events"))
        try:
            old.change("events", **changes)
        except IoctlError as error:
            pytest.skip(f"this KVM has no such event: {error}")
        before = bytes(old.get("events"))
        if before == fresh:
            pytest.skip("this KVM does not keep that event between two ioctls")
        assert bytes(hand_over().get("events")) == before


def test_a_pending_exception_with_its_payload(fds: FdStore) -> None:
    """A page fault that is pending and not delivered yet: CR2 still has its old value."""
    with sides(fds) as (old, hand_over):
        if not old.vm.check(Cap.EXCEPTION_PAYLOAD):
            pytest.skip("this kernel has no KVM_CAP_EXCEPTION_PAYLOAD (Linux 4.20)")
        events = old.get("events")
        events.flags |= abi.KVM_VCPUEVENT_VALID_PAYLOAD
        events.exception.pending, events.exception.nr = 1, 14
        events.exception.has_error_code, events.exception.error_code = 1, 2
        events.exception_has_payload, events.exception_payload = 1, 0x1234_5000
        old.vcpu.set_events(events)
        new = hand_over()
        kept = new.get("events")
        assert (kept.exception.pending, kept.exception.nr, kept.exception.error_code) == (1, 14, 2)
        assert (kept.exception_has_payload, kept.exception_payload) == (1, 0x1234_5000)
        assert new.get("sregs2").cr2 == 0


@pytest.mark.lab
def test_int_n_half_delivered_is_executed_again(fds: FdStore) -> None:
    """KVM does not say that it is: the guest is still at the instruction."""
    need_native_instructions()
    vector, handler = 0x80, 0x1100
    with sides(fds) as (old, hand_over):
        old.ram.write(ENTRY, b"\xcd\x80\xba\xf8\x03\xee")  # int 0x80; mov dx, 0x3f8; out dx, al
        old.ram.write(handler, b"\x43\xcf")  # inc bx; iret
        old.ram.write(4 * vector, handler.to_bytes(4, "little"))
        old.change("sregs2", cs__base=0, cs__selector=0)
        old.vcpu.set_regs(abi.kvm_regs(rip=ENTRY, rsp=0x8000, rflags=2))
        old.change("events", interrupt__injected=1, interrupt__nr=vector, interrupt__soft=1)
        events = old.get("events")
        assert (events.interrupt.injected, events.interrupt.soft) == (0, 0)
        new = hand_over()
        assert new.vcpu.run()
        assert new.vcpu.run_page.exit_reason == Exit.IO
        assert new.get("regs").rbx == 1


def test_a_queued_nmi(fds: FdStore) -> None:
    with sides(fds) as (old, hand_over):
        old.vcpu.nmi()
        assert hand_over().get("events").nmi.pending == 1


@pytest.mark.parametrize(
    "state", [MpState.RUNNABLE, MpState.UNINITIALIZED, MpState.HALTED, MpState.INIT_RECEIVED]
)
def test_what_a_vcpu_waits_for(state: MpState, fds: FdStore) -> None:
    with sides(fds) as (old, hand_over):
        old.vcpu.set_mp_state(abi.kvm_mp_state(state))
        assert hand_over().get("mp_state").mp_state == state


def test_a_vcpu_that_was_sent_sipi_starts_there(fds: FdStore) -> None:
    """KVM has it start when its state is asked for: its registers are those of the start then."""
    vector = 0x12
    with sides(fds, cpus=2) as (old, hand_over):
        second = old.vcpus[1]
        second.set_mp_state(abi.kvm_mp_state(MpState.SIPI_RECEIVED))
        events = abi.kvm_vcpu_events()
        second.get_events(events)
        events.sipi_vector, events.flags = vector, events.flags | abi.KVM_VCPUEVENT_VALID_SIPI_VECTOR
        second.set_events(events)
        new = hand_over()
        mp_state, sregs, regs = abi.kvm_mp_state(), abi.kvm_sregs2(), abi.kvm_regs()
        new.vcpus[1].get_mp_state(mp_state)
        new.vcpus[1].get_sregs2(sregs)
        new.vcpus[1].get_regs(regs)
        assert mp_state.mp_state == MpState.RUNNABLE
        assert (sregs.cs.selector, sregs.cs.base, regs.rip) == (vector << 8, vector << 12, 0)


# --- registers ---


def test_extended_registers(fds: FdStore) -> None:
    mxcsr, xmm0, xstate_bv = 6, 40, 128  # words of the XSAVE area: Intel SDM vol. 1, 13.4
    with sides(fds) as (old, hand_over):
        xsave = old.get("xsave")
        xsave.region[xstate_bv] |= 3
        xsave.region[mxcsr] = 0x1FA0
        for word in range(64):
            xsave.region[xmm0 + word] = 0x0101_0101 * word
        old.vcpu.set_xsave(xsave)
        before = bytes(old.get("xsave"))
        assert bytes(hand_over().get("xsave")) == before


def test_every_msr_that_takes_another_value(fds: FdStore) -> None:
    """No list of MSRs: whatever this kernel gives, each is changed where it can be, and moved."""
    with sides(fds) as (old, hand_over):
        values = old.states[0].sections["msrs"]
        old.vcpu.get_msrs(values)
        changed = {}
        for entry in values.entries:
            assert entry.index != IA32_TSC
            single = type(values)(nmsrs=1)
            single.entries[0] = abi.kvm_msr_entry(index=entry.index, data=entry.data ^ 0x1000)
            if entry.index == MSR_TSC_DEADLINE or not old.vcpu.set_msrs(single):
                continue
            old.vcpu.get_msrs(single)
            changed[entry.index] = single.entries[0].data
        time.sleep(0.001)
        old.vcpu.get_msrs(values)
        for entry in values.entries:  # one that counts by itself is its own matter (Hyper-V's time, say)
            if changed.get(entry.index) != entry.data:
                changed.pop(entry.index, None)
        assert len(changed) > 8
        new = hand_over()
        again = type(values)(nmsrs=len(values.entries))
        for slot, entry in zip(again.entries, values.entries, strict=True):
            slot.index = entry.index
        new.vcpu.get_msrs(again)
        found = {entry.index: entry.data for entry in again.entries}
        assert {index: f"{found[index]:#x}" for index in changed} == {
            index: f"{data:#x}" for index, data in changed.items()
        }


@pytest.mark.lab
def test_debug_control(fds: FdStore) -> None:
    """Older kernels keep it and list it nowhere."""
    with sides(fds) as (old, hand_over):
        values = old.states[0].sections["msrs"]
        single = type(values)(nmsrs=1)
        single.entries[0] = abi.kvm_msr_entry(index=IA32_DEBUGCTL)
        if not (old.vcpu.get_msrs(single) and old.vcpu.set_msrs(single)):
            pytest.skip("this KVM has no IA32_DEBUGCTL")
        assert IA32_DEBUGCTL in [entry.index for entry in values.entries]
        wanted = 0
        for bit in (DEBUGCTL_LBR, DEBUGCTL_BTF):
            single.entries[0].data = wanted | bit
            if old.vcpu.set_msrs(single) and old.vcpu.get_msrs(single) and single.entries[0].data & bit:
                wanted |= bit
        if not wanted:
            pytest.skip("it keeps no value here; it is in the list")
        single.entries[0].data = wanted
        assert old.vcpu.set_msrs(single)
        new = hand_over()
        assert new.vcpu.get_msrs(single)
        assert single.entries[0].data == wanted


@pytest.mark.parametrize("msr", WALL_CLOCKS)
def test_the_wall_clock_moves_and_ram_stays_as_it_is(msr: int, fds: FdStore) -> None:
    """KVM writes the time to the address that it is told. The guest may have something else there by now."""
    address = 0x2000
    with sides(fds, cpus=2) as (old, hand_over):
        block = type(old.states[0].sections["msrs"])(nmsrs=1)
        block.entries[0] = abi.kvm_msr_entry(index=msr, data=address)
        assert old.vcpu.set_msrs(block) == 1
        assert old.ram.bytes[address : address + 4] != bytes(4)  # KVM did write
        old.ram.write(address, bytes(range(100, 120)))
        before = old.ram.bytes[:]
        for _ in range(2):
            new = hand_over()
            assert new.ram.bytes[:] == before
            block.entries[0].data = 0
            assert new.vcpus[1].get_msrs(block) == 1
            assert block.entries[0].data == address


@pytest.mark.lab
def test_nested_state(fds: FdStore) -> None:
    """Of a vCPU that may run guests: its global interrupt flag (CLGI, on AMD) or its VMXON region (Intel) is
    not what a new vCPU has.
    """
    with sides(fds) as (old, hand_over):
        if not old.vm.check(Cap.NESTED_STATE):
            pytest.skip("this KVM has no nested state: its guests run no guests")
        old.save()
        fresh = bytes(old.states[0].sections["nested"])
        state = old.states[0].sections["nested"]
        if state.format == NESTED_FORMAT_SVM:
            old.change("sregs2", efer=EFER_SVME)
            state.flags &= ~NESTED_GIF_SET
        else:
            pytest.skip("made for SVM; VMX needs a VMXON region with the right revision")
        old.vcpu.set_nested_state(state)
        old.save()
        before = bytes(old.states[0].sections["nested"])
        assert before != fresh
        new = hand_over()
        new.save()
        assert bytes(new.states[0].sections["nested"]) == before


def test_the_tsc_offset_is_the_same_cycle(fds: FdStore) -> None:
    with sides(fds, cpus=2) as (old, hand_over):
        if not old.vm.check(Cap.VCPU_ATTRIBUTES):
            pytest.skip("this kernel has no KVM_VCPU_TSC_OFFSET (Linux 5.16)")
        for vcpu in old.vcpus:
            vcpu.tsc_offset = 2**64 - 0x1234_5678_9ABC - vcpu.index
        offsets = [vcpu.tsc_offset for vcpu in old.vcpus]
        for _ in range(5):
            assert [vcpu.tsc_offset for vcpu in hand_over().vcpus] == offsets


# --- the LAPIC timer ---


def start_timer(side: Side, mode: lapic.TimerMode, count_ns: int, *, masked: bool = False) -> None:
    state = side.lapic()
    lapic.write_register(state, lapic.SPURIOUS, SPIV_ENABLED)
    lapic.write_register(state, lapic.LVT_TIMER, mode << 17 | masked << 16 | TIMER_VECTOR)
    lapic.write_register(state, lapic.DIVIDE, 0b1011)
    lapic.write_register(state, lapic.INITIAL_COUNT, count_ns)
    lapic.write_register(state, lapic.CURRENT_COUNT, count_ns)
    side.vcpu.set_lapic(state)


def expires_ns(side: Side) -> int:
    """When the timer expires next, as well as that can be read."""
    readings = []
    for _ in range(9):
        before_ns = time.monotonic_ns()
        left_ns = lapic.remaining_ns(side.lapic())
        readings.append((time.monotonic_ns() - before_ns, before_ns + left_ns))
    return min(readings)[1]


def need_exact_readings(side: Side) -> None:
    """Skip where a LAPIC cannot be read fast enough to tell where its timer is."""
    took = []
    for _ in range(9):
        before_ns = time.monotonic_ns()
        side.lapic()
        took.append(time.monotonic_ns() - before_ns)
    if sorted(took)[4] > SLOW_NS:
        pytest.skip(f"reading a LAPIC takes {sorted(took)[4] // 1000} µs here")


def requested(side: Side) -> bool:
    side.settle()
    at, bit = TIMER_VECTOR // 32 * 0x10, 1 << TIMER_VECTOR % 32
    return bool(lapic.read_register(side.lapic(), lapic.REQUEST + at) & bit)


def test_a_one_shot_timer_expires_when_it_was_to(fds: FdStore) -> None:
    with sides(fds) as (old, hand_over):
        need_exact_readings(old)
        start_timer(old, lapic.TimerMode.ONE_SHOT, 4000 * MS)
        due_ns = expires_ns(old)
        for _ in range(5):
            time.sleep(0.01)
            new = hand_over()
        assert not requested(new)
        assert abs(expires_ns(new) - due_ns) < OFF_NS


def test_a_one_shot_timer_that_expires_on_the_way(fds: FdStore) -> None:
    with sides(fds) as (old, hand_over):
        start_timer(old, lapic.TimerMode.ONE_SHOT, 2 * MS)
        time.sleep(0.02)
        new = hand_over()
        time.sleep(0.005)
        assert requested(new)
        assert lapic.read_register(new.lapic(), lapic.CURRENT_COUNT) == 0


def test_a_periodic_timer_keeps_step(fds: FdStore) -> None:
    """Over many moves its ticks stay on one grid, to what a reading here can miss by."""
    period_ns, moves = 20 * MS, 40
    with sides(fds) as (old, hand_over):
        need_exact_readings(old)
        start_timer(old, lapic.TimerMode.PERIODIC, period_ns)
        first_ns = expires_ns(old)
        for _ in range(moves - 1):
            hand_over()
        off_ns = (expires_ns(hand_over()) - first_ns + period_ns // 2) % period_ns - period_ns // 2
        assert abs(off_ns) < OFF_NS


def test_a_tick_of_a_periodic_timer_is_not_lost(fds: FdStore) -> None:
    """It expired while the vCPU was out of KVM_RUN, where KVM only notes it."""
    with sides(fds) as (old, hand_over):
        start_timer(old, lapic.TimerMode.PERIODIC, 200 * MS)
        time.sleep(0.21)
        at, bit = TIMER_VECTOR // 32 * 0x10, 1 << TIMER_VECTOR % 32
        assert not lapic.read_register(old.lapic(), lapic.REQUEST + at) & bit
        new = hand_over()
        assert lapic.read_register(new.lapic(), lapic.REQUEST + at) & bit


@pytest.mark.parametrize("due_ms", [-5, 60_000])
def test_a_tsc_deadline(due_ms: int, fds: FdStore) -> None:
    """One that is past requests its interrupt in the new VM, one in the future stays a deadline."""
    with sides(fds) as (old, hand_over):
        if not old.vm.check(Cap.TSC_DEADLINE_TIMER):
            pytest.skip("this KVM has no TSC-deadline timer")
        start_timer(old, lapic.TimerMode.TSC_DEADLINE, 0)
        clock = abi.kvm_clock_data()
        old.vm.set_clock(clock)
        old.vm.get_clock(clock)
        if not clock.flags & abi.KVM_CLOCK_HOST_TSC:
            pytest.skip("this host's KVM_GET_CLOCK gives no TSC")
        deadline = (clock.host_tsc + old.vcpu.tsc_offset + due_ms * old.vcpu.tsc_khz) % 2**64
        block = type(old.states[0].sections["msrs"])(nmsrs=1)
        block.entries[0] = abi.kvm_msr_entry(index=MSR_TSC_DEADLINE, data=deadline)
        assert old.vcpu.set_msrs(block) == 1
        new = hand_over()
        new.vcpu.get_msrs(block)
        assert block.entries[0].data in ({deadline} if due_ms > 0 else {deadline, 0})
        assert requested(new) == (due_ms < 0)


# --- the PIT ---


def test_a_pit_channel_that_counts_down_once_goes_on(fds: FdStore) -> None:
    with sides(fds) as (old, hand_over):
        pit = abi.kvm_pit_state2()
        old.vm.get_pit2(pit)
        pit.channels[2].mode, pit.channels[2].count, pit.channels[2].gate = 0, 0xFFFF, 1
        old.vm.set_pit2(pit)
        began_ns = time.monotonic_ns()
        time.sleep(0.02)
        new = hand_over()
        loaded = abi.kvm_pit_state2()
        new.vm.get_pit2(loaded)
        elapsed_ns = loaded.channels[2].count_load_time - began_ns
        left = max(0xFFFF - elapsed_ns * 1_193_182 / 1e9, 1)
        assert loaded.channels[2].count == pytest.approx(left, abs=OFF_NS * 1_193_182 / 1e9)


def test_chips_are_bit_for_bit(fds: FdStore) -> None:
    with sides(fds) as (old, hand_over):
        for chip_id in range(abi.KVM_NR_IRQCHIPS):
            chip = abi.kvm_irqchip()
            old.vm.get_irqchip(chip_id, chip)
            if chip_id == abi.KVM_IRQCHIP_IOAPIC:
                chip.chip.ioapic.redirtbl[7].fields.vector = 0x77
            else:
                chip.chip.pic.irq_base, chip.chip.pic.imr = 0x20 + 8 * chip_id, 0xA5
            old.vm.set_irqchip(chip)
        before = [chip_of(old, chip_id) for chip_id in range(abi.KVM_NR_IRQCHIPS)]
        new = hand_over()
        assert [chip_of(new, chip_id) for chip_id in range(abi.KVM_NR_IRQCHIPS)] == before


def chip_of(side: Side, chip_id: int) -> bytes:
    chip = abi.kvm_irqchip()
    side.vm.get_irqchip(chip_id, chip)
    return bytes(chip)
