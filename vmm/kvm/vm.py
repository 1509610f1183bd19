"""One VM: its memory slots, in-kernel chips, interrupt routes and clock.

State goes into and comes from structures that the caller owns; they may lie in a memfd's mapping, and the
kernel then writes straight into it. Nothing here keeps guest state, and nothing here retries.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Final, Self

from vmm.kvm import abi
from vmm.kvm.abi import Cap, sized
from vmm.kvm.port import Bitmap, Port
from vmm.kvm.vcpu import Vcpu

# Where Intel's real mode gets three pages for a TSS and one for a page table: above any RAM below 4 GiB and
# under the firmware, as in QEMU (target/i386/kvm/kvm.c).
TSS_ADDRESS: Final = 0xFFFB_D000
IDENTITY_MAP_ADDRESS: Final = 0xFFFB_C000

_XSAVE_SIZE: Final = 4096


def irqchip_route(gsi: int, chip_id: int, pin: int) -> abi.kvm_irq_routing_entry:
    """A route from `gsi` to a pin of the PIC or the IOAPIC (KVM_IRQCHIP_*)."""
    route = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
    route.u.irqchip = abi.kvm_irq_routing_irqchip(chip_id, pin)
    return route


def msi_route(gsi: int, address: int, data: int) -> abi.kvm_irq_routing_entry:
    """A route from `gsi` to a message-signalled interrupt: `data` written to the guest-physical `address`."""
    route = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_MSI)
    route.u.msi = abi.kvm_irq_routing_msi(address & 0xFFFF_FFFF, address >> 32, data)
    return route


class Vm:
    """A VM fd, which it owns; `mmap_size` is `System.mmap_size`. All methods raise IoctlError."""

    def __init__(self, fd: int, port: Port, mmap_size: int) -> None:
        self.fd = fd
        self.port: Final = port
        self.mmap_size: Final = mmap_size

    def check(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of this VM; for some capabilities it differs from the system's answer."""
        return self.port.ioctl(self.fd, abi.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, flags: int = 0, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        enable = abi.kvm_enable_cap(cap=cap, flags=flags)
        enable.args[: len(args)] = list(args)
        self.port.ioctl(self.fd, abi.KVM_ENABLE_CAP, enable)

    @property
    def xsave_size(self) -> int:
        """Bytes of a vCPU's XSAVE state: 4096, or more where KVM_CAP_XSAVE2 says so."""
        return max(_XSAVE_SIZE, self.check(Cap.XSAVE2))

    # --- memory ---

    def set_tss_address(self, address: int = TSS_ADDRESS) -> None:
        """KVM_SET_TSS_ADDR: three pages of guest-physical space for KVM's use; before the first vCPU."""
        self.port.ioctl(self.fd, abi.KVM_SET_TSS_ADDR, address)

    def set_identity_map(self, address: int = IDENTITY_MAP_ADDRESS) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: a page of guest-physical space for KVM's use; before the first vCPU."""
        self.port.ioctl(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, (ctypes.c_uint64 * 1)(address))

    def set_memory(
        self, slot: int, gpa: int, size: int, hva: int, memfd: int, offset: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: `gpa` is `size` bytes of `memfd` at `offset`, mapped here at `hva`.

        `flags` are KVM_MEM_*; size 0 deletes the slot. The caller keeps the mapping while the slot exists.
        """
        self.port.set_user_memory(self.fd, slot, flags, gpa, size, hva, memfd, offset)

    def set_guest_memory(
        self, slot: int, gpa: int, size: int, hva: int, guest_memfd: int, offset: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_GUEST_MEMFD (KVM_CAP_USER_MEMORY2): `gpa` is `size` bytes
        of `guest_memfd` at `offset`, mapped here at `hva`, or 0 where it cannot be mapped.
        """
        self.port.set_guest_memory(self.fd, slot, flags, gpa, size, hva, guest_memfd, offset)

    def get_dirty_log(self, slot: int, bitmap: Bitmap) -> None:
        """KVM_GET_DIRTY_LOG: the pages written since the last call, a bit for each, in whole 64-bit words."""
        self.port.get_dirty_log(self.fd, slot, bitmap)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD (KVM_CAP_GUEST_MEMFD): an fd of `size` bytes of memory bound to this VM.

        `flags` are GUEST_MEMFD_FLAG_*, of those that KVM_CAP_GUEST_MEMFD_FLAGS says.
        """
        return self.port.create(self.fd, abi.KVM_CREATE_GUEST_MEMFD, abi.kvm_create_guest_memfd(size, flags))

    def register_coalesced(self, address: int, size: int, pio: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO: writes there are queued in the vCPUs' ring instead of exiting."""
        self.port.ioctl(
            self.fd, abi.KVM_REGISTER_COALESCED_MMIO, abi.kvm_coalesced_mmio_zone(address, size, pio)
        )

    def unregister_coalesced(self, address: int, size: int, pio: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO of the same zone."""
        self.port.ioctl(
            self.fd, abi.KVM_UNREGISTER_COALESCED_MMIO, abi.kvm_coalesced_mmio_zone(address, size, pio)
        )

    # --- vCPUs ---

    def create_vcpu(self, index: int) -> Vcpu:
        """KVM_CREATE_VCPU; `index` is its APIC id. With an in-kernel irqchip, all but 0 wait for SIPI."""
        fd = self.port.create(self.fd, abi.KVM_CREATE_VCPU, index)
        try:
            self.port.start_vcpu(fd, index)
        except BaseException:
            self.port.forget(fd)
            os.close(fd)
            raise
        return Vcpu(fd, index, self.port, self.mmap_size)

    # --- chips and interrupts ---

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: two PICs, an IOAPIC, and a LAPIC for each vCPU created after it."""
        self.port.ioctl(self.fd, abi.KVM_CREATE_IRQCHIP)

    def create_pit(self, flags: int = abi.KVM_PIT_SPEAKER_DUMMY) -> None:
        """KVM_CREATE_PIT2, after the irqchip; by default KVM serves port 0x61 (gate and OUT2) too."""
        self.port.ioctl(self.fd, abi.KVM_CREATE_PIT2, abi.kvm_pit_config(flags))

    def irq_line(self, gsi: int, level: bool | int) -> None:
        """KVM_IRQ_LINE: sets the level of an interrupt line."""
        self.port.ioctl(self.fd, abi.KVM_IRQ_LINE, abi.kvm_irq_level(gsi, level))

    def signal_msi(self, address: int, data: int) -> bool:
        """KVM_SIGNAL_MSI: delivers one message. False: the guest has it blocked."""
        message = abi.kvm_msi(address & 0xFFFF_FFFF, address >> 32, data)
        return self.port.ioctl(self.fd, abi.KVM_SIGNAL_MSI, message) > 0

    def set_gsi_routing(self, entries: Iterable[abi.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: replaces the whole table (see `irqchip_route`, `msi_route`)."""
        routes = tuple(entries)
        table = sized(abi.kvm_irq_routing, len(routes))(nr=len(routes))
        table.entries[:] = list(routes)
        self.port.ioctl(self.fd, abi.KVM_SET_GSI_ROUTING, table)

    def assign_irqfd(self, eventfd: int, gsi: int, resample: int | None = None) -> None:
        """KVM_IRQFD: writes to `eventfd` raise `gsi`; given `resample`, as a level until EOI, told there."""
        irqfd = abi.kvm_irqfd(eventfd, gsi)
        self.port.admit(eventfd)
        if resample is not None:
            self.port.admit(resample)
            irqfd.flags, irqfd.resamplefd = abi.KVM_IRQFD_FLAG_RESAMPLE, resample
        self.port.ioctl(self.fd, abi.KVM_IRQFD, irqfd)

    def deassign_irqfd(self, eventfd: int, gsi: int) -> None:
        """Undoes `assign_irqfd`; on return no more interrupts come from it."""
        self.port.admit(eventfd)
        self.port.ioctl(self.fd, abi.KVM_IRQFD, abi.kvm_irqfd(eventfd, gsi, abi.KVM_IRQFD_FLAG_DEASSIGN))
        self.port.forget(eventfd)

    def assign_ioeventfd(
        self, eventfd: int, address: int, length: int, pio: bool = False, datamatch: int | None = None
    ) -> None:
        """KVM_IOEVENTFD: a write of `length` bytes (0: any), of `datamatch` if given, signals `eventfd`."""
        self._ioeventfd(eventfd, address, length, pio, datamatch, 0)

    def deassign_ioeventfd(
        self, eventfd: int, address: int, length: int, pio: bool = False, datamatch: int | None = None
    ) -> None:
        """Undoes `assign_ioeventfd`, given the same arguments."""
        self._ioeventfd(eventfd, address, length, pio, datamatch, abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
        self.port.forget(eventfd)

    def _ioeventfd(
        self, eventfd: int, address: int, length: int, pio: bool, datamatch: int | None, flags: int
    ) -> None:
        if pio:
            flags |= abi.KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        self.port.admit(eventfd)
        request = abi.kvm_ioeventfd(datamatch or 0, address, length, eventfd, flags)
        self.port.ioctl(self.fd, abi.KVM_IOEVENTFD, request)

    def get_irqchip(self, chip_id: int, into: abi.kvm_irqchip) -> None:
        """KVM_GET_IRQCHIP of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        into.chip_id = chip_id
        self.port.ioctl(self.fd, abi.KVM_GET_IRQCHIP, into)

    def set_irqchip(self, state: abi.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP of the chip that `state.chip_id` names."""
        self.port.ioctl(self.fd, abi.KVM_SET_IRQCHIP, state)

    def get_pit2(self, into: abi.kvm_pit_state2) -> None:
        """KVM_GET_PIT2."""
        self.port.ioctl(self.fd, abi.KVM_GET_PIT2, into)

    def set_pit2(self, state: abi.kvm_pit_state2) -> None:
        """KVM_SET_PIT2. The running channel starts its count anew: `count_load_time` is not taken over."""
        self.port.ioctl(self.fd, abi.KVM_SET_PIT2, state)

    # --- clock, statistics ---

    def get_clock(self, into: abi.kvm_clock_data) -> None:
        """KVM_GET_CLOCK: kvmclock in ns, and what else `flags` says: the host's clock and TSC just then."""
        self.port.ioctl(self.fd, abi.KVM_GET_CLOCK, into)

    def set_clock(self, state: abi.kvm_clock_data) -> None:
        """KVM_SET_CLOCK; with KVM_CLOCK_REALTIME in `flags` the time since `state.realtime` is added."""
        self.port.ioctl(self.fd, abi.KVM_SET_CLOCK, state)

    def stats_fd(self) -> int:
        """KVM_GET_STATS_FD (KVM_CAP_BINARY_STATS_FD): an fd that reads as kvm_stats_header and so on."""
        return self.port.create(self.fd, abi.KVM_GET_STATS_FD)

    def close(self) -> None:
        """Idempotent. The kernel ends the VM once its vCPU, device and statistics fds are closed too."""
        if self.fd >= 0:
            self.port.forget(self.fd)
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
