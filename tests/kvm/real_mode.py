"""A bare machine for a few bytes of real-mode code: one vCPU, 64 KiB of RAM at 0, entered at 0:ENTRY.

Code is spelt as bytes with its assembly beside it. What lies at MMIO (segment 0x2000) is no memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vmm.kvm import DirectPort, Exit, Port, System, Vcpu, Vm, abi

ENTRY = 0x1000
RAM_SIZE = 0x10000
MMIO = 0x20000
PORT = 0x3F8
FLAGS = 2  # bit 1 of FLAGS is always set


@dataclass
class Ram:
    """A memfd and its mapping here."""

    memfd: int
    bytes: mmap.mmap
    hva: int

    def give(self, vm: Vm, flags: int = 0) -> None:
        vm.set_memory(slot=0, gpa=0, size=RAM_SIZE, hva=self.hva, memfd=self.memfd, offset=0, flags=flags)

    def read(self, gpa: int, length: int) -> bytes:
        return self.bytes[gpa : gpa + length]

    def write(self, gpa: int, data: bytes) -> None:
        self.bytes[gpa : gpa + len(data)] = data


@dataclass
class Machine:
    system: System
    vm: Vm
    vcpu: Vcpu
    ram: Ram

    def enter_at(self, ip: int = ENTRY) -> None:
        sregs = abi.kvm_sregs()
        self.vcpu.get_sregs(sregs)
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(abi.kvm_regs(rip=ip, rsp=0x8000, rflags=FLAGS))

    def next_exit(self) -> Exit:
        """Runs to the next exit; a kick that nobody sent would fail the test."""
        assert self.vcpu.run()
        return Exit(self.vcpu.run_page.exit_reason)

    def io_data(self) -> memoryview:
        io = self.vcpu.run_page.io
        return self.vcpu.io_data(io.data_offset, io.size * io.count)

    def regs(self) -> abi.kvm_regs:
        regs = abi.kvm_regs()
        self.vcpu.get_regs(regs)
        return regs


@contextmanager
def ram_of(code: bytes) -> Iterator[Ram]:
    memfd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, RAM_SIZE)
        mapping = mmap.mmap(memfd, RAM_SIZE)
        mapping[ENTRY : ENTRY + len(code)] = code
        yield Ram(memfd, mapping, ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
    finally:
        os.close(memfd)


@contextmanager
def machine_on(
    ram: Ram, prepare: Callable[[Vm], None] = lambda vm: None, flags: int = 0, port: Port | None = None
) -> Iterator[Machine]:
    """A machine on that RAM. `prepare` is given the VM before its vCPU exists."""
    with System(port=port or DirectPort()) as system, system.create_vm() as vm:
        vm.set_tss_address()
        vm.set_identity_map()
        prepare(vm)
        ram.give(vm, flags)
        with vm.create_vcpu(0) as vcpu:
            yield Machine(system, vm, vcpu, ram)


@contextmanager
def machine_with(
    code: bytes, prepare: Callable[[Vm], None] = lambda vm: None, flags: int = 0
) -> Iterator[Machine]:
    """A machine that is about to execute `code`."""
    with ram_of(code) as ram, machine_on(ram, prepare, flags) as machine:
        machine.enter_at()
        yield machine


def with_chips(vm: Vm) -> None:
    """For `prepare`: the in-kernel irqchip and PIT."""
    vm.create_irqchip()
    vm.create_pit()
