"""What must have come with a guest, and what must not, before anything is made of it."""

from __future__ import annotations

from vmm.devices.chardev import needed_fds, parse_serial
from vmm.errors import StateError
from vmm.fds import FdStore
from vmm.machine.config import MachineConfig
from vmm.memory import layout
from vmm.memory.guest import FD_NAMES

PER_VCPU = frozenset({"vcpu", "kvm-go", "kvm-done"})
KEEPERS_FDS = PER_VCPU | {"kvm-slots"}


def check_complete(config: MachineConfig, fds: FdStore) -> None:
    """What did not come with a guest must not be made anew, and empty, or opened by a path that the other VMM
    names. Raises StateError that names it.
    """
    ram = FD_NAMES[config.memory_backend]
    for name in ("state", "fresh", "token", "image"):
        fds.get(name)
    for index in range(len(layout(config.memory))):
        fds.get(ram, index)
    for name, index in needed_fds(parse_serial(config.serial)):
        fds.get(name, index)


def check_keepers_fds(config: MachineConfig, fds: FdStore) -> None:
    """What a keeper's VM is driven with is there, and no more of it. Raises StateError."""
    wanted = {("kvm-slots", 0), *((name, index) for name in PER_VCPU for index in range(config.cpus))}
    for name, index in sorted(wanted):
        fds.get(name, index)
    came = {(name, index) for name, index, _ in fds.items() if name in KEEPERS_FDS}
    refuse_surplus(sorted(came - wanted))


def surplus(fds: FdStore) -> list[tuple[str, int]]:
    """What came, and no part of the machine that is built wants."""
    fds.find("kvm-stats")  # wanted as soon as the monitor is asked which VM it is
    return fds.unasked()


def refuse_surplus(rows: list[tuple[str, int]]) -> None:
    """Raises StateError where there are any."""
    if rows:
        names = ", ".join(f"{name}/{index}" for name, index in rows)
        raise StateError(f"the fd table has what this machine has no use for: {names}; refused")
