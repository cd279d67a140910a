"""The task `place`: small files, which come whole over standard input, are put where they belong.

    blake2b of the rest, 32 bytes | fields: destination, into, and of each file
    name, permissions, owner, group, time of change in ns, content

Nothing is written before all has come and the sum is right; a file is written beside, flushed, and
renamed.  Only what differs is written.  Larger things: karun/node_copy.py.
"""

from __future__ import annotations

import os
from _blake2 import blake2b

from . import frames
from .target import filled, resolve, words_of

SIZE_MAX = 4 << 20
SUM_SIZE = 32
_FIELD_COUNT = 6


def pack(destination: str, files: list[tuple[bytes | str | int, ...]], *, into: bool) -> bytes:
    """Return what `main` reads."""
    fields = [field for file in files for field in file]
    body = frames.pack(destination, int(into), *fields)
    return blake2b(body, digest_size=SUM_SIZE).digest() + body


def main(_words: list[str]) -> int:
    """Put what standard input holds in its place; what prevents it goes to standard error."""
    data = _read(SIZE_MAX)
    body = data[SUM_SIZE:]
    if blake2b(body, digest_size=SUM_SIZE).digest() != data[:SUM_SIZE]:
        os.write(2, b"what came is damaged or cut off\n")
        return 1
    fields = frames.unpack(body)
    destination = filled(frames.text(fields[0]), os.environ["KARUN_NODE"])
    into = fields[1] == b"1"
    path = destination
    try:
        for at in range(2, len(fields), _FIELD_COUNT):
            name, mode, uid, gid, mtime_ns, content = fields[at : at + _FIELD_COUNT]
            path = resolve(destination, frames.text(name), is_tree=False, into=into)
            numbers = [frames.number(field) for field in (mode, uid, gid, mtime_ns)]
            _put(path, content, *numbers)
    except OSError as error:
        line = f"cannot write {path}: {words_of(error)}\n"
        os.write(2, line.encode("utf-8", "surrogateescape"))
        return 1
    return 0


def _read(size_max: int) -> bytes:
    parts = []
    size = 0
    while size < size_max and (part := os.read(0, 1 << 16)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _put(path: str, content: bytes, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
    if os.path.isdir(path):
        raise IsADirectoryError(21, "is a directory", path)
    if _holds(path, content):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _dress(fd, mode, uid, gid, mtime_ns)
        return
    above, name = os.path.split(path)
    beside = os.path.join(above, f".{name[:200]}.karun-{os.getpid()}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
        _dress(fd, mode, uid, gid, mtime_ns)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _holds(path: str, content: bytes) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(len(content) + 1) == content
    except OSError:
        return False


def _dress(fd: int, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
    """Give an open file its attributes; closes it."""
    try:
        if os.geteuid() == 0:
            os.fchown(fd, uid, gid)
        os.fchmod(fd, mode)
        os.utime(fd, ns=(mtime_ns, mtime_ns))
    finally:
        os.close(fd)
