"""A pseudo-terminal for a terminal program; `label` holds its path. It outlives the programs that open it.

While nobody has it open the master reports a hang-up without end. So output is then dropped, and input is
watched through an edge-triggered epoll of its own, which is readable once for each thing that happens and
quiet in between.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import struct
import tty

from vmm.devices.chardev.interface import Reactor
from vmm.devices.chardev.stream import Stream
from vmm.errors import HostError, StateError
from vmm.fds import FdStore

log = logging.getLogger(__name__)

TIOCGPTN = 0x8004_5430  # _IOR('T', 0x30, unsigned int): the pty's number; asm-generic/ioctls.h
_NUMBER = struct.Struct("=I")
EDGE = select.EPOLLIN | select.EPOLLET


class Pty(Stream):
    """The master is fd `serial/N`."""

    def __init__(self, reactor: Reactor, fds: FdStore, index: int) -> None:
        """Raises HostError where there is no pty, StateError where the received fd is no pty's master."""
        self._master = master(fds, index)
        super().__init__(f"pty:{slave_path(self._master)}", reactor, self._master, self._master)
        self._hang_up = select.poll()
        self._hang_up.register(self._master, 0)  # POLLHUP is reported unasked; poll(2)
        self._edges = select.epoll()
        self._edges.register(self._master, EDGE)

    def close(self) -> None:
        """The end; the path goes when the FdStore closes the master."""
        super().close()
        self._edges.close()

    def write(self, data: bytes) -> int:
        """Bytes taken; all of them while nobody has the terminal open."""
        if self._live and self._hang_up.poll(0):
            return len(data)
        return super().write(data)

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes of input; that nobody has the terminal open is no end of it."""
        if limit < 1:
            return b""
        try:
            data = os.read(self._master, limit)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: nobody has it open
                log.warning("%s: input: %s", self.label, error.strerror)
            return b""
        self._look_again()
        return data

    def _look_again(self) -> None:
        self._edges.modify(self._master, EDGE)  # an edge, now, if there is input; epoll_ctl(2)

    def _input_event(self) -> int | None:
        return self._edges.fileno()

    def _watch_in(self, fd: int | None) -> None:
        if fd is not None and self._watched_in is None:
            self._look_again()
        super()._watch_in(fd)

    def _readable(self) -> None:
        if not self._edges.closed:
            self._edges.poll(0)
        super()._readable()


def master(fds: FdStore, index: int) -> int:
    """The fd of the master. Raises HostError where there is no pty."""
    return fds.get_or_open("serial", index, _new_pty)


def slave_path(master: int) -> str:
    """The path of a pty by its master. Raises StateError where `master` is none."""
    try:
        (number,) = _NUMBER.unpack(fcntl.ioctl(master, TIOCGPTN, bytes(_NUMBER.size)))
    except OSError as error:
        raise StateError(
            f"serial: the console's fd is not a pty's master (TIOCGPTN: {error.strerror}); refused"
        ) from error
    return f"/dev/pts/{number}"


def _new_pty() -> int:
    try:
        master, slave = os.openpty()
    except OSError as error:
        raise HostError(f"serial: no pty: {error.strerror}; mount devpts or use another --serial") from error
    tty.setraw(slave)  # what a terminal program does not set itself must not cook or echo the guest's bytes
    os.close(slave)
    os.set_blocking(master, False)
    return master
