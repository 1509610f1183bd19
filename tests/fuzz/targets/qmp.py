"""A QMP client that sends anything, in any pieces: every request gets one well-formed answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.fuzz.reading import Reader
from tests.unit.qmp_backend import RecordingBackend
from vmm.qmp.framing import Limits
from vmm.qmp.session import Session

SMALL = Limits(value_bytes=256, tokens=64, depth=6)
DIALOGUE = b"""{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
{"execute": "query-status", "id": 1}{"exec-oob": "migrate_cancel"}
{"execute": "migrate-set-parameters", "arguments": {"mode": "cpr-transfer", "x-vmm-setup-timeout": 500}}
{"execute": "migrate", "arguments": {"channels": [
  {"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": "/m"}},
  {"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "/c"}}]}}
{"execute": "x-vmm-read-memory", "arguments": {"gpa": 4096, "size": 16}}
{'execute': 'migrate-set-capabilities',
 'arguments': {'capabilities': [{'capability': 'events', 'state': true}]}}
"""


def one(data: bytes) -> None:
    """Byte 0: size of the pieces; byte 1: small limits or the usual ones, negotiated already or not."""
    reader = Reader(data)
    piece = reader.number() + 1
    how = reader.number()
    session = Session(RecordingBackend(), limits=SMALL if how & 1 else Limits())
    if how & 2:
        _answers(session, b'{"execute":"qmp_capabilities"}')
    while chunk := reader.bytes(piece):
        _answers(session, chunk)
    again = Session(RecordingBackend(), limits=SMALL if how & 1 else Limits(), state=session.export())
    _answers(again, b"\xff" if how & 4 else b" ")


def _answers(session: Session, data: bytes) -> None:
    session.feed(data)
    while (reply := session.next_reply()) is not None:
        assert reply.endswith(b"\r\n")
        answer = json.loads(reply)
        assert answer.keys() - {"id"} in ({"return"}, {"error"})
        if "error" in answer:
            assert answer["error"].keys() == {"class", "desc"}
            assert not answer["error"]["desc"].startswith("internal error"), answer
    assert not session.has_input


def seeds() -> Iterator[bytes]:
    """A client's usual words, whole and in small pieces."""
    yield b"\xff\x00" + DIALOGUE
    yield b"\x06\x03" + DIALOGUE
    yield b'\x00\x02[[[[{"a":"\\u00e9\xc3\xa9"}]]]] 1.5e-3 null \xff'
