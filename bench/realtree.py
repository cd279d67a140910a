"""The tree of real files: a tar archive of what the machine itself has installed.

Taken from the running Python's library, then /usr/share and /usr/include, in sorted order, until
there are as many entries as asked for.  So its mix of names, sizes and depths is real, and it is
the same for every system of a run (not the same on every machine: compare within a run).  Owners
are cleared; hard links are separate files; very large files are left out, the large-file
workloads are there for those.
"""

from __future__ import annotations

import os
import stat
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RealTree", "build", "sources"]

_FILE_SIZE_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class RealTree:
    """The archive and what is in it."""

    archive: Path
    entry_count: int
    """Files, directories and symbolic links."""
    size_bytes: int
    """Of the regular files' content."""


def sources() -> list[Path]:
    """Return the directories the tree is taken from, first choice first."""
    return [Path(sysconfig.get_path("stdlib")), Path("/usr/share"), Path("/usr/include")]


def build(archive: Path, *, entries_max: int, roots: list[Path]) -> RealTree:
    """Write *archive* with at most *entries_max* entries from *roots*."""
    entry_count = size_bytes = 0
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT, dereference=False) as tar:
        for index, root in enumerate(roots):
            for path in _walk(root):
                if entry_count == entries_max:
                    break
                name = f"tree/{index}/{path.relative_to(root)}" if path != root else f"tree/{index}"
                size = _add(tar, path, name)
                if size is not None:
                    entry_count += 1
                    size_bytes += size
    return RealTree(archive, entry_count, size_bytes)


def _walk(root: Path) -> Iterator[Path]:
    """Yield directories before what they hold."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories.sort()
        yield Path(directory)
        for name in sorted(files + [d for d in subdirectories if Path(directory, d).is_symlink()]):
            yield Path(directory, name)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> int | None:
    """Add one entry; return its content's size, or None if it is not wanted."""
    try:
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            return None
        if kind == stat.S_IFREG and status.st_size > _FILE_SIZE_MAX:
            return None
        member = tar.gettarinfo(path, name)
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        if kind != stat.S_IFREG:
            tar.addfile(member)
            return 0
        if member.type != tarfile.REGTYPE:  # a second name of a file already in the archive
            member.type, member.linkname, member.size = tarfile.REGTYPE, "", status.st_size
        with path.open("rb") as content:
            tar.addfile(member, content)
        return member.size
    except PermissionError:
        return None  # an ordinary user's run takes what it may read
