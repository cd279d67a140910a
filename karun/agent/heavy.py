"""The heavy archive: what copying takes beyond the agent, fetched over standard input if need be.

Whether this node has it is said on standard output, `have` or `need`; then frames come in:
HEAVY (the archive, for whoever has said `need`; others pass it over) and those of the task.  It is
kept beside the agent's archive, under its digest (karun/agent/loader.py has the rules).
"""

from __future__ import annotations

import os
import sys

from . import frames
from .loader import digest_of, find, keep, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HEAVY = 1
SIZE_MAX = 64 << 20
_SYSTEM_PLACES = (
    "/usr/lib/python3/dist-packages",
    f"/usr/lib64/python3.{sys.version_info[1]}/site-packages",
)


def relay(words: list[str]) -> int:
    """The task `relay`: one node's part in broadcasts."""
    incoming = attach(words[0], words[1])
    from karun.node_copy import main

    return main(incoming, words[2:])


def attach(digest: str, place: str = "") -> Iterator[tuple[int, bytes]]:
    """Make the modules of the heavy archive importable; return the frames that follow.

    *place*: where packages are besides the system's own, when this is the head's machine.
    Raises OSError, FrameError; EOFError when the input ends before the archive has come.
    """
    incoming = _frames()
    name = b"/" + digest.encode() + b".zip"
    path = find(digest, places(), name)
    os.write(1, b"have\n" if path else b"need\n")
    while path is None:
        kind, payload = next(incoming, (0, b""))
        if kind == 0:
            raise EOFError("the input ended before the archive came")
        if kind == HEAVY:
            path = _take(payload, digest, name)
    archive = path.decode("utf-8", "surrogateescape")
    sys.path.insert(0, archive)
    import karun

    karun.__path__.append(archive + "/karun")
    _find_xxhash((place, *_SYSTEM_PLACES))
    return incoming


def _find_xxhash(places: tuple[str, ...]) -> None:
    """Let chunks be summed by an installed xxhash, which is not on our path: it is quicker."""
    for place in places:
        if os.path.isdir(f"{place}/xxhash"):
            sys.path.append(place)
            import common.checksum  # noqa: F401

            sys.path.remove(place)
            return


def _take(payload: bytes, digest: str, name: bytes) -> bytes:
    import zlib

    unpacker = zlib.decompressobj()
    data = unpacker.decompress(payload, SIZE_MAX)
    if digest_of(data) != digest:
        raise frames.FrameError("the archive came damaged")
    return keep(data, places(), name)


def _frames() -> Iterator[tuple[int, bytes]]:
    decoder = frames.Decoder(SIZE_MAX)
    while data := os.read(0, 1 << 16):
        for kind, _rank, payload in decoder.feed(data):
            yield kind, payload
