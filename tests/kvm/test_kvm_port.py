"""What reaches the port, by one that records and answers from a script; then DirectPort's own manners."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vmm.errors import HostError
from vmm.kvm import (
    CAPABILITIES,
    Cap,
    DirectPort,
    Exit,
    Ioctl,
    IoctlBlocked,
    IoctlError,
    IoctlInterrupted,
    Port,
    System,
    Vcpu,
    Vm,
    abi,
    irqchip_route,
    missing_required,
    msi_route,
    probe,
    require,
    sized,
)
from vmm.kvm.port import ioctl_error

VM_FD, VCPU_FD = 1000, 1001  # never used as fds: this port reaches no kernel
MMAP_SIZE = 3 * mmap.PAGESIZE

Answer = Callable[[Any], int]


@dataclass
class RecordingPort:
    """Keeps each call as (request's name, argument's bytes or int); answers 0 unless told otherwise."""

    answers: dict[str, Answer] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    run_result: bool | IoctlError = True

    def ioctl(self, fd: int, request: Ioctl, arg: Any = 0) -> int:
        self.fds.append(fd)
        self.calls.append((request.name, arg if isinstance(arg, int) else bytes(arg)))
        answer = self.answers.get(request.name)
        return 0 if answer is None else answer(arg)

    def create(self, fd: int, request: Ioctl, arg: Any = 0) -> int:
        return self.ioctl(fd, request, arg)

    def get_attr(self, fd: int, group: int, attr: int) -> int:
        self.calls.append(("get_attr", group, attr))
        return 77

    def set_attr(self, fd: int, group: int, attr: int, value: int) -> None:
        self.calls.append(("set_attr", group, attr, value))

    def has_attr(self, fd: int, group: int, attr: int) -> bool:
        self.calls.append(("has_attr", group, attr))
        return True

    def set_user_memory(
        self, vm_fd: int, slot: int, flags: int, gpa: int, size: int, hva: int, memfd: int, offset: int
    ) -> None:
        self.calls.append(("set_user_memory", slot, flags, gpa, size, hva, memfd, offset))

    def get_dirty_log(self, vm_fd: int, slot: int, bitmap: Any) -> None:
        self.calls.append(("get_dirty_log", slot, len(bitmap)))

    def admit(self, fd: int) -> None:
        self.calls.append(("admit",))

    def forget(self, fd: int) -> None:
        """Not of interest: it comes with every close."""

    def start_vcpu(self, vcpu_fd: int, index: int) -> None:
        self.calls.append(("start_vcpu", index))

    def bind_thread(self, vcpu_fd: int) -> None:
        self.calls.append(("bind_thread",))

    def kick(self, vcpu_fd: int) -> None:
        self.calls.append(("kick",))

    def leave(self, vcpu_fd: int) -> None:
        self.calls.append(("leave",))

    def go_on(self, vcpu_fd: int) -> None:
        self.calls.append(("go_on",))

    def pending_exit(self, vcpu_fd: int) -> int:
        return 0

    def waiting_ns(self, vcpu_fd: int) -> None:
        return None

    @property
    def outlives(self) -> bool:
        return False

    def attach(self) -> None:
        self.calls.append(("attach",))

    def detach(self) -> None:
        self.calls.append(("detach",))

    def close(self, *, for_good: bool) -> None:
        self.calls.append(("close", for_good))

    def store(self, name: str, index: int, fd: int) -> None:
        self.calls.append(("store", name, index))

    def drop(self, name: str, index: int) -> None:
        self.calls.append(("drop", name, index))

    @property
    def process(self) -> int:
        return 0

    @property
    def identity(self) -> int:
        return 0

    @property
    def lifeline(self) -> None:
        return None

    def live_on(self, orphan_timeout_s: float) -> None:
        self.calls.append(("live_on", orphan_timeout_s))

    def lost(self) -> None:
        self.calls.append(("lost",))

    def fd_rows(self, *, offer: bool) -> list[tuple[str, int, int]]:
        return []

    def close_offer(self) -> None:
        self.calls.append(("close_offer",))

    def run(self, vcpu_fd: int) -> bool:
        if isinstance(self.run_result, IoctlError):
            raise self.run_result
        return self.run_result


def error(number: int, request: Ioctl) -> Answer:
    def fail(_: Any) -> int:
        raise ioctl_error(number, request)

    return fail


def last(port: RecordingPort) -> tuple[Any, ...]:
    return port.calls[-1]


@pytest.fixture
def port() -> RecordingPort:
    return RecordingPort()


@pytest.fixture
def vm(port: RecordingPort) -> Vm:
    return Vm(VM_FD, port, MMAP_SIZE)


@contextmanager
def vcpu_of(port: Port) -> Iterator[Vcpu]:
    """A vCPU whose shared pages are a memfd's."""
    fd = os.memfd_create("vcpu", os.MFD_CLOEXEC)
    os.ftruncate(fd, MMAP_SIZE)
    with Vcpu(fd, 0, port, MMAP_SIZE) as vcpu:
        yield vcpu


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Something that opens, in place of /dev/kvm."""
    path = tmp_path / "kvm"
    path.touch()
    return path


# --- the VM's arguments ---


def test_memory_is_described_by_its_memfd_as_well_as_its_address(vm: Vm, port: RecordingPort) -> None:
    vm.set_memory(slot=3, gpa=0x100000, size=0x2000, hva=0x7F00_0000_0000, memfd=9, offset=0x4000, flags=1)
    assert port.calls == [("set_user_memory", 3, 1, 0x100000, 0x2000, 0x7F00_0000_0000, 9, 0x4000)]


def test_irqfd_flags(vm: Vm, port: RecordingPort) -> None:
    vm.assign_irqfd(7, gsi=4)
    assert last(port) == ("KVM_IRQFD", bytes(abi.kvm_irqfd(fd=7, gsi=4)))
    vm.assign_irqfd(7, gsi=4, resample=8)
    resampling = abi.kvm_irqfd(fd=7, gsi=4, flags=abi.KVM_IRQFD_FLAG_RESAMPLE, resamplefd=8)
    assert last(port) == ("KVM_IRQFD", bytes(resampling))
    vm.deassign_irqfd(7, gsi=4)
    assert last(port) == ("KVM_IRQFD", bytes(abi.kvm_irqfd(fd=7, gsi=4, flags=abi.KVM_IRQFD_FLAG_DEASSIGN)))


def test_ioeventfd_flags(vm: Vm, port: RecordingPort) -> None:
    vm.assign_ioeventfd(7, 0xFEB0_0000, 0)
    assert last(port) == ("KVM_IOEVENTFD", bytes(abi.kvm_ioeventfd(addr=0xFEB0_0000, len=0, fd=7)))
    vm.deassign_ioeventfd(7, 0x510, 2, pio=True, datamatch=0)
    flags = abi.KVM_IOEVENTFD_FLAG_DEASSIGN | abi.KVM_IOEVENTFD_FLAG_PIO | abi.KVM_IOEVENTFD_FLAG_DATAMATCH
    assert last(port) == ("KVM_IOEVENTFD", bytes(abi.kvm_ioeventfd(0, 0x510, 2, 7, flags)))


def test_gsi_routing_is_one_table(vm: Vm, port: RecordingPort) -> None:
    vm.set_gsi_routing([irqchip_route(4, abi.KVM_IRQCHIP_IOAPIC, 4), msi_route(24, 0x1_FEE0_0000, 0x4041)])
    name, table = last(port)
    assert name == "KVM_SET_GSI_ROUTING"
    routes = sized(abi.kvm_irq_routing, 2).from_buffer_copy(table)
    pin, message = routes.entries
    assert (routes.nr, routes.flags) == (2, 0)
    assert (pin.gsi, pin.type, pin.u.irqchip.irqchip, pin.u.irqchip.pin) == (4, 1, 2, 4)
    assert (message.gsi, message.type) == (24, 2)
    assert (message.u.msi.address_hi, message.u.msi.address_lo, message.u.msi.data) == (
        1,
        0xFEE0_0000,
        0x4041,
    )


@pytest.mark.parametrize(("result", "delivered"), [(1, True), (0, False)])
def test_signal_msi(vm: Vm, port: RecordingPort, result: int, delivered: bool) -> None:
    port.answers["KVM_SIGNAL_MSI"] = lambda _: result
    assert vm.signal_msi(0x2_FEE0_1000, 0x31) is delivered
    assert last(port) == ("KVM_SIGNAL_MSI", bytes(abi.kvm_msi(0xFEE0_1000, 2, 0x31)))


def test_enable_cap_arguments(vm: Vm, port: RecordingPort) -> None:
    vm.enable_cap(Cap.X86_DISABLE_EXITS, 0, 2, 5)
    enable = abi.kvm_enable_cap.from_buffer_copy(last(port)[1])
    assert (enable.cap, enable.flags, list(enable.args)) == (Cap.X86_DISABLE_EXITS, 0, [2, 5, 0, 0])


def test_real_modes_pages(vm: Vm, port: RecordingPort) -> None:
    vm.set_tss_address()
    vm.set_identity_map()
    assert port.calls == [
        ("KVM_SET_TSS_ADDR", 0xFFFB_D000),
        ("KVM_SET_IDENTITY_MAP_ADDR", (0xFFFB_C000).to_bytes(8, "little")),
    ]


def test_irqchip_state_names_its_chip(vm: Vm, port: RecordingPort) -> None:
    vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC, abi.kvm_irqchip())
    assert abi.kvm_irqchip.from_buffer_copy(last(port)[1]).chip_id == abi.KVM_IRQCHIP_IOAPIC


@pytest.mark.parametrize(("answer", "size"), [(0, 4096), (4096, 4096), (11008, 11008)])
def test_xsave_size(vm: Vm, port: RecordingPort, answer: int, size: int) -> None:
    port.answers["KVM_CHECK_EXTENSION"] = lambda _: answer
    assert vm.xsave_size == size


# --- the vCPU's ---


def test_bigger_xsave_is_read_by_the_newer_ioctl(port: RecordingPort) -> None:
    with vcpu_of(port) as vcpu:
        vcpu.get_xsave(abi.kvm_xsave())
        vcpu.get_xsave(sized(abi.kvm_xsave, 1728)())
        vcpu.set_xsave(sized(abi.kvm_xsave, 1728)())
    assert [(name, len(argument)) for name, argument in port.calls] == [
        ("KVM_GET_XSAVE", 4096),
        ("KVM_GET_XSAVE2", 11008),
        ("KVM_SET_XSAVE", 11008),
    ]


def test_signal_mask_is_the_kernels_sigset(port: RecordingPort) -> None:
    with vcpu_of(port) as vcpu:
        vcpu.set_signal_mask({1, 10, 64})
        vcpu.set_signal_mask(None)
    bits = 1 << 0 | 1 << 9 | 1 << 63
    assert port.calls == [
        ("KVM_SET_SIGNAL_MASK", (8).to_bytes(4, "little") + bits.to_bytes(8, "little")),
        ("KVM_SET_SIGNAL_MASK", 0),
    ]


def test_tsc_offset_is_an_attribute(port: RecordingPort) -> None:
    with vcpu_of(port) as vcpu:
        assert vcpu.tsc_offset == 77
        vcpu.tsc_offset = 2**64 - 1
    assert port.calls == [("get_attr", 0, 0), ("set_attr", 0, 0, 2**64 - 1)]


def test_guest_debug_arguments(port: RecordingPort) -> None:
    with vcpu_of(port) as vcpu:
        vcpu.set_guest_debug(abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP, [0x1000, 0x2000])
    debug = abi.kvm_guest_debug.from_buffer_copy(last(port)[1])
    assert (debug.control, list(debug.arch.debugreg)) == (0x20001, [0x1000, 0x2000, 0, 0, 0, 0, 0, 0])


def test_translation_of_what_is_not_mapped(port: RecordingPort) -> None:
    with vcpu_of(port) as vcpu:
        assert vcpu.translate(0x1000) is None


def test_pre_fault_goes_on_until_nothing_is_left(port: RecordingPort) -> None:
    def half(rest: abi.kvm_pre_fault_memory) -> int:
        done = max(rest.size // 2, 0x1000)
        rest.gpa, rest.size = rest.gpa + done, rest.size - done
        return 0

    port.answers["KVM_PRE_FAULT_MEMORY"] = half
    with vcpu_of(port) as vcpu:
        vcpu.pre_fault(0x10_0000, 0x4000)
    assert [abi.kvm_pre_fault_memory.from_buffer_copy(argument).gpa for _, argument in port.calls] == [
        0x10_0000,
        0x10_2000,
        0x10_3000,
    ]


def test_the_shared_page_is_the_fds_own(port: RecordingPort) -> None:
    run: Any = abi.kvm_run
    with vcpu_of(port) as vcpu:
        os.pwrite(vcpu.fd, Exit.IO.to_bytes(4, "little"), run.exit_reason.offset)
        assert vcpu.run_page.exit_reason == Exit.IO
        vcpu.io_data(0x1000, 2)[:] = b"ab"
        assert os.pread(vcpu.fd, 2, 0x1000) == b"ab"
        vcpu.immediate_exit = True
        assert os.pread(vcpu.fd, 1, run.immediate_exit.offset) == b"\1"
        vcpu.immediate_exit = False
        assert not vcpu.immediate_exit


def test_no_coalesced_ring_in_a_small_mapping(port: RecordingPort) -> None:
    fd = os.memfd_create("vcpu", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * mmap.PAGESIZE)
    with Vcpu(fd, 0, port, 2 * mmap.PAGESIZE) as vcpu:
        assert vcpu.coalesced is None


def test_a_memory_fault_is_an_exit(port: RecordingPort) -> None:
    """KVM_RUN says it with EFAULT (KVM API, KVM_EXIT_MEMORY_FAULT); any other EFAULT is an error."""
    port.run_result = ioctl_error(errno.EFAULT, abi.KVM_RUN)
    with vcpu_of(port) as vcpu:
        with pytest.raises(IoctlError, match=r"\[Errno 14\] KVM_RUN: Bad address"):
            vcpu.run()
        vcpu.run_page.exit_reason = Exit.MEMORY_FAULT
        assert vcpu.run()


def test_closing_twice_closes_once(port: RecordingPort) -> None:
    with vcpu_of(port) as vcpu:
        vcpu.close()
    fd = os.memfd_create("vm", os.MFD_CLOEXEC)
    with Vm(fd, port, MMAP_SIZE) as vm:
        vm.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# --- /dev/kvm ---


@contextmanager
def system_on(device: Path, port: RecordingPort) -> Iterator[System]:
    port.answers.setdefault("KVM_GET_API_VERSION", lambda _: 12)
    port.answers.setdefault("KVM_GET_VCPU_MMAP_SIZE", lambda _: MMAP_SIZE)
    with System(device, port) as system:
        yield system


def test_no_device() -> None:
    with pytest.raises(HostError, match=r"^/nonexistent/kvm does not exist; .*modprobe kvm_intel"):
        System("/nonexistent/kvm", RecordingPort())


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, r"may not be opened by this user; run `sudo usermod -aG kvm \$USER`"),
        (errno.EPERM, r"may not be opened by this user"),
        (errno.ENXIO, r"has no driver behind it; run `modprobe kvm_intel`"),
        (errno.ENODEV, r"has no driver behind it"),
        (errno.EMFILE, r"cannot be opened: Too many open files"),
    ],
)
def test_a_device_that_does_not_open(monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("vmm.kvm.system.os.open", refuse)
    with pytest.raises(HostError, match=rf"^/dev/kvm {text}"):
        System("/dev/kvm", RecordingPort())


def test_another_api_version(device: Path, port: RecordingPort) -> None:
    port.answers["KVM_GET_API_VERSION"] = lambda _: 11
    with pytest.raises(HostError, match="speaks KVM API version 11, not 12"), system_on(device, port):
        pass


def test_a_file_that_is_not_kvm(device: Path) -> None:
    with pytest.raises(HostError, match=r"is not a KVM device \(\[Errno 25\] KVM_GET_API_VERSION: "):
        System(device)


def test_supported_cpuid_grows_until_it_fits(device: Path, port: RecordingPort) -> None:
    def fill(cpuid: abi.kvm_cpuid2) -> int:
        if cpuid.nent < 300:
            raise ioctl_error(errno.E2BIG, abi.KVM_GET_SUPPORTED_CPUID)
        cpuid.nent = 300
        cpuid.entries[299].function = 0x4000_0001
        return 0

    port.answers["KVM_GET_SUPPORTED_CPUID"] = fill
    with system_on(device, port) as system:
        cpuid = system.supported_cpuid()
    assert (cpuid.nent, cpuid.entries[299].function) == (300, 0x4000_0001)


def test_supported_cpuid_does_not_grow_for_ever(device: Path, port: RecordingPort) -> None:
    port.answers["KVM_GET_SUPPORTED_CPUID"] = error(errno.E2BIG, abi.KVM_GET_SUPPORTED_CPUID)
    with system_on(device, port) as system, pytest.raises(IoctlError, match="KVM_GET_SUPPORTED_CPUID"):
        system.supported_cpuid()


def test_msr_list_asks_how_many_first(device: Path, port: RecordingPort) -> None:
    def fill(block: abi.kvm_msr_list) -> int:
        if block.nmsrs < 2:
            block.nmsrs = 2
            raise ioctl_error(errno.E2BIG, abi.KVM_GET_MSR_INDEX_LIST)
        block.indices[0], block.indices[1] = 0x10, 0xC000_0080
        return 0

    port.answers["KVM_GET_MSR_INDEX_LIST"] = fill
    with system_on(device, port) as system:
        assert system.msr_index_list() == (0x10, 0xC000_0080)


def test_capabilities(device: Path, port: RecordingPort) -> None:
    port.answers["KVM_CHECK_EXTENSION"] = lambda cap: 0 if cap in (Cap.IRQFD, Cap.IMMEDIATE_EXIT) else 7
    with system_on(device, port) as system:
        reports = probe(system)
        with pytest.raises(HostError, match=r"lacks KVM_CAP_IMMEDIATE_EXIT \(a vCPU is stopped"):
            require(system)
        port.answers["KVM_CHECK_EXTENSION"] = lambda cap: 0 if cap == Cap.IRQFD else 1
        require(system)
    assert tuple(report.capability for report in reports) == CAPABILITIES
    absent = {report.capability.number for report in reports if not report.present}
    assert absent == {Cap.IRQFD, Cap.IMMEDIATE_EXIT}
    assert [capability.number for capability in missing_required(reports)] == [Cap.IMMEDIATE_EXIT]
    assert all(capability.purpose and capability.without for capability in CAPABILITIES)


# --- errors, DirectPort ---


def test_an_error_names_its_ioctl_and_keeps_its_class() -> None:
    plain = ioctl_error(errno.EINVAL, abi.KVM_SET_SREGS)
    assert str(plain) == "[Errno 22] KVM_SET_SREGS: Invalid argument"
    assert (plain.errno, plain.request) == (errno.EINVAL, abi.KVM_SET_SREGS)
    interrupted, blocked = ioctl_error(errno.EINTR, abi.KVM_RUN), ioctl_error(errno.EAGAIN, abi.KVM_RUN)
    assert isinstance(interrupted, IoctlInterrupted)
    assert isinstance(interrupted, InterruptedError)
    assert isinstance(blocked, IoctlBlocked)
    assert isinstance(blocked, BlockingIOError)
    assert not isinstance(plain, InterruptedError | BlockingIOError)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EINVAL])
def test_an_error_survives_pickling(number: int) -> None:
    """A port whose calls are carried out elsewhere has to bring it home."""
    error = ioctl_error(number, abi.KVM_RUN)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.errno, copy.request, str(copy)) == (type(error), number, abi.KVM_RUN, str(error))


def test_direct_port_refuses_a_buffer_that_the_kernel_would_overrun() -> None:
    with pytest.raises(ValueError, match="KVM_GET_REGS needs 144 bytes, not the 143 it was given"):
        DirectPort().ioctl(VM_FD, abi.KVM_GET_REGS, bytearray(143))


def test_direct_port_reports_the_calls_own_errno() -> None:
    with pytest.raises(IoctlError) as caught:
        DirectPort().ioctl(-1, abi.KVM_GET_REGS, abi.kvm_regs())
    assert caught.value.errno == errno.EBADF
    with pytest.raises(IoctlError, match="KVM_RUN: Bad file descriptor"):
        DirectPort().run(-1)


@pytest.mark.kvm
def test_direct_port_takes_a_bytearray_for_a_structure() -> None:
    with System() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        into, raw = abi.kvm_regs(), bytearray(ctypes.sizeof(abi.kvm_regs))
        vcpu.get_regs(into)
        vcpu.port.ioctl(vcpu.fd, abi.KVM_GET_REGS, raw)
        assert raw == bytes(into)
        assert into.rip == 0xFFF0  # the reset vector


@pytest.mark.kvm
def test_this_host() -> None:
    with System() as system:
        assert system.api_version == 12
        assert system.mmap_size >= ctypes.sizeof(abi.kvm_run)
        assert missing_required(probe(system)) == ()
        assert 0x10 in system.msr_index_list()  # IA32_TIME_STAMP_COUNTER
        assert len(system.msr_feature_list()) > 0
        leaves = {entry.function for entry in system.supported_cpuid().entries}
        assert {0, 1, 7, 0x8000_0000} <= leaves
        with system.create_vm() as vm:
            assert not os.get_inheritable(vm.fd)
            assert vm.check(Cap.NR_MEMSLOTS) >= 32
