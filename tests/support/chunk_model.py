"""A dumb second chunk store: one bytearray per chunk file.  And operations to try on both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from common.checksum import ABSENT, block_sum
from nfsp.iod.chunk import BLOCK_SIZE
from nfsp.iod.chunkstore import ChunkStore
from nfsp.iod.disk import Disk

CHUNK_SIZE = 64 * 1024
ROWS = 3
FILE_SIZE = ROWS * CHUNK_SIZE
KEYS = ((5, 0), (5, 1), (3000, 0))
BOOT = b"one boot of many"

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation; `row`, `offset` and `length` say where, as far as the kind needs it."""

    kind: str
    key: Key = KEYS[0]
    row: int = 0
    offset: int = 0
    length: int = 0
    fill: int = 0
    sync: bool = False

    @property
    def range(self) -> tuple[int, int]:
        """The bytes of the chunk file's content that may change."""
        start = self.row * CHUNK_SIZE + self.offset
        if self.kind in ("write", "zero"):
            return start, start + self.length
        if self.kind == "trim":
            return start, FILE_SIZE
        return (0, FILE_SIZE) if self.kind == "remove" else (0, 0)


_PLACES = st.one_of(
    st.sampled_from([0, 0, 0, 1, 4095, 4096, 8192, 32767, 32768, 32769, 36864, 65535]),
    st.integers(0, CHUNK_SIZE - 1),
)


@st.composite
def _ranged(draw: st.DrawFn, kind: str) -> Op:
    start = draw(_PLACES)
    stop = draw(st.one_of(_PLACES, st.just(CHUNK_SIZE)))
    start, stop = min(start, stop), max(start, stop)
    return Op(
        kind,
        draw(st.sampled_from(KEYS)),
        draw(st.integers(0, ROWS - 1)),
        start,
        max(1, stop - start),
        draw(st.integers(1, 255)),
        kind == "write" and draw(st.integers(0, 4)) == 0,
    )


def ops() -> st.SearchStrategy[Op]:
    """Operations that change something, writes most of all."""
    keys = st.sampled_from(KEYS)
    write = _ranged("write")
    return st.one_of(
        write,
        write,
        write,
        _ranged("trim"),
        _ranged("zero"),
        st.builds(Op, st.just("sync"), keys),
        st.builds(Op, st.sampled_from(["remove", "settle", "sync"]), keys),
    )


def payload(op: Op) -> bytes:
    """Return what *op* writes: no two bytes in a row are equal, and none is zero."""
    period = bytes((op.fill + step) % 255 + 1 for step in range(251))
    return (period * (op.length // 251 + 1))[: op.length]


def piece_sums(data: bytes, offset: int) -> list[int]:
    """Return the sums a writer sends with *data* at *offset* of a chunk."""
    sums = []
    while data:
        room = BLOCK_SIZE - offset % BLOCK_SIZE
        sums.append(block_sum([data[:room]], BLOCK_SIZE))
        offset, data = offset + room, data[room:]
    return sums


def apply_to_store(store: ChunkStore, op: Op) -> None:
    if op.kind == "write":
        data = payload(op)
        cut = len(data) // 3
        store.write(
            *op.key, op.row, op.offset, [data[:cut], data[cut:]], piece_sums(data, op.offset),
            chunk_size=CHUNK_SIZE, sync=op.sync,
        )  # fmt: skip
    elif op.kind == "trim":
        store.trim(*op.key, row=op.row, offset=op.offset, chunk_size=CHUNK_SIZE)
    elif op.kind == "zero":
        store.zero(*op.key, op.row, op.offset, op.length, chunk_size=CHUNK_SIZE)
    elif op.kind == "sync":
        store.sync(*op.key)
    elif op.kind == "remove":
        store.remove(*op.key)
    elif op.kind == "settle":
        store.settle()


def apply_to_model(model: dict[Key, bytearray], op: Op) -> None:
    start, end = op.range
    if op.kind == "write":
        model[op.key][start:end] = payload(op)
    elif op.kind in ("trim", "zero", "remove"):
        model[op.key][start:end] = bytes(end - start)


def new_model() -> dict[Key, bytearray]:
    return {key: bytearray(FILE_SIZE) for key in KEYS}


def content(store: ChunkStore, key: Key) -> bytes:
    """Return what the store holds, and check that plain reads would give the same."""
    result = b""
    for row in range(ROWS):
        sums, data = store.read_verified(*key, row, 0, CHUNK_SIZE, chunk_size=CHUNK_SIZE)
        with store.read(*key, row, 0, CHUNK_SIZE, chunk_size=CHUNK_SIZE) as plan:
            assert (plan.sums, plan.length) == (sums, len(data))
        data = data.ljust(CHUNK_SIZE, b"\0")
        for block, expected in enumerate(sums):
            part = data[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
            assert expected == (block_sum([part], BLOCK_SIZE) if expected else ABSENT)
            assert expected or not any(part)
        result += data
    return result


@contextmanager
def opened(root: Path, disk: Disk | None = None, boot_id: bytes = BOOT) -> Iterator[ChunkStore]:
    """A store with so few open files that it must close some all the time."""
    with ChunkStore(root, fd_cache_max=2, reserve_bytes=0, boot_id=boot_id, disk=disk) as store:
        yield store


_NONZERO = bytes([0]) + bytes([255]) * 255


def strays(found: bytes, allowed: list[bytes]) -> list[int]:
    """Return the positions at which *found* has a byte that none of *allowed* has there."""
    if found in allowed:
        return []
    number = int.from_bytes(found, "big")
    odd = -1
    for candidate in allowed:
        differs = (number ^ int.from_bytes(candidate, "big")).to_bytes(len(found), "big")
        odd &= int.from_bytes(differs.translate(_NONZERO), "big")
    return [at for at, byte in enumerate(odd.to_bytes(len(found), "big")) if byte]
