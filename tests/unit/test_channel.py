"""The handover's sockets against peers that do everything wrong; whatever they send, no fd stays open."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmm.cpr import protocol
from vmm.cpr.channel import Cancelled, CancelSwitch, Channel, Listener, connect
from vmm.cpr.live import Choice, IncomingMachine, LiveIncoming, LiveOutgoing, Timeouts, run
from vmm.cpr.outgoing import TokenVerdict
from vmm.cpr.protocol import (
    FDS_PER_BATCH,
    HEADER,
    LARGEST_BODY,
    MAGIC,
    MOST_FDS,
    VERSION,
    Cancel,
    Commit,
    FdEntry,
    Offer,
    Prepared,
    Ready,
    Refuse,
    Running,
    State,
    TraceEvent,
    as_reason,
    decode_header,
    encode,
    expect,
)
from vmm.cpr.report import Report
from vmm.cpr.token import SIZE as TOKEN_SIZE
from vmm.cpr.token import RunToken
from vmm.errors import HandoverError, PeerError, StateError, VmmError
from vmm.fds import FdStore, sealed_memfd
from vmm.machine.config import MachineConfig
from vmm.machine.config import encode as encode_config
from vmm.trace import Tracer

SOON_S = 0.05
NOBODY_UID = 65534

MESSAGES = (
    Offer("1.0", "cpr-transfer", msgspec.Raw(b'{"memory":1}'), [FdEntry("ram", 0), FdEntry("ram", 1)]),
    Ready("rebuild", "why", True, "EIO"),
    Refuse("no"),
    State(7, True),
    Prepared(),
    Commit(),
    Cancel("off"),
    Running(1, [TraceEvent("loaded", 5)]),
)


def fd_count() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def switch() -> Iterator[CancelSwitch]:
    switch = CancelSwitch()
    yield switch
    switch.close()


@pytest.fixture
def ends(switch: CancelSwitch) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel of ours, and the raw socket of its peer."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours, switch)
    yield channel, theirs
    channel.close()
    theirs.close()


@contextmanager
def some_fds(count: int) -> Iterator[list[int]]:
    fds = [os.eventfd(0) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def send_fds(sock: socket.socket, fds: list[int], data: bytes = b"F") -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def header(length: int, fds: int = 0, *, magic: int = MAGIC, version: int = VERSION) -> bytes:
    return HEADER.pack(magic, version, length, fds)


# --- what is right ---


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_arrive_as_they_were_sent(
    ends: tuple[Channel, socket.socket], switch: CancelSwitch, message: Any
) -> None:
    channel, theirs = ends
    peer = Channel(theirs.dup(), switch)
    peer.send(message)
    assert channel.receive(1.0) == (message, [])
    peer.close()


@pytest.mark.parametrize("count", [0, 1, FDS_PER_BATCH, FDS_PER_BATCH + 1, 600])
def test_fds_arrive_in_their_order(
    ends: tuple[Channel, socket.socket], switch: CancelSwitch, count: int
) -> None:
    channel, theirs = ends
    peer = Channel(theirs.dup(), switch)
    with some_fds(count) as fds:
        for number, fd in enumerate(fds):
            os.eventfd_write(fd, number + 1)
        before = fd_count()
        peer.send(Commit(), fds)
        message, received = channel.receive(5.0)
        assert message == Commit()
        assert [os.eventfd_read(fd) for fd in received] == [number + 1 for number in range(count)]
        assert not any(os.get_inheritable(fd) for fd in received)
        for fd in received:
            os.close(fd)
        assert fd_count() == before
    peer.close()


def test_a_message_in_pieces_is_one(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    data = encode(State(3, False)) + encode(Commit())

    def drip() -> None:
        for at in range(len(data)):
            theirs.send(data[at : at + 1])

    thread = threading.Thread(target=drip)
    thread.start()
    assert channel.receive(5.0)[0] == State(3, False)
    assert channel.receive(5.0)[0] == Commit()
    thread.join()


# --- what is no message ---


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", r"another protocol \(magic 0x47455420"),
        (b"\0" * 64, r"another protocol \(magic 0x0, expected 0x56435052\)"),
        (struct.pack("<IIII", MAGIC, VERSION, 2, 0), "another protocol"),
        (header(2, version=0), "protocol version 0, this VMM speaks 1 to 1; update the one that is older"),
        (header(2, version=VERSION + 1), f"protocol version {VERSION + 1}, this VMM speaks 1 to {VERSION}"),
        (header(2, version=(1 << 32) - 1), "protocol version 4294967295"),
        (header(LARGEST_BODY + 1), f"announces {LARGEST_BODY + 1} bytes and 0 fds"),
        (header((1 << 32) - 1), "announces 4294967295 bytes"),
        (header(2, MOST_FDS + 1), f"and {MOST_FDS + 1} fds"),
        (header(2, (1 << 32) - 1), "and 4294967295 fds"),
        (header(0), "cannot be read"),
        (header(2) + b"{}", "cannot be read"),
        (header(2) + b"[]", "cannot be read"),
        (header(4) + b"null", "cannot be read"),
        (header(15) + b'{"type":"boom"}', "cannot be read"),
        (header(16) + b'{"type":"state"}', "cannot be read"),
        (header(20) + b'{"type":"commit","a"', "cannot be read"),
        (header(26) + b'{"type":"commit","more":1}', "cannot be read"),
        (header(42) + b'{"type":"state","epoch":"7","running":true}'[:42], "cannot be read"),
        (header(30) + b'{"type":"cancel","reason":"\xff"}', "cannot be read"),
        (header(100_000) + b"[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_message(ends: tuple[Channel, socket.socket], data: bytes, words: str) -> None:
    channel, theirs = ends
    theirs.sendall(data)
    with pytest.raises(StateError, match=words):
        channel.receive(1.0)


NINES = b"9" * 400
HOSTILE_BODIES = {
    "epoch": b'{"type":"state","epoch":%s,"running":true}' % NINES,
    "pid": b'{"type":"running","pid":%s,"events":[]}' % NINES,
    "negative pid": b'{"type":"running","pid":-1,"events":[]}',
    "ns": b'{"type":"running","pid":1,"events":[["a",%s]]}' % NINES,
    "negative ns": b'{"type":"running","pid":1,"events":[["a",-1]]}',
    "event name": b'{"type":"running","pid":1,"events":[["%s",1]]}' % NINES,
    "events": b'{"type":"running","pid":1,"events":[%s["a",1]]}' % (b'["a",1],' * 4096),
    "client": b'{"type":"farewell","clients":[[%s,""]]}' % NINES,
    "clients": b'{"type":"farewell","clients":[%s[0,""]]}' % (b'[0,""],' * 256),
    "why": b'{"type":"ready","method":"rebuild","why":"%s","received":true,"probe":""}' % (NINES * 11),
    "probe": b'{"type":"ready","method":"rebuild","why":"","received":true,"probe":"%s"}' % (NINES * 11),
    "mode": b'{"type":"offer","release":"1","mode":"normal","machine":{},"fds":[]}',
    "release": b'{"type":"offer","release":"%s","mode":"cpr-transfer","machine":{},"fds":[]}' % NINES,
    "fd": b'{"type":"offer","release":"1","mode":"cpr-transfer","machine":{},"fds":[{"name":"a","id":1024}]}',
}


@pytest.mark.parametrize("what", HOSTILE_BODIES)
def test_what_has_no_bounds_is_not_taken(ends: tuple[Channel, socket.socket], what: str) -> None:
    """Whatever is taken can be written again: it goes into answers of the monitor."""
    channel, theirs = ends
    body = HOSTILE_BODIES[what]
    theirs.sendall(header(len(body)) + body)
    with pytest.raises(StateError, match="cannot be read"):
        channel.receive(1.0)


# --- versions ---


def test_the_lower_version_is_spoken(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "VERSION", 3)
    monkeypatch.setattr(protocol, "OLDEST_VERSION", 2)
    ours, theirs = socket.socketpair()
    switch = CancelSwitch()
    channel = Channel(ours, switch)
    try:
        channel.send(Commit())
        assert decode_header(theirs.recv(4096)[: HEADER.size]).version == 3
        theirs.sendall(encode(Prepared(), version=2))
        assert channel.receive(1.0) == (Prepared(), [])
        channel.send(Commit())
        assert decode_header(theirs.recv(4096)[: HEADER.size]).version == 2
        theirs.sendall(encode(Prepared(), version=3))
        channel.receive(1.0)
        assert channel.say_last(Cancel("off"))
        assert decode_header(theirs.recv(4096)[: HEADER.size]).version == 2
    finally:
        channel.close()
        theirs.close()
        switch.close()


@pytest.mark.parametrize("version", [1, 4])
def test_a_version_that_nobody_speaks(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setattr(protocol, "VERSION", 3)
    monkeypatch.setattr(protocol, "OLDEST_VERSION", 2)
    with pytest.raises(StateError, match=f"version {version} cannot be spoken; this VMM speaks 2 to 3"):
        encode(Commit(), version=version)


def test_a_text_that_is_not_utf8_is_not_sent() -> None:
    with pytest.raises(StateError, match="Refuse: a text in it is not UTF-8"):
        encode(Refuse("/tmp/\udcff"))
    assert as_reason("/tmp/\udcff" + "x" * 5000) == "/tmp/\\udcff" + "x" * 4085


@pytest.mark.parametrize("at", range(len(encode(State(3, True)))))
def test_a_hang_up_anywhere(ends: tuple[Channel, socket.socket], at: int) -> None:
    channel, theirs = ends
    theirs.sendall(encode(State(3, True))[:at])
    theirs.close()
    with pytest.raises(PeerError, match="hung up$" if at == 0 else "in the middle of a message|hung up"):
        channel.receive(1.0)


def test_a_reset_is_a_hang_up(ends: tuple[Channel, socket.socket]) -> None:
    """A peer that goes without having read what we sent."""
    channel, theirs = ends
    channel.send(Commit())
    theirs.close()
    with pytest.raises(PeerError, match="the peer hung up"):
        channel.receive(1.0)
    with pytest.raises(PeerError, match="the peer is gone"):
        channel.send(Commit())


@pytest.mark.parametrize("data", [b"", encode(Commit())[:7], encode(Commit())[:-1]])
def test_a_peer_that_stops_talking(ends: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, theirs = ends
    theirs.sendall(data)
    start = time.monotonic()
    with pytest.raises(PeerError, match="did not answer within the time allowed"):
        channel.receive(SOON_S)
    assert SOON_S <= time.monotonic() - start < 2.0


def test_a_slow_loris_meets_the_deadline(ends: tuple[Channel, socket.socket]) -> None:
    """A byte now and then does not move the deadline."""
    channel, theirs = ends
    done = threading.Event()

    def drip() -> None:
        for byte in header(LARGEST_BODY) + b"{" * 10_000:
            if done.wait(0.01):
                return
            theirs.send(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(PeerError, match="did not answer within the time allowed"):
            channel.receive(0.2)
        assert time.monotonic() - start < 2.0
    finally:
        done.set()
        thread.join()


def test_a_long_body_is_not_held_before_it_comes(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        theirs.sendall(header(LARGEST_BODY))
        with pytest.raises(PeerError):
            channel.receive(0.001)
        channel._buffer.clear()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


# --- fds that lie ---


@pytest.mark.parametrize(
    ("announced", "sent", "batches"),
    [(0, 3, 1), (1, 3, 1), (3, 1, 1), (3, 0, 1), (251, 250, 2)],
)
def test_other_fds_than_announced(
    ends: tuple[Channel, socket.socket], announced: int, sent: int, batches: int
) -> None:
    channel, theirs = ends
    body = encode(Commit())[HEADER.size :]
    with some_fds(sent) as fds:
        before = fd_count()
        # what is not announced comes with the bytes of the message itself
        if announced == 0:
            send_fds(theirs, fds, header(len(body)) + body)
        else:
            theirs.sendall(header(len(body), announced) + body)
            for batch in range(batches):
                send_fds(theirs, fds[batch::batches])
            theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerError, match=f"announced {announced} fds and sent {sent}"):
            channel.receive(1.0)
        assert fd_count() == before


def test_fds_that_never_come(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    theirs.sendall(encode(Commit(), 2))
    with pytest.raises(PeerError, match="did not answer"):
        channel.receive(SOON_S)


@pytest.mark.parametrize("after", [b"", b"rubbish rubbish!", header(2) + b"{}", encode(Commit())[:10]])
def test_fds_with_what_is_no_message(ends: tuple[Channel, socket.socket], after: bytes) -> None:
    channel, theirs = ends
    with some_fds(5) as fds:
        before = fd_count()
        send_fds(theirs, fds, after or b"?")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((PeerError, StateError)):
            channel.receive(1.0)
        assert fd_count() == before


def test_a_flood_of_fds_is_bounded(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    done = threading.Event()
    with some_fds(200) as fds:
        before = fd_count()
        theirs.sendall(header(LARGEST_BODY))

        def flood() -> None:
            while not done.is_set():
                try:
                    send_fds(theirs, fds)
                except OSError:
                    return

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            with pytest.raises(StateError, match=f"more than {MOST_FDS} fds"):
                channel.receive(10.0)
        finally:
            done.set()
            assert fd_count() == before
            channel.close()
            thread.join()


def test_more_fds_than_the_process_may_hold(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with some_fds(20) as fds:
        before = fd_count()
        theirs.sendall(encode(Commit(), len(fds)))
        send_fds(theirs, fds)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 5, hard))
        try:
            with pytest.raises(PeerError, match="RLIMIT_NOFILE"):
                channel.receive(1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert fd_count() == before


def test_closing_drops_what_nobody_took(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    with some_fds(3) as fds:
        before = fd_count()
        send_fds(theirs, fds)
        assert channel._fill(time.monotonic() + 1)
        assert fd_count() == before + 3
        channel.close()
        assert fd_count() == before - 1


# --- sending ---


def fill(channel: Channel) -> None:
    """Send until the peer would have to read."""
    for _ in range(100):
        channel.send(Refuse("x" * 100_000), (), SOON_S)


def test_a_peer_that_does_not_read(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    with pytest.raises(PeerError, match="does not read"):
        fill(channel)


def test_too_much_is_not_sent(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    with pytest.raises(StateError, match="more than the channel takes"):
        channel.send(Refuse("x" * LARGEST_BODY))
    with some_fds(1) as fds, pytest.raises(StateError, match="and 1025 fds"):
        channel.send(Commit(), fds * (MOST_FDS + 1))
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


def test_last_words_to_a_full_socket(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    with pytest.raises(PeerError):
        fill(channel)
    assert not channel.say_last(Cancel("off"))


def test_last_words(ends: tuple[Channel, socket.socket], switch: CancelSwitch) -> None:
    """They are said though everything else is cancelled."""
    channel, theirs = ends
    switch.set("off")
    assert channel.say_last(Cancel("off"))
    assert theirs.recv(4096) == encode(Cancel("off"))
    assert theirs.recv(1) == b""


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), OSError(109, "Too many references")]
)
def test_an_error_of_the_socket_is_the_peers(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    channel, _ = ends

    class Broken:
        def sendmsg(self, *_: Any) -> Any:
            raise error

        recvmsg = sendmsg

    with monkeypatch.context() as patch:
        patch.setattr(channel, "_sock", Broken())
        with pytest.raises(PeerError, match=f"the peer cannot be heard: {error.strerror}"):
            channel.receive(1.0)
        with pytest.raises(PeerError, match=f"nothing can be sent to the peer: {error.strerror}"):
            channel.send(Commit())


# --- cancelling ---


def test_cancelling_ends_a_wait(ends: tuple[Channel, socket.socket], switch: CancelSwitch) -> None:
    channel, _ = ends
    timer = threading.Timer(SOON_S, switch.set, ("off",))
    timer.start()
    with pytest.raises(Cancelled, match="off"):
        channel.receive(None)
    timer.join()
    with pytest.raises(Cancelled, match="off"):
        channel.send(Commit())


def test_the_commit_disarms(switch: CancelSwitch) -> None:
    switch.disarm()
    assert not switch.set("too late")
    switch.check()


def test_a_cancel_before_the_commit_wins(switch: CancelSwitch) -> None:
    assert switch.set("off")
    with pytest.raises(Cancelled, match="off"):
        switch.disarm()


def test_a_closed_switch_is_out_of_use() -> None:
    switch = CancelSwitch()
    switch.close()
    assert not switch.set("too late")


# --- who the peer is ---


def as_other_user(work: Callable[[], None]) -> int:
    """Fork a process of another user that does `work`; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
            os.setresuid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


@pytest.fixture
def open_dir(tmp_socket_dir: Path) -> Path:
    """A folder that every user may use: file permissions are not what is tested here."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    tmp_socket_dir.chmod(0o777)
    return tmp_socket_dir


def test_a_stranger_is_not_let_in(open_dir: Path, switch: CancelSwitch) -> None:
    path = str(open_dir / "s")
    listener = Listener(path)
    os.chmod(path, 0o666)
    before = fd_count()

    def knock() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.settimeout(5)
            assert sock.recv(1) == b""

    pid = as_other_user(knock)
    with pytest.raises(PeerError, match="nobody connected"):
        listener.accept(1.0, switch)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert fd_count() == before
    listener.close()


def test_a_friend_behind_a_stranger_is_let_in(open_dir: Path, switch: CancelSwitch) -> None:
    path = str(open_dir / "s")
    listener = Listener(path)
    os.chmod(path, 0o666)
    with socket.socket(socket.AF_UNIX) as friend:

        def knock() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)

        pid = as_other_user(knock)
        os.waitpid(pid, 0)
        friend.connect(path)
        channel = listener.accept(5.0, switch)
        assert channel.peer_pid == os.getpid()
        channel.close()
    listener.close()


def test_a_strangers_listener_is_not_talked_to(open_dir: Path, switch: CancelSwitch) -> None:
    path = str(open_dir / "s")
    ready, done = os.pipe()

    def listen() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            sock.listen()
            os.write(done, b"!")
            time.sleep(10)

    pid = as_other_user(listen)
    try:
        assert os.read(ready, 1) == b"!"
        before = fd_count()
        with pytest.raises(PeerError, match=f"the peer, process {pid}, is uid {NOBODY_UID}"):
            connect(path, switch)
        assert fd_count() == before
    finally:
        os.close(ready)
        os.close(done)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_nobody_listens(tmp_socket_dir: Path, switch: CancelSwitch) -> None:
    before = fd_count()
    with pytest.raises(PeerError, match=r"^Failed to connect to '.*/s': No such file or directory$"):
        connect(str(tmp_socket_dir / "s"), switch)
    assert fd_count() == before


# --- an offer that is not what it seems ---

KINDS: dict[str, Callable[[], int]] = {
    "token": lambda: sealed_memfd("token", TOKEN_SIZE),
    "small memfd": lambda: sealed_memfd("small", 1),
    "unsealed memfd": lambda: os.memfd_create("unsealed"),
    "eventfd": lambda: os.eventfd(0),
    "character device": lambda: os.open("/dev/null", os.O_RDWR),
    "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "path": lambda: os.open("/", os.O_PATH),
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "itself": lambda: os.open("/proc/self/mem", os.O_RDWR),
}


def build(described: bytes, fds: FdStore, token: RunToken) -> tuple[IncomingMachine, Choice]:
    raise HandoverError("far enough")


class Newcomer:
    """The new VMM up to its machine, and the socket of whoever offers it something."""

    def __init__(self, folder: Path) -> None:
        self.errors: list[str] = []
        self.world = LiveIncoming(
            cpr_path=str(folder / "cpr"),
            main_path=str(folder / "main"),
            build=build,
            timeouts=lambda: Timeouts(0.5, 0.5, 0.5),
            tracer=Tracer("new"),
            on_phase=lambda phase, error: None,
        )
        self.peer = socket.socket(socket.AF_UNIX)
        self.peer.connect(str(folder / "cpr"))

    def offered(self) -> str:
        """What comes of what the peer has sent: an error's text."""
        try:
            run(self.world.receive_offer())
            run(self.world.build())
        except VmmError as error:
            run(self.world.refuse(str(error)))
            return str(error)
        raise AssertionError("no error")

    def close(self) -> None:
        """As a process that ends."""
        self.peer.close()
        if self.world.token is not None:
            self.world.token.close()
        self.world.fds.close()
        self.world.close()


@pytest.fixture
def newcomer(tmp_socket_dir: Path) -> Iterator[Newcomer]:
    newcomer = Newcomer(tmp_socket_dir)
    yield newcomer
    newcomer.close()


def offer(names: list[tuple[str, int]], machine: bytes | None = None) -> Offer:
    described = encode_config(MachineConfig(kernel="ticker")) if machine is None else machine
    return Offer("1", "cpr-transfer", msgspec.Raw(described), [FdEntry(*name) for name in names])


def send_offer(newcomer: Newcomer, names: list[tuple[str, int]], kinds: list[str]) -> None:
    fds = [KINDS[kind]() for kind in kinds]
    try:
        newcomer.peer.sendall(encode(offer(names), len(fds)))
        if fds:
            send_fds(newcomer.peer, fds)
    finally:
        for fd in fds:
            os.close(fd)


def test_a_good_offer(newcomer: Newcomer) -> None:
    send_offer(newcomer, [("token", 0)], ["token"])
    assert newcomer.offered() == "far enough"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("ram", "eventfd", "fd ram/0 is a eventfd where a memfd was expected"),
        ("ram", "unsealed memfd", "fd ram/0 is not sealed"),
        ("state", "character device", "fd state/0 is a character device where a memfd"),
        ("token", "small memfd", "fd token/0 has 1 bytes where 4096 were expected"),
        ("token", "unsealed memfd", "fd token/0 is not sealed"),
        ("vm", "eventfd", "fd vm/0 is a eventfd where a kvm-vm was expected"),
        ("vcpu", "socket", "fd vcpu/0 is a socket where a kvm-vcpu was expected"),
        ("serial", "token", "fd serial/0 is a memfd where"),
        ("serial", "directory", "fd serial/0 is a other where"),
        ("serial", "path", "fd serial/0 is a other where"),
        ("qmp", "character device", "fd qmp/0 is a character device where a socket was expected"),
        ("irqfd", "itself", "fd irqfd/0 is a file where a eventfd was expected"),
        ("rm -rf", "token", "fd rm -rf/0: this VMM knows no fd of that name"),
        ("", "token", "fd /0: this VMM knows no fd of that name"),
    ],
)
def test_fds_that_are_something_else(newcomer: Newcomer, name: str, kind: str, words: str) -> None:
    before = fd_count()
    send_offer(newcomer, [("token", 1), (name, 0)], ["token", kind])
    assert words in newcomer.offered()
    newcomer.world.fds.close()
    assert fd_count() <= before


@pytest.mark.parametrize(
    ("names", "kinds", "words"),
    [
        ([("token", 0)], ["token", "token"], "the fd table has 1 rows, 2 fds came"),
        ([("token", 0), ("token", 1)], ["token"], "the fd table has 2 rows, 1 fds came"),
        ([("token", 0), ("token", 0)], ["token", "token"], "fd token/0 came twice"),
        ([("token", -1)], ["token"], "cannot be read: Expected `int` >= 0"),
        ([("token", 1 << 70)], ["token"], "cannot be read"),
        ([], [], "fd token/0 is missing from the fd table"),
    ],
)
def test_fd_tables_that_lie(
    newcomer: Newcomer, names: list[tuple[str, int]], kinds: list[str], words: str
) -> None:
    before = fd_count()
    send_offer(newcomer, names, kinds)
    assert words in newcomer.offered()
    newcomer.world.fds.close()
    assert fd_count() <= before


@pytest.mark.parametrize("message", [m for m in MESSAGES if not isinstance(m, Offer)])
def test_another_message_than_an_offer(newcomer: Newcomer, message: Any) -> None:
    newcomer.peer.sendall(encode(message))
    words = {Refuse: "refuses: no", Cancel: "cancelled: off"}.get(type(message), "where Offer was expected")
    assert words in newcomer.offered()


def test_the_peer_is_told_why(newcomer: Newcomer) -> None:
    send_offer(newcomer, [("ram", 0)], ["eventfd"])
    error = newcomer.offered()
    newcomer.peer.settimeout(1)
    assert newcomer.peer.recv(4096) == encode(Refuse(error))
    assert newcomer.peer.recv(1) == b""


def test_nobody_else_gets_in_while_one_is_served(newcomer: Newcomer, tmp_socket_dir: Path) -> None:
    send_offer(newcomer, [("token", 0)], ["token"])
    newcomer.offered()
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
        late.connect(str(tmp_socket_dir / "cpr"))


# --- a new VMM that is not what it seems ---


class Giver:
    """An old machine that has nothing."""

    def describe(self) -> bytes:
        return b"{}"

    def hold_fds(self) -> None: ...

    def release_fds(self) -> None: ...

    def fd_table(self) -> list[tuple[str, int, int]]:
        return []

    def quiesce(self, *, keep_running: bool) -> bool:
        return True

    def runs_alone(self) -> bool:
        return False

    def roll_back(self) -> None: ...

    def gave_up(self) -> None: ...


@pytest.fixture
def taker(tmp_socket_dir: Path, switch: CancelSwitch) -> Iterator[tuple[LiveOutgoing, socket.socket]]:
    """The old VMM's world with its cpr channel connected, and that channel's other end."""
    fds = FdStore()
    with RunToken.open(fds) as token:
        assert token.take(0)
        listener = Listener(str(tmp_socket_dir / "cpr"))
        world = LiveOutgoing(
            Giver(),
            token,
            cpr_path=str(tmp_socket_dir / "cpr"),
            main_path=str(tmp_socket_dir / "main"),
            timeouts=Timeouts(0.2, 0.2, 0.2),
            tracer=Tracer("old"),
            report=Report("cpr-transfer"),
            on_phase=lambda phase, error: None,
        )
        world.connect_cpr()
        theirs = listener.accept(1.0, switch)
        yield world, theirs._sock
        theirs.close()
        listener.close()
        run(world.withdraw("the end"))
        world.close()
    fds.close()


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (encode(Refuse("other RAM size")), StateError, "the new VMM refuses: other RAM size"),
        (encode(Refuse("x" * 100_000)), StateError, "the new VMM refuses: x{4096}$"),
        (encode(Running(1, [])), StateError, "the peer sent Running where Ready was expected"),
        (encode(MESSAGES[1]) * 2, StateError, "said ready and went on talking"),
        (encode(MESSAGES[1]), PeerError, "did not answer within the time allowed"),
        (b"rubbish rubbish!", StateError, "another protocol"),
        (b"", PeerError, "did not answer within the time allowed"),
    ],
)
def test_a_new_vmm_that_is_not_ready(
    taker: tuple[LiveOutgoing, socket.socket], data: bytes, error: type[VmmError], words: str
) -> None:
    world, theirs = taker
    theirs.sendall(data)
    with pytest.raises(error, match=words):
        run(world.wait_ready())


@pytest.mark.parametrize(
    ("oldest", "words"),
    [
        (
            1,
            "the new VMM speaks protocol version 1, and was offered the guest in version 2; .*: what is 2",
        ),
        (2, "the peer speaks protocol version 1, this VMM speaks 2 to 2"),
    ],
)
def test_a_new_vmm_of_an_older_protocol(
    taker: tuple[LiveOutgoing, socket.socket], monkeypatch: pytest.MonkeyPatch, oldest: int, words: str
) -> None:
    world, theirs = taker
    theirs.sendall(encode(Refuse("what is 2?")))
    monkeypatch.setattr(protocol, "VERSION", 2)
    monkeypatch.setattr(protocol, "OLDEST_VERSION", oldest)
    with pytest.raises(StateError, match=words):
        run(world.wait_ready())


def test_both_channels_speak_one_version(
    taker: tuple[LiveOutgoing, socket.socket],
    tmp_socket_dir: Path,
    switch: CancelSwitch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, theirs = taker
    theirs.sendall(encode(MESSAGES[1]))
    theirs.shutdown(socket.SHUT_RDWR)
    monkeypatch.setattr(protocol, "VERSION", 2)
    run(world.wait_ready())
    listener = Listener(str(tmp_socket_dir / "main"))
    run(world.connect_main())
    main = listener.accept(1.0, switch)
    run(world.send_state())
    assert decode_header(main._sock.recv(4096)[: HEADER.size]).version == 1
    main.close()
    listener.close()


def test_another_mode_is_not_offered(taker: tuple[LiveOutgoing, socket.socket]) -> None:
    world, _ = taker
    world.report.mode = "normal"
    with pytest.raises(msgspec.ValidationError):
        run(world.offer())


def too_large() -> list[tuple[int, bytes]]:
    return [(0, bytes(LARGEST_BODY))]


def broken() -> list[tuple[int, bytes]]:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("farewell", [too_large, broken])
def test_clients_that_cannot_move_do_not_unsay_running(
    taker: tuple[LiveOutgoing, socket.socket],
    tmp_socket_dir: Path,
    switch: CancelSwitch,
    caplog: pytest.LogCaptureFixture,
    farewell: Callable[[], list[tuple[int, bytes]]],
) -> None:
    world, _ = taker
    world._farewell = farewell
    listener = Listener(str(tmp_socket_dir / "main"))
    run(world.connect_main())
    main = listener.accept(1.0, switch)
    main.send(Running(7, []))
    run(world.receive_running())
    assert world.report.new_pid == 7
    assert "the clients that were to move with the guest are lost" in caplog.text
    main.close()
    listener.close()


def test_a_new_vmm_that_sends_fds(taker: tuple[LiveOutgoing, socket.socket]) -> None:
    """Nothing that it sends is kept."""
    world, theirs = taker
    with some_fds(3) as fds:
        before = fd_count()
        theirs.sendall(encode(MESSAGES[1], len(fds)))
        send_fds(theirs, fds)
        with pytest.raises(PeerError):
            run(world.wait_ready())
        assert fd_count() == before


def test_what_the_token_says_after_the_commit(
    taker: tuple[LiveOutgoing, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world, _ = taker
    monkeypatch.setattr("vmm.cpr.live.NAP_S", 0.001)
    run(world.release_token())
    theirs = RunToken(world._token._fd)
    assert theirs._lock(fcntl.F_WRLCK)
    for _ in range(100):
        assert run(world.ask_token()) is TokenVerdict.UNDECIDED
        run(world.nap())
    assert caplog.text.count("holds the run token and has not run the guest yet") == 1
    theirs._move()
    assert run(world.ask_token()) is TokenVerdict.TAKEN
    theirs.close()
    assert run(world.ask_token()) is TokenVerdict.LOST
    assert not world._token.held


def test_a_token_that_is_free_is_taken_back(taker: tuple[LiveOutgoing, socket.socket]) -> None:
    world, _ = taker
    run(world.release_token())
    assert run(world.ask_token()) is TokenVerdict.MINE
    assert (world._token.held, world._token.epoch()) == (True, 2)


def test_the_state_that_was_sent_goes_stale(taker: tuple[LiveOutgoing, socket.socket]) -> None:
    world, _ = taker
    run(world.keep_token())
    run(world.release_token())
    with RunToken(world._token._fd) as theirs, pytest.raises(StateError, match="run elsewhere"):
        theirs.take(1)


def test_expect_says_what_came() -> None:
    assert expect(Commit(), Commit) == Commit()
    with pytest.raises(StateError, match="sent Commit where State was expected"):
        expect(Commit(), State)
