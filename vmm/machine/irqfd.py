"""Interrupts that an eventfd raises, and how they move: one eventfd may feed one VM at a time.

Linux answers EBUSY where an eventfd is given to a second irqfd, in whichever VM (seen on 6.18; 6.12 allows
it). So there is an order, and nothing is retried:

    old VMM                                        new VMM
    vCPUs stopped; `release`, then chips saved
                                                   chips loaded
    run token released                     ───▶    run token taken: the old VMM will not come back
                                                   `listen`, then the vCPUs run
    (rolled back instead: `listen`, then the vCPUs run on)

Releasing waits for an interrupt under way, so it is in a chip before the chips are saved. What is signalled
while no VM listens stays counted in the eventfd, and is raised, once, by the VM that listens next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final

from vmm.errors import ConfigError
from vmm.fds import FdStore
from vmm.kvm import Vm, abi, irqchip_route, msi_route

IRQFD: Final = "irqfd"  # name in the FdStore
PIC_PINS: Final = 8  # of each of two
CASCADE: Final = 2  # the master's pin that the slave is on
FIRST_MSI: Final = abi.KVM_IOAPIC_NUM_PINS  # GSIs below are the chips' pins, or kept free for them


class GsiRoutes:
    """Which GSI leads to which pin or message. KVM is always given the whole table, and keeps nothing that is
    not here: a device that routes a message keeps it in its own state and routes it again in a new VMM.
    """

    def __init__(self, vm: Vm, *, chips: bool) -> None:
        """`chips`: PICs and IOAPIC are in the kernel; their routes are then those KVM has at first."""
        self._vm = vm
        self._pins = list(_default_routes()) if chips else []
        self._messages: dict[int, tuple[int, int]] = {}

    def route_msi(self, gsi: int, address: int, data: int) -> None:
        """Have `gsi` send the message `data` to guest-physical `address`. ConfigError for a pin's GSI."""
        if gsi < FIRST_MSI:
            raise ConfigError(
                f"GSI {gsi} is a pin of an interrupt controller; messages have {FIRST_MSI} and up"
            )
        self._messages[gsi] = address, data
        self._vm.set_gsi_routing(
            [*self._pins, *(msi_route(gsi, *message) for gsi, message in self._messages.items())]
        )


def _default_routes() -> Iterable[abi.kvm_irq_routing_entry]:
    """Linux arch/x86/kvm/irq.c: each of the first 16 GSIs leads to the IOAPIC and to a PIC, the rest to the
    IOAPIC alone.
    """
    for pin in range(abi.KVM_IOAPIC_NUM_PINS):
        yield irqchip_route(pin, abi.KVM_IRQCHIP_IOAPIC, pin)
        if pin < PIC_PINS:
            yield irqchip_route(pin, abi.KVM_IRQCHIP_PIC_MASTER, pin)
        elif pin < 2 * PIC_PINS:
            yield irqchip_route(pin, abi.KVM_IRQCHIP_PIC_SLAVE, pin - PIC_PINS)


class IrqFds:
    """The irqfds of a machine. Used by the main thread while building, and by the thread of a handover."""

    def __init__(self, vm: Vm, fds: FdStore) -> None:
        self._vm = vm
        self._fds = fds
        self._gsis: dict[int, int] = {}  # eventfd -> GSI
        self._listening = False

    def open(self, index: int, gsi: int) -> int:
        """The eventfd `irqfd/index`, the received one or a new one, which from `listen` on raises `gsi`.

        While the machine is built.
        """
        eventfd = self._fds.get_or_open(IRQFD, index, _new_eventfd)
        self._gsis[eventfd] = gsi
        return eventfd

    def listen(self) -> None:
        """Have the VM listen to all of them; what was signalled meanwhile is raised now. Idempotent."""
        if not self._listening:
            self._each(self._vm.assign_irqfd)
            self._listening = True

    def release(self) -> None:
        """Have it listen no more; interrupts under way have arrived when this returns. Idempotent."""
        if self._listening:
            self._each(self._vm.deassign_irqfd)
            self._listening = False

    def taken_over(self) -> None:
        """The VM is an adopted one, which listens already."""
        self._listening = True

    def _each(self, call: Callable[[int, int], None]) -> None:
        for eventfd, gsi in self._gsis.items():
            call(eventfd, gsi)


def _new_eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
