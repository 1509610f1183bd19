"""The character device over an input fd and an output fd, either of which may be missing; the other backends
refine it.

Which thread may do what, and why nothing is lost, stands in `interface`. It must never block and never keep a
byte.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections.abc import Callable
from enum import Enum

from vmm.devices.chardev.interface import Reactor
from vmm.errors import VmmError
from vmm.fds import FdKind, identify

log = logging.getLogger(__name__)


class Phase(Enum):
    """Where a character device is in its life; drawn in `interface`."""

    IDLE = "idle"
    RUNNING = "running"
    HELD = "held"
    QUIET = "quiet"
    FROZEN = "frozen"
    CLOSED = "closed"


LIVE = frozenset({Phase.RUNNING, Phase.HELD})
WRITABLE = LIVE | {Phase.QUIET}

# transition -> the phases it may start from, the phase it leads to
TRANSITIONS: dict[str, tuple[frozenset[Phase], Phase]] = {
    "start": (frozenset({Phase.IDLE, Phase.QUIET}), Phase.RUNNING),
    "hold": (LIVE, Phase.HELD),
    "quiet": (LIVE | {Phase.IDLE}, Phase.QUIET),
    "freeze": (WRITABLE | {Phase.FROZEN}, Phase.FROZEN),
    "thaw": (WRITABLE | {Phase.FROZEN}, Phase.RUNNING),
    "close": (frozenset(Phase), Phase.CLOSED),
}


class Stream:
    """A `CharDevice` over two fds. Input that ended stays ended; output that nobody can get is dropped."""

    def __init__(self, label: str, reactor: Reactor, input_fd: int | None, output_fd: int | None) -> None:
        """Nothing is read, written or watched before `start`."""
        self.label = label
        self.lock = threading.Lock()
        self._reactor = reactor
        self._on_readable: Callable[[], object] = _nothing
        self._on_writable: Callable[[], object] = _nothing
        self._phase = Phase.IDLE
        self._live = False  # `_phase in LIVE`
        self._writable = False  # `_phase in WRITABLE`, for the path of every printed byte
        self._reading = True  # the device has room for input
        self._writing = False  # the device has output that did not go out
        self._ended = False  # the input is at its end
        self._complained = False
        self._watched_in: int | None = None
        self._watched_out: int | None = None
        self._sync_due = False
        self._turn_due = False
        self._connect(input_fd, output_fd)

    def _connect(self, input_fd: int | None, output_fd: int | None) -> None:
        self._input = input_fd
        self._output = output_fd
        self._ended = self._complained = False
        self._get = os.read if input_fd is None or never_blocks(input_fd) else _read_ready
        self._put = os.write if output_fd is None or never_blocks(output_fd) else _write_ready

    # --- life ---

    def attach(self, on_readable: Callable[[], object], on_writable: Callable[[], object]) -> None:
        """Name the callbacks, before `start`."""
        self._on_readable = on_readable
        self._on_writable = on_writable

    def start(self) -> None:
        """IDLE or QUIET -> RUNNING."""
        with self.lock:
            self._go("start")
            self._opened()
            self._drain()
            self._ask_sync()

    def hold(self) -> None:
        """RUNNING -> HELD."""
        with self.lock:
            self._go("hold")

    def quiet(self) -> None:
        """IDLE, RUNNING or HELD -> QUIET."""
        with self.lock:
            self._go("quiet")

    def freeze(self) -> None:
        """RUNNING, HELD or QUIET -> FROZEN."""
        with self.lock:
            self._go("freeze")

    def thaw(self) -> None:
        """HELD, QUIET or FROZEN -> RUNNING."""
        with self.lock:
            self._go("thaw")
            self._ended = False  # what ended while held is met again, and then acted upon
            self._drain()
            self._ask_sync()

    def close(self) -> None:
        """The end; tidies up where the guest was this VMM's."""
        with self.lock:
            owner = self._live
            self._drain()  # a guest's last words, if somebody takes them now
            self._go("close")
            self._sync()
            if owner:
                self._tidy()

    def _go(self, transition: str) -> None:
        origins, target = TRANSITIONS[transition]
        if self._phase not in origins:
            raise VmmError(f"{self.label}: {transition} while {self._phase.value}")
        self._phase = target
        self._live = target in LIVE
        self._writable = target in WRITABLE

    def _opened(self) -> None:
        """For backends: the guest is this VMM's from here on."""

    def _tidy(self) -> None:
        """For backends: the guest ended; undo what is visible outside."""

    # --- the device's side, with the lock held ---

    def write(self, data: bytes) -> int:
        """Bytes taken; 0 where it would block."""
        if not self._writable:
            return 0
        if self._output is None:
            return len(data)
        try:
            return self._put(self._output, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            if not self._complained:
                log.warning("%s: output is dropped: %s", self.label, error.strerror)
            self._complained = True
            return len(data)

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes of input."""
        if self._input is None or limit < 1:
            return b""
        try:
            data = self._get(self._input, limit)
        except BlockingIOError:
            return b""
        except OSError as error:  # the peer's way to leave: EIO of a terminal, ECONNRESET of a socket
            log.debug("%s: input ends: %s", self.label, error.strerror)
            data = b""
        self._ended = not data
        return data

    def want_read(self, wanted: bool) -> None:
        """Whether input is to be announced."""
        if wanted and not self._reading:
            self._reading = True
            self._ask_sync()
        self._reading = wanted

    def want_write(self) -> None:
        """Announce, once, that output is possible again."""
        if not self._writing:
            self._writing = True
            self._ask_sync()

    # --- the loop's side ---

    def _ask_sync(self) -> None:
        if self._live and not self._sync_due:
            self._sync_due = True
            self._reactor.call_soon_threadsafe(self._follow)

    def _follow(self) -> None:
        with self.lock:
            self._sync()

    def _readable(self) -> None:
        with self.lock:
            self._turn_due = False
            self._sync_due = True  # what the callback asks for is done below
            try:
                if self._live and self._reading:
                    self._on_readable()
                    if self._ended:
                        self._input_ended()
            finally:
                self._sync()

    def _room(self) -> None:
        with self.lock:
            self._sync_due = True
            try:
                self._drain()
            finally:
                self._sync()

    def _drain(self) -> None:
        if self._live:
            self._writing = False
            self._on_writable()

    def _input_ended(self) -> None:
        """For backends: nothing more will come from this input."""

    def _sync(self) -> None:
        """Make the watches those that are wanted now."""
        self._sync_due = False
        self._watch_in(self._input_event() if self._live and self._reading and not self._ended else None)
        self._watch_out(self._output if self._live and self._writing else None)

    def _input_event(self) -> int | None:
        """The fd that is readable when there is input."""
        return self._input

    def _watch_in(self, fd: int | None) -> None:
        if fd == self._watched_in:
            return
        if self._watched_in is not None:
            self._reactor.remove_reader(self._watched_in)
            self._watched_in = None
        if fd is None or self._turn_due:
            return
        try:
            self._reactor.add_reader(fd, self._readable)
            self._watched_in = fd
        except PermissionError:  # epoll(7) takes no regular file and no /dev/null: they are always readable
            self._turn_due = True
            self._reactor.call_soon_threadsafe(self._readable)

    def _watch_out(self, fd: int | None) -> None:
        if fd == self._watched_out:
            return
        if self._watched_out is not None:
            self._reactor.remove_writer(self._watched_out)
        if fd is not None:
            self._reactor.add_writer(fd, self._room)
        self._watched_out = fd


def _nothing() -> None:
    """The callback before there is one."""


def never_blocks(fd: int) -> bool:
    """Whether read and write on `fd` return at once: O_NONBLOCK is set, or it is a file."""
    return not os.get_blocking(fd) or identify(fd).kind is FdKind.FILE


def _ready(fd: int, event: int) -> None:
    poller = select.poll()
    poller.register(fd, event)
    if not poller.poll(0):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _read_ready(fd: int, limit: int) -> bytes:
    """`os.read` for an fd whose O_NONBLOCK is others' to set."""
    _ready(fd, select.POLLIN)
    return os.read(fd, limit)


def _write_ready(fd: int, data: bytes) -> int:
    """`os.write` for an fd whose O_NONBLOCK is others' to set: one byte, all that POLLOUT promises."""
    _ready(fd, select.POLLOUT)
    return os.write(fd, data[:1])
