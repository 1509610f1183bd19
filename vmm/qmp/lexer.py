"""The lexer of QMP's JSON: a table-driven machine that can stop after any byte and go on later.

It accepts what QEMU's does (strings in single quotes too), and falls over and gets up again where QEMU's
does: after a stray byte everything is skipped up to a control character, a structural character, 0xFE or
0xFF. Those two bytes are never JSON, so a client that lost its place can send one to be understood again
(qmp-spec.rst, "Forcing the JSON parser into known-good state"). It must never look at a byte twice: a client
may send them one at a time.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class Token(Enum):
    """What a piece of text is. STRAY ends at the byte that fits nowhere, and includes it."""

    LBRACE = "{"
    RBRACE = "}"
    LBRACKET = "["
    RBRACKET = "]"
    COLON = ":"
    COMMA = ","
    STRING = "string"
    INTEGER = "integer"
    FLOAT = "float"
    KEYWORD = "keyword"
    STRAY = "stray"


class State(Enum):
    """Where the lexer stands between two bytes. The values are part of a handed-over connection's state."""

    START = "start"
    DOUBLE = "double-quoted"
    DOUBLE_ESCAPE = "double-quoted-escape"
    SINGLE = "single-quoted"
    SINGLE_ESCAPE = "single-quoted-escape"
    SIGN = "sign"
    ZERO = "zero"
    DIGITS = "digits"
    POINT = "point"
    FRACTION = "fraction"
    E = "e"
    EXPONENT_SIGN = "exponent-sign"
    EXPONENT = "exponent"
    WORD = "word"
    RECOVERY = "recovery"


class _Move(NamedTuple):
    target: State | Token
    consumes: bool = True


_DIGIT = b"0123456789"
_WORD = b"abcdefghijklmnopqrstuvwxyz"
_STRUCTURAL = b"{}[]:,"
_CONTROL = bytes(range(0x20))
_NEVER_UTF8 = b"\xfe\xff"
_UNFIT = _CONTROL + _NEVER_UTF8  # what no string may hold


def _row(default: _Move, *rules: tuple[bytes, State | Token]) -> tuple[dict[int, _Move], _Move]:
    return {byte: _Move(target) for some, target in rules for byte in some}, default


_STRAY = _Move(Token.STRAY)

_TABLE: dict[State, tuple[dict[int, _Move], _Move]] = {
    State.START: _row(
        _STRAY,
        (b" \t\r\n", State.START),
        (b'"', State.DOUBLE),
        (b"'", State.SINGLE),
        (b"-", State.SIGN),
        (b"0", State.ZERO),
        (b"123456789", State.DIGITS),
        (_WORD, State.WORD),
        *((byte.encode(), Token(byte)) for byte in _STRUCTURAL.decode()),
    ),
    State.DOUBLE: _row(
        _Move(State.DOUBLE), (b'"', Token.STRING), (b"\\", State.DOUBLE_ESCAPE), (_UNFIT, Token.STRAY)
    ),
    State.DOUBLE_ESCAPE: _row(_Move(State.DOUBLE), (_UNFIT, Token.STRAY)),
    State.SINGLE: _row(
        _Move(State.SINGLE), (b"'", Token.STRING), (b"\\", State.SINGLE_ESCAPE), (_UNFIT, Token.STRAY)
    ),
    State.SINGLE_ESCAPE: _row(_Move(State.SINGLE), (_UNFIT, Token.STRAY)),
    State.SIGN: _row(_STRAY, (b"0", State.ZERO), (b"123456789", State.DIGITS)),
    State.ZERO: _row(_Move(Token.INTEGER, consumes=False), (b".", State.POINT), (_DIGIT, Token.STRAY)),
    State.DIGITS: _row(
        _Move(Token.INTEGER, consumes=False), (_DIGIT, State.DIGITS), (b".", State.POINT), (b"eE", State.E)
    ),
    State.POINT: _row(_STRAY, (_DIGIT, State.FRACTION)),
    State.FRACTION: _row(_Move(Token.FLOAT, consumes=False), (_DIGIT, State.FRACTION), (b"eE", State.E)),
    State.E: _row(_STRAY, (b"+-", State.EXPONENT_SIGN), (_DIGIT, State.EXPONENT)),
    State.EXPONENT_SIGN: _row(_STRAY, (_DIGIT, State.EXPONENT)),
    State.EXPONENT: _row(_Move(Token.FLOAT, consumes=False), (_DIGIT, State.EXPONENT)),
    State.WORD: _row(_Move(Token.KEYWORD, consumes=False), (_WORD, State.WORD)),
    State.RECOVERY: (
        {byte: _Move(State.START, consumes=False) for byte in _STRUCTURAL + _UNFIT.replace(b"\t", b"")},
        _Move(State.RECOVERY),
    ),
}

# The bytes on which a state stays: taken by the regex engine in one go.
_RUNS: dict[State, re.Pattern[bytes]] = {
    State.START: re.compile(rb"[ \t\r\n]*"),
    State.DOUBLE: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*'),
    State.SINGLE: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*"),
    State.DIGITS: re.compile(rb"[0-9]*"),
    State.FRACTION: re.compile(rb"[0-9]*"),
    State.EXPONENT: re.compile(rb"[0-9]*"),
    State.WORD: re.compile(rb"[a-z]*"),
    State.RECOVERY: re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff{}\[\]:,]*"),
}

_SKIPPING = (State.START, State.RECOVERY)


class Lexer:
    """One stream's lexer. `state` and `text` (the bytes of the token under way) are all it remembers."""

    def __init__(self, state: State = State.START) -> None:
        self.state = state
        self.text = bytearray()

    def scan(self, data: bytes, position: int) -> tuple[Token | None, int]:
        """Go on from `position` to the end of a token or of `data` (then None), and say where that is.

        A finished token's bytes are in `text` until `take` fetches them.
        """
        while position < len(data):
            start = position
            if (run := _RUNS.get(self.state)) is not None and (
                match := run.match(data, position)
            ) is not None:
                position = match.end()
            if position == start:
                rules, default = _TABLE[self.state]
                target, consumes = rules.get(data[position], default)
                position += consumes
            else:
                target = self.state
            if self.state not in _SKIPPING or target is not self.state:
                self.text += data[start:position]
            if isinstance(target, Token):
                self.state = State.RECOVERY if target is Token.STRAY else State.START
                return target, position
            self.state = target
        return None, position

    def take(self) -> bytes:
        """The bytes of the token just finished; the lexer forgets them."""
        text = bytes(self.text)
        self.text.clear()
        return text
