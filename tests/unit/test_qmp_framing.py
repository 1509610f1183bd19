"""The stream of JSON values, held against what QEMU 10.0.2 answered to the same bytes."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from vmm.errors import StateError
from vmm.qmp.framing import JsonStream, Limits, StreamState, decode
from vmm.qmp.parser import JsonError

VALUE = "expecting value"


def read(stream: JsonStream, data: bytes) -> list[Any]:
    """What `stream` makes of `data`: values, and errors as ("error", text)."""
    stream.feed(data)
    return [("error", str(item)) if isinstance(item, JsonError) else item for item in stream]


def errors(*texts: str) -> list[Any]:
    return [("error", f"JSON parse error, {text}") for text in texts]


# What QEMU answered: its transcript's case 41, and further probes of the same binary.
QEMU = [
    (b'{"execute": "query-status"}\n', [{"execute": "query-status"}]),
    (b'{"execute": "query-status"\n}\n', [{"execute": "query-status"}]),
    (b"{'execute': 'query-status'}\n", [{"execute": "query-status"}]),
    (b'{"a":1}{"a":2}', [{"a": 1}, {"a": 2}]),
    (b"[1,2\n]\n", [[1, 2]]),
    (b"{}[]", [{}, []]),
    (b'{"execute" "query-status"}\n', errors("missing : in object pair")),
    (b"hello\n", errors("invalid keyword 'hello'")),
    (b"nul\n", errors("invalid keyword 'nul'")),
    (b"nan\n", errors("invalid keyword 'nan'")),
    (b"truex\n", errors("invalid keyword 'truex'")),
    (b'{"execute": "query-status",}\n', errors(VALUE)),
    (b'{"execute":"query-\xff"}\n', errors("stray '\"query-\N{REPLACEMENT CHARACTER}'", VALUE)),
    (b'{"id":"\\ud800"}\n', errors("\\ud800 is not a valid Unicode character")),
    (b'{"id":"\\ud83dx"}\n', errors("\\ud83d is not a valid Unicode character")),
    (b'{"id":"\\ud83d\\u0041"}\n', errors("\\ud83d is not a valid Unicode character")),
    (b'{"id":"\\q"}\n', errors("invalid escape sequence in string")),
    (b'{"id":"\xc3("}\n', errors("invalid UTF-8 sequence in string")),
    (b'{"id":"\xed\xa0\x80"}\n', errors("invalid UTF-8 sequence in string")),
    (b'{"id":"\xf4\x90\x80\x80"}\n', errors("invalid UTF-8 sequence in string")),
    (b'"\\ud83d\\ude00 \\u00e9 \xc3\xa9 \\/\\\'\\"\\\\\\b\\f\\n\\r\\t"', ["😀 é é /'\"\\\b\f\n\r\t"]),
    (b"'\\u0000'", ["\0"]),
    (b'{"id":"a\nb"}\n', errors("stray '\"a\n'", VALUE)),
    (b"\xff\n", errors("stray '\N{REPLACEMENT CHARACTER}'")),
    (b"\xff\xff\xff\n", errors(*["stray '\N{REPLACEMENT CHARACTER}'"] * 3)),
    (b"\x80abc\n", errors("stray '\N{REPLACEMENT CHARACTER}'")),
    (b"\x01\x01{}\n", [*errors("stray '\x01'", "stray '\x01'"), {}]),
    (b"01\n", errors("stray '01'")),
    (b"-\n", errors("stray '-\n'")),
    (b"1.\n", errors("stray '1.\n'")),
    (b"True\n", errors("stray 'T'")),
    (b"+1\n", errors("stray '+'")),
    (b"%d\n", errors("stray '%'")),
    (b"0e1\n", [0, *errors("invalid keyword 'e'"), 1]),
    (b"1e5 -0 -1.5e-3 true false null\n", [1e5, 0, -0.0015, True, False, None]),
    (b"18446744073709551615 18446744073709551616\n", [(1 << 64) - 1, float(1 << 64)]),
    (b"-9223372036854775808 -9223372036854775809\n", [-(1 << 63), -float(1 << 63)]),
    (b'{"a":1,"a":2}\n', errors("duplicate key")),
    (b"}\n", errors(VALUE)),
    (b"]]", errors(VALUE, VALUE)),
    (b":,", errors(VALUE, VALUE)),
    (b"{]}\n", errors(VALUE, VALUE)),
    (b"[}\n", errors(VALUE)),
    (b"[1}2\n", [*errors("expected separator in list"), 2]),
    (b"[1 2]\n", errors("expected separator in list")),
    (b"[1,]\n", errors(VALUE)),
    (b"[,1]\n", errors(VALUE)),
    (b"{1:2}\n", errors("key is not a string in object")),
    (b'{"a":}\n', errors(VALUE)),
    (b'{"a"}\n', errors("missing : in object pair")),
    (b'{"a":1 "b":2}\n', errors("expected separator in dict")),
    (b"{,}\n", errors(VALUE)),
    (b'hello"x"{}\n', [*errors("invalid keyword 'hello'"), "x", {}]),
]


@pytest.mark.parametrize(("sent", "expected"), QEMU, ids=[repr(sent) for sent, _ in QEMU])
def test_bytes_mean_what_they_mean_to_qemu(sent: bytes, expected: list[Any]) -> None:
    assert expected == read(JsonStream(), sent)


@pytest.mark.parametrize(("sent", "expected"), QEMU, ids=[repr(sent) for sent, _ in QEMU])
def test_the_same_one_byte_at_a_time(sent: bytes, expected: list[Any]) -> None:
    stream = JsonStream()
    assert expected == [item for byte in sent for item in read(stream, bytes([byte]))]


@pytest.mark.parametrize(("sent", "expected"), QEMU, ids=[repr(sent) for sent, _ in QEMU])
def test_the_same_handed_over_between_any_two_bytes(sent: bytes, expected: list[Any]) -> None:
    for cut in range(len(sent) + 1):
        before = JsonStream()
        items = read(before, sent[:cut])
        items += read(JsonStream(state=before.export()), sent[cut:])
        assert expected == items, f"cut at {cut}"


def test_a_number_no_double_holds_is_an_error_unlike_in_qemu() -> None:
    assert errors("number 1e400 is out of range") == read(JsonStream(), b"1e400 ")


def test_a_stray_text_is_quoted_in_part() -> None:
    ((_, text),) = read(JsonStream(), b'"' + b"a" * 1000 + b"\n")
    assert len(text) < 120
    assert text.endswith("…'")


def test_iteration_is_lazy() -> None:
    stream = JsonStream()
    stream.feed(b"{} [] {")
    assert next(iter(stream)) == {}
    assert (stream.has_input, stream.in_value) == (True, False)
    assert list(stream) == [[]]
    assert (stream.has_input, stream.in_value) == (False, True)


SMALL = Limits(value_bytes=100, tokens=20, depth=4)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b'"' + b"a" * 100 + b'"', "JSON token size limit exceeded"),
        (b'["' + b"a" * 100 + b'"]', "JSON token size limit exceeded"),
        (b'["' + b"a" * 60 + b'","' + b"b" * 60 + b'"]', "JSON token size limit exceeded"),
        (b"[" + b"1" * 200 + b"]", "JSON token size limit exceeded"),
        (b"[" + b"1," * 20 + b"1]", "JSON token count limit exceeded"),
        (b"[" * 5 + b"]" * 5, "JSON nesting depth limit exceeded"),
        (b"[" * 500 + b"]" * 500, "JSON nesting depth limit exceeded"),
        (b'{"a":' * 5 + b"1" + b"}" * 5, "JSON nesting depth limit exceeded"),
        (b'["' + b"a" * 200 + b'",[{"x":"y]}"}]]', "JSON token size limit exceeded"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_a_value_over_a_limit_is_one_error_and_the_next_is_understood(
    sent: bytes, error: str, chunk: int
) -> None:
    stream = JsonStream(SMALL)
    data = sent + b'{"next": 1}'
    items = [
        item for start in range(0, len(data), chunk) for item in read(stream, data[start : start + chunk])
    ]
    assert [("error", error), {"next": 1}] == items


@pytest.mark.parametrize("fits", [b'"' + b"a" * 98 + b'"', b"[[[[]]]]", b"[{}" + b",1" * 8 + b"]"])
def test_a_value_just_at_a_limit_is_read(fits: bytes) -> None:
    assert read(JsonStream(SMALL), fits) == [decode(fits)]


def test_discarding_ends_with_a_stray_byte_as_any_value_does() -> None:
    items = read(JsonStream(SMALL), b'["' + b"a" * 200 + b'\n{"next": 1}')
    assert items == [("error", "JSON token size limit exceeded"), {"next": 1}]


def test_discarding_survives_a_handover() -> None:
    sent = b'{"a": ["' + b"a" * 200 + b'", {"b": [1]}]}{"next": 1}'
    for cut in range(len(sent)):
        before = JsonStream(SMALL)
        items = read(before, sent[:cut])
        state = before.export()
        assert len(state.undecoded) < 150
        items += read(JsonStream(SMALL, state), sent[cut:])
        assert items == [("error", "JSON token size limit exceeded"), {"next": 1}], f"cut at {cut}"


def test_ten_megabytes_on_a_line_are_one_error_in_bounded_memory() -> None:
    stream = JsonStream()
    items = read(stream, b'{"execute": "')
    for _ in range(10):
        items += read(stream, b"x" * (1 << 20))
        assert len(stream.export().undecoded) <= 1 << 21
    items += read(stream, b'"}{"next": 1}')
    assert items == [("error", "JSON token size limit exceeded"), {"next": 1}]


def test_what_is_thrown_away_is_not_kept() -> None:
    stream = JsonStream()
    tracemalloc.start()
    try:
        for _ in range(50):
            list(read(stream, b"[" * 1000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # fifty thousand tokens would be 4 MB


def test_a_value_sent_byte_by_byte_takes_linear_time() -> None:
    def seconds(size: int) -> float:
        stream = JsonStream()
        begin = time.process_time()
        for byte in b'"' + b"a" * size + b'"':
            list(read(stream, bytes([byte])))
        return time.process_time() - begin

    seconds(1000)
    assert seconds(80_000) < 40 * seconds(
        8_000
    )  # ten times, were it exactly linear; a hundred, were it quadratic


def test_an_exported_state_from_elsewhere_is_checked() -> None:
    with pytest.raises(StateError, match="unknown lexer state 'nowhere'"):
        JsonStream(state=StreamState(lexer="nowhere"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"channel-type":"cpr"', "JSON parse error, premature EOI"),
        (b"", "JSON parse error, premature EOI"),
        (b"{} {}", "JSON parse error, expecting end of input"),
        (b"{]", "JSON parse error, expecting value"),
    ],
)
def test_decode_wants_exactly_one_value(text: bytes, error: str) -> None:
    with pytest.raises(JsonError, match=error):
        decode(text)


def test_decode_needs_no_newline() -> None:
    assert decode(b"12") == 12
    assert decode(b'{"a": [null]}') == {"a": [None]}
