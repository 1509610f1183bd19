"""A guest on a machine in the test's own process: a test can stop it and damage what it must not lose.

Built of `vmm.kvm` and `vmm.boot` alone, with devices as simple as their descriptions: COM1, debug-exit, and
the test device of firmware/README.md.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from vmm.boot.cpuid import cpuid_table, guest_cpuid, offers_1gib_pages
from vmm.boot.image import find_image, load_image
from vmm.boot.x86 import BootFlags, apply_boot_state, prepare_memory
from vmm.fds import FdStore
from vmm.kvm import Exit, System, Vcpu, Vm, abi
from vmm.memory import GuestMemory, layout
from vmm.report.results import GuestState, Results, parse_results

POLL_S = 0.02
COM1 = 0x3F8
LINE_CONTROL, LINE_STATUS = COM1 + 3, COM1 + 5
DIVISOR_LATCH, TRANSMITTER_EMPTY, DATA_READY = 0x80, 0x60, 0x01
DEBUG_EXIT = 0xF4
HOLD = (COM1 + 1, LINE_CONTROL, COM1 + 4, COM1 + 7, 0xCF9)  # registers that are nothing but what was written
ALL_ONES = 2**64 - 1
M32 = 2**32 - 1


class DeviceModel:
    """The test device, as firmware/README.md specifies it."""

    STREAM, POST, COUNT, PAGE = 0x5F0, 0x5F2, 0x5F4, 0xFED10000

    def __init__(self) -> None:
        self.latch = self.latch_writes = 0
        self.count = self.sum = self.reads = self.register_reads = 0
        self.posted = self.posted_sum = 0

    def port_in(self, port: int) -> int:
        if port == self.COUNT:
            return self.count
        self.reads += 1
        return (self.reads - 1) & 0xFF

    def port_out(self, port: int, value: int) -> None:
        if port == self.COUNT:
            self.count = self.sum = self.reads = 0
        elif port == self.POST:
            self.post(value)
        else:
            self.count += 1
            self.sum = ((self.sum << 1 | self.sum >> 31) + value) & M32

    def load(self, offset: int) -> int:
        if offset == 0x20:
            self.register_reads += 1
            return self.register_reads - 1
        return {
            0x00: self.latch + self.latch_writes,
            0x08: self.latch_writes,
            0x10: self.count,
            0x14: self.sum,
            0x18: self.reads,
            0x1C: 0x54534554,
            0x28: self.posted,
            0x2C: self.posted_sum,
        }.get(offset, 0)

    def store(self, offset: int, value: int) -> None:
        if offset == 0:
            self.latch, self.latch_writes = value, self.latch_writes + 1
        elif offset == 0x24:
            self.post(value)

    def post(self, value: int) -> None:
        self.posted += 1
        self.posted_sum = ((self.posted_sum << 1 | self.posted_sum >> 31) + value) & M32


def symbol(image: Path, source: str, name: str) -> int:
    """The address of that variable or function of one of a guest's source files."""
    with image.open("rb") as file:
        where = ""
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        for one in table.iter_symbols():
            if one["st_info"]["type"] == "STT_FILE":
                where = one.name
            elif one.name == name and (where == source or one["st_info"]["bind"] == "STB_GLOBAL"):
                return int(one["st_value"])
    raise AssertionError(f"{source} has no {name}")


class RunningGuest:
    """`stopped` lets a test change vCPUs, VM, memory and devices; `held` keeps vCPUs from going on."""

    def __init__(
        self, guest: str | Path, append: str, *, cpus: int = 1, memory: int = 64 << 20, testdev: bool = True
    ) -> None:
        path = guest if isinstance(guest, Path) else find_image(guest)
        self.image = load_image(path, ram=layout(memory))
        self.output = bytearray()
        self.input = bytearray()
        self.held: Collection[int] = ()
        self.device = DeviceModel() if testdev else None
        self._ended: SimpleQueue[int | BaseException] = SimpleQueue()
        self._change = threading.Condition()  # guards what follows, and the devices
        self.registers = dict.fromkeys(HOLD, 0)
        self._goal = "stop"
        self._parked = 0
        self._fds = FdStore()
        self.system = System()
        self.memory = GuestMemory.map(self._fds, memory)
        self.vm = self._build_vm()
        self.vcpus = [self.vm.create_vcpu(index) for index in range(cpus)]
        self._boot(append, memory)
        self._threads = [threading.Thread(target=self._main, args=(vcpu,)) for vcpu in self.vcpus]
        for thread in self._threads:
            thread.start()

    def _build_vm(self) -> Vm:
        vm = self.system.create_vm()
        vm.set_tss_address()
        vm.set_identity_map()
        for slot, region in enumerate(self.memory.regions):
            vm.set_memory(slot, region.gpa, region.size, region.hva, region.fd, 0)
        vm.create_irqchip()
        vm.create_pit()
        return vm

    def _boot(self, append: str, memory: int) -> None:
        block = self.system.supported_cpuid()
        supported = block.entries[: block.nent]
        khz = self.vcpus[0].tsc_khz
        for vcpu in self.vcpus:
            entries = guest_cpuid(supported, vcpu.index, len(self.vcpus), tsc_deadline=True, tsc_khz=khz)
            vcpu.set_cpuid(cpuid_table(entries))
        sizes = [size for _, size in layout(memory)]
        prepare_memory(
            self.memory.write,
            self.image,
            ram_below_4g=sizes[0],
            ram_above_4g=sum(sizes[1:]),
            cpus=len(self.vcpus),
            tsc_khz=khz,
            flags=BootFlags.IRQCHIP | BootFlags.PIT,
            cmdline=append,
            pdpe1gb=offers_1gib_pages(supported),
        )
        regs, sregs = abi.kvm_regs(), abi.kvm_sregs()
        self.vcpus[0].get_regs(regs)
        self.vcpus[0].get_sregs(sregs)
        apply_boot_state(regs, sregs, self.image)
        self.vcpus[0].set_sregs(sregs)
        self.vcpus[0].set_regs(regs)

    # --- the vCPUs' threads ---

    def _main(self, vcpu: Vcpu) -> None:
        vcpu.bind_thread()
        try:
            while self._wait_for_goal(vcpu) != "end":
                while self._goal == "run":
                    if vcpu.run():
                        self._serve(vcpu)
                vcpu.immediate_exit = True  # completes the I/O that was just served
                vcpu.run()
                vcpu.immediate_exit = False
        except BaseException as error:  # noqa: BLE001 -- the test is told
            self._ended.put(error)

    def _wait_for_goal(self, vcpu: Vcpu) -> str:
        with self._change:
            self._parked += 1
            self._change.notify_all()
            self._change.wait_for(
                lambda: self._goal == "end" or (self._goal == "run" and vcpu.index not in self.held)
            )
            self._parked -= 1
            return self._goal

    def _serve(self, vcpu: Vcpu) -> None:
        page = vcpu.run_page
        with self._change:
            if page.exit_reason == Exit.IO:
                self._serve_ports(vcpu)
            elif page.exit_reason == Exit.MMIO:
                self._serve_mmio(page.mmio)
            else:
                raise AssertionError(f"vCPU {vcpu.index}: exit {page.exit_reason}")

    def _serve_ports(self, vcpu: Vcpu) -> None:
        io = vcpu.run_page.io
        data = vcpu.io_data(io.data_offset, io.size * io.count)
        for start in range(0, len(data), io.size):
            item = data[start : start + io.size]
            if io.direction == abi.KVM_EXIT_IO_OUT:
                self._port_out(io.port, int.from_bytes(item, "little"))
            else:
                value = self._port_in(io.port) & ((1 << 8 * io.size) - 1)
                item[:] = value.to_bytes(io.size, "little")

    def _port_in(self, port: int) -> int:
        if port == LINE_STATUS:
            return TRANSMITTER_EMPTY | (DATA_READY if self.input else 0)
        if port in HOLD:
            return self.registers[port]
        if port == COM1:
            return self.input.pop(0) if self.input else 0
        if self.device is not None and port in (self.device.STREAM, self.device.COUNT):
            return self.device.port_in(port)
        return ALL_ONES

    def _port_out(self, port: int, value: int) -> None:
        if port == COM1:
            if not self.registers[LINE_CONTROL] & DIVISOR_LATCH:
                self.output.append(value)
        elif port in HOLD:
            self.registers[port] = value
        elif port == DEBUG_EXIT:
            self._goal = "stop"
            self._ended.put(value << 1 | 1)
        elif self.device is not None and port in (self.device.STREAM, self.device.POST, self.device.COUNT):
            self.device.port_out(port, value)

    def _serve_mmio(self, mmio: abi.MmioExit) -> None:
        device = self.device
        offset = mmio.phys_addr - DeviceModel.PAGE
        if device is None or not 0 <= offset < 4096:
            mmio.data[: mmio.len] = [0xFF] * mmio.len
        elif mmio.is_write:
            device.store(offset, int.from_bytes(bytes(mmio.data[: mmio.len]), "little"))
        else:
            value = device.load(offset) & ((1 << 8 * mmio.len) - 1)
            mmio.data[: mmio.len] = list(value.to_bytes(mmio.len, "little"))

    # --- what tests call ---

    def _to(self, goal: str) -> None:
        with self._change:
            self._goal = goal
            self._change.notify_all()

    def go(self) -> None:
        """Let all vCPUs run that are not held."""
        self._to("run")

    def stop(self) -> None:
        """Stop all vCPUs between two instructions, with no I/O half done."""
        self._to("stop")
        for vcpu in self.vcpus:
            vcpu.kick()
        with self._change:
            if not self._change.wait_for(lambda: self._parked == len(self.vcpus), timeout=10):
                raise AssertionError(f"{len(self.vcpus) - self._parked} vCPUs do not stop")

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The guest paused, and then let go on."""
        self.stop()
        yield
        self.go()

    @property
    def said(self) -> str:
        """All that came out of COM1."""
        return self.output.decode(errors="replace")

    def results(self) -> Results:
        """The results area, as the host reads it at this moment."""
        assert self.image.results is not None
        return parse_results(self.memory.read(*self.image.results))

    def symbol(self, source: str, name: str) -> int:
        """The address of that variable or function of one of the guest's source files."""
        return symbol(self.image.path, source, name)

    def load(self, gpa: int) -> int:
        """The u64 at `gpa`."""
        return int.from_bytes(self.memory.read(gpa, 8), "little")

    def add(self, gpa: int, what: int) -> None:
        """Add to the u64 at `gpa`."""
        self.memory.write(gpa, struct.pack("<Q", (self.load(gpa) + what) % (1 << 64)))

    def wait_for(self, what: Callable[[Results], bool], timeout_s: float = 20.0) -> Results:
        """Let it run until its results are so; AssertionError if it ends before or the time is over."""
        assert self.image.results is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self._ended.empty():
                raise AssertionError(f"the guest ended: {self._ended.get()}\n{self.said}")
            if self.memory.read(self.image.results[0], 4) != bytes(4):
                results = self.results()
                if results.state is not GuestState.STARTING and what(results):
                    return results
            time.sleep(POLL_S)
        raise AssertionError(f"not within {timeout_s} s\n{self.said}")

    def stop_when(self, found: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Let the stopped guest go on and stop it again until it stopped where it was wanted."""
        deadline = time.monotonic() + timeout_s
        while not found():
            if time.monotonic() > deadline:
                raise AssertionError(f"not found so within {timeout_s} s")
            self.go()
            time.sleep(0.0005)
            self.stop()

    def status_after(self, change: Callable[[], None], timeout_s: float = 20.0) -> int:
        """Make that change while the guest is stopped, let it go on, and wait for its end.

        Where it stops just between reading and writing what is changed, the change is lost: then once more.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self.stopped():
                change()
            try:
                return self.exit_status(timeout_s=2.0)
            except TimeoutError:
                continue
        raise AssertionError(f"nothing noticed within {timeout_s} s\n{self.said}")

    def exit_status(self, timeout_s: float = 20.0) -> int:
        """Wait for its end: what the process would end with. Raises TimeoutError if it does not come."""
        try:
            ended = self._ended.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f"still running after {timeout_s} s\n{self.said}") from None
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def close(self) -> None:
        """End whatever is left of it."""
        self._to("end")
        for vcpu in self.vcpus:
            vcpu.kick()
        for thread in self._threads:
            thread.join(10)
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.system.close()
        self.memory.close()
        self._fds.close()


@contextmanager
def running(
    guest: str | Path, append: str = "", *, cpus: int = 1, memory: int = 64 << 20, testdev: bool = True
) -> Iterator[RunningGuest]:
    """A prebuilt guest, or an image, that runs on a machine which ends with the context."""
    machine = RunningGuest(guest, append, cpus=cpus, memory=memory, testdev=testdev)
    try:
        machine.go()
        yield machine
    finally:
        machine.close()
