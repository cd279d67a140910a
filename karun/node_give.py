"""What `give` takes for directories and large files; runs on the node, out of the heavy archive."""

from __future__ import annotations

from collections.abc import Iterator

from common.broadcast.image import encode_table
from common.broadcast.source import Source
from common.errors import KaError
from karun.agent.give import refuse, send
from karun.agent.target import words_of

__all__ = ["give"]

PIECE_SIZE = 1 << 20


def give(path: str) -> int:
    """Write the table of files and what they hold; return an exit code."""
    source = Source(path)
    try:
        source.scan()
        table = encode_table(source.entries)
        head = len(table).to_bytes(4, "little") + table
        send(_parts(source, head), len(head) + source.size)
    except KaError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"cannot read {path}: {words_of(error)}")
    finally:
        source.close()
    return 0


def _parts(source: Source, head: bytes) -> Iterator[bytes | memoryview]:
    yield head
    yield from source.content(PIECE_SIZE)
