"""The run token: the kernel's lock, the epoch beside it, and processes that die with it."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from vmm.cpr.token import SIZE, RunToken
from vmm.errors import HandoverError, StateError
from vmm.fds import FdStore, sealed_memfd


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = sealed_memfd("token", SIZE)
    yield fd
    os.close(fd)


@contextmanager
def held(memfd: int, epoch: int = 0) -> Iterator[RunToken]:
    with RunToken(memfd) as token:
        assert token.take(epoch)
        yield token


class Child:
    """A forked process that has done `work` with its own hold on the token, and waits to be killed."""

    def __init__(self, memfd: int, work: Callable[[RunToken], object]) -> None:
        ready, done = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work(RunToken(memfd))
                os.write(done, b"!")
                signal.pause()
            finally:
                os._exit(1)
        os.close(done)
        try:
            assert os.read(ready, 1) == b"!", "the child failed"
        finally:
            os.close(ready)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextmanager
def child(memfd: int, work: Callable[[RunToken], object]) -> Iterator[Child]:
    process = Child(memfd, work)
    try:
        yield process
    finally:
        process.kill()


def test_a_new_token_is_free_and_at_epoch_0() -> None:
    fds = FdStore()
    with RunToken.open(fds) as token:
        assert (token.epoch(), token.held, token.held_elsewhere()) == (0, False, False)
        assert fds.find("token") is not None
    fds.close()


def test_taking_moves_the_epoch(memfd: int) -> None:
    with RunToken(memfd) as token:
        assert token.take(0)
        assert (token.epoch(), token.held) == (1, True)
        token.release()
        assert (token.epoch(), token.held) == (1, False)
        assert token.take(1)
        assert token.epoch() == 2


def test_only_one_holds_it(memfd: int) -> None:
    """Even within one process: a lock belongs to an open file description, not to a process."""
    with held(memfd) as first, RunToken(memfd) as second:
        assert not second.take(1)
        assert second.held_elsewhere()
        assert not first.held_elsewhere()
        assert second.epoch() == 1
        first.release()
        assert not second.held_elsewhere()
        assert second.take(1)
        assert first.held_elsewhere()


def test_taking_twice_is_an_error(memfd: int) -> None:
    with held(memfd) as token, pytest.raises(HandoverError, match="held already"):
        token.take(1)


def test_a_moved_epoch_is_refused_and_nothing_is_taken(memfd: int) -> None:
    with RunToken(memfd) as first, RunToken(memfd) as second:
        assert first.take(0)
        first.release()
        with pytest.raises(StateError, match="run elsewhere: run token at epoch 1, expected 0"):
            second.take(0)
        assert not second.held
        assert not first.held_elsewhere()
        assert second.epoch() == 1


def test_a_stale_process_does_not_even_ask_for_the_lock(memfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep those out for a moment that may take it, or for good, were it stopped there."""
    with held(memfd) as token, RunToken(memfd) as stale:
        monkeypatch.setattr(stale, "_lock", lambda kind: pytest.fail("the lock was asked for"))
        with pytest.raises(StateError, match="run elsewhere"):
            stale.take(token.epoch() - 1)


def test_an_epoch_that_moves_before_the_lock_is_there(memfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunToken(memfd) as first, RunToken(memfd) as second:
        lock = second._lock

        def others_first(kind: int) -> bool:
            if kind == fcntl.F_WRLCK:
                assert first.take(0)
                first.release()
            return lock(kind)

        monkeypatch.setattr(second, "_lock", others_first)
        with pytest.raises(StateError, match="run elsewhere"):
            second.take(0)
        assert not second.held
        assert not first.held_elsewhere()


def test_renewing(memfd: int) -> None:
    with held(memfd) as token, RunToken(memfd) as other:
        assert token.renew() == 2
        assert token.held
        assert other.held_elsewhere()
        token.release()
        with pytest.raises(StateError, match="at epoch 2, expected 1"):
            other.take(1)


def test_renewing_what_is_not_held_is_an_error(memfd: int) -> None:
    with RunToken(memfd) as token, pytest.raises(HandoverError, match="only its holder"):
        token.renew()
    assert os.pread(memfd, 8, 0) == bytes(8)


def test_a_dead_holder_loses_it_and_the_epoch_tells_how_far_it_came(memfd: int) -> None:
    with RunToken(memfd) as token:
        with child(memfd, lambda theirs: theirs.take(0)):
            assert token.held_elsewhere()
            assert not token.take(1)
        assert not token.held_elsewhere()
        with pytest.raises(StateError, match="run elsewhere"):
            token.take(0)
        assert token.take(1)


def test_a_holder_that_dies_before_it_moved_the_epoch_leaves_the_guest(memfd: int) -> None:
    with RunToken(memfd) as token:
        with child(memfd, lambda theirs: theirs._lock(fcntl.F_WRLCK)):
            assert not token.take(0)
        assert token.take(0)


def test_an_inherited_copy_is_closed_by_exec(memfd: int) -> None:
    """A copy of the description that outlived the holder would keep the lock."""
    with held(memfd) as token:
        assert not os.get_inheritable(token._fd)
        pid = os.fork()
        if pid == 0:
            os.execv("/bin/sleep", ["sleep", "60"])
    try:
        with RunToken(memfd) as other:
            for _ in range(500):
                if not other.held_elsewhere():
                    break
                signal.sigtimedwait([], 0.01)
            assert other.take(1)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_memfd_itself_holds_no_lock(memfd: int) -> None:
    """What is sent to the new VMM is another description than the one with the lock on it."""
    with held(memfd):
        request = struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(memfd, fcntl.F_OFD_SETLK, request)


def test_closing_gives_it_up(memfd: int) -> None:
    token = RunToken(memfd)
    assert token.take(0)
    token.close()
    assert not token.held
    with RunToken(memfd) as other:
        assert other.take(1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sealed_memfd("small", SIZE // 2), "2048 bytes where 4096 were expected"),
        (lambda: os.memfd_create("unsealed"), "is not sealed"),
        (lambda: os.eventfd(0), "is a eventfd where a memfd was expected"),
        (lambda: os.open("/dev/null", os.O_RDWR), "is a character device where a memfd was expected"),
    ],
)
def test_a_received_token_is_looked_at(make: Callable[[], int], words: str) -> None:
    fds = FdStore()
    fds.add("token", 0, make())
    try:
        with pytest.raises(StateError, match=words):
            RunToken.open(fds)
    finally:
        fds.close()
