"""Peers on the cpr and the main channel that send anything, fds included: every end is an error of ours, no
fd stays open, and what is taken in can be said again by the monitor.
"""

from __future__ import annotations

import array
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tests.fuzz.reading import Reader, open_fds
from vmm.cpr.channel import CancelSwitch, Channel
from vmm.cpr.live import Choice, IncomingMachine, LiveIncoming, Timeouts, run
from vmm.cpr.protocol import (
    Commit,
    Farewell,
    FdEntry,
    Message,
    Offer,
    Prepared,
    Ready,
    Running,
    State,
    TraceEvent,
    encode,
    expect,
)
from vmm.cpr.report import Report
from vmm.cpr.token import SIZE as TOKEN_SIZE
from vmm.cpr.token import RunToken
from vmm.errors import HandoverError, VmmError
from vmm.fds import FdStore, check_received, sealed_memfd
from vmm.machine.config import MachineConfig, decode
from vmm.machine.config import encode as encode_config
from vmm.qmp.framing import JsonStream, StreamState
from vmm.qmp.server import ConnectionState
from vmm.state import Arena
from vmm.trace import Event, Tracer

ENOUGH = "far enough"
WANTED = (Offer, Ready, State, Prepared, Commit, Running, Farewell)
KINDS: tuple[Callable[[], int], ...] = (
    lambda: sealed_memfd("token", TOKEN_SIZE),
    lambda: os.memfd_create("unsealed", os.MFD_CLOEXEC),
    lambda: os.eventfd(0),
    lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    lambda: socket.socket(socket.AF_UNIX).detach(),
    lambda: os.open("/", os.O_PATH | os.O_CLOEXEC),
    lambda: sealed_memfd("small", 1),
)


def one(data: bytes) -> None:
    """Byte 0: which end; byte 1: how many fds, 2 each; then the stream."""
    reader = Reader(data)
    side = reader.choice((_offer, _channel))
    fds = [reader.choice(KINDS)() for _ in range(reader.number() % 12)]
    before = open_fds()
    try:
        side(reader, fds)
        left = {fd: what for fd, what in open_fds().items() if fd not in before}
        assert not left, left
    finally:
        for fd in fds:
            os.close(fd)


def _send(sock: socket.socket, content: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    if content:
        sock.sendmsg([content[:65536]], rights)
    sock.shutdown(socket.SHUT_WR)


def _channel(reader: Reader, fds: list[int]) -> None:
    """Messages one after another, each expected to be any of them."""
    cancel = CancelSwitch()
    ours, theirs = socket.socketpair()
    wanted = reader.choice(WANTED)
    with theirs:
        channel = Channel(ours, cancel)
        _send(theirs, reader.rest(), fds)
        try:
            while True:
                message, received = channel.receive(1.0)
                for fd in received:
                    os.close(fd)
                _use(expect(message, wanted))
        except HandoverError:
            return
        finally:
            channel.close()
            cancel.close()


def _use(message: Message) -> None:
    """What either side does with a message, up to the monitor's answers about it."""
    report = Report("cpr-transfer")
    if isinstance(message, Ready):
        report.why, report.vm_fd_probe = message.why, message.probe
    elif isinstance(message, Running):
        report.new_pid = message.pid
        report.add(Event(event.name, event.ns, "new", message.pid) for event in message.events)
    elif isinstance(message, Farewell):
        for _, encoded in message.clients:
            _go_on_with(encoded)
    msgspec.json.encode([report.as_dict(), report.as_query_migrate()])
    encode(message)


def _go_on_with(encoded: bytes) -> None:
    """A client that comes, speaks, and moves on."""
    try:
        state = msgspec.json.decode(encoded, type=ConnectionState)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    stream = JsonStream(state=state.stream)
    stream.feed(b'{"execute": "query-status"}]}"')
    list(stream)
    moved = ConnectionState(negotiated=state.negotiated, stream=stream.export(), unsent=state.unsent)
    again = msgspec.json.decode(msgspec.json.encode(moved), type=ConnectionState)
    assert again == moved


def _offer(reader: Reader, fds: list[int]) -> None:
    """The new VMM up to the point where it would make a VM."""
    folder = Path(tempfile.mkdtemp(prefix="vmm-fuzz-"))
    world = LiveIncoming(
        cpr_path=str(folder / "cpr"),
        main_path=str(folder / "main"),
        build=_build,
        timeouts=lambda: Timeouts(1.0, 1.0, 1.0),
        tracer=Tracer("new"),
        on_phase=lambda phase, error: None,
    )
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(folder / "cpr"))
            _send(peer, reader.rest(), fds)
            try:
                run(world.receive_offer())
                run(world.build())
            except VmmError as error:
                run(world.refuse(str(error)))
    finally:
        if world.token is not None:
            world.token.close()
        world.fds.close()
        world.cancel.close()
        shutil.rmtree(folder)


def _build(described: bytes, fds: FdStore, token: RunToken) -> tuple[IncomingMachine, Choice]:
    decode(described, "the old VMM's machine")
    for name, index, fd in fds.items():
        check_received(name, index, fd)
    if fds.find("state") is not None:
        Arena.open(fds)
    raise HandoverError(ENOUGH)


def _offer_of(*names: str, release: str = "0") -> bytes:
    machine = msgspec.Raw(encode_config(MachineConfig(kernel="ticker")))
    return encode(Offer(release, "cpr-transfer", machine, [FdEntry(name, 0) for name in names]), len(names))


def seeds() -> Iterator[bytes]:
    """A good offer, offers that lie about their fds, and the main channel's messages in their order."""
    yield bytes((0, 1, 0)) + _offer_of("token") + b"F"
    yield bytes((0, 2, 0, 0)) + _offer_of("token", "token") + b"F"
    yield bytes((0, 3, 0, 1, 2)) + _offer_of("token", "ram", "vm") + b"F"
    yield bytes((0, 1, 1)) + _offer_of("token") + b"F"
    yield bytes((0, 0)) + _offer_of("token") + b"F"
    words = (
        State(1, True),
        Prepared(),
        Commit(),
        Running(1, [TraceEvent("a", 1)]),
        Ready("rebuild", "", True, "EIO"),
        Farewell([(0, msgspec.json.encode(ConnectionState(stream=StreamState(b'{"exec', braces=1))))]),
    )
    for word in words:
        yield bytes((1, 0, WANTED.index(type(word)))) + encode(word) * 2
    for huge in (
        Running(1 << 62, [TraceEvent("a", 1)]),
        Running(1, [TraceEvent("a", 1 << 62)]),
        Running(1, [TraceEvent("pause", 2), TraceEvent("resumed", 1)]),
    ):
        yield bytes((1, 0, WANTED.index(Running))) + encode(huge)
    yield bytes((1, 2, 2, 2, 3)) + encode(Prepared(), 2) + b"F" + encode(Prepared())
