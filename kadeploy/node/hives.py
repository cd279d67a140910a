"""Registry hives of a Windows that does not run: SYSTEM, the boot store.  By hivex.

A hive is copied out of the new system, edited here and put back beside the old one, which it then
replaces: cut off at any time, there is a whole hive.  It keeps the old one's security descriptor.
A hive that was not closed is refused: Windows would play its log over what is edited here.

Every edit may be made again.  GUIDs are looked for as the 16 bytes that Windows writes.  Copying
out and putting back are done in a chroot (system.py); hivex is not, for it loads converters.

The only importer of hivex, which is Debian's python3-hivex: the package of that name on PyPI is
something else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from common.errors import Code, KaError
from kadeploy.orders import HiveEdit, IdChange

__all__ = ["GuidChange", "edit_all"]

REG_SZ = 1
REG_BINARY = 3
DEPTH_MAX = 512
"""Of keys in a hive, Windows' own limit."""
CURRENT = "CurrentControlSet"
KEPT = ("system.ntfs_acl", "system.ntfs_attrib")

Inside = Callable[[Callable[[], object]], None]
"""Does a piece of work in the new system."""


def edit_all(edits: Sequence[HiveEdit], inside: Inside, scratch: Path) -> None:
    """Make *edits*; *scratch*: a directory for a copy.  Raises USAGE for what does not fit."""
    for path, group in groupby(edits, lambda edit: edit.path):
        with open(scratch / "hive", "w+b") as copy:
            inside(partial(_copy_out, Path(path), copy))
            _check_closed(path, copy)
        _edit(scratch / "hive", path, list(group))
        with open(scratch / "hive", "rb") as copy:
            inside(partial(_put_back, Path(path), copy))


def _copy_out(path: Path, copy: IO[bytes]) -> None:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        shutil.copyfileobj(file, copy)
        copy.flush()


def _put_back(path: Path, copy: IO[bytes]) -> None:
    new = path.with_name(f"{path.name}.kadeploy")
    with open(new, "wb") as file:
        shutil.copyfileobj(copy, file)
        file.flush()
        os.fsync(file.fileno())
    for name in KEPT:
        try:
            os.setxattr(new, name, os.getxattr(path, name))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # the ESP's vfat has no such thing
                raise
    new.replace(path)


def _check_closed(path: str, copy: IO[bytes]) -> None:
    copy.seek(0)
    head = copy.read(12)
    if len(head) < 12 or head[:4] != b"regf":
        raise KaError(Code.USAGE, f"{path} is not a registry hive")
    begun, ended = struct.unpack_from("<II", head, 4)
    if begun != ended:
        raise KaError(
            Code.USAGE, f"{path} was not closed: shut Windows down whole before it is recorded"
        )


def _edit(copy: Path, path: str, edits: Sequence[HiveEdit]) -> None:
    try:
        import hivex
    except ImportError:
        raise KaError(Code.USAGE, "python3-hivex is not installed here") from None
    try:
        hive = hivex.Hivex(str(copy), write=True)
        for edit in edits:
            _Editor(hive, path).apply(edit)
        hive.commit(None)
    except (RuntimeError, UnicodeError) as error:  # hivex has no class of its own
        raise KaError(Code.EIO, f"{path}: hivex: {error}") from None


class _Editor:
    """An open hive, as far as an edit needs it."""

    def __init__(self, hive: Any, path: str) -> None:
        self._hive = hive
        self._path = path

    def apply(self, edit: HiveEdit) -> None:
        node = self._node(edit.key)
        for value in edit.values:
            data = f"{value.text}\0".encode("utf-16-le")
            self._hive.node_set_value(node, {"key": value.name, "t": REG_SZ, "value": data})
        if not edit.ids and not edit.drop_others:
            return
        change = GuidChange(edit.ids)
        for one in self._below(node, 0):
            self._change_ids(one, change, edit.drop_others)
        if edit.ids_needed and not change.found:
            raise KaError(
                Code.USAGE, f"{self._path} names none of the image's partitions: see image_guid"
            )

    def _node(self, key: str) -> int:
        node: int = self._hive.root()
        for word in key.split("\\"):
            child = self._hive.node_get_child(node, self._real(word))
            if child is None:
                raise KaError(Code.USAGE, f"{self._path} has no key {key}")
            node = child
        return node

    def _real(self, word: str) -> str:
        if word != CURRENT:
            return word
        current = self._hive.node_get_value(self._node("Select"), "Current")
        return f"ControlSet{self._hive.value_dword(current):03}"

    def _below(self, node: int, depth: int) -> Iterator[int]:
        if depth > DEPTH_MAX:
            raise KaError(Code.USAGE, f"{self._path}: keys nested too deeply")
        yield node
        for child in self._hive.node_children(node):
            yield from self._below(child, depth + 1)

    def _change_ids(self, node: int, change: GuidChange, drop_others: bool) -> None:
        old = []
        for value in self._hive.node_values(node):
            kind, data = self._hive.value_value(value)
            old.append({"key": self._hive.value_key(value), "t": kind, "value": data})
        new = []
        for one in old:
            data, named = change.applied(one["value"]) if one["t"] == REG_BINARY else (b"", False)
            if named:
                new.append({**one, "value": data})
            elif one["t"] != REG_BINARY or not drop_others:
                new.append(one)
        if new != old:
            self._hive.node_set_values(node, new)


class GuidChange:
    """All GUIDs at once, so that none is changed twice."""

    def __init__(self, ids: Sequence[IdChange]) -> None:
        self._new = {_bytes(one.old): _bytes(one.new) for one in ids}
        self._new |= {new: new for new in self._new.values()}  # done already
        words = b"|".join(map(re.escape, self._new))
        self._pattern = re.compile(words or b"(?!)", re.DOTALL)
        self.found = False

    def applied(self, data: bytes) -> tuple[bytes, bool]:
        """Return the data with this node's GUIDs, and whether there were any."""
        made, count = self._pattern.subn(lambda match: self._new[match[0]], data)
        self.found |= count > 0
        return made, count > 0


def _bytes(guid: str) -> bytes:
    return uuid.UUID(guid).bytes_le
