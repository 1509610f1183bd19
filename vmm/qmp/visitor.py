"""Arguments of commands as msgspec Structs, and a reader of them that says what is wrong in QEMU's words.

The reader walks the type annotations, in their order, as QEMU's input visitor walks a QAPI schema; it must
not lean on msgspec's own validation, whose sentences and order differ. Rules a Struct follows: an optional
argument has a default and is never null on the wire; an Enum holds words; an integer has a `Range`; a union
of Structs is told apart by the words in `DISCRIMINATORS`, which stand in the same object (a QAPI flat union;
nested ones are flattened, the outer word first).
"""

from __future__ import annotations

import types
from enum import Enum
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

from vmm.qmp.backend import QmpError


class Range(NamedTuple):
    """The bounds of an integer, and what an error says was expected."""

    least: int
    most: int
    words: str


Uint16 = Annotated[int, Range(0, (1 << 16) - 1, "uint16_t")]
Uint64 = Annotated[int, Range(0, (1 << 64) - 1, "uint64")]

_UINT64_DIGITS = 20
_TYPE_WORDS = {str: "string", bool: "boolean"}
_SWITCH = {
    "on": True,
    "off": False,
    "yes": True,
    "no": False,
    "true": True,
    "false": False,
    "y": True,
    "n": False,
}


class Arguments(msgspec.Struct, frozen=True, rename="kebab", kw_only=True):
    """Base of all that comes in a request: names on the wire have hyphens."""

    DISCRIMINATORS: ClassVar[dict[str, str]] = {}


_Read = TypeVar("_Read", bound=Arguments)


def read_arguments(kind: type[_Read], arguments: dict[str, Any]) -> _Read:
    """`arguments`, as they came in JSON, as a `kind`. Raises QmpError."""
    read: _Read = _Reader(keyval=False).struct(kind, arguments, "")
    return read


def read_keyval(kind: type[_Read], arguments: dict[str, Any]) -> _Read:
    """The same for a command line's `key=value,…`, whose scalars are all text (QEMU's keyval visitor)."""
    read: _Read = _Reader(keyval=True).struct(kind, arguments, "")
    return read


class _Reader:
    def __init__(self, keyval: bool) -> None:
        self._keyval = keyval

    def struct(self, kind: type[Any], value: Any, path: str) -> Any:
        return self._members((kind,), self._object(value, path), path)

    def value(self, kind: Any, value: Any, name: str | None, path: str) -> Any:
        """`value` as a `kind`. In QEMU's errors most places are paths, but a wrong word's is a bare name."""
        origin, of = get_origin(kind), get_args(kind)
        if origin in (types.UnionType, Union):
            alternatives = tuple(each for each in of if each is not types.NoneType)
            if len(alternatives) == 1:
                return self.value(alternatives[0], value, name, path)
            return self._members(alternatives, self._object(value, path), path)
        if origin is list:
            if not isinstance(value, list):
                raise QmpError(f"Invalid parameter type for '{path}', expected: array")
            return [self.value(of[0], item, None, f"{path}[{index}]") for index, item in enumerate(value)]
        if origin is Annotated:
            return self._integer(value, of[1], name, path)
        if issubclass(kind, Arguments):
            return self.struct(kind, value, path)
        if issubclass(kind, Enum):
            return kind(self._word([each.value for each in kind], value, name, path))
        return self._scalar(kind, value, name, path)

    def _members(self, alternatives: tuple[type[Any], ...], value: dict[str, Any], path: str) -> Any:
        """An object's members as the one of `alternatives` that its discriminators name."""
        rest = dict(value)
        prefix = f"{path}." if path else ""
        told: set[str] = set()
        while len(alternatives) > 1 or not told.issuperset(alternatives[0].DISCRIMINATORS):
            name = next(each for each in alternatives[0].DISCRIMINATORS if each not in told)
            if name not in rest:
                raise QmpError(f"Parameter '{prefix}{name}' is missing")
            words = [each.DISCRIMINATORS[name] for each in alternatives]
            word = self._word(words, rest.pop(name), name, prefix + name)
            alternatives = tuple(each for each in alternatives if each.DISCRIMINATORS[name] == word)
            told.add(name)
        (kind,) = alternatives
        members: dict[str, Any] = {}
        for field in msgspec.structs.fields(kind):
            where = prefix + field.encode_name
            if field.encode_name in rest:
                members[field.name] = self.value(
                    field.type, rest.pop(field.encode_name), field.encode_name, where
                )
            elif field.required:
                raise QmpError(f"Parameter '{where}' is missing")
        for unexpected in rest:
            raise QmpError(f"Parameter '{prefix}{unexpected}' is unexpected")
        return kind(**members)

    @staticmethod
    def _object(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise QmpError(f"Invalid parameter type for '{path}', expected: object")
        return value

    def _word(self, words: list[str], value: Any, name: str | None, path: str) -> str:
        word: str = self._scalar(str, value, name, path)
        if word not in words:  # an array's element has no name of its own: QEMU prints null
            raise QmpError(f"Parameter '{name or 'null'}' does not accept value '{word}'")
        return word

    def _integer(self, value: Any, bounds: Range, name: str | None, path: str) -> int:
        if self._keyval and isinstance(value, str) and value.isascii() and value.isdecimal():
            value = int(value[: _UINT64_DIGITS + 1])
        if type(value) is not int:
            raise QmpError(f"Parameter '{path}' expects {bounds.words}")
        if not bounds.least <= value <= bounds.most:
            raise QmpError(f"Parameter '{name or 'null'}' expects {bounds.words}")
        return value

    def _scalar(self, kind: type[Any], value: Any, name: str | None, path: str) -> Any:
        if kind is bool and self._keyval and isinstance(value, str):
            if value not in _SWITCH:
                raise QmpError(f"Parameter '{path}' expects 'on' or 'off'")
            return _SWITCH[value]
        if type(value) is not kind:
            raise QmpError(f"Invalid parameter type for '{path}', expected: {_TYPE_WORDS[kind]}")
        return value
