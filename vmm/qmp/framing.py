"""A byte stream cut into JSON values: no newlines needed, any chunking, everything bounded.

A value ends where its brackets balance, or, outside brackets, with its token, as in QEMU. A value over a
limit costs one error, is thrown away up to its own end, and the next one is understood. A stream must never
hold more than `Limits.value_bytes` plus what was fed at once, and never look at a byte twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vmm.errors import StateError
from vmm.qmp.lexer import Lexer, State, Token
from vmm.qmp.parser import JsonError, parse, quote

DEEPEST = 1 << 63  # a depth that no client reaches, and that can still be written as JSON


class Limits(NamedTuple):
    """How big one value may be; QEMU allows 64 MiB, 2 Mi tokens, depth 1024."""

    value_bytes: int = 1 << 20
    tokens: int = 1 << 14
    depth: int = 64


class StreamState(NamedTuple):
    """Where a stream stands, for another process to go on: bytes to be read again, after setting the rest."""

    undecoded: bytes = b""
    lexer: str = State.START.value
    discarding: bool = False
    braces: int = 0
    brackets: int = 0


_DEPTH_CHANGE = {
    Token.LBRACE: (1, 0),
    Token.RBRACE: (-1, 0),
    Token.LBRACKET: (0, 1),
    Token.RBRACKET: (0, -1),
}


_INCOMPLETE = object()
_TOO_LONG = "JSON token size limit exceeded"


class JsonStream:
    """Feed it bytes, iterate over it for what they hold: values, and a JsonError (not raised) for a mistake.

    Iteration is lazy, may be left at any point, and ends where more input is needed: feed, iterate again.
    """

    def __init__(self, limits: Limits = Limits(), state: StreamState = StreamState()) -> None:  # noqa: B008 — immutable
        self._limits = limits
        try:
            self._lexer = Lexer(State(state.lexer))
        except ValueError:
            raise StateError(f"JSON stream: unknown lexer state {state.lexer!r}") from None
        if not (0 <= state.braces < DEEPEST and 0 <= state.brackets < DEEPEST):
            raise StateError(f"JSON stream: no stream is {state.braces} and {state.brackets} brackets deep")
        self._discarding = state.discarding
        self._braces = state.braces
        self._brackets = state.brackets
        self._tokens: list[tuple[Token, bytes]] = []
        self._size = 0
        self._input = state.undecoded
        self._position = 0

    @property
    def has_input(self) -> bool:
        """Whether bytes wait that iteration has not looked at yet."""
        return self._position < len(self._input)

    def feed(self, data: bytes) -> None:
        """Append `data` to the input."""
        self._input = self._input[self._position :] + data if self.has_input else data
        self._position = 0

    @property
    def in_value(self) -> bool:
        """Whether a value has begun and not ended."""
        return self._discarding or bool(self._tokens) or bool(self._lexer.text)

    def __iter__(self) -> Iterator[Any]:
        while self.has_input:
            token, self._position = self._lexer.scan(self._input, self._position)
            try:
                value = self._partial() if token is None else self._accept(token, self._lexer.take())
            except JsonError as error:
                yield error
            else:
                if value is not _INCOMPLETE:
                    yield value

    def export(self) -> StreamState:
        """The state from which a new stream, fed the same bytes from here on, gives the same values."""
        rest = self._input[self._position :]
        if self._discarding or self._lexer.state is State.RECOVERY:
            return StreamState(rest, self._lexer.state.value, self._discarding, self._braces, self._brackets)
        texts = [text for _, text in self._tokens]
        return StreamState(b" ".join([*texts, bytes(self._lexer.text)]) + rest)

    def _partial(self) -> object:
        """The input ended inside a token, or between two."""
        if self._discarding:
            self._lexer.text.clear()
        elif self._size + len(self._lexer.text) > self._limits.value_bytes:
            self._discard()
            self._lexer.text.clear()
            raise JsonError(_TOO_LONG)
        return _INCOMPLETE

    def _accept(self, token: Token, text: bytes) -> Any:
        if token is Token.STRAY:
            discarded, size = self._discarding, self._size + len(text)
            self._reset()
            if discarded:  # its one error has been reported
                return _INCOMPLETE
            if size > self._limits.value_bytes:
                raise JsonError(_TOO_LONG)
            raise JsonError(f"JSON parse error, stray '{quote(text)}'")
        braces, brackets = _DEPTH_CHANGE.get(token, (0, 0))
        self._braces += braces
        self._brackets += brackets
        excess = None
        if not self._discarding:
            self._size += len(text)
            self._tokens.append((token, text))
            excess = self._excess()
        if (self._braces > 0 or self._brackets > 0) and self._braces >= 0 and self._brackets >= 0:
            if excess is not None:
                self._discard()
                raise JsonError(excess)
            return _INCOMPLETE
        tokens, discarded = self._tokens, self._discarding
        self._reset()
        if excess is not None:
            raise JsonError(excess)
        return _INCOMPLETE if discarded else parse(tokens)

    def _excess(self) -> str | None:
        if self._size > self._limits.value_bytes:
            return _TOO_LONG
        if len(self._tokens) > self._limits.tokens:
            return "JSON token count limit exceeded"
        if self._braces + self._brackets > self._limits.depth:
            return "JSON nesting depth limit exceeded"
        return None

    def _discard(self) -> None:
        self._discarding = True
        self._tokens.clear()

    def _reset(self) -> None:
        self._discarding = False
        self._braces = self._brackets = self._size = 0
        self._tokens = []


def decode(text: bytes) -> Any:
    """The one value that is all of `text`, such as a command line's argument. Raises JsonError."""
    stream = JsonStream()
    stream.feed(text + b"\n")  # a word or a number ends only where something else begins
    values = list(stream)
    for value in values:
        if isinstance(value, JsonError):
            raise value
    if stream.in_value or not values:
        raise JsonError("JSON parse error, premature EOI")
    if len(values) > 1:
        raise JsonError("JSON parse error, expecting end of input")
    return values[0]
