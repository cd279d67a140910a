"""The sink for files: what is read back, and when.  Real files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.broadcast import sink as module
from common.broadcast.filecache import write_at
from common.broadcast.image import Piece
from common.broadcast.manifest import Algorithm
from common.broadcast.sink import FileSink
from common.broadcast.source import Source

CHUNK_SIZE = 1 << 16
COUNT = 5


class Copy:
    """A file, and a sink that is to get it."""

    def __init__(self, directory: Path) -> None:
        self.data = os.urandom(COUNT * CHUNK_SIZE - 77)
        self.target = directory / "target"
        (directory / "source").write_bytes(self.data)
        source = Source(str(directory / "source"))
        source.scan()
        plan = source.make_plan(
            bytes(16), b"t" * 16, name="x", chunk_size=CHUNK_SIZE, algorithm=Algorithm.XXH3
        )
        source.close()
        self.sink = FileSink(str(self.target))
        assert self.sink.open(plan.manifest, plan.entries) == 0

    def put(self, chunk: int, *, part_size: int = 10_000) -> None:
        start = chunk * CHUNK_SIZE
        data = self.data[start : start + CHUNK_SIZE]
        for at in range(0, len(data), part_size):
            self.sink.put(chunk, at, memoryview(data[at : at + part_size]))

    def read_at_the_end(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Verify; return the chunks that were read for it."""
        found: list[int] = []
        read_pieces = self.sink._read_pieces

        def noted(pieces: Sequence[Piece], buffer: memoryview) -> memoryview | None:
            found.append(pieces[0].offset // CHUNK_SIZE)
            return read_pieces(pieces, buffer)

        monkeypatch.setattr(self.sink, "_read_pieces", noted)
        assert self.sink.verify() == []
        return found


@pytest.fixture(name="copy")
def _copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_what_read_back_right_when_it_was_written_is_not_read_again(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk in (3, 0, 4, 1, 2):
        copy.put(chunk)
    assert copy.read_at_the_end(monkeypatch) == []
    assert copy.target.read_bytes() == copy.data
    copy.sink.close()


def test_a_chunk_is_read_at_the_end_if_it_was_begun_again_and_left(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk in range(COUNT):
        copy.put(chunk)
    copy.sink.put(2, 0, memoryview(copy.data[2 * CHUNK_SIZE :][:100]))
    assert copy.read_at_the_end(monkeypatch) == [2]
    copy.sink.close()


@pytest.mark.parametrize("part_size", [10_000, CHUNK_SIZE])
def test_what_a_disk_spoils_is_found_and_goes_nowhere(
    copy: Copy, monkeypatch: pytest.MonkeyPatch, part_size: int
) -> None:
    def spoil(fd: int, data: memoryview, offset: int) -> None:
        write_at(fd, data, offset)
        if offset <= CHUNK_SIZE + 10 < offset + len(data):
            os.pwrite(fd, bytes([data[CHUNK_SIZE + 10 - offset] ^ 1]), CHUNK_SIZE + 10)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_at", spoil)
        for chunk in range(COUNT):
            copy.put(chunk, part_size=part_size)
    assert copy.sink.verify() == [1]
    assert not copy.target.exists()
    copy.put(1)
    assert copy.sink.verify() == []
    assert copy.target.read_bytes() == copy.data
    copy.sink.close()
