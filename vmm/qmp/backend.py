"""What the control socket asks of the rest of the VMM: one narrow protocol, and the error it answers with.

Every method is a plain call on the event loop's thread that returns at once and never waits for a guest, a
peer or a disk; what takes time (a handover) is started, and reported through events and `query_migrate`. The
implementation alone knows run states and refuses what they forbid, with QEMU's sentence in a `QmpError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vmm.errors import VmmError

if TYPE_CHECKING:
    from vmm.qmp.schema import MigrationMode, UnixSocket


class QmpError(VmmError):
    """A command was refused: `desc` is for people, `klass` (GenericError, CommandNotFound) for programs."""

    exit_code: ClassVar[int] = 12

    def __init__(self, desc: str, klass: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.klass = klass


class Backend(Protocol):
    """The VMM behind the monitor. A VmmError that a method raises is answered; a QmpError names its class.

    Events go out through `QmpServer.emit`. MIGRATION events only while the capability `events` is set is for
    the implementation to see to, as it keeps the capabilities.
    """

    def status(self) -> tuple[str, bool]:
        """QEMU's RunState word, and whether the guest runs."""
        ...

    def name(self) -> str | None:
        """The guest's name, if it has one."""
        ...

    def cpus(self) -> list[tuple[int, int]]:
        """(index, host thread id) of each vCPU."""
        ...

    def memory_size(self) -> int:
        """Bytes of guest RAM; 0 while there is no machine yet."""
        ...

    def stop(self) -> None:
        """Pause the guest; nothing to do if it is paused."""
        ...

    def cont(self) -> None:
        """Run the guest, or, while it is on its way in, on arrival. Refused without the run token."""
        ...

    def quit(self) -> None:
        """End this process soon; the answer is still sent."""
        ...

    def reset(self) -> None:
        """Reset the machine as its reset line would."""
        ...

    def inject_nmi(self) -> None:
        """Deliver an NMI to every vCPU."""
        ...

    def migration_parameters(self) -> dict[str, Any]:
        """By QMP name: `mode` (`normal` or `cpr-transfer`) and the `x-vmm-…-timeout`s in milliseconds."""
        ...

    def set_migration_parameters(self, values: dict[str, Any]) -> None:
        """Take over those given, already checked for type and range."""
        ...

    def migration_capabilities(self) -> dict[str, bool]:
        """By QMP name; `events` is the one there is."""
        ...

    def set_migration_capabilities(self, values: dict[str, bool]) -> None:
        """Take over those given."""
        ...

    def migrate(self, mode: MigrationMode, main: UnixSocket, cpr: UnixSocket) -> None:
        """Start the outgoing handover, in `mode`, whatever the parameter becomes afterwards."""
        ...

    def migrate_cancel(self) -> None:
        """Give up the outgoing handover; nothing to do if there is none or it has committed."""
        ...

    def migrate_incoming(self, main: UnixSocket) -> None:
        """Listen on the main channel, where `--incoming defer` left that open."""
        ...

    def query_migrate(self) -> dict[str, Any]:
        """QEMU's MigrationInfo; empty if there has been none."""
        ...

    def report(self) -> dict[str, Any]:
        """The last handover's whole report; empty if there has been none."""
        ...

    def read_memory(self, gpa: int, size: int) -> bytes:
        """`size` bytes of guest RAM from guest physical address `gpa`; outside RAM is an error."""
        ...

    def guest_clock(self) -> dict[str, Any]:
        """The guest's TSC and kvmclock as the host computes them."""
        ...

    def fds(self) -> list[dict[str, Any]]:
        """Every named fd: name, id, fd, kind."""
        ...

    def stats(self) -> dict[str, Any]:
        """Exit and I/O counters."""
        ...
