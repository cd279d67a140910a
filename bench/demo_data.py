"""The demo's data: which real files are copied in, and whether they come out as they went in.

The tree is what the machine itself has installed, so its mix of names, sizes, depths and symbolic
links is real.  Each file is summed while it is copied, from the bytes that are written: it does
not matter if the original changes afterwards.  Sums are SHA-256, which nfsp itself does not use,
so an error in its own checksums cannot hide behind them.

The large file consists of 1 MiB parts that are all different; each is summed by XXH3, which costs
next to nothing beside writing and reading.

Not here: where all this happens, what is shown of it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from common.checksum import digest
from common.errors import Code, KaError

__all__ = [
    "Picked",
    "Tree",
    "compare",
    "copy_in",
    "parse_layout",
    "pick",
    "read_large",
    "sources",
    "write_large",
]

FILE_SIZE_MAX = 64 << 20
"""Larger files are left out: one alone would be a third of the tree."""
BIG_SIZE_MIN = 256 << 10
PART_SIZE = 1 << 20
_SOIL_SIZE = 8 << 20
_DIFFERENCES_MAX = 20

Progress = Callable[[int], None]
"""Told how many bytes are done."""


class Picked(NamedTuple):
    """A file, directory or symbolic link to be copied, and its name in the copy."""

    source: Path
    name: str
    size: int
    is_file: bool


class Item(NamedTuple):
    """What must be found in the copy."""

    mode: int
    mtime_ns: int
    size: int
    content: str
    """A file's SHA-256, a symbolic link's target, nothing for a directory."""


@dataclass(frozen=True, slots=True)
class Tree:
    """What was written."""

    items: dict[str, Item]
    file_count: int
    size: int


def sources() -> list[Path]:
    """Return the directories that are copied from, first choice first."""
    found = [Path(sysconfig.get_path("stdlib"))]
    for name in ("/usr/lib/python3", "/usr/share", "/usr/include", "/usr/lib"):
        if Path(name).is_dir():
            found.append(Path(name))
    return found


def pick(roots: Sequence[Path], files_min: int, size_min: int) -> list[Picked]:
    """Choose files from *roots* until both bounds are reached.

    Whole directories are taken until there are enough files, then only BIG ones: an installation
    consists of small files, and five times as many of them would show nothing more.  Returns less
    when the roots hold less.
    """
    picked: list[Picked] = []
    file_count = size = 0
    seen: set[tuple[int, int]] = set()
    for index, root in enumerate(roots):
        for directory in _directories(root, seen):
            if file_count >= files_min and size >= size_min:
                return picked
            floor = BIG_SIZE_MIN if file_count >= files_min else 0
            for one in _children(directory, root, f"{index}-{root.name}", floor):
                picked.append(one)
                file_count += one.is_file
                size += one.size
    return picked


def _directories(root: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the directories below *root*, parents first, each once however it is reached."""
    for text, names, _ in os.walk(root):
        names.sort()
        try:
            status = os.stat(text)
        except OSError:
            names.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
        else:
            seen.add((status.st_dev, status.st_ino))
            yield Path(text)


def _children(directory: Path, root: Path, top: str, floor: int) -> Iterator[Picked]:
    """Yield the directory, then its files and links; with a *floor* only files above it, if any."""
    inside = PurePath(top) / directory.relative_to(root)
    found: list[Picked] = []
    for entry in sorted(os.scandir(directory), key=lambda one: one.name):
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        is_file = stat.S_ISREG(status.st_mode)
        if is_file and not (
            floor <= status.st_size <= FILE_SIZE_MAX and os.access(entry.path, os.R_OK)
        ):
            continue
        if is_file or (stat.S_ISLNK(status.st_mode) and not floor):
            size = status.st_size if is_file else 0
            found.append(Picked(Path(entry.path), str(inside / entry.name), size, is_file))
    if found or not floor:
        yield Picked(directory, str(inside), 0, False)
    yield from found


def copy_in(picked: Sequence[Picked], target: Path, progress: Progress) -> Tree:
    """Copy what was picked below *target*, with modes and times; return what must be there."""
    items: dict[str, Item] = {}
    file_count = size = 0
    target.mkdir()
    for one in picked:
        to = target / one.name
        if one.is_file:
            content, length = _copy_file(one.source, to)
            file_count += 1
            size += length
            progress(size)
        elif one.source.is_symlink():
            content = os.readlink(one.source)
            os.symlink(content, to)
        else:
            content = ""
            to.mkdir(parents=True)
        if not one.source.is_symlink():
            shutil.copystat(one.source, to)
        items[one.name] = _describe(to, content)
    # What was put into a directory has changed its time: set it again when all is there.
    for one in reversed(picked):
        if not one.is_file and not one.source.is_symlink():
            shutil.copystat(one.source, target / one.name)
            items[one.name] = _describe(target / one.name, "")
    return Tree(items, file_count, size)


def _copy_file(source: Path, to: Path) -> tuple[str, int]:
    """Copy the content; return its sum and size."""
    summer, length = hashlib.sha256(), 0
    with open(source, "rb") as reader, open(to, "xb") as writer:
        while data := reader.read(PART_SIZE):
            summer.update(data)
            writer.write(data)
            length += len(data)
    return summer.hexdigest(), length


def _describe(path: Path, content: str) -> Item:
    """Return what the file system says of an entry now, with the content that was written."""
    status = path.lstat()
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Item(status.st_mode, status.st_mtime_ns, size, content)


def compare(tree: Tree, target: Path, progress: Progress) -> list[str]:
    """Return in what the entries below *target* differ from what was written, a line each."""
    missing = dict(tree.items)
    above = {str(parent) for name in missing for parent in PurePath(name).parents}
    differences: list[str] = []
    done = 0
    for path in _walk(target):
        name = str(path.relative_to(target))
        expected = missing.pop(name, None)
        if expected is None:
            if name not in above:
                differences.append(f"{name}: not written, but there")
            continue
        try:
            found = _describe(path, _content(path))
        except OSError as error:
            differences.append(f"{name}: {error.strerror}")
            continue
        differences += [
            f"{name}: {field} is {is_}, not {was}"
            for field, is_, was in zip(Item._fields, found, expected, strict=True)
            if is_ != was
        ]
        done += found.size
        progress(done)
    differences += [f"{name}: missing" for name in missing]
    more = len(differences) - _DIFFERENCES_MAX
    return differences[:_DIFFERENCES_MAX] + ([f"... and {more} more"] if more > 0 else [])


def _walk(target: Path) -> Iterator[Path]:
    for text, directories, files in os.walk(target, onerror=_raise):
        for name in sorted(directories + files):
            yield Path(text, name)


def _raise(error: OSError) -> None:
    raise error


def _content(path: Path) -> str:
    if path.is_symlink():
        return os.readlink(path)
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- the large file


def write_large(path: Path, size: int, progress: Progress) -> list[int]:
    """Write a file of *size* bytes and fsync it; return the sum of each MiB."""
    soil = os.urandom(_SOIL_SIZE)
    part = bytearray(PART_SIZE)
    sums = []
    with open(path, "xb", buffering=0) as file:
        for start in range(0, size, PART_SIZE):
            at = start // PART_SIZE * 4099 % (_SOIL_SIZE - PART_SIZE)
            part[:] = soil[at : at + PART_SIZE]
            struct.pack_into("<Q", part, 0, start)
            data = memoryview(part)[: min(PART_SIZE, size - start)]
            sums.append(digest(data))
            while data:
                data = data[file.write(data) :]
            progress(start)
        os.fsync(file.fileno())
    return sums


def read_large(path: Path, sums: Sequence[int], progress: Progress) -> int:
    """Return how many MiB of the file are not as written; it must end where it should."""
    buffer = bytearray(PART_SIZE)
    wrong = 0
    with open(path, "rb", buffering=0) as file:
        for index, expected in enumerate(sums):
            length = 0
            while length < PART_SIZE and (got := file.readinto(memoryview(buffer)[length:])):
                length += got
            wrong += digest(memoryview(buffer)[:length]) != expected
            progress(index * PART_SIZE)
        wrong += bool(file.read(1))
    return wrong


def parse_layout(text: str) -> tuple[int, list[int]]:
    """Return chunk size and chains from what `nfsp layout FILE` prints."""
    fields = dict(word.partition("=")[::2] for word in text.split())
    try:
        chains = [int(word) for word in fields["chains"].split(",")]
        return int(fields["chunk_size"]), chains
    except (KeyError, ValueError):
        raise KaError(Code.INTERNAL, f"not a layout: {text!r}") from None
