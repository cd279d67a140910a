"""The task `give`: a file or a directory of this node goes up over standard output.

    small\\n | u32 size | fields: permissions, owner, group, time of change in ns | content
    have\\n or need\\n | u32 size | table of files (common/broadcast/image.py) | content

The second form is for directories, and files with holes or extended attributes, or large ones: it
takes the heavy archive, which `need` asks for (karun/agent/heavy.py, karun/node_give.py).  When
all has been written, its sum goes to standard error; or else the reason why not.
The head's side: karun/gathering.py.
"""

from __future__ import annotations

import os
import stat
from _blake2 import blake2b

from . import frames
from .heavy import attach
from .target import filled, words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SMALL_SIZE_MAX = 1 << 20
SUM_SIZE = 32


def main(words: list[str]) -> int:
    """Give what the path names."""
    digest, template = words
    path = filled(template, os.environ["KARUN_NODE"])
    try:
        status = os.stat(path)
        if stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK):
            raise OSError(22, "is neither a file nor a directory")
        if _is_plain(path, status):
            _give_small(path)
            return 0
    except OSError as error:
        return refuse(f"cannot read {path}: {words_of(error)}")
    attach(digest)
    from karun.node_give import give

    return give(path)


def send(parts: Iterable[bytes | memoryview], size: int) -> None:
    """Write *size* bytes in all, and then their sum; raises OSError when there are not so many."""
    sums = blake2b(digest_size=SUM_SIZE)
    for part in parts:
        sums.update(part)
        size -= len(part)
        left = memoryview(part)
        while left:
            left = left[os.write(1, left) :]
    if size:
        raise OSError(5, "was changed while it was being read")
    os.write(2, b"sum %s\n" % sums.hexdigest().encode())


def refuse(reason: str) -> int:
    """Say why there is nothing, or no more, to give."""
    os.write(2, f"{reason}\n".encode("utf-8", "surrogateescape"))
    return 1


def _is_plain(path: str, status: os.stat_result) -> bool:
    full = status.st_blocks * 512 >= status.st_size
    if not stat.S_ISREG(status.st_mode) or status.st_size > SMALL_SIZE_MAX or not full:
        return False
    try:
        return not os.listxattr(path)
    except OSError:
        return True


def _give_small(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        content = file.read(SMALL_SIZE_MAX + 1)
    facts = frames.pack(
        stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns
    )
    os.write(1, b"small\n")
    head = len(facts).to_bytes(4, "little") + facts
    send((head, content), len(head) + status.st_size)
