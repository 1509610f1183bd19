"""For every piece of state: lost or damaged on the way, somebody notices.
The rows are those of docs/state.md.

A piece is dropped by giving it the value that it had at the machine's birth, which is what a new VM has where
nobody loads anything. Each guest runs with the one check that is to notice.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.handover.rig import Rig, Step, rig
from tests.native import need_native_instructions
from vmm.errors import GuestCrash
from vmm.kvm import MpState, abi
from vmm.machine.cpuid_state import kept_cpuid
from vmm.machine.lapic_state import INITIAL_COUNT, LVT_TIMER, write_register
from vmm.machine.machine import Machine
from vmm.machine.vcpu_thread import VcpuThread
from vmm.state import Arena, Section

pytestmark = pytest.mark.kvm

STALL = "stall_ms=300"
NOTICED_S = 15.0
CRASH = "crash"
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


def no_requests(section: Any) -> None:
    for at in range(0x200, 0x280, 0x10):
        write_register(section.registers, at, 0)


def no_clock_line(machine: Machine) -> None:
    machine.hypervisor.clock.line.over = 0


def no_tsc_offset(machine: Machine) -> None:
    for tsc in machine.hypervisor.tscs:
        tsc.section.has_offset = 0


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
    Row("xsave", "xmm", at_birth("vcpu/xsave")),
    Row("xsave", "x87", at_birth("vcpu/xsave")),
    Row("debugregs", "debug", at_birth("vcpu/debugregs")),
    Row("msrs", "msr", at_birth("vcpu/msrs")),
    Row("msrs", "mtrr", at_birth("vcpu/msrs")),
    Row("lapic", "lapic", at_birth("vcpu/lapic")),
    Row("lapic-timer", "timer", changed("lapic", no_timer), options=STALL),
    Row("mp_state", "cpus", at_birth("vcpu/mp_state"), cpus=2, options=STALL),
    Row("testdev", "pio", cleared("testdev")),
    Row("testdev", "mmio", cleared("testdev")),
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
    deadline = time.monotonic() + timeout_s
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
    with rig(kernel="sentinel", append=append, cpus=row.cpus, testdev=True) as one:
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
        deadline = time.monotonic() + 30.0
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


# xor esi, esi; again: mov eax, [0xfed20000]; inc esi; cmp eax, esi; je again; mov al, 1; out 0xf4, al; hlt
COUNTS_READS = bytes.fromhex("31f6 a10000d2fe 46 39f0 74f6 b001 e6f4 f4")


class ReadsCount(ctypes.LittleEndianStructure):
    """A device whose every read is one more: sentinel's test device has no such register in memory."""

    VERSION = 1
    _fields_ = (("reads", ctypes.c_uint32),)

    def read(self, offset: int, size: int) -> bytes:
        self.reads += 1
        return self.reads.to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        raise AssertionError("the guest only reads")


def attach_counter(machine: Machine) -> None:
    machine.mmio.attach(0xFED20000, 4, machine.arena.place("reads", 0, ReadsCount), "counter")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A guest that counts its reads of a device that counts them too, and ends where they differ."""
    build = Machine._build_devices

    def build_more(machine: Machine, reactor: Any) -> None:
        build(machine, reactor)
        attach_counter(machine)

    monkeypatch.setattr(Machine, "_build_devices", build_more)
    image = tmp_path / "counts"
    image.write_bytes(COUNTS_READS)
    return image


def hand_over_counting(image: Path, handovers: int) -> str | BaseException | None:
    with rig(kernel=str(image), entry_mode="protected32") as one:
        for _ in range(handovers):
            one.hand_over()
            if (end := one.end(timeout_s=0.01)) is not None:
                return end
        assert one.machine.arena.place("reads", 0, ReadsCount).reads > handovers
    return None


@pytest.mark.usefixtures("_exits_left_half_done")
def test_a_read_of_memory_left_half_done_is_noticed(counted: Path) -> None:
    assert hand_over_counting(counted, 100) == "debug-exit with status 3"


def test_reads_of_memory_happen_once(counted: Path) -> None:
    assert hand_over_counting(counted, 50) is None


@pytest.mark.lab
@pytest.mark.parametrize(
    "row",
    [
        Row("xsave", "ymm", at_birth("vcpu/xsave")),
        Row("xcrs", "ymm", at_birth("vcpu/xcrs"), crash=True),
        Row("tsc", "tsc", no_tsc_offset, when=("offered", "saved")),
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
