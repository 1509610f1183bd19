"""The debug-exit port: a guest ends the VMM with a status, as by QEMU's isa-debug-exit. Keeps no state."""

from __future__ import annotations

from collections.abc import Callable

PORTS = 4  # takes writes of 1, 2 and 4 bytes


class DebugExit:
    """A write of `code` ends the machine with status `(code << 1) | 1`, odd as none of the VMM's own."""

    def __init__(self, on_exit: Callable[[int], object]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> bytes:
        """Zero."""
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Calls `on_exit(status)` on the vCPU's thread; the process's status is its low 8 bits."""
        self._on_exit(int.from_bytes(data, "little") << 1 | 1)
