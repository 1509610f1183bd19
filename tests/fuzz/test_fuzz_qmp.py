"""Whatever bytes come, in whatever pieces: the monitor's stream and session keep their promises."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.qmp_backend import RecordingBackend
from vmm.qmp.backend import QmpError
from vmm.qmp.channels import parse_incoming, select_channels
from vmm.qmp.commands import COMMANDS
from vmm.qmp.framing import JsonStream, Limits
from vmm.qmp.parser import JsonError
from vmm.qmp.schema import MigrateArguments, MigrationChannel, MigrationMode
from vmm.qmp.session import Session, SessionState
from vmm.qmp.visitor import read_arguments

PIECES = [
    *(bytes([each]) for each in b"{}[]:,\"'\\ -.0123eEtfnul\n\t\x00\x01\x7f\x80\xc3\xfe\xff%A"),
    *(
        b'"a"',
        b"'b'",
        b"true",
        b"null",
        b"12",
        b"1.5e-3",
        b'{"a":1}',
        b"\\u0041",
        b"\\ud83d\\ude00",
        b"\\ud800",
    ),
    *(b'{"execute":"query-kvm"}', b'"x' + b"y" * 50, b"[" * 8, b"]" * 8, "é".encode()),
]
stream_bytes = st.one_of(
    st.binary(max_size=200), st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join)
)
cuts = st.lists(st.integers(0, 200), max_size=10).map(sorted)
limits = st.sampled_from(
    [Limits(), Limits(value_bytes=30, tokens=8, depth=3), Limits(value_bytes=1, tokens=1, depth=1)]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def read(stream: JsonStream, data: bytes) -> list[Any]:
    stream.feed(data)
    return [("error", str(item)) if isinstance(item, JsonError) else item for item in stream]


@given(stream_bytes, cuts, limits)
@example(b'"' + b"a" * 31 + b"\n", [10], Limits(value_bytes=30, tokens=8, depth=3))
def test_any_cutting_of_any_bytes_gives_the_same_values(data: bytes, cuts: list[int], limits: Limits) -> None:
    whole = read(JsonStream(limits), data)
    stream = JsonStream(limits)
    assert [item for piece in pieces(data, cuts) for item in read(stream, piece)] == whole


@given(stream_bytes, cuts, limits)
def test_a_stream_handed_over_at_every_cut_gives_the_same_values(
    data: bytes, cuts: list[int], limits: Limits
) -> None:
    whole = read(JsonStream(limits), data)
    stream, items = JsonStream(limits), []
    for piece in pieces(data, cuts):
        stream.feed(piece)
        for item in stream:  # at most one before it is handed over: the rest moves undecoded
            items.append(("error", str(item)) if isinstance(item, JsonError) else item)
            break
        stream = JsonStream(limits, stream.export())
    assert items + read(stream, b"") == whole


@given(stream_bytes, limits)
def test_a_stream_holds_no_more_than_its_limit(data: bytes, limits: Limits) -> None:
    stream = JsonStream(limits)
    for byte in data:
        list(read(stream, bytes([byte])))
        state = stream.export()
        assert len(state.undecoded) <= limits.value_bytes + limits.tokens + 1  # a space after each token


@given(stream_bytes)
def test_after_any_bytes_a_client_can_be_understood_again(data: bytes) -> None:
    """With 0xFF, as qmp-spec.rst has it, and a newline to end what that byte began."""
    assert read(JsonStream(), data + b'\xff\n{"execute": "stop"}')[-1] == {"execute": "stop"}


@given(st.lists(json_values, max_size=5), st.booleans())
def test_json_means_what_it_means_to_every_decoder(values: list[Any], ascii_only: bool) -> None:
    data = b" ".join(json.dumps(value, ensure_ascii=ascii_only).encode() for value in values)
    stream = JsonStream()
    assert read(stream, data + b"\n") == values
    assert [msgspec.json.decode(msgspec.json.encode(value)) for value in values] == values


@given(stream_bytes)
def test_a_session_answers_every_value_with_one_message(data: bytes) -> None:
    session = Session(RecordingBackend(), state=SessionState(negotiated=True))
    session.feed(data)
    replies = []
    while session.has_input:
        reply = session.next_reply()
        if reply is not None:
            replies.append(reply)
    assert len(replies) == len(read(JsonStream(), data))
    for reply in replies:
        assert len({"return", "error"} & msgspec.json.decode(reply).keys()) == 1


@given(
    st.sampled_from([each.name for each in COMMANDS]),
    st.dictionaries(
        st.sampled_from(["gpa", "size", "mode", "uri", "channels", "capabilities", "x-vmm-setup-timeout"])
        | st.text(),
        json_values,
    ),
)
def test_any_arguments_are_taken_or_refused_and_never_a_bug(name: str, arguments: dict[str, Any]) -> None:
    session = Session(RecordingBackend(), state=SessionState(negotiated=True))
    session.feed(msgspec.json.encode({"execute": name, "arguments": arguments}))
    reply = session.next_reply()
    assert reply is not None
    assert b"internal error" not in reply


ADDRESS_KEYS = ["transport", "type", "path", "host", "port", "str", "cid", "args", "filename", "offset"]
TRANSPORTS = ["socket", "exec", "rdma", "file", "unix", "inet", "fd", "vsock"]
ADDRESS_VALUES: list[Any] = [*TRANSPORTS, "", "a\0b", "x" * 200, 5, True, None, []]
addresses = st.dictionaries(st.sampled_from(ADDRESS_KEYS), st.sampled_from(ADDRESS_VALUES))
unix_addresses = st.sampled_from(["a", "/run/b", "", "x" * 107, "x" * 108]).map(
    lambda path: {"transport": "socket", "type": "unix", "path": path}
)
channels = st.lists(
    st.fixed_dictionaries(
        {
            "channel-type": st.sampled_from(["main", "cpr", "main", "cpr", "bogus", 5]),
            "addr": unix_addresses | addresses,
        }
    ),
    max_size=4,
)


@given(
    st.fixed_dictionaries(
        {}, optional={"uri": st.text(max_size=20), "channels": channels, "resume": st.booleans()}
    )
)
def test_channels_accepted_are_two_unix_paths(arguments: dict[str, Any]) -> None:
    try:
        main, cpr = select_channels(MigrationMode.CPR_TRANSFER, read_arguments(MigrateArguments, arguments))
    except QmpError:
        return
    for path in (main.path, cpr.path):
        assert 0 < len(path.encode()) < 108
        assert "\0" not in path
    assert [each["channel-type"] for each in arguments["channels"]] in (["main", "cpr"], ["cpr", "main"])


@given(
    st.text()
    | st.lists(
        st.sampled_from(
            ["cpr", "main", ",", ",,", "=", ".", "addr", "transport", "socket", "{", '"', "unix:"]
        )
    ).map("".join)
)
def test_any_incoming_text_is_a_channel_or_a_refusal(text: str) -> None:
    try:
        channel = parse_incoming(text)
    except QmpError:
        return
    assert channel is None or isinstance(channel, MigrationChannel)
