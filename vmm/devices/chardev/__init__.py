"""Character devices: where a serial port's bytes go and come from. `open_chardev` makes one; `interface` says
what it promises.

The fds come from the FdStore under the names `serial/N` (input, or both directions), `serial-out/N` and
`serial-listen/N`, so that a VMM which received them goes on with the same terminal and the same client.
"""

from __future__ import annotations

import os

from vmm.devices.chardev import pty, stdio, unix
from vmm.devices.chardev.interface import CharDevice, Reactor
from vmm.devices.chardev.pty import Pty
from vmm.devices.chardev.spec import CharKind, CharSpec, parse_serial
from vmm.devices.chardev.stdio import Stdio
from vmm.devices.chardev.stream import Stream
from vmm.devices.chardev.unix import UnixServer
from vmm.errors import ConfigError
from vmm.fds import FdStore
from vmm.state import Arena

__all__ = [
    "CharDevice",
    "CharKind",
    "CharSpec",
    "Reactor",
    "needed_fds",
    "open_chardev",
    "open_fds",
    "parse_serial",
]

PRIVATE = 0o600  # a console's log may hold secrets


def open_chardev(spec: CharSpec, fds: FdStore, arena: Arena, reactor: Reactor, index: int = 0) -> CharDevice:
    """The character device for `spec`: over the fds that `fds` holds already, over new ones where it holds
    none.

    Raises ConfigError or HostError where something cannot be opened.
    """
    match spec.kind:
        case CharKind.STDIO:
            return Stdio(reactor, fds, arena, index, signals=spec.signals)
        case CharKind.FILE:
            return Stream(str(spec), reactor, None, _sink(fds, index, spec.path))
        case CharKind.UNIX:
            return UnixServer(reactor, fds, index, spec.path)
        case CharKind.PTY:
            return Pty(reactor, fds, index)
        case CharKind.NULL:
            return Stream(str(spec), reactor, None, None)


def open_fds(spec: CharSpec, fds: FdStore, index: int = 0) -> None:
    """Open what `open_chardev` would, ahead of it: where paths can be opened no more by then.

    Raises ConfigError or HostError where something cannot be opened.
    """
    match spec.kind:
        case CharKind.STDIO:
            stdio.ends(fds, index)
        case CharKind.FILE:
            _sink(fds, index, spec.path)
        case CharKind.UNIX:
            unix.listener(fds, index, spec.path)
        case CharKind.PTY:
            pty.master(fds, index)
        case CharKind.NULL:
            return


def needed_fds(spec: CharSpec, index: int = 0) -> tuple[tuple[str, int], ...]:
    """`(name, id)` of the fds that `open_fds` opens: a guest that comes from another VMM brings them."""
    match spec.kind:
        case CharKind.STDIO:
            return ("serial", index), ("serial-out", index)
        case CharKind.FILE:
            return (("serial-out", index),)
        case CharKind.UNIX:
            return (("serial-listen", index),)
        case CharKind.PTY:
            return (("serial", index),)
        case CharKind.NULL:
            return ()


def _sink(fds: FdStore, index: int, path: str) -> int:
    return fds.get_or_open("serial-out", index, lambda: _open_file(path))


def _open_file(path: str) -> int:
    # truncated as QEMU does; O_APPEND: who truncates it later leaves no hole; O_NONBLOCK: for a FIFO
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(path, flags, PRIVATE)
    except OSError as error:
        raise ConfigError(f"serial: cannot write to {path}: {error.strerror}; choose another path") from error
