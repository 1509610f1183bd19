"""The ACPI PM1a control register as far as soft-off needs it (ACPI 6.5, 4.8.3.2). Keeps no state."""

from __future__ import annotations

from collections.abc import Callable

PORTS = 2
SLP_EN = 1 << 13


class PowerOff:
    """Setting SLP_EN powers the machine off, whatever SLP_TYP says: there is no other sleep state."""

    def __init__(self, on_power_off: Callable[[], object]) -> None:
        self._on_power_off = on_power_off

    def read(self, offset: int, size: int) -> bytes:
        """Zero: SLP_EN is write-only and there is no SCI."""
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Calls `on_power_off()` on the vCPU's thread where the bytes written set SLP_EN."""
        if int.from_bytes(data, "little") << 8 * offset & SLP_EN:
            self._on_power_off()
