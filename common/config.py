"""Configuration: a TOML file in, a frozen dataclass out, or one line that says what is wrong.

The dataclass is the schema: field names are keys, nested dataclasses are tables, `list[X]` and
`tuple[X, ...]` of dataclasses are lists of tables, `X | None` may be left out, and a field
without a default is required.  A string is never taken for a number or a bool for an int; only
a whole number may stand where a float is wanted.  `Path` is relative to the file's directory;
`Annotated[int, SIZE]` also takes "64MiB"; an enum takes the values of its members.  Unknown
keys are refused: a key with a typing error would otherwise be a setting that silently has no
effect.

A class may check relations in `validate(self)`, which raises KaError or ValueError.

The cluster key is a file of 64 hexadecimal digits that only its owner can read; it never appears
in a message.  Not here: where a configuration is looked for, and what its keys mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import os
import re
import secrets
import stat
import tomllib
import types
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from common.errors import Code, KaError
from common.sizes import SIZE, SIZE_MAX, format_size, parse_size

__all__ = ["SIZE", "check", "format_size", "load", "make_key", "parse_size", "read_key"]

T = TypeVar("T")

KEY_SIZE = 32
KEY_FILE_SIZE_MAX = 4096
FILE_SIZE_MAX = 16 * 1024 * 1024


# ---------------------------------------------------------------- files


class _Place(NamedTuple):
    """Where in the file we are, as its reader sees it: `[mds.cache]`, `[[iod]] 2`."""

    directory: Path
    file: str
    table: str = ""
    item: str = ""

    def inner(self, key: str, index: int | None = None) -> _Place:
        table = f"{self.table}.{key}" if self.table else key
        outer = f"{self.item} " if self.item.startswith("[[") else ""
        item = f"{outer}[{table}]" if index is None else f"{outer}[[{table}]] {index + 1}"
        return self._replace(table=table, item=item)

    def error(self, message: str) -> KaError:
        return KaError(Code.USAGE, ": ".join(filter(None, (self.file, self.item, message))))


def load(path: Path, cls: type[T]) -> T:
    """Return the configuration in *path* as a *cls*, a dataclass.

    Raises KaError USAGE, one line that names file, table and key.
    """
    place = _Place(path.absolute().parent, str(path))
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_SIZE_MAX + 1)
        if len(data) > FILE_SIZE_MAX:
            raise place.error(f"larger than {format_size(FILE_SIZE_MAX)}")
        # With a line more, a mistake at the end has a line number too.
        content = tomllib.loads(data.decode() + "\n")
    except OSError as error:
        raise place.error(error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise place.error(f"not UTF-8 text (at line {line})") from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise place.error(str(error)) from None
    except RecursionError:
        raise place.error("nested too deeply") from None
    return cast(T, _table(content, cls, place))


def check(content: object, cls: type[T], path: Path) -> T:
    """Return *content*, read from *path* by another parser than TOML's, as a *cls*; as `load`."""
    place = _Place(path.absolute().parent, str(path))
    if type(content) is not dict or not all(type(key) is str for key in content):
        raise place.error("not a table of keys")
    return cast(T, _table(content, cls, place))


def _table(content: dict[str, Any], cls: Any, place: _Place) -> object:
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise place.error(f"unknown key {key!r}{hint}")
    missing = [
        repr(name)
        for name, field in fields.items()
        if name not in content
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise place.error(f"missing key{plural} {', '.join(missing)}")
    values = {key: _value(value, hints[key], key, place) for key, value in content.items()}
    try:
        made: object = cls(**values)
        if hasattr(made, "validate"):
            made.validate()
    except KaError as error:
        raise place.error(error.message) from None
    except ValueError as error:
        raise place.error(str(error)) from None
    return made


def _value(value: object, hint: Any, key: str, place: _Place) -> object:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if SIZE in arguments[1:]:
            return _size(value, key, place)
        return _value(value, arguments[0], key, place)
    if origin in (Union, types.UnionType):
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return _value(value, kind, key, place)
    if origin in (list, tuple):
        return _sequence(value, origin, arguments[0], key, place)
    if dataclasses.is_dataclass(hint):
        if type(value) is not dict:
            raise _wrong(value, "a table", key, place)
        return _table(value, hint, place.inner(key))
    if isinstance(hint, enum.EnumType):
        choices = {member.value: member for member in cast(type[enum.Enum], hint)}
        if type(value) is not str or value not in choices:
            raise _wrong(value, f"one of {', '.join(choices)}", key, place)
        return choices[value]
    return _scalar(value, hint, key, place)


def _sequence(value: object, origin: Any, kind: Any, key: str, place: _Place) -> object:
    if type(value) is not list:
        raise _wrong(value, "a list", key, place)
    if not dataclasses.is_dataclass(kind):
        return origin(
            _value(item, kind, f"{key}[{index}]", place) for index, item in enumerate(value)
        )
    for item in value:
        if type(item) is not dict:
            raise _wrong(item, "a list of tables", key, place)
    return origin(_table(item, kind, place.inner(key, index)) for index, item in enumerate(value))


_WORDS = {int: "a whole number", str: "a string", bool: "true or false", float: "a number"}


def _scalar(value: object, kind: Any, key: str, place: _Place) -> object:
    if kind is Path:
        if type(value) is not str or not value or "\0" in value:
            raise _wrong(value, "a path", key, place)
        if value.startswith("~"):
            raise place.error(f"{key!r}: ~ means nothing here: write the directory")
        return place.directory / value
    assert kind in _WORDS, f"{key}: a configuration cannot hold {kind}"
    number: Any = value
    if type(value) is int and not -SIZE_MAX <= value <= SIZE_MAX:
        raise place.error(f"{key!r} is too large")
    if kind is float and type(value) in (int, float) and math.isfinite(number):
        return float(number)
    if type(value) is not kind or kind is float:
        raise _wrong(value, _WORDS[kind], key, place)
    return value


def _size(value: object, key: str, place: _Place) -> int:
    if type(value) is str:
        try:
            return parse_size(value)
        except KaError as error:
            raise place.error(f"{key!r}: {error.message}") from None
    if type(value) is not int or not 0 <= value <= SIZE_MAX:
        raise _wrong(value, 'a size such as 65536 or "64MiB"', key, place)
    return value


def _wrong(value: object, wanted: str, key: str, place: _Place) -> KaError:
    if isinstance(value, dict | list):
        shown = "a table" if isinstance(value, dict) else "a list"
    else:
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return place.error(f"{key!r} must be {wanted}, not {shown:.60}")


# ---------------------------------------------------------------- the cluster key


def read_key(path: Path) -> bytes:
    """Return the cluster key in *path*; raises KaError USAGE.

    Refuses a file that others can read or that somebody else (who could change it) owns.
    """
    try:
        # O_NONBLOCK: opening a FIFO put there by mistake must not hang.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KaError(Code.USAGE, f"{path}: cannot read the key: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise KaError(Code.USAGE, f"{path}: not a key file")
        if status.st_uid not in (os.geteuid(), 0):
            raise KaError(Code.USAGE, f"{path}: the key belongs to another user: chown it")
        if stat.S_IMODE(status.st_mode) & ~0o600:
            raise KaError(Code.USAGE, f"{path}: others may read the key: chmod 600 {path}")
        text = os.read(fd, KEY_FILE_SIZE_MAX)
    finally:
        os.close(fd)
    if re.fullmatch(rb"\s*[0-9a-fA-F]{%d}\s*" % (2 * KEY_SIZE), text) is None:
        raise KaError(Code.USAGE, f"{path}: a key is {2 * KEY_SIZE} hexadecimal digits")
    return bytes.fromhex(text.strip().decode())


def make_key(path: Path) -> None:
    """Write a new random key to *path*, mode 0600; raises KaError USAGE if it exists.

    The name appears when the key is whole.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w") as file:
                os.fchmod(fd, 0o600)
                file.write(secrets.token_hex(KEY_SIZE) + "\n")
                file.flush()
                os.fsync(fd)
            os.link(draft, path)
        finally:
            os.unlink(draft)
    except OSError as error:
        raise KaError(Code.USAGE, f"{path}: cannot make the key: {error.strerror}") from None
