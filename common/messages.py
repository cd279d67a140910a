"""Typed messages: a NamedTuple on either side, a checked msgpack list on the wire.

A message class is a NamedTuple with plain field types (int, bytes, str, bool, list), registered
under a number in a `Catalogue`.  On the wire it is `[number, field, ...]`.  Decoding checks the
count and the exact type of every field, so handlers never see a value of a wrong type; ranges
are the handler's business.  Numbers are never reused; a field may only ever be added at the end,
with a default.

The body of an ERROR frame is here too, `[code, line, context]`: encoding it cannot fail, and what
a peer sends as text comes out as one printable line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_origin, get_type_hints

from common import codec
from common.errors import Code, KaError, from_number

__all__ = ["Catalogue", "Message", "decode_error", "encode_error"]

Message = Any
"""An instance of a registered NamedTuple class."""

_MessageClass = TypeVar("_MessageClass", bound=type)
_TEXT_SIZE_MAX = 1000
_PLAIN = (int, bytes, str, bool, list)


class Catalogue:
    """The messages of one protocol, by number."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._by_number: dict[int, tuple[type, tuple[type, ...], int]] = {}
        self._numbers: dict[type, int] = {}

    def message(self, number: int) -> Callable[[_MessageClass], _MessageClass]:
        """Register the decorated NamedTuple class under *number*."""

        def register(cls: _MessageClass) -> _MessageClass:
            assert number not in self._by_number, f"{self.name}: message {number} exists"
            hints = get_type_hints(cls)
            fields: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]
            types = tuple(get_origin(hints[field]) or hints[field] for field in fields)
            assert all(kind in _PLAIN for kind in types), f"{cls.__name__}: plain types only"
            required = len(fields) - len(cls._field_defaults)  # type: ignore[attr-defined]
            self._by_number[number] = (cls, types, required)
            self._numbers[cls] = number
            return cls

        return register

    def encode(self, message: Message) -> bytes:
        """Return the wire form of a message."""
        return codec.encode((self._numbers[type(message)], *message))

    def decode(self, data: bytes | bytearray | memoryview) -> Message:
        """Return the message in *data*; raises KaError PROTOCOL for anything else."""
        value = codec.decode(data)
        if type(value) is not list or not value or type(value[0]) is not int:
            raise KaError(Code.PROTOCOL, f"not a {self.name} message")
        entry = self._by_number.get(value[0])
        if entry is None:
            raise KaError(Code.PROTOCOL, f"unknown {self.name} message {value[0]}")
        cls, types, required = entry
        del value[0]
        if not required <= len(value) <= len(types):
            raise KaError(Code.PROTOCOL, f"{cls.__name__}: {len(value)} fields")
        for field, kind in zip(value, types, strict=False):
            if type(field) is not kind:
                raise KaError(Code.PROTOCOL, f"{cls.__name__}: {type(field).__name__} field")
        return cls(*value)

    def classes(self) -> dict[int, type]:
        """Return the registered classes by number (for documents and fuzzing)."""
        return {number: entry[0] for number, entry in self._by_number.items()}


def encode_error(error: KaError) -> bytes:
    """Return the body of an ERROR frame."""
    context = {_sendable(key): _sendable(value) for key, value in error.context.items()}
    return codec.encode((error.code.number, _sendable(error.message), context))


def decode_error(body: bytes) -> KaError:
    """Return the error in the body of an ERROR frame, marked as `remote`."""
    try:
        number, message, context = codec.decode(body)
        facts = {_line(key): _line(value) for key, value in context.items()}
        error = KaError(from_number(number), _line(message), **facts)
    except (AttributeError, ValueError, TypeError, KaError):
        error = KaError(Code.PROTOCOL, "unreadable error frame")
    error.remote = True
    return error


def _sendable(value: object) -> str:
    """Return a short text without lone surrogates, which names of files can bring in."""
    return str(value)[:_TEXT_SIZE_MAX].encode("utf-8", "backslashreplace").decode()


def _line(text: object) -> str:
    if type(text) is not str:
        raise TypeError("not a text")
    return text if text.isprintable() else text.encode("unicode_escape").decode()
