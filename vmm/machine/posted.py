"""Writes that KVM has put aside: the ring of coalesced I/O, a VM's one, in the mapping of its vCPUs' fds.

A device says which of its addresses take such writes: those where nothing comes of a write before the guest
looks. KVM then lets the guest go on, without an exit, and the writes reach the device before the next exit
of any vCPU is served, in their order. Nobody hops to a keeper for them; and what is in the ring when a VMM
goes, or is killed, is the next one's to take out.

Each write is one step of a journal of its own, whose row number also says where in the ring it lay. So a VMM
that comes after a crash knows of the first one in the ring whether it has reached the device.
"""

from __future__ import annotations

import threading
from typing import Any

from vmm.bus import Bus
from vmm.kvm import abi
from vmm.machine.journal import Journal

RING = abi.KVM_COALESCED_MMIO_MAX


class PostedWrites:
    """The ring, on its way to the buses. `drain` may be called on any vCPU's thread."""

    def __init__(self, ring: Any, pio: Bus, mmio: Bus, journal: Journal | None) -> None:
        """`ring` is a `kvm_coalesced_mmio_ring`. With a `journal`, who calls `drain` holds the turn."""
        self._ring = ring
        self._pio = pio
        self._mmio = mmio
        self._journal = journal
        self._guard = threading.Lock()

    @property
    def waiting(self) -> bool:
        """Whether there is something in the ring."""
        return bool(self._ring.first != self._ring.last)

    def drain(self) -> None:
        """Give the devices what is in the ring."""
        with self._guard:
            for _ in range(RING):  # whatever the indices are: other processes have the ring mapped, too
                first = self._ring.first % RING
                if first == self._ring.last % RING:
                    break
                self._apply(first)
                self._ring.first = (first + 1) % RING

    def _apply(self, at: int) -> None:
        entry = self._ring.coalesced_mmio[at]
        bus = self._pio if entry.pio else self._mmio
        address, data = entry.phys_addr, bytes(entry.data[: entry.len])
        state = bus.state_at(address, len(data))
        if self._journal is None or state is None:
            bus.write(address, data)
            return
        lap = self._journal.number // RING + 1
        for _ in self._journal.steps(lap * RING + at, 1, state):
            bus.write(address, data)

    def recover(self) -> None:
        """Make good what a VMM that is gone had begun. Before the first `drain`, the VM being ours."""
        journal = self._journal
        if journal is None or not journal.number or journal.recover(journal.number):
            return
        first = self._ring.first % RING
        if self.waiting and journal.taken and first == journal.number % RING:
            self._ring.first = (first + 1) % RING  # it had reached the device, and was still in the ring

    def begin_anew(self) -> None:
        """The VM is a new one, and so is its ring."""
        if self._journal is not None:
            self._journal.clear()
