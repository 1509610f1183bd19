"""What QEMU's commands are told: their arguments, and the addresses of migration channels.

Types only, as in QEMU 10's qapi/*.json with its names; nothing here may act. `visitor` reads them, `channels`
judges what they say.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

import msgspec

from vmm.qmp.visitor import Arguments, Range, Uint16, Uint64
from vmm.units import MIB

READ_MEMORY_MAX = MIB

_HOUR_MS = 3_600_000


def _milliseconds(least: int) -> Range:
    return Range(least, _HOUR_MS, f"an integer in the range of {least} to {_HOUR_MS} ms")


# Shorter ones would end every handover, or, after the commit, not outlast a process that dies: the kernel
# drops its locks when it has taken its memory and its VM apart.
_SetupTimeout = Annotated[int, _milliseconds(100)]
_PrepareTimeout = Annotated[int, _milliseconds(10)]
_CommitTimeout = Annotated[int, _milliseconds(500)]
_ReadSize = Annotated[int, Range(1, READ_MEMORY_MAX, f"an integer in the range of 1 to {READ_MEMORY_MAX}")]


class QmpCapability(StrEnum):
    """What a client may enable with `qmp_capabilities`."""

    OOB = "oob"


class QmpCapabilitiesArguments(Arguments, frozen=True):
    """Of `qmp_capabilities`."""

    enable: list[QmpCapability] | None = None


class MigrationMode(StrEnum):
    """QEMU's migration modes that this VMM knows."""

    NORMAL = "normal"
    CPR_TRANSFER = "cpr-transfer"


class ChannelType(StrEnum):
    """What a channel is for."""

    MAIN = "main"
    CPR = "cpr"


class UnixSocket(Arguments, frozen=True):
    """A UNIX stream socket."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {"transport": "socket", "type": "unix"}
    path: str
    abstract: bool = False
    tight: bool = True


class InetSocket(Arguments, frozen=True):
    """A TCP socket."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {"transport": "socket", "type": "inet"}
    host: str
    port: str
    numeric: bool = False
    to: Uint16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    mptcp: bool = False


class VsockSocket(Arguments, frozen=True):
    """An AF_VSOCK socket."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {"transport": "socket", "type": "vsock"}
    cid: str
    port: str


class FdSocket(Arguments, frozen=True):
    """A socket that was handed over before, by name."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {"transport": "socket", "type": "fd"}
    name: str = msgspec.field(name="str")


class ExecCommand(Arguments, frozen=True):
    """A process to pipe through."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {"transport": "exec"}
    args: list[str]


class RdmaAddress(Arguments, frozen=True):
    """An RDMA peer."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {"transport": "rdma"}
    host: str
    port: str


class FileTarget(Arguments, frozen=True):
    """A file to migrate to."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {"transport": "file"}
    filename: str
    offset: Uint64


SocketAddress = UnixSocket | InetSocket | VsockSocket | FdSocket
Address = UnixSocket | InetSocket | VsockSocket | FdSocket | ExecCommand | RdmaAddress | FileTarget


class MigrationChannel(Arguments, frozen=True):
    """One entry of `channels`, or one `--incoming`."""

    channel_type: ChannelType
    addr: Address


class MigrateArguments(Arguments, frozen=True):
    """Of `migrate`. `detach` means nothing over QMP, as in QEMU."""

    uri: str | None = None
    channels: list[MigrationChannel] | None = None
    detach: bool = False
    resume: bool = False


class MigrateIncomingArguments(Arguments, frozen=True):
    """Of `migrate-incoming`."""

    uri: str | None = None
    channels: list[MigrationChannel] | None = None
    exit_on_error: bool = True


class NoArguments(Arguments, frozen=True):
    """Of commands that take none."""


class MigrationParameters(Arguments, frozen=True, omit_defaults=True):
    """Of `migrate-set-parameters`; only what is given is set."""

    mode: MigrationMode | None = None
    x_vmm_setup_timeout: _SetupTimeout | None = None
    x_vmm_prepare_timeout: _PrepareTimeout | None = None
    x_vmm_commit_timeout: _CommitTimeout | None = None


class MigrationCapability(StrEnum):
    """QEMU's migration capabilities that this VMM has."""

    EVENTS = "events"


class MigrationCapabilityStatus(Arguments, frozen=True):
    """One capability and whether it is on."""

    capability: MigrationCapability
    state: bool


class MigrationCapabilities(Arguments, frozen=True):
    """Of `migrate-set-capabilities`."""

    capabilities: list[MigrationCapabilityStatus]


class ReadMemoryArguments(Arguments, frozen=True):
    """Of `x-vmm-read-memory`: guest physical address and size, in bytes."""

    gpa: Uint64
    size: _ReadSize
