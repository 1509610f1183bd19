"""The monitor on real sockets: clients of every kind, and connections that move from server to server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu.qmp import ExecuteError
from qemu.qmp import QMPClient as QemuClient

import vmm
from tests.unit.qmp_backend import RecordingBackend, ServerThread
from vmm import sockets
from vmm.errors import PeerError, StateError
from vmm.qmp import server as server_module
from vmm.qmp.framing import StreamState
from vmm.qmp.schema import MigrationMode, UnixSocket
from vmm.qmp.server import ConnectionState, QmpServer
from vmm.sockets import listen

TIMEOUT_S = 10.0
READ_MEMORY = {"execute": "x-vmm-read-memory", "arguments": {"gpa": 0, "size": 1 << 20}}


class Raw:
    """A client that sends what it is told to and gives back messages as they come."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(TIMEOUT_S)
        self._file = sock.makefile("rb")

    @classmethod
    def connect(cls, path: str) -> Raw:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return cls(sock)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.sock.close()

    def send(self, *requests: bytes | dict[str, Any]) -> None:
        self.sock.sendall(
            b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() for each in requests)
        )

    def receive(self) -> Any:
        """The next message; None at the end."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def ask(self, request: bytes | dict[str, Any]) -> Any:
        self.send(request)
        return self.receive()

    def negotiate(self) -> None:
        assert "QMP" in self.receive()
        assert self.ask({"execute": "qmp_capabilities"}) == {"return": {}}


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture
def path(tmp_socket_dir: Path) -> str:
    return str(tmp_socket_dir / "qmp.sock")


@pytest.fixture
def monitor(backend: RecordingBackend, path: str) -> Iterator[ServerThread]:
    with ServerThread(backend, path) as monitor:
        yield monitor


@pytest.fixture
def raw(monitor: ServerThread, path: str) -> Iterator[Raw]:
    with Raw.connect(path) as raw:
        raw.negotiate()
        yield raw


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


# -- QEMU's own client ---------------------------------------------------------------------------------------


def test_qemus_client_drives_it(monitor: ServerThread, backend: RecordingBackend, path: str) -> None:
    async def drive() -> None:
        client = QemuClient("test")
        with client.listener("STOP") as stops:
            await client.connect(path)
            assert client.greeting is not None
            assert client.greeting._raw["QMP"]["version"]["package"] == f"vmm-cpr {vmm.__version__}"
            assert await client.execute("query-status") == {"status": "running", "running": True}
            await client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
            address = {"transport": "socket", "type": "unix"}
            await client.execute(
                "migrate",
                {
                    "channels": [
                        {"channel-type": "main", "addr": {**address, "path": "main.sock"}},
                        {"channel-type": "cpr", "addr": {**address, "path": "cpr.sock"}},
                    ]
                },
            )
            with pytest.raises(ExecuteError, match="The command bogus has not been found") as refusal:
                await client.execute("bogus")
            assert refusal.value.error_class == "CommandNotFound"
            await client.execute("stop")
            event = await asyncio.wait_for(stops.get(), TIMEOUT_S)
            assert event["event"] == "STOP"
            assert await client.execute("query-status") == {"status": "paused", "running": False}
        await client.disconnect()

    asyncio.run(drive())
    assert backend.calls == [
        ("set_migration_parameters", {"mode": "cpr-transfer"}),
        ("migrate", MigrationMode.CPR_TRANSFER, UnixSocket(path="main.sock"), UnixSocket(path="cpr.sock")),
        ("stop",),
    ]
    wait_until(lambda: monitor.call(lambda: monitor.server.connections) == ())


# -- the socket file -----------------------------------------------------------------------------------------


def test_a_dead_listeners_file_is_replaced(backend: RecordingBackend, path: str) -> None:
    listen(path, "QMP socket").close()
    assert os.path.exists(path)
    with ServerThread(backend, path), Raw.connect(path) as raw:
        raw.negotiate()
    assert not os.path.exists(path)


# -- who may connect -----------------------------------------------------------------------------------------


def test_another_user_is_refused(
    monitor: ServerThread, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sockets, "peer", lambda _: (4711, os.geteuid() + 1))
    with Raw.connect(path) as raw:
        assert raw.receive() is None
    assert f"process 4711, is uid {os.geteuid() + 1}" in caplog.text


def test_root_may_connect(monitor: ServerThread, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "peer", lambda _: (4711, 0))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with Raw.connect(path) as raw:
        raw.negotiate()


def test_a_socket_without_credentials_is_refused(backend: RecordingBackend) -> None:
    with (
        ServerThread(backend) as monitor,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        accepted, _ = listener.accept()
        with accepted, pytest.raises(PeerError, match="and root may connect"):
            monitor.call(lambda: monitor.server.serve_connection(accepted))


def test_there_is_a_last_client(
    monitor: ServerThread, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 2)
    with Raw.connect(path) as first, Raw.connect(path) as second:
        first.negotiate()
        second.negotiate()
        with Raw.connect(path) as third:
            assert third.receive() is None
        assert "2 clients are connected already" in caplog.text
        assert first.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}


def test_who_says_nothing_makes_room(
    monitor: ServerThread, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The oldest first; not one who has negotiated."""
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 3)
    with Raw.connect(path) as busy, Raw.connect(path) as silent, Raw.connect(path) as late:
        busy.negotiate()
        assert "QMP" in silent.receive()
        assert "QMP" in late.receive()
        with Raw.connect(path) as operator:
            operator.negotiate()
            assert silent.receive() is None
            assert "no room for another client" in caplog.text
            late.ask({"execute": "qmp_capabilities"})
            assert busy.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}
            assert late.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}


def test_out_of_fds_the_listener_rests(
    monitor: ServerThread, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "ACCEPT_PAUSE_S", 0.05)
    held = []
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(TIMEOUT_S)
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                break
        try:
            late.connect(path)
            wait_until(lambda: "cannot accept a client now: Too many open files" in caplog.text)
        finally:
            for fd in held:
                os.close(fd)
        assert b"QMP" in late.recv(4096)
    assert caplog.text.count("cannot accept") < 20


# -- conversations -------------------------------------------------------------------------------------------


def test_requests_without_newlines_one_after_the_other(raw: Raw) -> None:
    raw.send(b'{"execute":"query-name","id":1}{"execute":"query-name","id":2}')
    assert [raw.receive()["id"], raw.receive()["id"]] == [1, 2]


def test_a_client_that_only_asks_and_hangs_up_gets_its_answers(monitor: ServerThread, path: str) -> None:
    with Raw.connect(path) as raw:
        raw.send({"execute": "qmp_capabilities"}, *({"execute": "query-kvm", "id": n} for n in range(100)))
        raw.sock.shutdown(socket.SHUT_WR)
        messages = [raw.receive() for _ in range(103)]
    assert "QMP" in messages[0]
    assert [message["id"] for message in messages[2:102]] == list(range(100))
    assert messages[102] is None


def test_who_has_hung_up_still_gets_the_largest_answer(monitor: ServerThread, raw: Raw) -> None:
    raw.send(READ_MEMORY)
    raw.sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: monitor.call(lambda: monitor.server.connections[0].unsent_bytes) > 0)
    time.sleep(0.05)  # in which the end of its input is seen
    assert len(raw.receive()["return"]["data"]) > 1 << 20
    assert raw.receive() is None


def test_garbage_costs_one_error_each_and_the_connection_stays(raw: Raw) -> None:
    raw.send(b"hello\n\xff\n" + b"[" * 100 + b"]" * 100 + b'{"execute": 5}')
    assert [raw.receive()["error"]["desc"] for _ in range(4)] == [
        "JSON parse error, invalid keyword 'hello'",
        "JSON parse error, stray '\N{REPLACEMENT CHARACTER}'",
        "JSON nesting depth limit exceeded",
        "QMP input member 'execute' must be a string",
    ]
    assert raw.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}


def test_ten_megabytes_on_a_line_are_one_error(raw: Raw) -> None:
    raw.send(b'{"execute": "' + b"x" * 10_000_000 + b'"}\n', {"execute": "query-name"})
    assert raw.receive()["error"]["desc"] == "JSON token size limit exceeded"
    assert raw.receive() == {"return": {"name": "guest"}}


def test_clients_are_served_side_by_side(raw: Raw, path: str) -> None:
    with Raw.connect(path) as second:
        second.negotiate()
        raw.send(b'{"execute": "query-')  # stays unfinished
        assert second.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}
        raw.send(b'name"}')
        assert raw.receive() == {"return": {"name": "guest"}}


def test_a_clients_end_leaves_the_others(monitor: ServerThread, raw: Raw, path: str) -> None:
    with Raw.connect(path) as second:
        second.negotiate()
        second.send(b'{"execute"')
    wait_until(lambda: len(monitor.call(lambda: monitor.server.connections)) == 1)
    assert raw.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}


# -- events --------------------------------------------------------------------------------------------------


def test_an_event_precedes_the_reply_of_its_command_and_reaches_all_who_negotiated(
    monitor: ServerThread, raw: Raw, path: str
) -> None:
    with Raw.connect(path) as second, Raw.connect(path) as silent:
        second.negotiate()
        assert "QMP" in silent.receive()
        before = time.time()
        raw.send({"execute": "stop", "id": 1})
        event, reply = raw.receive(), raw.receive()
        assert reply == {"return": {}, "id": 1}
        assert second.receive() == event
        assert (event.pop("event"), event.keys()) == ("STOP", {"timestamp"})
        at = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        assert before - 0.001 <= at <= time.time() + 0.001
        monitor.server.emit("MIGRATION", {"status": "setup"}, at=12.5)
        for client in (raw, second):
            assert client.receive() == {
                "timestamp": {"seconds": 12, "microseconds": 500_000},
                "event": "MIGRATION",
                "data": {"status": "setup"},
            }
        silent.send({"execute": "qmp_capabilities"})
        assert silent.receive() == {"return": {}}, "and not an event"


def test_events_of_another_thread_keep_their_order_and_precede_a_later_reply(
    monitor: ServerThread, backend: RecordingBackend, raw: Raw
) -> None:
    def stop() -> None:  # as vCPU threads do: the event comes from another thread, the command waits for that
        def run() -> None:
            for number in range(50):
                backend.emit("TICK", {"number": number})

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    backend.stop = stop  # type: ignore[method-assign]
    raw.send({"execute": "stop", "id": 1})
    assert [raw.receive()["data"]["number"] for _ in range(50)] == list(range(50))
    assert raw.receive() == {"return": {}, "id": 1}


def test_an_event_storm_loses_events_not_memory(
    monitor: ServerThread, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    def storm() -> None:
        def emit() -> None:
            for _ in range(5000):
                monitor.server.emit("RESET")

        thread = threading.Thread(target=emit)
        thread.start()
        thread.join()  # the loop does not turn meanwhile

    monitor.call(storm)
    received = [raw.receive() for _ in range(server_module.QUEUED_EVENTS_MAX)]
    assert {message["event"] for message in received} == {"RESET"}
    assert "3976 events lost" in caplog.text
    assert raw.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}


# -- clients that do not read --------------------------------------------------------------------------------


def test_who_takes_no_events_is_dropped_and_others_are_not(
    monitor: ServerThread, raw: Raw, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[Any] = []

    def read() -> None:
        while len(received) < 600:
            received.append(raw.receive())

    reader = threading.Thread(target=read)
    reader.start()
    with Raw.connect(path) as slow:
        slow.negotiate()
        for number in range(600):  # 600 × 10 KiB: more than socket buffer and limit
            begin = time.monotonic()
            monitor.call(lambda n=number: monitor.server.emit("BIG", {"n": n, "fill": "x" * 10_000}))  # type: ignore[misc]
            assert time.monotonic() - begin < 5, "a slow reader must not hold up the loop"
            sizes = [each.unsent_bytes for each in monitor.call(lambda: monitor.server.connections)]
            assert max(sizes) <= server_module.UNSENT_BYTES_MAX
        reader.join(TIMEOUT_S)
        assert len(received) == 600
        assert "bytes unread" in caplog.text
        assert len(monitor.call(lambda: monitor.server.connections)) == 1
    assert raw.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}


def test_a_flood_of_requests_is_held_back_in_the_socket(monitor: ServerThread, raw: Raw, path: str) -> None:
    request = json.dumps({"execute": "query-commands", "id": "x" * 1000}).encode()
    count, sent, stalls = 20_000, 0, 0
    flood = memoryview(request * count)
    raw.sock.setblocking(False)
    while stalls < 20:  # for 0.2 s nothing more is taken
        try:
            sent += raw.sock.send(flood[sent : sent + 100_000])
            stalls = 0
        except BlockingIOError:
            stalls += 1
            time.sleep(0.01)
    assert sent < len(flood) / 4
    (connection,) = monitor.call(lambda: monitor.server.connections)
    assert connection.unsent_bytes < server_module.HIGH_WATER_BYTES + 10_000
    with Raw.connect(path) as second:  # nobody else notices
        second.negotiate()
        assert second.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}
    raw.sock.settimeout(TIMEOUT_S)
    for _ in range(sent // len(request)):  # and once it reads, all is answered
        assert raw.receive()["id"] == "x" * 1000


def test_large_answers_wait_for_each_other_and_not_in_memory_or_in_a_busy_loop(
    monitor: ServerThread, raw: Raw
) -> None:
    raw.send(*[READ_MEMORY] * 20)
    wait_until(lambda: monitor.call(lambda: monitor.server.connections[0].unsent_bytes) > 0)
    begin = monitor.call(time.thread_time)
    time.sleep(0.2)
    assert monitor.call(time.thread_time) - begin < 0.02
    assert monitor.call(lambda: monitor.server.connections[0].unsent_bytes) < 1_500_000
    for _ in range(20):
        assert len(raw.receive()["return"]["data"]) > 1 << 20


def test_who_floods_takes_turns(monitor: ServerThread, raw: Raw, path: str) -> None:
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            raw.send(b'{"execute":"query-kvm"}' * 200)
            for _ in range(200):
                raw.receive()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with Raw.connect(path) as second:
            second.negotiate()
            for number in range(20):
                assert second.ask({"execute": "query-name", "id": number})["id"] == number
    finally:
        stop.set()
        thread.join(TIMEOUT_S)


def test_who_leaves_in_the_middle_of_its_answers_is_forgotten(monitor: ServerThread, path: str) -> None:
    with Raw.connect(path) as raw:
        raw.negotiate()
        raw.send(*({"execute": "query-commands"} for _ in range(2000)))
        wait_until(lambda: monitor.call(lambda: monitor.server.connections[0].unsent_bytes) > 0)
    wait_until(lambda: monitor.call(lambda: monitor.server.connections) == ())


def test_who_leaves_without_reading_is_forgotten_and_no_fault(
    monitor: ServerThread, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), Raw.connect(path) as raw:
        raw.negotiate()
        monitor.call(lambda: monitor.server.emit("UNREAD"))
        raw.__exit__()
        wait_until(lambda: monitor.call(lambda: monitor.server.connections) == ())
    assert [(each.levelno, each.message.endswith("Connection reset by peer")) for each in caplog.records] == [
        (logging.INFO, True)
    ]


def test_who_only_looks_whether_one_listens_is_no_news(
    monitor: ServerThread, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        Raw.connect(path).__exit__()
        wait_until(lambda: "went away" in caplog.text)
    assert [each.levelno for each in caplog.records if "went away" in each.message] == [logging.DEBUG]


# -- from one server to another ------------------------------------------------------------------------------


def move(source: ServerThread, target: ServerThread) -> None:
    """Hand every connection of `source` over to `target`, the state through its bytes."""

    def export() -> list[tuple[socket.socket, bytes]]:
        exported = [source.server.export_connection(each) for each in source.server.connections]
        return [(sock, msgspec.msgpack.encode(state)) for sock, state in exported]

    for sock, encoded in source.call(export):
        state = msgspec.msgpack.decode(encoded, type=ConnectionState)
        target.call(lambda s=sock, t=state: target.server.serve_connection(s, t))  # type: ignore[misc]


def test_a_connection_moves_and_its_client_does_not_notice(path: str) -> None:
    old, new = RecordingBackend(), RecordingBackend()
    with ServerThread(old, path) as first, ServerThread(new) as second, Raw.connect(path) as raw:
        raw.negotiate()
        raw.send({"execute": "stop", "id": 1}, b'{"execute":"co')
        assert raw.receive()["event"] == "STOP"
        assert raw.receive() == {"return": {}, "id": 1}
        move(first, second)
        assert first.call(lambda: first.server.connections) == ()
        first.server.emit("NOT_FOR_IT")
        raw.send(b'nt","id":2}')
        assert raw.receive()["event"] == "RESUME"
        assert raw.receive() == {"return": {}, "id": 2}
        move(second, first)  # and back, as after a handover that failed
        assert raw.ask({"execute": "query-status"})["return"]["status"] == "paused"
    assert (old.calls, new.calls) == ([("stop",)], [("cont",)])


def test_what_a_client_has_not_taken_moves_with_it(path: str) -> None:
    count = 3000
    with (
        ServerThread(RecordingBackend(), path) as first,
        ServerThread(RecordingBackend()) as second,
        Raw.connect(path) as raw,
    ):
        raw.negotiate()
        sender = threading.Thread(
            target=raw.send, args=[{"execute": "query-commands", "id": n} for n in range(count)]
        )
        sender.start()
        wait_until(lambda: first.call(lambda: first.server.connections[0].unsent_bytes) > 0)
        move(first, second)
        assert [raw.receive()["id"] for _ in range(count)] == list(range(count))
        sender.join(TIMEOUT_S)


def test_requests_received_and_not_carried_out_move_too(path: str) -> None:
    old, new = RecordingBackend(), RecordingBackend()
    with ServerThread(old, path) as first, ServerThread(new) as second, Raw.connect(path) as raw:

        def export() -> None:
            exported.append(first.server.export_connection(first.server.connections[0]))

        def stop() -> None:  # the first of the turn: the export comes between this turn and the next
            asyncio.get_running_loop().call_soon(export)

        exported: list[tuple[socket.socket, ConnectionState]] = []
        old.stop = stop  # type: ignore[method-assign]
        raw.negotiate()
        raw.send({"execute": "stop"}, *({"execute": "inject-nmi"} for _ in range(99)))
        wait_until(lambda: exported)
        second.call(lambda: second.server.serve_connection(*exported[0]))
        assert [raw.receive() for _ in range(100)] == [{"return": {}}] * 100
    done_by_old = server_module.COMMANDS_PER_TURN - 1
    assert (len(old.calls), len(new.calls)) == (done_by_old, 99 - done_by_old)


def test_a_connection_moved_before_it_negotiated_is_not_greeted_twice(path: str) -> None:
    with (
        ServerThread(RecordingBackend(), path) as first,
        ServerThread(RecordingBackend()) as second,
        Raw.connect(path) as raw,
    ):
        assert "QMP" in raw.receive()
        move(first, second)
        second.server.emit("NOT_YET")
        assert raw.ask({"execute": "query-name"})["error"]["class"] == "CommandNotFound"
        assert raw.ask({"execute": "qmp_capabilities"}) == {"return": {}}


def test_a_listener_moves_with_its_file(path: str) -> None:
    with ServerThread(RecordingBackend()) as second:
        with ServerThread(RecordingBackend(), path) as first:
            (listener,) = first.call(first.server.release_listeners)
            with Raw.connect(path) as raw:  # nobody accepts at the moment: it waits in the backlog
                second.call(lambda: second.server.listen(listener))
                raw.negotiate()
        assert os.path.exists(path), "the first server's end leaves it alone"
    assert not os.path.exists(path)


def test_a_command_cannot_export_its_own_connection(
    monitor: ServerThread, backend: RecordingBackend, raw: Raw
) -> None:
    def stop() -> None:
        monitor.server.export_connection(monitor.server.connections[0])

    backend.stop = stop  # type: ignore[method-assign]
    assert "cannot be exported" in raw.ask({"execute": "stop"})["error"]["desc"]
    assert raw.ask({"execute": "query-name"}) == {"return": {"name": "guest"}}


@pytest.mark.parametrize(
    "state",
    [
        ConnectionState(unsent=b"x" * (server_module.UNSENT_BYTES_MAX + 1)),
        ConnectionState(stream=StreamState(undecoded=b"x" * (server_module.UNDECODED_BYTES_MAX + 1))),
        ConnectionState(stream=StreamState(lexer="nowhere")),
        ConnectionState(stream=StreamState(braces=10**400)),
        ConnectionState(stream=StreamState(brackets=-1)),
    ],
    ids=["unsent", "undecoded", "lexer", "braces", "brackets"],
)
def test_a_state_no_vmm_exports_is_refused(state: ConnectionState) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ServerThread(RecordingBackend()) as monitor:
        with pytest.raises(StateError):
            monitor.call(lambda: monitor.server.serve_connection(ours, state))
        assert monitor.call(lambda: monitor.server.connections) == ()


# -- the end -------------------------------------------------------------------------------------------------


def test_closing_sends_what_is_due_and_removes_the_file(path: str) -> None:
    with ServerThread(RecordingBackend(), path) as monitor:
        raw = Raw.connect(path)
        raw.negotiate()
        raw.send({"execute": "quit"})
        monitor.server.emit("LAST_WORDS")
        first, second, third = raw.receive(), raw.receive(), raw.receive()
    with raw:
        assert {first.get("event"), second.get("event"), third.get("event")} == {
            "SHUTDOWN",
            "LAST_WORDS",
            None,
        }
        assert raw.receive() is None
    assert not os.path.exists(path)


def test_an_event_emitted_just_before_the_end_is_sent() -> None:
    ours, theirs = socket.socketpair()
    loop = asyncio.new_event_loop()
    with Raw(theirs) as raw:
        server = QmpServer(loop, RecordingBackend())
        server.serve_connection(ours, ConnectionState(negotiated=True))
        server.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})  # the loop never turns
        server.close()
        assert raw.receive()["event"] == "SHUTDOWN"
        assert raw.receive() is None
    loop.close()


def test_nothing_is_logged_as_wrong_when_all_is_right(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), ServerThread(RecordingBackend(), path):
        for _ in range(3):
            with Raw.connect(path) as raw:
                raw.negotiate()
                raw.ask({"execute": "query-kvm"})
    assert caplog.records == []
