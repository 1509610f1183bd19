"""What a user writes after `--serial`, as a record. Never opens anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum

from vmm.errors import ConfigError
from vmm.sockets import PATH_BYTES


class CharKind(Enum):
    """The backends."""

    STDIO = "stdio"
    FILE = "file"
    UNIX = "unix"
    PTY = "pty"
    NULL = "null"


FORMS = "stdio, stdio,signal=off, file:PATH, unix:PATH, pty or null"
_WITH_PATH = frozenset({CharKind.FILE, CharKind.UNIX})
_SIGNAL = {"signal=on": True, "signal=off": False}


@dataclass(frozen=True)
class CharSpec:
    """A backend; `path` for file and unix; `signals` for stdio: whether Ctrl-C still signals the VMM."""

    kind: CharKind
    path: str = ""
    signals: bool = True

    def __str__(self) -> str:
        """The text that `parse_serial` takes."""
        if self.kind in _WITH_PATH:
            return f"{self.kind.value}:{self.path}"
        return self.kind.value if self.signals else f"{self.kind.value},signal=off"


def parse_serial(text: str) -> CharSpec:
    """The spec for a text of one of the FORMS. Raises ConfigError."""
    name, colon, path = text.partition(":")
    if colon and name in {kind.value for kind in _WITH_PATH}:
        return _with_path(CharKind(name), path)
    name, comma, option = text.partition(",")
    if name == CharKind.STDIO.value and option in _SIGNAL:
        return CharSpec(CharKind.STDIO, signals=_SIGNAL[option])
    if comma or name not in {kind.value for kind in CharKind if kind not in _WITH_PATH}:
        raise ConfigError(f"serial: {text!r} is not a character device; use {FORMS}")
    return CharSpec(CharKind(name))


def _with_path(kind: CharKind, path: str) -> CharSpec:
    if not path or "\0" in path:
        raise ConfigError(f"serial: {kind.value}:PATH needs a path, {path!r} is none")
    if kind is CharKind.UNIX and len(os.fsencode(path)) >= PATH_BYTES:
        raise ConfigError(
            f"serial: a socket's path has at most {PATH_BYTES - 1} bytes; choose one shorter than {path!r}"
        )
    return CharSpec(kind, path)
