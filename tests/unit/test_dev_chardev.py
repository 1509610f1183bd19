"""Character devices: every backend, clients that come and go, and handovers that lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import select
import socket
import stat
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.devices.chardev import (
    CharDevice,
    CharKind,
    CharSpec,
    needed_fds,
    open_chardev,
    open_fds,
    parse_serial,
)
from vmm.devices.chardev.unix import BUSY, STRANGER
from vmm.devices.serial import Serial
from vmm.errors import ConfigError, HostError, PeerError, StateError, VmmError
from vmm.fds import FdStore
from vmm.irq import UnconnectedIrq
from vmm.sockets import listen
from vmm.state import Arena

NOBODY = 65534


class Loop:
    """An asyncio loop that the test turns by hand, on its own thread."""

    def __init__(self) -> None:
        self.asyncio = asyncio.new_event_loop()

    def turn(self, times: int = 5) -> None:
        """Run what is due."""
        for _ in range(times):
            self.asyncio.run_until_complete(asyncio.sleep(0))

    def until(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        """Run until `condition`; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            self.asyncio.run_until_complete(asyncio.sleep(0.001))


class Front:
    """The device in front: takes `room` bytes of input, keeps output that is not taken."""

    def __init__(self, chardev: CharDevice) -> None:
        self.chardev = chardev
        self.got = b""
        self.room = 1 << 20
        self.pending = b""
        self.calls = 0
        chardev.attach(self.on_readable, self.on_writable)

    def on_readable(self) -> None:
        self.calls += 1
        data = self.chardev.read(min(self.room, 16))
        self.got += data
        self.room -= len(data)
        if not self.room:
            self.chardev.want_read(False)

    def on_writable(self) -> None:
        self.pending = self.pending[self.chardev.write(self.pending) :]
        if self.pending:
            self.chardev.want_write()

    def make_room(self, room: int) -> None:
        with self.chardev.lock:
            self.room = room
            self.chardev.want_read(True)

    def say(self, data: bytes) -> bool:
        """Whether all of it went out at once."""
        with self.chardev.lock:
            self.pending += data
            self.on_writable()
            return not self.pending

    def fill(self) -> int:
        """Write until no more is taken; how much was."""
        taken = 0
        with self.chardev.lock:
            for chunk in (b"x" * 100, b"x"):  # a pipe takes the whole of a small write or nothing; pipe(7)
                while count := self.chardev.write(chunk):
                    taken += count
        return taken


class Host:
    """One VMM's worth of fds and state, and those of the VMMs after it."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.fds = FdStore()
        self.arena = Arena.open(self.fds)
        self.opened: list[CharDevice] = []

    def open(self, text: str, *, start: bool = True) -> Front:
        chardev = open_chardev(parse_serial(text), self.fds, self.arena, self.loop.asyncio)
        self.opened.append(chardev)
        front = Front(chardev)
        if start:
            chardev.start()
            self.loop.turn()
        return front

    def successor(self) -> Host:
        """A second VMM in this process: duplicates of all fds, as SCM_RIGHTS gives them."""
        host = Host.__new__(Host)
        host.loop = self.loop
        host.fds = FdStore()
        for name, index, fd in self.fds.items():
            host.fds.add(name, index, os.dup(fd))
        host.arena = Arena.open(host.fds)
        host.opened = []
        return host

    def end(self) -> None:
        for chardev in self.opened:
            chardev.close()
        self.fds.close()
        vars(self).clear()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.turn()
    loop.asyncio.close()


@pytest.fixture
def host(loop: Loop) -> Iterator[Host]:
    host = Host(loop)
    yield host
    host.end()


@contextlib.contextmanager
def standard(stdin: int, stdout: int) -> Iterator[None]:
    """This process's fds 0 and 1 are these for a while."""
    saved = os.dup(0), os.dup(1)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    try:
        yield
    finally:
        for fd, target in zip(saved, (0, 1), strict=True):
            os.dup2(fd, target)
            os.close(fd)


@contextlib.contextmanager
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """Stdin's read and write end, stdout's read and write end."""
    fds = [*os.pipe(), *os.pipe()]
    try:
        yield fds[0], fds[1], fds[2], fds[3]
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_utime + usage.ru_stime


def assert_quiet(loop: Loop, front: Front) -> None:
    """Nothing calls back without end."""
    before = front.calls
    spent = cpu_seconds()
    loop.asyncio.run_until_complete(asyncio.sleep(0.1))
    assert front.calls - before <= 1
    assert cpu_seconds() - spent < 0.05


def receive(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (chunk := peer.recv(count - len(data))):
        data += chunk
    return data


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(5)
    peer.connect(str(path))
    return peer


# --- specs ---


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("stdio", CharSpec(CharKind.STDIO)),
        ("stdio,signal=on", CharSpec(CharKind.STDIO)),
        ("stdio,signal=off", CharSpec(CharKind.STDIO, signals=False)),
        ("file:/tmp/a:b,c", CharSpec(CharKind.FILE, "/tmp/a:b,c")),
        ("unix:console.sock", CharSpec(CharKind.UNIX, "console.sock")),
        ("pty", CharSpec(CharKind.PTY)),
        ("null", CharSpec(CharKind.NULL)),
    ],
)
def test_specs(text: str, spec: CharSpec) -> None:
    assert parse_serial(text) == spec
    assert parse_serial(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a character device"),
        ("tcp:1234", "not a character device"),
        ("stdio:", "not a character device"),
        ("stdio,signal=maybe", "not a character device"),
        ("null,x", "not a character device"),
        ("pty,signal=off", "not a character device"),
        ("file", "not a character device"),
        ("file:", "needs a path"),
        ("unix:", "needs a path"),
        ("file:a\0b", "needs a path"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
    ],
)
def test_bad_specs(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_serial(text)


# --- life ---


def test_only_what_can_happen_happens(host: Host) -> None:
    front = host.open("null", start=False)
    for step in (front.chardev.hold, front.chardev.freeze, front.chardev.thaw):
        with pytest.raises(VmmError, match=r"null: .* while idle"):
            step()
    front.chardev.start()
    with pytest.raises(VmmError, match="null: start while running"):
        front.chardev.start()
    front.chardev.thaw()
    front.chardev.close()
    with pytest.raises(VmmError, match="null: thaw while closed"):
        front.chardev.thaw()


def test_nothing_goes_out_before_start_or_while_frozen(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "log"
    front = host.open(f"file:{path}", start=False)
    assert not front.say(b"one ")
    assert path.read_bytes() == b""
    front.chardev.start()  # and at once: the guest may be polling for room
    assert path.read_bytes() == b"one "
    front.chardev.freeze()
    assert not front.say(b"two ")
    host.loop.turn()
    assert path.read_bytes() == b"one "
    front.chardev.thaw()
    assert path.read_bytes() == b"one two "


def test_output_and_nothing_else_flows_while_quiet(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    with connect(path) as peer:
        host.loop.until(lambda: front.say(b"before "))
        front.chardev.quiet()
        calls = front.calls
        peer.send(b"input")
        assert front.say(b"while ")
        assert_quiet(host.loop, front)
        assert front.calls == calls
        front.chardev.freeze()
        assert not front.say(b"after")
        front.chardev.thaw()
        host.loop.until(lambda: front.got == b"input")


def test_a_new_vmms_output_flows_before_it_starts(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "log"
    front = host.open(f"file:{path}", start=False)
    front.chardev.quiet()
    assert front.say(b"one")
    front.chardev.start()
    assert front.say(b" two")
    assert path.read_bytes() == b"one two"


def test_last_words_go_out_at_the_end(host: Host) -> None:
    with pipes() as (stdin, _, screen, stdout), standard(stdin, stdout):
        front = host.open("stdio")
        front.fill()
        assert not front.say(b"last words")
        os.read(screen, 1 << 20)
        front.chardev.close()
        assert os.read(screen, 100) == b"last words"


# --- null, file ---


def test_null_takes_everything(host: Host) -> None:
    front = host.open("null")
    assert front.say(b"x" * 1000)
    assert len(host.fds) == 1


def test_file_is_private_truncated_and_appended_to(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "log"
    front = host.open(f"file:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert front.say(b"hello")
    path.write_bytes(b"")
    assert front.say(b"again")
    assert path.read_bytes() == b"again"
    successor = host.successor()
    front.chardev.freeze()
    assert successor.open(f"file:{path}").say(b" and on")
    assert path.read_bytes() == b"again and on"
    successor.end()


def test_file_that_cannot_be_opened(host: Host, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"serial: cannot write to {tmp_path}: Is a directory"):
        host.open(f"file:{tmp_path}")


def test_full_disk_drops_output_and_says_so_once(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    front = host.open("file:/dev/full")
    assert front.say(b"a")
    assert front.say(b"b")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["file:/dev/full: output is dropped: No space left on device"]


# --- stdio ---


def test_stdio_leaves_the_shared_pipe_as_it_is(host: Host) -> None:
    with pipes() as (stdin, keyboard, screen, stdout), standard(stdin, stdout):
        front = host.open("stdio")
        assert os.get_blocking(stdin)
        assert os.get_blocking(stdout)
        os.write(keyboard, b"0123456789abcdefXYZ")
        host.loop.until(lambda: len(front.got) == 19)
        assert front.got == b"0123456789abcdefXYZ"
        assert front.say(b"out")
        assert os.read(screen, 100) == b"out"


def test_stdio_stuck_reader(host: Host) -> None:
    with pipes() as (stdin, _, screen, stdout), standard(stdin, stdout):
        front = host.open("stdio")
        assert front.fill() > 0
        assert not front.say(b"tail")
        host.loop.turn()
        assert_quiet(host.loop, front)
        content = os.read(screen, 1 << 20)
        host.loop.until(lambda: not front.pending)
        assert (content + os.read(screen, 1 << 20)).endswith(b"xtail")


def test_stdio_over_sockets_is_polled_and_stays_blocking(host: Host) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, standard(ours.fileno(), ours.fileno()):
        front = host.open("stdio")
        assert ours.getblocking()
        theirs.send(b"ping")
        host.loop.until(lambda: front.got == b"ping")
        assert front.fill() > 0
        assert not front.say(b"pong")
        drained = b""
        while not drained.endswith(b"pong"):
            host.loop.turn(2)
            drained += theirs.recv(1 << 20)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_stdin_from_a_file(host: Host, tmp_path: Path, size: int) -> None:
    text = bytes(range(size))
    source = tmp_path / "input"
    source.write_bytes(text)
    with source.open("rb") as stdin, pipes() as (_, _, _, stdout), standard(stdin.fileno(), stdout):
        front = host.open("stdio", start=False)
        front.room = 10
        front.chardev.start()
        host.loop.until(lambda: front.got == text[:10])
        assert_quiet(host.loop, front)
        assert os.lseek(stdin.fileno(), 0, os.SEEK_CUR) == min(size, 10)  # not a byte more was taken
        front.make_room(1000)
        host.loop.until(lambda: front.got == text)
        assert_quiet(host.loop, front)


def test_stdin_from_dev_null(host: Host) -> None:
    with open("/dev/null", "rb") as stdin, pipes() as (_, _, _, stdout), standard(stdin.fileno(), stdout):
        front = host.open("stdio")
        host.loop.until(lambda: front.calls)
        assert_quiet(host.loop, front)
        assert front.got == b""


def test_stdin_ends_and_stdout_vanishes(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    with pipes() as (stdin, keyboard, screen, stdout), standard(stdin, stdout):
        front = host.open("stdio")
        os.write(keyboard, b"bye")
        os.close(keyboard)
        host.loop.until(lambda: front.got == b"bye")
        assert_quiet(host.loop, front)
        os.close(screen)
        assert front.say(b"into the void")
        assert front.say(b"again")
        assert [record.getMessage() for record in caplog.records] == ["stdio: output is dropped: Broken pipe"]


def test_stdout_vanishes_while_output_waits(host: Host) -> None:
    with pipes() as (stdin, _, screen, stdout), standard(stdin, stdout):
        front = host.open("stdio")
        front.fill()
        assert not front.say(b"tail")
        host.loop.turn()
        os.close(screen)
        host.loop.until(lambda: not front.pending)


def test_stdio_without_stdin(host: Host) -> None:
    with pipes() as (stdin, _, _, stdout), standard(stdin, stdout):
        os.close(0)
        with pytest.raises(
            HostError, match=r"serial: stdio, but stdin is not usable \(Bad file descriptor\)"
        ):
            host.open("stdio")


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(("text", "signals"), [("stdio", True), ("stdio,signal=off", False)])
def test_terminal_mode_is_restored_by_the_vmm_that_ends_the_guest(
    host: Host, text: str, signals: bool
) -> None:
    with terminal() as (master, slave), standard(slave, slave):
        before = termios.tcgetattr(slave)
        first = host.open(text, start=False)
        assert termios.tcgetattr(slave) == before
        first.chardev.start()
        mode = termios.tcgetattr(slave)
        assert not mode[3] & (termios.ECHO | termios.ICANON)
        assert bool(mode[3] & termios.ISIG) is signals
        assert not mode[0] & termios.ICRNL
        os.write(master, b"\r")
        host.loop.until(lambda: first.got == b"\r")
        assert first.say(b"$")
        assert os.read(master, 10) == b"$"

        host.successor().end()  # one that never got the guest changes nothing
        rejected = host.successor()
        rejected.open(text, start=False)
        rejected.end()
        assert termios.tcgetattr(slave) == mode

        second = host.successor()
        first.chardev.freeze()
        front = second.open(text)
        first.chardev.close()
        assert termios.tcgetattr(slave) == mode
        os.write(master, b"k")
        host.loop.until(lambda: front.got == b"k")
        second.end()
        assert termios.tcgetattr(slave) == before


def test_terminal_that_vanished(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    master, slave = os.openpty()
    with standard(slave, slave):
        os.close(slave)
        front = host.open("stdio")
    os.close(master)
    host.loop.turn()
    assert_quiet(host.loop, front)
    assert front.say(b"x")
    front.chardev.close()
    assert "the terminal's mode is not restored" in caplog.text


# --- what a guest has to bring ---


@pytest.mark.parametrize("spec", ["stdio", "file:{}/f", "unix:{}/u", "pty", "null"])
def test_what_is_needed_is_what_is_opened(host: Host, tmp_socket_dir: Path, spec: str) -> None:
    before = {(name, index) for name, index, _ in host.fds.items()}
    chardev = parse_serial(spec.format(tmp_socket_dir))
    open_fds(chardev, host.fds)
    opened = {(name, index) for name, index, _ in host.fds.items()} - before
    assert set(needed_fds(chardev)) == opened


# --- unix ---


@pytest.fixture
def path(tmp_socket_dir: Path) -> Path:
    return tmp_socket_dir / "console"


def test_unix_client_leaves_and_joins(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert front.say(b"nobody hears this")
    for name in (b"first", b"second"):
        with connect(path) as peer:
            peer.send(name)
            host.loop.until(lambda name=name: front.got.endswith(name))
            assert front.say(b"hello " + name)
            assert receive(peer, 6 + len(name)) == b"hello " + name
        host.loop.until(lambda: host.fds.find("serial") is None)
        assert_quiet(host.loop, front)
        assert front.say(b"nobody hears this")
    assert front.got == b"firstsecond"


def test_unix_last_words_are_heard(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    front.room = 10
    with connect(path) as peer:
        peer.send(b"0123456789 and more")
    host.loop.until(lambda: len(front.got) == 10)
    assert_quiet(host.loop, front)
    front.make_room(1000)
    host.loop.until(lambda: host.fds.find("serial") is None)
    assert front.got == b"0123456789 and more"


def test_unix_second_client_is_turned_away(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    with connect(path) as first:
        host.loop.until(lambda: host.fds.find("serial"))
        with connect(path) as second:
            host.loop.turn()
            assert receive(second, 1000) == BUSY
        assert front.say(b"still here")
        assert receive(first, 10) == b"still here"


def test_unix_client_that_left_does_not_keep_the_console(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    front.room = 1
    with connect(path) as first:
        first.send(b"more than the guest reads")
        host.loop.until(lambda: not front.room)
    with connect(path) as second:
        host.loop.turn()
        front.make_room(1000)
        second.send(b"new")
        host.loop.until(lambda: front.got == b"mnew")


def test_unix_stuck_client(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    with connect(path) as peer:
        host.loop.until(lambda: host.fds.find("serial"))
        started = time.monotonic()
        taken = front.fill()
        assert time.monotonic() - started < 1
        assert not front.say(b"tail")
        host.loop.turn()
        assert_quiet(host.loop, front)
        drained = b""
        while not drained.endswith(b"tail"):
            drained += peer.recv(1 << 16)
            host.loop.turn(2)
        assert len(drained) == taken + 4
    host.loop.until(lambda: host.fds.find("serial") is None)


def test_unix_stuck_client_leaves(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    with connect(path):
        host.loop.until(lambda: host.fds.find("serial"))
        front.fill()
        assert not front.say(b"tail")
        host.loop.turn()
    host.loop.until(lambda: host.fds.find("serial") is None and not front.pending)
    assert_quiet(host.loop, front)


def test_unix_path(host: Host, path: Path, loop: Loop) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    front = host.open(f"unix:{path}")
    other = Host(loop)
    with pytest.raises(ConfigError, match=f"a running process listens at {path}"):
        other.open(f"unix:{path}")
    with pytest.raises(ConfigError, match=f"cannot listen at {path}/x: Not a directory"):
        other.open(f"unix:{path}/x")
    plain = path.with_name("plain")
    plain.write_text("precious")
    with pytest.raises(ConfigError, match=f"{plain} exists and is no socket"):
        other.open(f"unix:{plain}")
    assert plain.read_text() == "precious"
    other.end()
    front.chardev.close()
    assert not path.exists()


@pytest.mark.parametrize("victim", ["socket", "file", "nothing"])
def test_unix_path_that_is_another_ones_is_not_removed(host: Host, path: Path, victim: str) -> None:
    """The VMM that sent the socket named the path, too."""
    named = path.with_name("victim")
    if victim == "socket":
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(named))
    elif victim == "file":
        named.write_text("precious")
    host.fds.add("serial-listen", 0, listen(str(path), "test").detach())
    host.open(f"unix:{named}").chardev.close()
    assert named.exists() == (victim != "nothing")
    assert path.exists()


def test_unix_path_that_is_no_socket_any_more_is_not_removed(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    path.unlink()
    path.write_text("precious")
    front.chardev.close()
    assert path.read_text() == "precious"


def test_unix_client_that_came_with_the_guest_is_ours(
    host: Host, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    host.fds.add("serial", 0, ours.detach())
    monkeypatch.setattr("vmm.sockets.peer", lambda _: (7, 1001))
    with theirs, pytest.raises(PeerError, match="fd serial/0: the peer, process 7, is uid 1001"):
        host.open(f"unix:{path}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_unix_stranger_is_turned_away(host: Host, path: Path) -> None:
    host.open(f"unix:{path}")
    path.parent.chmod(0o755)
    path.chmod(0o666)
    heard, tell = os.pipe()
    stranger = os.fork()
    if not stranger:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with connect(path) as peer:
            os.write(tell, peer.recv(1000))
        os._exit(0)
    host.loop.until(lambda: os.waitpid(stranger, os.WNOHANG)[0])
    assert os.read(heard, 1000) == STRANGER
    os.close(heard)
    os.close(tell)
    assert host.fds.find("serial") is None


def test_unix_client_stays_through_handovers(host: Host, path: Path) -> None:
    spec = f"unix:{path}"
    front = host.open(spec)
    hosts = [host]
    with connect(path) as peer:
        host.loop.until(lambda: host.fds.find("serial"))
        for turn in range(4):
            old, new = hosts[-1], hosts[-1].successor()
            old.opened[-1].freeze()
            peer.send(b"<%d>" % turn)
            front = new.open(spec)
            old.opened[-1].close()
            old.fds.close()
            hosts.append(new)
            host.loop.until(lambda front=front: front.got)
            assert front.got == b"<%d>" % turn
            assert front.say(b"[%d]" % turn)
            assert receive(peer, 3) == b"[%d]" % turn
        assert path.exists()
    for new in hosts[1:]:
        new.end()
    assert not path.exists()


def test_unix_nobody_joins_or_leaves_while_held(host: Host, path: Path) -> None:
    spec = f"unix:{path}"
    old = host.open(spec)
    leaver = connect(path)
    host.loop.until(lambda: host.fds.find("serial"))
    old.chardev.hold()
    new = host.successor()  # the fds are sent
    leaver.close()
    with connect(path) as joiner:
        host.loop.turn()
        assert_quiet(host.loop, old)
        assert old.say(b"to whom?")
        assert host.fds.find("serial") is not None
        joiner.send(b"early")
        old.chardev.freeze()
        front = new.open(spec)
        host.loop.until(lambda: front.got == b"early")
        assert front.say(b"hello")
        assert receive(joiner, 5) == b"hello"
    new.end()


@pytest.mark.parametrize("frozen", [False, True])
def test_unix_after_a_handover_that_failed(host: Host, path: Path, frozen: bool) -> None:
    front = host.open(f"unix:{path}")
    leaver = connect(path)
    host.loop.until(lambda: host.fds.find("serial"))
    front.chardev.hold()
    leaver.close()
    joiner = connect(path)
    host.loop.turn()
    if frozen:
        front.chardev.freeze()
        host.loop.turn()
    assert_quiet(host.loop, front)
    front.chardev.thaw()
    with joiner:
        joiner.send(b"hi")
        host.loop.until(lambda: front.got == b"hi")


def test_unix_out_of_fds(host: Host, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    front = host.open(f"unix:{path}")
    with connect(path):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            host.loop.turn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "takes no more clients until the next handover: Too many open files" in caplog.text
        assert_quiet(host.loop, front)


# --- pty ---


def test_pty_clients_come_and_go(host: Host) -> None:
    front = host.open("pty")
    name = front.chardev.label.removeprefix("pty:")
    assert front.say(b"nobody hears this")
    assert_quiet(host.loop, front)
    for text in (b"first", b"second"):
        client = os.open(name, os.O_RDWR | os.O_NOCTTY)
        assert not termios.tcgetattr(client)[3] & (termios.ECHO | termios.ICANON)
        os.write(client, text)
        host.loop.until(lambda text=text: front.got.endswith(text))
        assert front.say(b"to " + text)
        assert os.read(client, 100) == b"to " + text
        os.write(client, b".")
        os.close(client)
        host.loop.until(lambda: front.got.endswith(b"."))
        assert front.say(b"nobody hears this")
        assert_quiet(host.loop, front)
    assert front.got == b"first.second."


def test_pty_input_waits_for_room(host: Host) -> None:
    front = host.open("pty")
    front.room = 20
    client = os.open(front.chardev.label.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    text = bytes(range(200))
    os.write(client, text)
    host.loop.until(lambda: not front.room)
    assert_quiet(host.loop, front)
    assert front.got == text[:20]
    front.make_room(1000)
    host.loop.until(lambda: front.got == text)
    os.close(client)


def test_pty_stuck_client(host: Host) -> None:
    front = host.open("pty")
    client = os.open(front.chardev.label.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    assert front.fill() > 0
    assert not front.say(b"tail")
    host.loop.turn()
    assert_quiet(host.loop, front)
    drained = b""
    while not drained.endswith(b"tail"):
        drained += os.read(client, 1 << 16)
        host.loop.turn()
    front.fill()
    assert not front.say(b"tail")
    host.loop.turn()
    os.close(client)
    host.loop.until(lambda: not front.pending)


def test_pty_client_stays_through_a_handover(host: Host) -> None:
    front = host.open("pty")
    client = os.open(front.chardev.label.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    new = host.successor()
    front.chardev.freeze()
    os.write(client, b"in between")
    host.loop.turn()
    assert front.got == b""
    after = new.open("pty")
    front.chardev.close()
    assert after.chardev.label == front.chardev.label
    host.loop.until(lambda: after.got == b"in between")
    assert after.say(b"hello")
    assert os.read(client, 10) == b"hello"
    os.close(client)
    new.end()


def test_pty_freeze_and_thaw(host: Host) -> None:
    front = host.open("pty")
    client = os.open(front.chardev.label.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    front.chardev.freeze()
    os.write(client, b"kept")
    host.loop.turn()
    assert front.got == b""
    assert_quiet(host.loop, front)
    front.chardev.thaw()
    host.loop.until(lambda: front.got == b"kept")
    os.close(client)


def test_pty_received_fd_is_checked(host: Host) -> None:
    with pipes() as (stdin, _, _, _):
        host.fds.add("serial", 0, os.dup(stdin))
        with pytest.raises(StateError, match="not a pty's master"):
            host.open("pty")


# --- handovers ---


def test_frozen_means_untouched(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    with connect(path) as peer:
        host.loop.until(lambda: host.fds.find("serial"))
        calls = front.calls
        front.chardev.freeze()
        peer.send(b"waits")
        assert_quiet(host.loop, front)
        assert front.calls == calls
        front.chardev.thaw()
        host.loop.until(lambda: front.got == b"waits")


def test_freeze_from_another_thread_waits_for_a_callback_under_way(host: Host, path: Path) -> None:
    front = host.open(f"unix:{path}")
    inside, leave, order = threading.Event(), threading.Event(), []

    def slow() -> None:
        inside.set()
        leave.wait(5)
        order.append("callback")

    front.chardev.attach(slow, slow)
    with connect(path) as peer:
        peer.send(b"x")

        def freeze() -> None:
            inside.wait(5)
            threading.Timer(0.05, leave.set).start()
            front.chardev.freeze()
            order.append("frozen")

        freezer = threading.Thread(target=freeze)
        freezer.start()
        host.loop.until(lambda: "frozen" in order)
        freezer.join()
        host.loop.turn()
    assert order[0] == "callback"
    assert order[-1] == "frozen"  # and no callback after it


def test_numbered_bytes_survive_many_handovers_in_both_directions(host: Host, path: Path) -> None:
    """A guest that echoes: every byte sent by the client comes back once and in order, whoever serves it."""
    total, handovers = 3000, 12
    fed, back = bytes(at % 251 for at in range(total)), bytearray()
    spec = f"unix:{path}"
    hosts = [host]
    host.open(spec)
    uart = Serial(host.arena, UnconnectedIrq(), host.opened[-1])
    uart.write(2, b"\x01")
    held = b""

    def guest_turn() -> None:
        """The guest reads at most three bytes, and writes what it has read where there is room."""
        nonlocal held
        for _ in range(3):
            if not held and uart.read(5, 1)[0] & 0x01:
                held = uart.read(0, 1)
            if held and uart.read(5, 1)[0] & 0x20:
                uart.write(0, held)
                held = b""

    with connect(path) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        peer.setblocking(False)
        sent = steps = 0
        while len(back) < total:
            steps += 1
            with contextlib.suppress(BlockingIOError):
                sent += peer.send(fed[sent : sent + 37])
            host.loop.turn(2)
            guest_turn()
            if steps % 3 == 0:
                with contextlib.suppress(BlockingIOError):
                    back += peer.recv(29)
            if steps % 80 == 0 and len(hosts) <= handovers:
                old, new = hosts[-1], hosts[-1].successor()
                old.opened[-1].freeze()
                chardev = open_chardev(parse_serial(spec), new.fds, new.arena, new.loop.asyncio)
                new.opened.append(chardev)
                uart = Serial(new.arena, UnconnectedIrq(), chardev)
                guest_turn()  # the guest may run before the character device is started
                chardev.start()
                old.opened[-1].close()
                old.fds.close()
                hosts.append(new)
            assert steps < 20000
    assert bytes(back) == fed
    assert len(hosts) == handovers + 1
    for each in hosts[1:]:
        each.end()


def test_vcpu_threads_and_the_loop_share_a_uart(host: Host, path: Path) -> None:
    """Output from a vCPU thread against a slow client, the loop on its own; nothing is lost or doubled."""
    host.open(f"unix:{path}")
    uart = Serial(host.arena, UnconnectedIrq(), host.opened[-1])
    text = bytes(at % 251 for at in range(20_000))
    with connect(path) as peer:
        host.loop.until(lambda: host.fds.find("serial"))
        client = os.dup(host.fds.get("serial"))
        with socket.socket(fileno=client) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

        def guest() -> None:
            for at in range(len(text)):
                while not uart.read(5, 1)[0] & 0x20:
                    time.sleep(0.0005)
                uart.write(0, text[at : at + 1])
            while not uart.read(5, 1)[0] & 0x40:
                time.sleep(0.0005)

        vcpu = threading.Thread(target=guest)
        vcpu.start()
        got = bytearray()
        peer.setblocking(False)
        while len(got) < len(text) and (vcpu.is_alive() or select.select([peer], [], [], 0.5)[0]):
            host.loop.turn(1)
            with contextlib.suppress(BlockingIOError):
                got += peer.recv(3000)
        vcpu.join()
    assert bytes(got) == text


def test_fds_are_close_on_exec(host: Host, path: Path) -> None:
    host.open(f"unix:{path}")
    with connect(path):
        host.loop.until(lambda: host.fds.find("serial"))
        flags = {name: fcntl.fcntl(fd, fcntl.F_GETFD) for name, _, fd in host.fds.items()}
        assert flags == dict.fromkeys(("state", "serial-listen", "serial"), fcntl.FD_CLOEXEC)
