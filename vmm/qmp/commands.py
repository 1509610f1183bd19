"""The commands: for each its name, its arguments and one function from the Backend to what is returned.

A handler translates between QEMU's words and the Backend's, and must not decide anything that depends on the
run state: that is the Backend's. Names and shapes are those of QEMU 10's qapi/*.json; `x-vmm-…` are this
VMM's own.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

import vmm
from vmm.qmp.backend import Backend
from vmm.qmp.channels import select_channels, select_incoming
from vmm.qmp.schema import (
    MigrateArguments,
    MigrateIncomingArguments,
    MigrationCapabilities,
    MigrationMode,
    MigrationParameters,
    NoArguments,
    ReadMemoryArguments,
)
from vmm.qmp.visitor import Arguments


class Command(NamedTuple):
    """One command. A handler returns what msgspec can write, or None, which stands for `{}`.

    `allow_oob`: may be sent as `exec-oob` by a client that has enabled that. As handlers return at once,
    there is no queue to overtake, and oob changes nothing but the word.
    """

    name: str
    arguments: type[Arguments]
    handler: Callable[[Backend, Any], object]
    allow_oob: bool = False


def version() -> dict[str, Any]:
    """QEMU's VersionInfo, with this VMM's own version in it."""
    major, minor, micro = (int(part) for part in vmm.__version__.split(".")[:3])
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": f"vmm-cpr {vmm.__version__}",
    }


def _status(backend: Backend, _: NoArguments) -> object:
    status, running = backend.status()
    return {"status": status, "running": running}


def _name(backend: Backend, _: NoArguments) -> object:
    name = backend.name()
    return None if name is None else {"name": name}


def _cpus(backend: Backend, _: NoArguments) -> object:
    return [
        {
            "thread-id": thread,
            "props": {"core-id": index, "thread-id": 0, "socket-id": 0},
            "qom-path": f"/machine/vcpu[{index}]",
            "cpu-index": index,
            "target": "x86_64",
        }
        for index, thread in backend.cpus()
    ]


def _set_parameters(backend: Backend, parameters: MigrationParameters) -> None:
    backend.set_migration_parameters(msgspec.to_builtins(parameters))


def _capabilities(backend: Backend, _: NoArguments) -> object:
    return [{"state": state, "capability": name} for name, state in backend.migration_capabilities().items()]


def _set_capabilities(backend: Backend, arguments: MigrationCapabilities) -> None:
    backend.set_migration_capabilities({each.capability: each.state for each in arguments.capabilities})


def _migrate(backend: Backend, arguments: MigrateArguments) -> None:
    mode = MigrationMode(backend.migration_parameters()["mode"])
    channels = select_channels(mode, arguments)
    backend.migrate(mode, channels.main, channels.cpr)


def _migrate_incoming(backend: Backend, arguments: MigrateIncomingArguments) -> None:
    backend.migrate_incoming(select_incoming(arguments))


def _read_memory(backend: Backend, arguments: ReadMemoryArguments) -> object:
    data = backend.read_memory(arguments.gpa, arguments.size)
    return {"data": base64.b64encode(data).decode("ascii")}


COMMANDS = (
    Command("query-version", NoArguments, lambda backend, _: version()),
    Command("query-status", NoArguments, _status),
    Command("query-name", NoArguments, _name),
    Command("query-kvm", NoArguments, lambda backend, _: {"enabled": True, "present": True}),
    Command("query-cpus-fast", NoArguments, _cpus),
    Command(
        "query-memory-size-summary", NoArguments, lambda backend, _: {"base-memory": backend.memory_size()}
    ),
    Command("stop", NoArguments, lambda backend, _: backend.stop()),
    Command("cont", NoArguments, lambda backend, _: backend.cont()),
    Command("quit", NoArguments, lambda backend, _: backend.quit()),
    Command("system_reset", NoArguments, lambda backend, _: backend.reset()),
    Command("inject-nmi", NoArguments, lambda backend, _: backend.inject_nmi()),
    Command("migrate-set-parameters", MigrationParameters, _set_parameters),
    Command("query-migrate-parameters", NoArguments, lambda backend, _: backend.migration_parameters()),
    Command("migrate-set-capabilities", MigrationCapabilities, _set_capabilities),
    Command("query-migrate-capabilities", NoArguments, _capabilities),
    Command("migrate", MigrateArguments, _migrate),
    Command("migrate_cancel", NoArguments, lambda backend, _: backend.migrate_cancel(), allow_oob=True),
    Command("migrate-incoming", MigrateIncomingArguments, _migrate_incoming),
    Command("query-migrate", NoArguments, lambda backend, _: backend.query_migrate(), allow_oob=True),
    Command("x-vmm-report", NoArguments, lambda backend, _: backend.report()),
    Command("x-vmm-read-memory", ReadMemoryArguments, _read_memory),
    Command("x-vmm-guest-clock", NoArguments, lambda backend, _: backend.guest_clock()),
    Command("x-vmm-fds", NoArguments, lambda backend, _: backend.fds()),
    Command("x-vmm-stats", NoArguments, lambda backend, _: backend.stats()),
)
"""Every command but the protocol's own two, `qmp_capabilities` and `query-commands`, which `session` has."""
