"""One vCPU: its shared page, KVM_RUN, and all of its state.

KVM serialises a vCPU's ioctls with KVM_RUN, so all but `immediate_exit` block while another thread runs it:
stop it first. State goes into and comes from structures that the caller owns, and nothing is allocated on the
way but for a list of more MSRs than KVM takes at once. This module must never decide what an exit means.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterable
from ctypes import addressof, memmove, sizeof
from typing import Any, Final, Self

from vmm.kvm import abi
from vmm.kvm.abi import Exit, Ioctl, sized
from vmm.kvm.port import IoctlError, Port

_SIGSET_SIZE: Final = 8  # the kernel's sigset_t: bit N-1 is signal N
_PAGE_SIZE: Final = 4096
_MOST_MSRS: Final = 255  # below MAX_IO_MSRS, arch/x86/kvm/x86.c


def _map(fd: int, size: int) -> mmap.mmap:
    """The whole of what a vCPU fd shares. This works in any process that has the fd, unlike its ioctls."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, size, trackfd=False)
    return mmap.mmap(fd, size)


class Vcpu:
    """A vCPU fd, which it owns, and its mapping. All methods raise IoctlError.

    `run_page` is the shared kvm_run; `coalesced` the ring of coalesced writes, None where the mapping has no
    room for one. They are gone after `close`, and unmapped once nothing else refers to them.
    """

    def __init__(self, fd: int, index: int, port: Port, mmap_size: int) -> None:
        self.fd = fd
        self.index: Final = index
        self.port: Final = port
        self._ioctl = port.ioctl
        self._run = port.run
        mapping = _map(fd, mmap_size)
        self._bytes = memoryview(mapping)
        self.run_page = abi.kvm_run.from_buffer(mapping)
        ring = abi.KVM_COALESCED_MMIO_PAGE_OFFSET * _PAGE_SIZE
        self.coalesced = (
            sized(abi.kvm_coalesced_mmio_ring, abi.KVM_COALESCED_MMIO_MAX).from_buffer(mapping, ring)
            if mmap_size >= ring + _PAGE_SIZE
            else None
        )

    # --- running ---

    def run(self) -> bool:
        """KVM_RUN. True: `run_page` holds an exit to serve. False: kicked, nothing to serve.

        KVM completes an I/O exit, registers included, when `run` is entered again: before state is read,
        enter with `immediate_exit` set until it returns False. EFAULT with Exit.MEMORY_FAULT is an exit too.
        """
        try:
            return self._run(self.fd)
        except IoctlError as error:
            if error.errno == errno.EFAULT and self.run_page.exit_reason == Exit.MEMORY_FAULT:
                return True
            raise

    def bind_thread(self) -> None:
        """The calling thread is this vCPU's from here on: `kick` ends its `run`."""
        self.port.bind_thread(self.fd)

    @property
    def thread_id(self) -> int:
        """The thread that is in KVM_RUN while it runs, in whichever process."""
        return self.port.thread_id(self.fd)

    def kick(self) -> None:
        """Make `run` return False, now or the next time it is called. From any thread."""
        self.port.kick(self.fd)

    def leave(self) -> None:
        """As `kick`, but a vCPU that can run without this process is not stopped. From any thread."""
        self.port.leave(self.fd)

    def go_on(self) -> None:
        """After `leave`, on the vCPU's thread: its last exit is served, let it run on without us."""
        self.port.go_on(self.fd)

    @property
    def pending_exit(self) -> int:
        """The number of the exit that waits to be served or is being served, whoever began; else 0."""
        return self.port.pending_exit(self.fd)

    @property
    def waiting_ns(self) -> int | None:
        """How long that exit has been there; None where there is none."""
        return self.port.waiting_ns(self.fd)

    def io_data(self, offset: int, length: int) -> memoryview:
        """`length` bytes of the mapping at `offset`; for Exit.IO `io.data_offset`, `io.size * io.count`."""
        return self._bytes[offset : offset + length]

    @property
    def immediate_exit(self) -> bool:
        """True makes the next KVM_RUN, not one under way, return at once (KVM_CAP_IMMEDIATE_EXIT)."""
        return self.run_page.immediate_exit != 0

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self.run_page.immediate_exit = value

    def set_signal_mask(self, blocked: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: the signals blocked during KVM_RUN; None: those that the thread blocks anyway.

        A signal that the thread blocks and this set does not ends KVM_RUN and stays pending: no handler runs,
        and a kick that comes before KVM_RUN is not lost. Take it with `signal.sigtimedwait`.
        """
        if blocked is None:
            self._ioctl(self.fd, abi.KVM_SET_SIGNAL_MASK)
            return
        bits = sum({1 << (number - 1) for number in blocked})
        mask = sized(abi.kvm_signal_mask, _SIGSET_SIZE)(len=_SIGSET_SIZE)
        mask.sigset[:] = list(bits.to_bytes(_SIGSET_SIZE, "little"))
        self._ioctl(self.fd, abi.KVM_SET_SIGNAL_MASK, mask)

    # --- state, in and out ---

    def set_cpuid(self, cpuid: abi.kvm_cpuid2) -> None:
        """KVM_SET_CPUID2 of the first `nent` entries; before all other state, which depends on it."""
        self._ioctl(self.fd, abi.KVM_SET_CPUID2, cpuid)

    def get_cpuid(self, into: abi.kvm_cpuid2) -> None:
        """KVM_GET_CPUID2; `into.nent` says how much room there is, then how many there are."""
        self._ioctl(self.fd, abi.KVM_GET_CPUID2, into)

    def get_regs(self, into: abi.kvm_regs) -> None:
        """KVM_GET_REGS: general registers, RIP, RFLAGS."""
        self._ioctl(self.fd, abi.KVM_GET_REGS, into)

    def set_regs(self, state: abi.kvm_regs) -> None:
        """KVM_SET_REGS; it drops a pending exception, so `set_events` comes after it."""
        self._ioctl(self.fd, abi.KVM_SET_REGS, state)

    def get_sregs(self, into: abi.kvm_sregs) -> None:
        """KVM_GET_SREGS: segments, descriptor tables, control registers, EFER, APIC base."""
        self._ioctl(self.fd, abi.KVM_GET_SREGS, into)

    def set_sregs(self, state: abi.kvm_sregs) -> None:
        """KVM_SET_SREGS; `interrupt_bitmap` has at most one bit set. Without an in-kernel LAPIC, KVM_RUN
        begins by taking CR8 from the run page: so it is set there too.
        """
        self._ioctl(self.fd, abi.KVM_SET_SREGS, state)
        self.run_page.cr8 = state.cr8

    def get_sregs2(self, into: abi.kvm_sregs2) -> None:
        """KVM_GET_SREGS2 (KVM_CAP_SREGS2): with PAE's page-directory pointers, without pending interrupts."""
        self._ioctl(self.fd, abi.KVM_GET_SREGS2, into)

    def set_sregs2(self, state: abi.kvm_sregs2) -> None:
        """KVM_SET_SREGS2; CR8 as in `set_sregs`."""
        self._ioctl(self.fd, abi.KVM_SET_SREGS2, state)
        self.run_page.cr8 = state.cr8

    def get_fpu(self, into: abi.kvm_fpu) -> None:
        """KVM_GET_FPU: x87 and SSE registers; part of what `get_xsave` gives."""
        self._ioctl(self.fd, abi.KVM_GET_FPU, into)

    def set_fpu(self, state: abi.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        self._ioctl(self.fd, abi.KVM_SET_FPU, state)

    def get_xsave(self, into: abi.kvm_xsave) -> None:
        """KVM_GET_XSAVE, or KVM_GET_XSAVE2 if `into` has more than its 4096 bytes (`Vm.xsave_size`)."""
        big = sizeof(into) > abi.KVM_GET_XSAVE.size
        self._ioctl(self.fd, abi.KVM_GET_XSAVE2 if big else abi.KVM_GET_XSAVE, into)

    def set_xsave(self, state: abi.kvm_xsave) -> None:
        """KVM_SET_XSAVE. The kernel reads `Vm.xsave_size` bytes, so `state` has as many."""
        self._ioctl(self.fd, abi.KVM_SET_XSAVE, state)

    def get_xcrs(self, into: abi.kvm_xcrs) -> None:
        """KVM_GET_XCRS (KVM_CAP_XCRS)."""
        self._ioctl(self.fd, abi.KVM_GET_XCRS, into)

    def set_xcrs(self, state: abi.kvm_xcrs) -> None:
        """KVM_SET_XCRS."""
        self._ioctl(self.fd, abi.KVM_SET_XCRS, state)

    def get_debugregs(self, into: abi.kvm_debugregs) -> None:
        """KVM_GET_DEBUGREGS."""
        self._ioctl(self.fd, abi.KVM_GET_DEBUGREGS, into)

    def set_debugregs(self, state: abi.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self._ioctl(self.fd, abi.KVM_SET_DEBUGREGS, state)

    def get_events(self, into: abi.kvm_vcpu_events) -> None:
        """KVM_GET_VCPU_EVENTS: pending and injected exceptions, interrupts, NMIs and SMIs."""
        self._ioctl(self.fd, abi.KVM_GET_VCPU_EVENTS, into)

    def set_events(self, state: abi.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS; `flags` says which optional parts are valid."""
        self._ioctl(self.fd, abi.KVM_SET_VCPU_EVENTS, state)

    def get_mp_state(self, into: abi.kvm_mp_state) -> None:
        """KVM_GET_MP_STATE; it also takes in a waiting INIT or SIPI, so it comes before the other state."""
        self._ioctl(self.fd, abi.KVM_GET_MP_STATE, into)

    def set_mp_state(self, state: abi.kvm_mp_state) -> None:
        """KVM_SET_MP_STATE."""
        self._ioctl(self.fd, abi.KVM_SET_MP_STATE, state)

    def get_lapic(self, into: abi.kvm_lapic_state) -> None:
        """KVM_GET_LAPIC; needs an in-kernel irqchip."""
        self._ioctl(self.fd, abi.KVM_GET_LAPIC, into)

    def set_lapic(self, state: abi.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC, after the APIC base of `set_sregs`."""
        self._ioctl(self.fd, abi.KVM_SET_LAPIC, state)

    def get_nested_state(self, into: abi.kvm_nested_state) -> None:
        """KVM_GET_NESTED_STATE (KVM_CAP_NESTED_STATE says its size, which `into.size` must have)."""
        self._ioctl(self.fd, abi.KVM_GET_NESTED_STATE, into)

    def set_nested_state(self, state: abi.kvm_nested_state) -> None:
        """KVM_SET_NESTED_STATE."""
        self._ioctl(self.fd, abi.KVM_SET_NESTED_STATE, state)

    def get_msrs(self, block: abi.kvm_msrs) -> int:
        """KVM_GET_MSRS of the indices in `block`: how many were read; KVM does not know the next one."""
        return self._on_msrs(abi.KVM_GET_MSRS, block)

    def set_msrs(self, block: abi.kvm_msrs) -> int:
        """KVM_SET_MSRS: how many were written; the next one, or its value, was refused."""
        return self._on_msrs(abi.KVM_SET_MSRS, block)

    def _on_msrs(self, request: Ioctl, block: abi.kvm_msrs) -> int:
        """KVM takes so many in one call: more of them go in parts."""
        if block.nmsrs <= _MOST_MSRS:
            return self._ioctl(self.fd, request, block)
        done = 0
        while done < block.nmsrs:
            count = min(block.nmsrs - done, _MOST_MSRS)
            part: Any = sized(abi.kvm_msrs, count)(nmsrs=count)
            size = sizeof(abi.kvm_msr_entry)
            there = addressof(block) + sizeof(abi.kvm_msrs) + done * size
            memmove(part.entries, there, count * size)
            did = self._ioctl(self.fd, request, part)
            memmove(there, part.entries, did * size)
            done += did
            if did < count:
                break
        return done

    # --- time ---

    @property
    def tsc_offset(self) -> int:
        """What KVM adds to the host's TSC for the guest, modulo 2**64 (KVM_VCPU_TSC_OFFSET; Linux 5.16)."""
        return self.port.get_attr(self.fd, abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET)

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self.port.set_attr(self.fd, abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET, value)

    @property
    def tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the guest's TSC frequency, in kHz."""
        return self._ioctl(self.fd, abi.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; a frequency other than the host's needs KVM_CAP_TSC_CONTROL."""
        self._ioctl(self.fd, abi.KVM_SET_TSC_KHZ, khz)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tells the guest that it was paused. EINVAL: it has no kvmclock to be told by."""
        self._ioctl(self.fd, abi.KVM_KVMCLOCK_CTRL)

    # --- the rest ---

    def nmi(self) -> None:
        """KVM_NMI: queues one."""
        self._ioctl(self.fd, abi.KVM_NMI)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: queues an external interrupt; only without an in-kernel irqchip."""
        self._ioctl(self.fd, abi.KVM_INTERRUPT, abi.kvm_interrupt(vector))

    def set_guest_debug(self, control: int, debugreg: Iterable[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_* and, for hardware breakpoints, DR0 to DR7; 0 turns it off."""
        debug = abi.kvm_guest_debug(control)
        for number, value in enumerate(debugreg):
            debug.arch.debugreg[number] = value
        self._ioctl(self.fd, abi.KVM_SET_GUEST_DEBUG, debug)

    def translate(self, gva: int) -> int | None:
        """KVM_TRANSLATE: the guest-physical address of a virtual one, None if it is not mapped."""
        translation = abi.kvm_translation(gva)
        self._ioctl(self.fd, abi.KVM_TRANSLATE, translation)
        return translation.physical_address if translation.valid else None

    def pre_fault(self, gpa: int, size: int) -> None:
        """KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY): fills the second-stage tables for `size` bytes."""
        rest = abi.kvm_pre_fault_memory(gpa, size)
        while rest.size:
            self._ioctl(self.fd, abi.KVM_PRE_FAULT_MEMORY, rest)

    def stats_fd(self) -> int:
        """KVM_GET_STATS_FD (KVM_CAP_BINARY_STATS_FD)."""
        return self.port.create(self.fd, abi.KVM_GET_STATS_FD)

    def close(self) -> None:
        """Idempotent. Stop the vCPU first. A mapping that something else refers to keeps the VM alive."""
        if self.fd >= 0:
            self.port.forget(self.fd)
            os.close(self.fd)
            self.fd = -1
            del self.run_page, self.coalesced, self._bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
