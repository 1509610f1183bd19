"""What one VMM process is started with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vmm.devices.chardev import CharKind, parse_serial
from vmm.machine.config import MachineConfig
from vmm.machine.host import HOST_DEVICES
from vmm.sandbox import Access, Grant, Mode


@dataclass(frozen=True)
class Incoming:
    """Where a new VMM waits for the old one."""

    cpr_path: str
    main_path: str


@dataclass
class Options:
    """The machine's own part is `given`."""

    given: Mapping[str, Any] = field(default_factory=dict)
    config: MachineConfig | None = None
    qmp_paths: tuple[str, ...] = ()
    incoming: Incoming | None = None
    method: Literal["auto", "adopt", "rebuild"] = "auto"
    keeper: bool = False
    keeper_path: str | None = None  # where the keeper listens for VMMs that come after a crash
    orphan_timeout_s: float = 0.0
    attach: tuple[str, ...] = ()  # take over from the keeper at one of these paths, whose VMM is gone
    paused: bool = False
    sandbox: Mode = Mode.OFF
    grants: tuple[Grant, ...] = ()  # files, besides what the other options name
    owned: Callable[[], None] = lambda: None  # called once this process runs the machine
    disowned: Callable[[], None] = lambda: None  # called at the end, if it still does

    @property
    def orphan_ms(self) -> int:
        """The orphan timeout in milliseconds."""
        return round(self.orphan_timeout_s * 1000)

    def all_grants(self) -> list[Grant]:
        """The files that are opened, made or removed later on; see docs/security.md."""
        paths = [*self.qmp_paths]
        if self.incoming is not None:
            paths += [self.incoming.cpr_path, self.incoming.main_path]
        serial = self.config.serial if self.config is not None else self.given.get("serial")
        if serial is not None and (spec := parse_serial(serial)).kind is CharKind.UNIX:
            paths.append(spec.path)
        directories = {os.path.dirname(os.path.abspath(path)) for path in paths}
        return [
            *(Grant(path, Access.DEVICE) for path in HOST_DEVICES),
            *(Grant(path, Access.SOCKETS) for path in sorted(directories)),
            *self.grants,
        ]
