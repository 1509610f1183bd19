"""Address buses: which device answers an address. A device never learns its address, only the offset into its
range.

Unclaimed reads give all ones, as an empty bus does; unclaimed accesses are counted by address and logged once
each, as information: a guest may look for what is not there, as `sentinel` does for its test device. The
tables are bounded, so that a hostile guest can fill neither memory nor log. They are this process's: the
counts of QMP's `x-vmm-stats` begin anew in the VMM that a guest is handed to.
"""

from __future__ import annotations

import ctypes
import logging
from bisect import bisect_right
from collections.abc import Iterable
from typing import Protocol

from vmm.errors import ConfigError

log = logging.getLogger(__name__)

COUNTED_ADDRESSES = 256  # unclaimed addresses counted one by one; the rest share one counter


class BusDevice(Protocol):
    """What a bus needs of a device."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes (1, 2, 4 or 8) at `offset` of the device's range."""

    def write(self, offset: int, data: bytes) -> None:
        """Take `data` (1, 2, 4 or 8 bytes) at `offset` of the device's range."""


class Bus:
    """Ranges of addresses, none overlapping, each answered by one device."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.unclaimed: dict[int, int] = {}
        self.unclaimed_elsewhere = 0
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, BusDevice, str]] = []  # start, end (exclusive), device, label
        self._states: dict[int, ctypes.Structure] = {}  # start of the range -> its device's state
        self.posted: list[tuple[int, int]] = []  # address and size of what takes posted writes

    def attach(
        self,
        start: int,
        size: int,
        device: BusDevice,
        label: str,
        state: ctypes.Structure | None = None,
        posted: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Give `[start, start + size)` to `device`, which has `state`. Writes to `posted`, offsets and sizes
        in bytes, may reach it late, but before anything else that the guest does to it. Raises ConfigError
        on overlap or a range beyond the bus.
        """
        end = start + size
        if not 0 <= start < end <= self.size:
            raise ConfigError(f"{label}: {start:#x}..{end:#x} lies outside the {self.name} bus")
        for other_start, other_end, _, other in self._ranges:
            if start < other_end and other_start < end:
                raise ConfigError(
                    f"{label}: {start:#x}..{end:#x} overlaps {other} at {other_start:#x} on {self.name}"
                )
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._ranges.insert(at, (start, end, device, label))
        if state is not None:
            self._states[start] = state
        self.posted += [(start + offset, length) for offset, length in posted]

    def state_at(self, address: int, size: int) -> ctypes.Structure | None:
        """The state of the device that answers the access, or a part of it, where one has any. (No two that
        have lie side by side, so an access meets one at most.)
        """
        for one in range(address, address + size):
            found = self._lookup(one, 1)
            if found is not None and (state := self._states.get(found[0])) is not None:
                return state
        return None

    def ranges(self) -> list[tuple[int, int, str]]:
        """`(start, end, label)` of every range, ascending; `end` is exclusive."""
        return [(start, end, label) for start, end, _, label in self._ranges]

    def _lookup(self, address: int, size: int) -> tuple[int, BusDevice] | None:
        """The range's start and device where one range holds the whole access."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            start, end, device, _ = self._ranges[at]
            if address + size <= end:
                return start, device
        return None

    def read(self, address: int, size: int) -> bytes:
        """What the guest reads; all ones where nobody answers. An access over a range's edge goes byte by
        byte.
        """
        found = self._lookup(address, size)
        if found is not None:
            start, device = found
            return device.read(address - start, size)
        if self._touches_any(address, size):
            return b"".join(self.read(address + i, 1) for i in range(size))
        self._count(address, size, "read")
        return b"\xff" * size

    def write(self, address: int, data: bytes) -> None:
        """What the guest writes; nothing happens where nobody answers."""
        found = self._lookup(address, len(data))
        if found is not None:
            start, device = found
            device.write(address - start, data)
        elif self._touches_any(address, len(data)):
            for i in range(len(data)):
                self.write(address + i, data[i : i + 1])
        else:
            self._count(address, len(data), "write")

    def _touches_any(self, address: int, size: int) -> bool:
        return size > 1 and any(self._lookup(address + i, 1) is not None for i in range(size))

    def _count(self, address: int, size: int, what: str) -> None:
        seen = self.unclaimed.get(address)
        if seen is not None:
            self.unclaimed[address] = seen + 1
        elif len(self.unclaimed) < COUNTED_ADDRESSES:
            self.unclaimed[address] = 1
            log.info(
                "%s %#x: %s of %d bytes that no device claims (logged once)", self.name, address, what, size
            )
        else:
            self.unclaimed_elsewhere += 1
