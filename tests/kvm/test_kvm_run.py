"""Real-mode code on the real KVM: the exits that a minimal machine meets, and how a vCPU is stopped."""

from __future__ import annotations

import os
import select
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kvm.real_mode import ENTRY, MMIO, PORT, Machine, machine_with, with_chips
from vmm.kvm import Exit, IoctlError, Vm, abi, irqchip_route

pytestmark = pytest.mark.kvm

HLT = b"\xf4"
FOREVER = b"\xeb\xfe"  # jmp $
KICK = signal.SIGUSR2


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


# --- exits ---


def test_port_output_then_halt() -> None:
    code = b"\xb0\x41\xba\xf8\x03\xee" + HLT  # mov al, 'A'; mov dx, 0x3f8; out dx, al
    with machine_with(code) as machine:
        assert machine.next_exit() == Exit.IO
        io = machine.vcpu.run_page.io
        assert (io.direction, io.size, io.port, io.count) == (abi.KVM_EXIT_IO_OUT, 1, PORT, 1)
        assert bytes(machine.io_data()) == b"A"
        assert machine.next_exit() == Exit.HLT


@pytest.mark.parametrize(("opcode", "size"), [(b"\xec", 1), (b"\xed", 2), (b"\x66\xed", 4)])
def test_port_input_of_each_size(opcode: bytes, size: int) -> None:
    code = b"\xba\xf8\x03" + opcode + HLT  # mov dx, 0x3f8; in al/ax/eax, dx
    with machine_with(code) as machine:
        assert machine.next_exit() == Exit.IO
        io = machine.vcpu.run_page.io
        assert (abi.KVM_EXIT_IO_IN, size, PORT, 1) == (io.direction, io.size, io.port, io.count)
        machine.io_data()[:] = b"\x11\x22\x33\x44"[:size]
        assert machine.next_exit() == Exit.HLT
        assert 0x44332211 & ((1 << 8 * size) - 1) == machine.regs().rax


def test_string_output() -> None:
    text = b"string"
    code = b"\xbe\x00\x20\xb9\x06\x00\xba\xf8\x03\xf3\x6e" + HLT  # mov si, 0x2000; mov cx, 6; …; rep outsb
    with machine_with(code) as machine:
        machine.ram.bytes[0x2000 : 0x2000 + len(text)] = text
        said = b""
        while machine.next_exit() == Exit.IO:
            said += bytes(machine.io_data())
        assert (text, Exit.HLT) == (said, machine.vcpu.run_page.exit_reason)


def test_string_input() -> None:
    text = b"0123456789abcdef"
    code = b"\xbf\x00\x20\xb9\x08\x00\xba\xf8\x03\xf3\x6d" + HLT  # mov di, 0x2000; mov cx, 8; …; rep insw
    with machine_with(code) as machine:
        given = 0
        while machine.next_exit() == Exit.IO:
            room = machine.io_data()
            room[:] = text[given : given + len(room)]
            given += len(room)
        assert len(text) == given
        assert text == machine.ram.bytes[0x2000 : 0x2000 + len(text)]


def test_memory_mapped_write_and_read() -> None:
    # mov ax, 0x2000; mov ds, ax; mov word [0x10], 0xbeef; mov al, [0x20]
    code = b"\xb8\x00\x20\x8e\xd8\xc7\x06\x10\x00\xef\xbe\xa0\x20\x00" + HLT
    with machine_with(code) as machine:
        mmio = machine.vcpu.run_page.mmio
        assert machine.next_exit() == Exit.MMIO
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (MMIO + 0x10, 2, 1)
        assert bytes(mmio.data[:2]) == b"\xef\xbe"
        assert machine.next_exit() == Exit.MMIO
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (MMIO + 0x20, 1, 0)
        mmio.data[0] = 0x5A
        assert machine.next_exit() == Exit.HLT
        assert machine.regs().rax & 0xFF == 0x5A


def test_triple_fault() -> None:
    """In protected mode: KVM's emulator has no limit on the real-mode vector table."""
    with machine_with(b"\x0f\x0b") as machine:  # ud2
        sregs = abi.kvm_sregs()
        machine.vcpu.get_sregs(sregs)
        sregs.cr0 |= 1  # PE
        sregs.cs.db = sregs.cs.g = 1
        sregs.cs.limit = 0xFFFF_FFFF
        sregs.idt.limit = 0
        machine.vcpu.set_sregs(sregs)
        assert machine.next_exit() == Exit.SHUTDOWN


def test_single_step() -> None:
    with machine_with(b"\x90\x90" + HLT) as machine:
        control = abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP
        machine.vcpu.set_guest_debug(control)
        assert machine.next_exit() == Exit.DEBUG
        assert machine.vcpu.run_page.debug.arch.pc == ENTRY + 1
        machine.vcpu.set_guest_debug(0)
        assert machine.next_exit() == Exit.HLT


# --- stopping ---


def test_immediate_exit_returns_without_running() -> None:
    with machine_with(FOREVER) as machine:
        machine.vcpu.immediate_exit = True
        assert machine.vcpu.immediate_exit
        assert not machine.vcpu.run()
        assert machine.regs().rip == ENTRY


def test_immediate_exit_completes_the_pending_port_input() -> None:
    code = b"\xba\xf8\x03\xec" + FOREVER  # mov dx, 0x3f8; in al, dx
    with machine_with(code) as machine:
        assert machine.next_exit() == Exit.IO
        machine.io_data()[:] = b"\x77"
        machine.vcpu.immediate_exit = True
        assert not machine.vcpu.run()
        assert (machine.regs().rax & 0xFF, machine.regs().rip) == (0x77, ENTRY + 4)


@contextmanager
def running(machine: Machine) -> Iterator[tuple[threading.Thread, list[bool]]]:
    """The vCPU in a thread that takes KICK in KVM_RUN alone; yields it, and what `run` returned."""
    results: list[bool] = []
    entered = threading.Event()

    def thread() -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [KICK])
        machine.vcpu.set_signal_mask(blocked - {KICK})
        entered.set()
        results.append(machine.vcpu.run())
        info = signal.sigtimedwait([KICK], 0)
        results.append(info is not None and info.si_signo == KICK)

    vcpu_thread = threading.Thread(target=thread)
    vcpu_thread.start()
    entered.wait()
    try:
        yield vcpu_thread, results
    finally:
        machine.vcpu.immediate_exit = True
        vcpu_thread.join(10)


def kick(thread: threading.Thread) -> None:
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, KICK)


def test_a_blocked_signal_ends_a_run_under_way() -> None:
    """This thread goes on meanwhile: KVM_RUN does not hold the GIL."""
    # mov ax, 0; again: inc word [0x2000]; jmp again
    with machine_with(b"\xff\x06\x00\x20\xeb\xfa") as machine, running(machine) as (thread, results):
        deadline = time.monotonic() + 10
        while machine.ram.bytes[0x2000:0x2002] == b"\0\0":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        kick(thread)
        thread.join(10)
        assert results == [False, True]


def test_a_kick_before_the_run_is_not_lost() -> None:
    with machine_with(FOREVER) as machine:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [KICK])
        try:
            machine.vcpu.set_signal_mask(blocked - {KICK})
            kick(threading.current_thread())
            assert not machine.vcpu.run()
            assert signal.sigtimedwait([KICK], 0) is not None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_no_signal_mask_is_the_threads_own() -> None:
    with machine_with(FOREVER) as machine:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [KICK])
        try:
            machine.vcpu.set_signal_mask(blocked - {KICK})
            machine.vcpu.set_signal_mask(None)
            kick(threading.current_thread())
            machine.vcpu.immediate_exit = True  # the signal is blocked again, so nothing else would end this
            assert not machine.vcpu.run()
            assert signal.sigtimedwait([KICK], 0) is not None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# --- interrupts and what replaces exits ---

# Vector 4's handler says 'I' on the port, again after each interrupt; the code halts with interrupts on.
HANDLER = 0x1800
INTERRUPTIBLE = b"\xfb\xf4\xeb\xfd"  # sti; again: hlt; jmp again
HANDLE = b"\xb0\x49\xba\xf8\x03\xee\xb0\x20\xe6\x20\xcf"  # mov al, 'I'; out; mov al, 0x20; out 0x20, al; iret


@contextmanager
def interruptible() -> Iterator[Machine]:
    """The PIC is as KVM resets it: all unmasked, vectors from 0."""
    with machine_with(INTERRUPTIBLE, with_chips) as machine:
        machine.vm.set_gsi_routing([irqchip_route(4, abi.KVM_IRQCHIP_PIC_MASTER, 4)])  # no timer
        machine.ram.bytes[HANDLER : HANDLER + len(HANDLE)] = HANDLE
        machine.ram.bytes[16:20] = struct.pack("<HH", HANDLER, 0)
        yield machine


def test_interrupt_line() -> None:
    with interruptible() as machine:
        machine.vm.irq_line(4, True)
        assert machine.next_exit() == Exit.IO
        assert bytes(machine.io_data()) == b"I"


def test_irqfd() -> None:
    with interruptible() as machine, eventfd() as fd:
        machine.vm.assign_irqfd(fd, gsi=4)
        os.eventfd_write(fd, 1)
        assert machine.next_exit() == Exit.IO
        assert bytes(machine.io_data()) == b"I"
        machine.vm.deassign_irqfd(fd, gsi=4)
        os.eventfd_write(fd, 1)
        assert readable(fd)  # KVM no longer takes it


def test_queued_interrupt_without_irqchip() -> None:
    with machine_with(INTERRUPTIBLE) as machine:
        machine.ram.bytes[HANDLER : HANDLER + len(HANDLE)] = HANDLE
        machine.ram.bytes[16:20] = struct.pack("<HH", HANDLER, 0)
        assert machine.next_exit() == Exit.HLT
        machine.vcpu.interrupt(4)
        assert machine.next_exit() == Exit.IO
        assert bytes(machine.io_data()) == b"I"


def test_ioeventfd_replaces_the_exit() -> None:
    code = b"\xb0\x41\xba\xf8\x03\xee\xb0\x42\xee" + HLT  # mov al, 'A'; mov dx, 0x3f8; out dx, al; …'B'…
    with machine_with(code) as machine, eventfd() as fd:
        machine.vm.assign_ioeventfd(fd, PORT, 1, pio=True, datamatch=0x41)
        assert machine.next_exit() == Exit.IO
        assert bytes(machine.io_data()) == b"B"
        assert os.eventfd_read(fd) == 1
        machine.enter_at()
        machine.vm.deassign_ioeventfd(fd, PORT, 1, pio=True, datamatch=0x41)
        assert machine.next_exit() == Exit.IO
        assert bytes(machine.io_data()) == b"A"
        assert not readable(fd)


@pytest.mark.parametrize("pio", [False, True])
def test_coalesced_writes_are_queued(pio: bool) -> None:
    memory = b"\xb8\x00\x20\x8e\xd8\xc6\x06\x10\x00\x55"  # mov ax, 0x2000; mov ds, ax; mov byte [0x10], 0x55
    port = b"\xb0\x55\xba\xf8\x03\xee"  # mov al, 0x55; mov dx, 0x3f8; out dx, al
    address = PORT if pio else MMIO + 0x10
    with machine_with((port if pio else memory) + HLT) as machine:
        machine.vm.register_coalesced(address, 1, pio)
        assert machine.next_exit() == Exit.HLT
        ring = machine.vcpu.coalesced
        assert ring is not None
        assert (ring.first, ring.last) == (0, 1)
        write = ring.coalesced_mmio[0]
        assert (address, 1, int(pio), 0x55) == (write.phys_addr, write.len, write.pio, write.data[0])
        machine.vm.unregister_coalesced(address, 1, pio)
        machine.enter_at()
        assert (Exit.IO if pio else Exit.MMIO) == machine.next_exit()


# --- memory ---


def test_dirty_log() -> None:
    code = b"\xc6\x06\x00\x30\x01\xc6\x06\x00\x50\x01" + HLT  # mov byte [0x3000], 1; mov byte [0x5000], 1
    with machine_with(code, flags=abi.KVM_MEM_LOG_DIRTY_PAGES) as machine:
        bitmap = bytearray(8)
        machine.vm.get_dirty_log(0, bitmap)
        assert machine.next_exit() == Exit.HLT
        machine.vm.get_dirty_log(0, bitmap)
        written = int.from_bytes(bitmap, "little")
        assert written & (1 << 3 | 1 << 4 | 1 << 5) == 1 << 3 | 1 << 5


def test_a_read_only_slot_makes_writes_exit() -> None:
    code = b"\xc6\x06\x00\x30\x01" + HLT  # mov byte [0x3000], 1
    with machine_with(code, flags=abi.KVM_MEM_READONLY) as machine:
        assert machine.next_exit() == Exit.MMIO
        assert machine.vcpu.run_page.mmio.phys_addr == 0x3000


def test_a_deleted_slot_is_no_memory() -> None:
    code = b"\xc6\x06\x00\x30\x01" + HLT  # mov byte [0x3000], 1
    with machine_with(code) as machine:
        page = 0x1000
        ram = machine.ram
        machine.vm.set_memory(0, 0, 0, ram.hva, ram.memfd, 0)
        machine.vm.set_memory(1, ENTRY, page, ram.hva + ENTRY, ram.memfd, ENTRY)
        assert machine.next_exit() == Exit.MMIO
        assert machine.vcpu.run_page.mmio.phys_addr == 0x3000


def test_translation() -> None:
    with machine_with(HLT) as machine:
        assert machine.vcpu.translate(ENTRY) == ENTRY  # real mode: no paging


def guest_memfd_size(vm: Vm, size: int) -> int:
    fd = vm.create_guest_memfd(size)
    try:
        assert not os.get_inheritable(fd)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def test_guest_memfd() -> None:
    with machine_with(HLT) as machine:
        if not machine.vm.check(abi.Cap.GUEST_MEMFD):
            pytest.skip("this KVM has no guest_memfd (Linux 6.8)")
        assert guest_memfd_size(machine.vm, 0x4000) == 0x4000


def test_pre_fault() -> None:
    with machine_with(HLT) as machine:
        if machine.vm.check(abi.Cap.PRE_FAULT_MEMORY):
            machine.vcpu.pre_fault(0, 0x10000)
            assert machine.next_exit() == Exit.HLT
        else:
            with pytest.raises(IoctlError, match="KVM_PRE_FAULT_MEMORY"):
                machine.vcpu.pre_fault(0, 0x10000)
