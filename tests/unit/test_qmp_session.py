"""One client's conversation: QEMU's answers where QEMU has one, and what reaches the VMM behind it."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any

import msgspec
import pytest

import vmm
from tests.unit.qmp_backend import RecordingBackend
from vmm.errors import StateError
from vmm.qmp.backend import Backend, QmpError
from vmm.qmp.commands import COMMANDS
from vmm.qmp.schema import MigrationMode, UnixSocket
from vmm.qmp.session import Session, SessionState

NEGOTIATED = SessionState(negotiated=True)


def say(session: Session, request: bytes | dict[str, Any]) -> Any:
    """The one reply to one request."""
    session.feed(request if isinstance(request, bytes) else json.dumps(request).encode())
    reply = session.next_reply()
    assert reply is not None
    assert reply.endswith(b"\r\n")
    assert session.next_reply() is None
    return json.loads(reply)


def error(desc: str, klass: str = "GenericError", **ident: Any) -> dict[str, Any]:
    return {**ident, "error": {"class": klass, "desc": desc}}


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture
def session(backend: RecordingBackend) -> Session:
    checked: Backend = backend
    return Session(checked, state=NEGOTIATED)


def test_greeting(session: Session) -> None:
    major, minor, micro = (int(part) for part in vmm.__version__.split("."))
    assert json.loads(session.greeting()) == {
        "QMP": {
            "version": {
                "qemu": {"major": major, "minor": minor, "micro": micro},
                "package": f"vmm-cpr {vmm.__version__}",
            },
            "capabilities": ["oob"],
        }
    }


def test_negotiation_as_in_transcript_40(backend: RecordingBackend) -> None:
    session = Session(backend)
    expecting = error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
    assert say(session, {"execute": "query-status"}) == expecting
    assert say(session, {"execute": "bogus"}) == expecting
    assert say(session, {"exec-oob": "query-status"}) == error("QMP input member 'exec-oob' is unexpected")
    assert say(session, {"execute": "qmp_capabilities", "arguments": {"enable": ["bogus"]}}) == error(
        "Parameter 'null' does not accept value 'bogus'"
    )
    assert say(session, {"execute": "qmp_capabilities", "arguments": {"enable": [5]}}) == error(
        "Invalid parameter type for 'enable[0]', expected: string"
    )
    assert session.negotiated is False
    assert say(session, {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "neg"}) == {
        "return": {},
        "id": "neg",
    }
    assert say(session, {"execute": "qmp_capabilities"}) == error(
        "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
    )
    assert say(session, {"execute": "bogus", "id": 7}) == error(
        "The command bogus has not been found", "CommandNotFound", id=7
    )
    assert say(session, {"execute": "Query-Status"}) == error(
        "The command Query-Status has not been found", "CommandNotFound"
    )
    assert say(session, {"execute": ""}) == error("The command  has not been found", "CommandNotFound")


OBJECT = "QMP input must be a JSON object"
STRING = "QMP input member 'execute' must be a string"
ARGUMENTS = "QMP input member 'arguments' must be an object"
RUNNING = {"return": {"status": "running", "running": True}}


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"1 ", error(OBJECT)),
        (b'"x"', error(OBJECT)),
        (b"[]", error(OBJECT)),
        (b"null ", error(OBJECT)),
        (b"{}", error("QMP input lacks member 'execute'")),
        (b'{"id":5}', error("QMP input lacks member 'execute'", id=5)),
        (b'{"execute":5}', error(STRING)),
        (b'{"execute":null,"id":1}', error(STRING, id=1)),
        (b'{"execute":"query-status","arguments":5}', error(ARGUMENTS)),
        (b'{"execute":"query-status","arguments":[]}', error(ARGUMENTS)),
        (b'{"execute":"query-status","arguments":null}', error(ARGUMENTS)),
        (b'{"execute":"query-status","arguments":{"x":1}}', error("Parameter 'x' is unexpected")),
        (b'{"execute":"query-status","bogus":1}', error("QMP input member 'bogus' is unexpected")),
        (b'{"id":3,"bogus":2}', error("QMP input member 'bogus' is unexpected", id=3)),
        (b'{"execute":"query-status","id":{"a":[1,2.5,null]}}', {**RUNNING, "id": {"a": [1, 2.5, None]}}),
        (b'{"execute":"query-status","id":null}', {**RUNNING, "id": None}),
        (
            b'{"exec-oob":"query-status","id":1}',
            error("QMP input member 'exec-oob' is unexpected", id=1),
        ),
        (
            b'{"exec-oob":"query-status","execute":"query-status","id":1}',
            error("QMP input member 'exec-oob' is unexpected", id=1),
        ),
        (
            b'{"execute":"query-status","control":{"run-oob":true}}',
            error("QMP input member 'control' is unexpected"),
        ),
        (b"hello ", error("JSON parse error, invalid keyword 'hello'")),
        (
            b'{"execute":"query-status","execute":"query-version"}',
            error("JSON parse error, duplicate key"),
        ),
    ],
)
def test_request_shapes_as_in_transcript_42(session: Session, request_: bytes, reply: dict[str, Any]) -> None:
    assert say(session, request_) == reply
    assert say(session, {"execute": "query-status"}) == RUNNING, "the session goes on"


def test_out_of_band_as_in_transcript_44(backend: RecordingBackend) -> None:
    session = Session(backend, state=SessionState(negotiated=True, oob=True))
    assert say(session, {"exec-oob": "query-status", "id": 1}) == error(
        "The command query-status does not support OOB", id=1
    )
    assert say(session, {"exec-oob": "bogus"}) == error(
        "The command bogus has not been found", "CommandNotFound"
    )
    assert say(session, {"exec-oob": "x", "execute": "y"}) == error(
        "QMP input member 'execute' clashes with 'exec-oob'"
    )
    assert say(session, {"exec-oob": 5}) == error("QMP input member 'exec-oob' must be a string")
    assert say(session, {"exec-oob": "migrate_cancel", "id": "c"}) == {"return": {}, "id": "c"}
    assert backend.calls == [("migrate_cancel",)]


@pytest.mark.parametrize(
    ("name", "returned"),
    [
        ("query-status", {"status": "running", "running": True}),
        ("query-name", {"name": "guest"}),
        ("query-kvm", {"enabled": True, "present": True}),
        ("query-migrate", {"status": "completed", "downtime": 2}),
        ("query-migrate-parameters", {"mode": "cpr-transfer", "x-vmm-setup-timeout": 5000}),
        ("query-migrate-capabilities", [{"state": False, "capability": "events"}]),
        ("query-memory-size-summary", {"base-memory": 256 * 4096}),
        ("x-vmm-report", {"mode": "rebuild"}),
        ("x-vmm-guest-clock", {"tsc": 1 << 63}),
        ("x-vmm-fds", [{"name": "ram", "id": 0, "fd": 7}]),
        ("x-vmm-stats", {"exits": 3}),
    ],
)
def test_queries(session: Session, backend: RecordingBackend, name: str, returned: object) -> None:
    assert say(session, {"execute": name}) == {"return": returned}
    assert backend.calls == []


def test_query_cpus_fast_has_qemus_fields(session: Session) -> None:
    first, second = say(session, {"execute": "query-cpus-fast"})["return"]
    assert first == {
        "thread-id": 937,
        "props": {"core-id": 0, "thread-id": 0, "socket-id": 0},
        "qom-path": "/machine/vcpu[0]",
        "cpu-index": 0,
        "target": "x86_64",
    }
    assert (second["cpu-index"], second["thread-id"]) == (1, 938)


def test_a_guest_without_a_name(session: Session, backend: RecordingBackend) -> None:
    backend.guest_name = None
    assert say(session, {"execute": "query-name"}) == {"return": {}}


def test_query_version_is_the_greetings(session: Session) -> None:
    greeted = json.loads(session.greeting())["QMP"]["version"]
    assert say(session, {"execute": "query-version"}) == {"return": greeted}


def test_query_commands_lists_every_command_once(session: Session) -> None:
    names = [each["name"] for each in say(session, {"execute": "query-commands"})["return"]]
    assert len(names) == len(set(names))
    assert set(names) == {"qmp_capabilities", "query-commands"} | {each.name for each in COMMANDS}


def test_every_listed_command_is_found(session: Session) -> None:
    for each in say(session, {"execute": "query-commands"})["return"]:
        reply = say(session, {"execute": each["name"], "arguments": {"no-such": 1}})
        expected = "CommandNotFound" if each["name"] == "qmp_capabilities" else "GenericError"
        assert reply["error"]["class"] == expected, each


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("stop", "stop"),
        ("cont", "cont"),
        ("quit", "quit"),
        ("system_reset", "reset"),
        ("inject-nmi", "inject_nmi"),
        ("migrate_cancel", "migrate_cancel"),
    ],
)
def test_actions(session: Session, backend: RecordingBackend, name: str, call: str) -> None:
    assert say(session, {"execute": name, "id": 1}) == {"return": {}, "id": 1}
    assert backend.calls == [(call,)]


def test_read_memory(session: Session, backend: RecordingBackend) -> None:
    reply = say(session, {"execute": "x-vmm-read-memory", "arguments": {"gpa": 254, "size": 4}})
    assert base64.b64decode(reply["return"]["data"]) == b"\xfe\xff\x00\x01"
    assert backend.calls == [("read_memory", 254, 4)]


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"gpa": 0, "size": 0}, "Parameter 'size' expects an integer in the range of 1 to 1048576"),
        (
            {"gpa": 0, "size": (1 << 20) + 1},
            "Parameter 'size' expects an integer in the range of 1 to 1048576",
        ),
        ({"gpa": -1, "size": 1}, "Parameter 'gpa' expects uint64"),
        ({"gpa": 1.5, "size": 1}, "Parameter 'gpa' expects uint64"),
        ({"gpa": True, "size": 1}, "Parameter 'gpa' expects uint64"),
        ({"gpa": 0}, "Parameter 'size' is missing"),
    ],
)
def test_read_memory_refuses(session: Session, backend: RecordingBackend, arguments: Any, desc: str) -> None:
    assert say(session, {"execute": "x-vmm-read-memory", "arguments": arguments}) == error(desc)
    assert backend.calls == []


def test_set_parameters_passes_on_what_is_given(session: Session, backend: RecordingBackend) -> None:
    for values in ({}, {"mode": "normal"}, {"mode": "cpr-transfer", "x-vmm-prepare-timeout": 250}):
        assert say(session, {"execute": "migrate-set-parameters", "arguments": values}) == {"return": {}}
        assert backend.calls.pop() == ("set_migration_parameters", values)


SETUP, PREPARE, COMMIT = (f"an integer in the range of {least} to 3600000 ms" for least in (100, 10, 500))


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"mode": "cpr-bogus"}, "Parameter 'mode' does not accept value 'cpr-bogus'"),
        ({"mode": "cpr-reboot"}, "Parameter 'mode' does not accept value 'cpr-reboot'"),
        ({"mode": 3}, "Invalid parameter type for 'mode', expected: string"),
        ({"mode": None}, "Invalid parameter type for 'mode', expected: string"),
        ({"nosuch": 1}, "Parameter 'nosuch' is unexpected"),
        ({"mode": "cpr-transfer", "extra": True}, "Parameter 'extra' is unexpected"),
        ({"nosuch": 1, "mode": 3}, "Invalid parameter type for 'mode', expected: string"),
        ({"x-vmm-setup-timeout": 0}, f"Parameter 'x-vmm-setup-timeout' expects {SETUP}"),
        ({"x-vmm-setup-timeout": 99}, f"Parameter 'x-vmm-setup-timeout' expects {SETUP}"),
        ({"x-vmm-commit-timeout": 3_600_001}, f"Parameter 'x-vmm-commit-timeout' expects {COMMIT}"),
        ({"x-vmm-commit-timeout": 499}, f"Parameter 'x-vmm-commit-timeout' expects {COMMIT}"),
        ({"x-vmm-prepare-timeout": "1"}, f"Parameter 'x-vmm-prepare-timeout' expects {PREPARE}"),
        ({"x-vmm-prepare-timeout": 9}, f"Parameter 'x-vmm-prepare-timeout' expects {PREPARE}"),
    ],
)
def test_set_parameters_refuses_as_in_transcript_28(
    session: Session, backend: RecordingBackend, arguments: Any, desc: str
) -> None:
    assert say(session, {"execute": "migrate-set-parameters", "arguments": arguments}) == error(desc)
    assert backend.calls == []


def test_set_capabilities(session: Session, backend: RecordingBackend) -> None:
    arguments = {"capabilities": [{"capability": "events", "state": True}]}
    assert say(session, {"execute": "migrate-set-capabilities", "arguments": arguments}) == {"return": {}}
    assert backend.calls == [("set_migration_capabilities", {"events": True})]


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, "Parameter 'capabilities' is missing"),
        (
            {"capabilities": [{"capability": "x-colo", "state": True}]},
            "Parameter 'capability' does not accept value 'x-colo'",
        ),
        (
            {"capabilities": [{"capability": "events", "state": 1}]},
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        (
            {"capabilities": [{"capability": "events", "state": True, "x": 2}]},
            "Parameter 'capabilities[0].x' is unexpected",
        ),
        ({"capabilities": [{"capability": "events"}]}, "Parameter 'capabilities[0].state' is missing"),
    ],
)
def test_set_capabilities_refuses(
    session: Session, backend: RecordingBackend, arguments: Any, desc: str
) -> None:
    assert say(session, {"execute": "migrate-set-capabilities", "arguments": arguments}) == error(desc)
    assert backend.calls == []


def channel(kind: str, path: str) -> dict[str, Any]:
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}


def test_migrate_passes_the_mode_with_the_channels(session: Session, backend: RecordingBackend) -> None:
    arguments = {"channels": [channel("main", "/run/main"), channel("cpr", "/run/cpr")]}
    assert say(session, {"execute": "migrate", "arguments": arguments}) == {"return": {}}
    assert backend.calls == [
        ("migrate", MigrationMode.CPR_TRANSFER, UnixSocket(path="/run/main"), UnixSocket(path="/run/cpr"))
    ]


def test_migrate_in_mode_normal_is_refused(session: Session, backend: RecordingBackend) -> None:
    backend.mode = "normal"
    arguments = {"channels": [channel("main", "/run/main"), channel("cpr", "/run/cpr")]}
    reply = say(session, {"execute": "migrate", "arguments": arguments})
    assert reply["error"]["desc"].startswith("Migration mode 'normal' is not supported by this VMM")
    assert backend.calls == []


def test_migrate_without_main_is_an_error_and_reaches_nobody(
    session: Session, backend: RecordingBackend
) -> None:
    """QEMU dies of it (transcript 12)."""
    arguments = {"channels": [channel("cpr", "/run/cpr")]}
    assert say(session, {"execute": "migrate", "arguments": arguments}) == error(
        "missing 'main' migration channel"
    )
    assert backend.calls == []


def test_migrate_incoming(session: Session, backend: RecordingBackend) -> None:
    request = {"execute": "migrate-incoming", "arguments": {"uri": "unix:main.sock"}}
    assert say(session, request) == {"return": {}}
    assert backend.calls == [("migrate_incoming", UnixSocket(path="main.sock"))]


def test_a_refusal_keeps_its_class(session: Session, backend: RecordingBackend) -> None:
    backend.raises = QmpError("There's a migration process in progress", "DeviceNotActive")
    assert say(session, {"execute": "cont", "id": 1}) == error(
        "There's a migration process in progress", "DeviceNotActive", id=1
    )


def test_an_error_of_the_vmm_is_answered(session: Session, backend: RecordingBackend) -> None:
    backend.raises = StateError("the token is gone")
    assert say(session, {"execute": "cont"}) == error("the token is gone")


def test_a_bug_behind_a_command_is_answered_and_logged(
    session: Session, backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.raises = ZeroDivisionError("division by zero")
    assert say(session, {"execute": "stop", "id": 1}) == error(
        "internal error, see the log: ZeroDivisionError: division by zero", id=1
    )
    assert [(record.levelno, bool(record.exc_info)) for record in caplog.records] == [(logging.ERROR, True)]
    backend.raises = None
    assert say(session, {"execute": "query-kvm"}) == {"return": {"enabled": True, "present": True}}


def test_what_cannot_be_written_is_a_bug_too(
    session: Session, backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "stats", lambda: {"exits": object()})
    reply = say(session, {"execute": "x-vmm-stats"})
    assert reply["error"]["desc"].startswith("internal error, see the log: TypeError")


def test_an_exported_session_goes_on_elsewhere(backend: RecordingBackend) -> None:
    stream = b"".join(
        json.dumps(each).encode()
        for each in (
            {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}},
            {"exec-oob": "migrate_cancel", "id": 1},
            {"execute": "stop", "id": "straße"},
        )
    )
    expected = [{"return": {}}, {"return": {}, "id": 1}, {"return": {}, "id": "straße"}]
    for cut in range(len(stream) + 1):
        before = Session(backend)
        before.feed(stream[:cut])
        replies = [before.next_reply()]  # and one request may be left undone
        state = msgspec.json.decode(msgspec.json.encode(before.export()), type=SessionState)
        after = Session(backend, state=state)
        after.feed(stream[cut:])
        while after.has_input:
            replies.append(after.next_reply())
        assert [json.loads(reply) for reply in replies if reply is not None] == expected, f"cut at {cut}"
