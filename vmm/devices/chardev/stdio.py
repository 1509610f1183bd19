"""The VMM's own stdin and stdout as a character device, and the mode of the terminal they may be.

Stdin and stdout are shared with the shell and whoever else has them, so their O_NONBLOCK is never touched: a
pipe or terminal is opened anew, which gives an open file description of our own; what cannot be is polled
before each byte. The terminal's original mode is kept in the state memfd, so that the VMM which ends the
guest can restore it, whichever VMM set it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import termios
from typing import Any, ClassVar

from vmm.devices.chardev.interface import Reactor
from vmm.devices.chardev.stream import Stream
from vmm.errors import HostError
from vmm.fds import FdKind, FdStore, identify
from vmm.state import Arena

log = logging.getLogger(__name__)

CONTROL_CHARACTERS = 32  # NCCS of glibc's termios, which Python's termios module uses

# What input must not go through on its way to the guest; output processing stays, for the VMM's own log.
INPUT_COOKING = (
    termios.IGNBRK
    | termios.BRKINT
    | termios.PARMRK
    | termios.ISTRIP
    | termios.INLCR
    | termios.IGNCR
    | termios.ICRNL
    | termios.IXON
)
LINE_EDITING = termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN


class TerminalState(ctypes.LittleEndianStructure):
    """A terminal's original mode as termios(3) has it; `saved` says whether there is one."""

    VERSION: ClassVar[int] = 1
    saved: int
    _fields_ = (
        ("saved", ctypes.c_uint32),
        ("flags", ctypes.c_uint32 * 6),  # iflag, oflag, cflag, lflag, ispeed, ospeed
        ("characters", ctypes.c_uint8 * CONTROL_CHARACTERS),
    )


class Stdio(Stream):
    """Stdin and stdout; with `signals` off Ctrl-C and the like go to the guest."""

    def __init__(self, reactor: Reactor, fds: FdStore, arena: Arena, index: int, *, signals: bool) -> None:
        """Raises HostError where the process has no stdin or stdout."""
        source, sink = ends(fds, index)
        super().__init__("stdio", reactor, source, sink)
        self._signals = signals
        self._terminal = source if os.isatty(source) else None
        self._original = arena.place("chardev", index, TerminalState)

    def _opened(self) -> None:
        if self._terminal is not None and not self._original.saved:
            mode = termios.tcgetattr(self._terminal)
            self._original.flags[:] = mode[:6]
            self._original.characters[:] = b"".join(_character(value) for value in mode[6])
            self._original.saved = 1
            termios.tcsetattr(self._terminal, termios.TCSANOW, raw(mode, signals=self._signals))

    def _tidy(self) -> None:
        if self._terminal is not None and self._original.saved:
            characters = [bytes((value,)) for value in self._original.characters]
            try:
                _restore(self._terminal, [*self._original.flags, characters])
                self._original.saved = 0
            except termios.error as error:
                log.warning("the terminal's mode is not restored: %s; run `stty sane` there", error.args[-1])


def ends(fds: FdStore, index: int) -> tuple[int, int]:
    """The fds of input and output. Raises HostError where the process has no stdin or stdout."""
    source = fds.get_or_open("serial", index, lambda: _own(0, "stdin", os.O_RDONLY))
    return source, fds.get_or_open("serial-out", index, lambda: _own(1, "stdout", os.O_WRONLY))


def raw(mode: list[Any], *, signals: bool) -> list[Any]:
    """`mode` (as `termios.tcgetattr` gives it) with every key passed on at once, unechoed."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, characters = mode
    characters = list(characters)
    characters[termios.VMIN], characters[termios.VTIME] = 1, 0
    lflag &= ~(LINE_EDITING if signals else LINE_EDITING | termios.ISIG)
    return [
        iflag & ~INPUT_COOKING,
        oflag | termios.OPOST,
        cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8,
        lflag,
        ispeed,
        ospeed,
        characters,
    ]


def _character(value: bytes | int) -> bytes:
    return bytes((value,)) if isinstance(value, int) else value  # VMIN and VTIME come as numbers


def _restore(fd: int, mode: list[Any]) -> None:
    # The VMM that ends the guest may not be in the terminal's foreground, as the first one was; SIGTTOU would
    # stop it, but with that blocked the mode can be set (tcsetattr(3p)).
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(fd, termios.TCSANOW, mode)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _own(fd: int, name: str, access: int) -> int:
    """A close-on-exec fd for what `fd` is: opened anew where that can be, else a duplicate."""
    try:
        if identify(fd).kind in {FdKind.PIPE, FdKind.TTY}:
            try:
                return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in {errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENOENT}:
                    raise
                log.debug("stdio: %s is not ours to open anew (%s)", name, error.strerror)
        return os.dup(fd)
    except OSError as error:
        raise HostError(
            f"serial: stdio, but {name} is not usable ({error.strerror}); use another --serial"
        ) from error
