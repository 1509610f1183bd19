"""What a character device promises to the device in front of it, and what it needs of an event loop.

The life of a character device; `hold`, `quiet` and `freeze` belong to the handover:

              start            hold           quiet           freeze
        IDLE ------> RUNNING -------> HELD -------> QUIET -------> FROZEN       close: from anywhere, the end

    quiet and freeze may skip what is before them; thaw leads back to RUNNING from HELD, QUIET and FROZEN; and
    a new VMM goes from IDLE to QUIET before its vCPUs run, and by start to RUNNING when they do.

IDLE     The fds are there, nobody touches them: a new VMM before the guest is its own.
RUNNING  Input is announced, output flows, clients come and go.
HELD     As RUNNING, but no fd is opened or closed: between sending the fds to the new VMM and pausing it.
         Who wants to join waits in the kernel's backlog; the VMM that runs the guest next lets them in,
         and drops who left.
QUIET    No callback touches the device, but output flows: the vCPUs are being stopped or let go, and a guest
         that looks at no status bit prints all the same.
FROZEN   Nothing touches the fds, no callback touches the device. What is not read yet stays in the kernel.

Only the VMM that ends the guest tidies up after it (the terminal's mode, the socket's path): `close()` does
so in RUNNING and HELD and leaves everything as it is in the others, where the guest is another VMM's or on
its way there.

One lock, and every race there is:

- `lock` guards the character device and the device in front of it. `write`, `read`, `want_read` and
  `want_write` are called with it held; callbacks are run with it held; the rest take it themselves. So there
  is no order of locks to get wrong.
- `quiet()` and `freeze()` take the lock, so they return only after a callback that was under way, and each
  later one sees the phase first.
- Reactor watches change on the loop's thread alone. Other threads change what is *wanted* and ask the loop to
  follow. A callback that comes late (frozen, paused, client gone) finds that it is not wanted and takes its
  watch away. Watches are level-triggered (or re-armed), so that one taken away and put back misses nothing.
- An fd is closed on the loop's thread, with the lock held and its watches gone: no vCPU thread is ever inside
  a write to it, and no watch is left on a number that the next `open` gets.
- No input byte is ever kept here: it is in the kernel or, by `read`, in the device's state. No output byte is
  kept here either: `write` says how many bytes the kernel took. So a handover, or a VMM that dies, loses
  none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Reactor(Protocol):
    """The part of an asyncio event loop that is needed; every asyncio loop on Linux is one."""

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> object:
        """Call `callback` whenever `fd` is readable. Loop's thread only."""

    def remove_reader(self, fd: int, /) -> object:
        """Undo `add_reader`. Loop's thread only."""

    def add_writer(self, fd: int, callback: Callable[[], object], /) -> object:
        """Call `callback` whenever `fd` is writable. Loop's thread only."""

    def remove_writer(self, fd: int, /) -> object:
        """Undo `add_writer`. Loop's thread only."""

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> object:
        """Call `callback` once on the loop's thread. Any thread."""


class CharDevice(Protocol):
    """Where a serial port's bytes go and come from."""

    lock: threading.Lock
    label: str  # for people: `pty:/dev/pts/3`

    def attach(self, on_readable: Callable[[], object], on_writable: Callable[[], object]) -> None:
        """Name the callbacks, before `start`. The device in front does it in its constructor."""

    def start(self) -> None:
        """IDLE or QUIET -> RUNNING; calls `on_writable` for output that the VMM before left. Any thread."""

    def hold(self) -> None:
        """RUNNING -> HELD. Any thread but inside a callback."""

    def quiet(self) -> None:
        """IDLE, RUNNING or HELD -> QUIET. Any thread but inside a callback."""

    def freeze(self) -> None:
        """RUNNING, HELD or QUIET -> FROZEN. Any thread but inside a callback."""

    def thaw(self) -> None:
        """Back to RUNNING after a handover that failed; calls `on_writable`. Not inside a callback."""

    def close(self) -> None:
        """The end; then the FdStore may close the fds. Loop's thread, or any when the loop runs no more."""

    def write(self, data: bytes) -> int:
        """Bytes taken; 0 where it would block. Never blocks or raises: what nobody can get is taken too."""

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes of input, none where there is none. Called from `on_readable` only."""

    def want_read(self, wanted: bool) -> None:
        """Whether `on_readable` is to be called while there is input; at the start it is."""

    def want_write(self) -> None:
        """Have `on_writable` called, once, when `write` would take bytes again."""
