"""Tokens to a value, with QEMU's own sentences for what is wrong.

Recursive descent over a list of tokens that the framing has bounded in number, size and depth; it must never
be given an unbounded one. A duplicate key is an error, as in QEMU: decoders such as msgspec's take the last
one in silence, and two readers of a request could then disagree about it. So is a surrogate without its
partner, and, beyond QEMU, a number that no IEEE double holds.
"""

from __future__ import annotations

import math
import re
from typing import Any

from vmm.qmp.lexer import Token


class JsonError(Exception):
    """The text is not JSON; the message is QEMU's `desc`."""


_QUOTED_BYTES = 64  # of an offending text that an error repeats; QEMU repeats all of it, here up to 1 MiB

_CONSTANTS = {b"true": True, b"false": False, b"null": None}
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_SURROGATES = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"\\({_SURROGATES}|u[^\\]{{0,4}}|.)", re.DOTALL)
_CODE_UNIT = re.compile(r"u([0-9a-fA-F]{4})")

_INT64_MIN = -(1 << 63)
_UINT64_MAX = (1 << 64) - 1
_UINT64_DIGITS = len(str(_UINT64_MAX))


def quote(text: bytes) -> str:
    """`text` as an error repeats it: cut short, bytes that are not UTF-8 replaced."""
    shown = text[:_QUOTED_BYTES].decode("utf-8", "replace")
    return shown if len(text) <= _QUOTED_BYTES else shown + "…"


def parse(tokens: list[tuple[Token, bytes]]) -> Any:
    """The one value that `tokens` spell. Raises JsonError."""
    return _Parser(tokens).value()


class _Parser:
    def __init__(self, tokens: list[tuple[Token, bytes]]) -> None:
        self._tokens = tokens
        self._next = 0

    def value(self) -> Any:
        token, text = self._pop()
        match token:
            case Token.LBRACE:
                return self._object()
            case Token.LBRACKET:
                return self._array()
            case Token.STRING:
                return _string(text)
            case Token.INTEGER:
                return _integer(text)
            case Token.FLOAT:
                return _float(text)
            case Token.KEYWORD if text in _CONSTANTS:
                return _CONSTANTS[text]
            case Token.KEYWORD:
                raise JsonError(f"JSON parse error, invalid keyword '{quote(text)}'")
            case _:
                raise JsonError("JSON parse error, expecting value")

    def _object(self) -> dict[str, Any]:
        members: dict[str, Any] = {}
        if self._skip(Token.RBRACE):
            return members
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise JsonError("JSON parse error, key is not a string in object")
            if self._pop()[0] is not Token.COLON:
                raise JsonError("JSON parse error, missing : in object pair")
            value = self.value()
            if key in members:
                raise JsonError("JSON parse error, duplicate key")
            members[key] = value
            if self._skip(Token.RBRACE):
                return members
            if not self._skip(Token.COMMA):
                raise JsonError("JSON parse error, expected separator in dict")

    def _array(self) -> list[Any]:
        items: list[Any] = []
        if self._skip(Token.RBRACKET):
            return items
        while True:
            items.append(self.value())
            if self._skip(Token.RBRACKET):
                return items
            if not self._skip(Token.COMMA):
                raise JsonError("JSON parse error, expected separator in list")

    def _pop(self) -> tuple[Token, bytes]:
        if self._next == len(self._tokens):
            raise JsonError("JSON parse error, premature EOI")
        token = self._tokens[self._next]
        self._next += 1
        return token

    def _skip(self, wanted: Token) -> bool:
        token, _ = self._pop()
        if token is wanted:
            return True
        self._next -= 1
        return False


def _string(text: bytes) -> str:
    try:
        inner = text[1:-1].decode()
    except UnicodeDecodeError:
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string") from None
    return _ESCAPE.sub(_unescape, inner) if "\\" in inner else inner


def _unescape(match: re.Match[str]) -> str:
    escape = match[1]
    if not escape.startswith("u"):
        if escape not in _ESCAPES:
            raise JsonError("JSON parse error, invalid escape sequence in string")
        return _ESCAPES[escape]
    if len(escape) == len("uXXXX\\uXXXX"):
        high, low = int(escape[1:5], 16), int(escape[7:], 16)
        return chr(0x10000 + ((high & 0x3FF) << 10 | low & 0x3FF))
    unit = _CODE_UNIT.fullmatch(escape)
    if unit is None or 0xD800 <= int(unit[1], 16) <= 0xDFFF:
        raise JsonError(f"JSON parse error, {match[0]} is not a valid Unicode character")
    return chr(int(unit[1], 16))


def _integer(text: bytes) -> int | float:
    """An int where int64 or uint64 holds it, else a float, as in QEMU."""
    if len(text) <= _UINT64_DIGITS and _INT64_MIN <= (number := int(text)) <= _UINT64_MAX:
        return number
    return _float(text)


def _float(text: bytes) -> float:
    number = float(text)
    if math.isinf(number):
        raise JsonError(f"JSON parse error, number {quote(text)} is out of range")
    return number
