"""The run token: at every instant at most one process may enter KVM_RUN, and the kernel is the arbiter.

The token is an open-file-description lock (F_OFD_SETLK, byte 0) on a small memfd, beside an epoch word in
that memfd. Each VMM locks its own re-open of the memfd: a copy of one description would keep the lock alive
past its holder's death, so a re-open is close-on-exec, never sent and never inherited. Whoever holds the lock
may run the guest. Each taking moves the epoch by one, and so does a holder that lets the guest go on after a
handover that failed; a side that expects an epoch which has moved knows that the guest has run elsewhere
since: it must never run its own copy again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from types import TracebackType

from vmm.errors import HandoverError, StateError
from vmm.fds import FdStore, check_received, sealed_memfd
from vmm.state.arena import reopen

SIZE = 4096
_EPOCH = struct.Struct("=Q")
# struct flock on x86-64: l_type, l_whence, 4 bytes of padding, l_start, l_len, l_pid, 4 bytes of padding
_FLOCK = struct.Struct("=hh4xqqi4x")


class RunToken:
    """This process's hold on the token. `held` is what `KVM_RUN` is guarded by."""

    def __init__(self, memfd: int) -> None:
        """Re-open the token's memfd; the lock is not taken yet."""
        self._fd = reopen(memfd)
        self.held = False

    @classmethod
    def open(cls, fds: FdStore) -> RunToken:
        """The token in fd `token/0`: the received one (checked), or a new one at epoch 0."""
        if fds.find("token") is None:
            fds.add("token", 0, sealed_memfd("vmm-token", SIZE))
        check_received("token", 0, fds.get("token"), SIZE)
        return cls(fds.get("token"))

    def epoch(self) -> int:
        """How often the token has been taken."""
        return int(_EPOCH.unpack(os.pread(self._fd, _EPOCH.size, 0))[0])

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def held_elsewhere(self) -> bool:
        """Whether another process holds the token now."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def take(self, expected_epoch: int) -> bool:
        """Take the token if nobody holds it; True if it is held now, and then the epoch is `expected_epoch` +
        1.

        False: another process holds it. Raises StateError where the epoch has moved on: the guest has run
        elsewhere since, so this process's copy of its state is stale for good.
        """
        if self.held:
            raise HandoverError("the run token is held already")
        self._check(expected_epoch)  # first without the lock: a stale process must not hold up the others
        if not self._lock(fcntl.F_WRLCK):
            return False
        try:
            self._check(expected_epoch)
            self._move()
        except BaseException:
            self._lock(fcntl.F_UNLCK)
            raise
        self.held = True
        return True

    def _check(self, expected_epoch: int) -> None:
        epoch = self.epoch()
        if epoch != expected_epoch:
            raise StateError(
                f"the guest has run elsewhere: run token at epoch {epoch}, expected {expected_epoch}"
            )

    def _move(self) -> int:
        epoch = self.epoch() + 1
        os.pwrite(self._fd, _EPOCH.pack(epoch), 0)
        return epoch

    def renew(self) -> int:
        """Move the epoch of the token that is held, and return it: what others know of the guest is stale."""
        if not self.held:
            raise HandoverError("the run token is not held; only its holder may move the epoch")
        return self._move()

    def release(self) -> None:
        """Give the token up: the commit of a handover. From here on this process may not enter KVM_RUN."""
        self.held = False
        self._lock(fcntl.F_UNLCK)

    def close(self) -> None:
        """Close the re-open; the kernel drops the lock with it."""
        self.held = False
        os.close(self._fd)

    def __enter__(self) -> RunToken:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
