"""A cluster for the checker: a real name space in memory, and iods that know which blocks exist."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping

import trio

from common import codec
from common.errors import Code, KaError
from nfsp import keys
from nfsp.fsck.chunks import HEADER_SIZE, ChunkFile
from nfsp.fsck.findings import Finding, Outcome, Report
from nfsp.fsck.run import check
from nfsp.fsck.steps import Record
from nfsp.model import BLOCK_SIZE, ROOT, Inode, Remains
from nfsp.striping import column_cut, pieces
from tests.support.memory_view import MemoryView
from tests.support.space import CLUSTER_MAP, START_NS, SUPERBLOCK, Space

SESSION = 1


class FakeMds:
    """Pins copies; repairs under the condition.  `before_pin` lets the world move on."""

    def __init__(self, view: MemoryView) -> None:
        self.view = view
        self.pinned: MemoryView | None = None
        self.pin_count = 0
        self.before_pin: Callable[[int], None] = lambda pin: None
        self.upkeep: Callable[[], None] = lambda: None

    async def snapshot_open(self) -> None:
        assert self.pinned is None, "one view at a time"
        self.before_pin(self.pin_count)
        self.pin_count += 1
        self.pinned = MemoryView()
        self.pinned.apply(self.view.records)
        await trio.lowlevel.checkpoint()

    async def snapshot_close(self) -> None:
        self.pinned = None
        await trio.lowlevel.checkpoint()

    async def scan(self, start: bytes, end: bytes, count_max: int) -> list[Record]:
        await trio.lowlevel.checkpoint()
        assert self.pinned is not None
        return self.pinned.scan(start, end, count_max)

    async def repair(
        self, expected: Mapping[bytes, bytes | None], records: Mapping[bytes, bytes | None]
    ) -> None:
        await trio.lowlevel.checkpoint()
        for key, value in expected.items():
            if self.view.get(key) != value:
                raise KaError(Code.EBUSY)
        self.view.apply(records)
        self.upkeep()


class FakeIod:
    """Chunk files as sets of (row, block)."""

    def __init__(self) -> None:
        self.files: dict[tuple[int, int], set[tuple[int, int]]] = {}
        self.corrupt: dict[tuple[int, int], str] = {}
        self.before_list: Callable[[], None] = lambda: None
        self.before_extents: Callable[[], None] = lambda: None
        self.error: KaError | None = None

    def put(self, ino: int, column: int, row: int = 0, block: int = 0) -> None:
        self.files.setdefault((ino, column), set()).add((row, block))

    async def list_chunks(
        self, after_ino: int, after_column: int, count_max: int
    ) -> list[ChunkFile]:
        await trio.lowlevel.checkpoint()
        if self.error:
            raise self.error
        self.before_list()
        places = sorted(place for place in self.files if place > (after_ino, after_column))
        found = []
        for place in places[: min(count_max, 3)]:
            blocks = self.files[place]
            rows = {row for row, _ in blocks}
            row_size = HEADER_SIZE + SUPERBLOCK.layout.chunk_size
            last_row, last_block = max(blocks)
            size = last_row * row_size + HEADER_SIZE + (last_block + 1) * BLOCK_SIZE
            allocated = len(rows) * HEADER_SIZE + len(blocks) * BLOCK_SIZE
            found.append(ChunkFile(*place, size, allocated))
        return found

    async def extents(
        self, ino: int, column: int, chunk_size: int, row: int
    ) -> tuple[list[tuple[int, int, int]], int]:
        await trio.lowlevel.checkpoint()
        self.before_extents()
        blocks = sorted(at for at in self.files.get((ino, column), ()) if at[0] >= row)
        here = [(at, block * BLOCK_SIZE, BLOCK_SIZE) for at, block in blocks if at == row]
        return here, row + 1 if any(at > row for at, _ in blocks) else -1

    async def verify(self, ino: int, column: int) -> list[str]:
        await trio.lowlevel.checkpoint()
        line = self.corrupt.get((ino, column))
        return [line] if line else []

    async def remove(self, files: list[tuple[int, int]]) -> None:
        await trio.lowlevel.checkpoint()
        for place in files:
            self.files.pop(place, None)


class Cluster:
    """A small name space with a bit of everything, and its data; consistent as made."""

    def __init__(self) -> None:
        self.space = Space()
        self.view = self.space.view
        self.view.apply({keys.session(SESSION): b"\x80"})
        self.view.apply({keys.NEXT_SESSION: b"\x02"})
        self.mds = FakeMds(self.view)
        self.mds.upkeep = self.upkeep
        self.iods = {iod.iod: FakeIod() for iod in CLUSTER_MAP.iods}
        space = self.space
        self.top = space.mkdir(ROOT, b"top").ino
        self.sub = space.mkdir(self.top, b"sub").ino
        self.deep = space.mkdir(self.sub, b"deep").ino
        self.file = self.make_file(self.sub, b"data", 5_000_000)
        self.small = self.make_file(self.top, b"small", 10)
        self.sparse = self.make_file(self.top, b"sparse", 0)
        space.truncate(self.sparse, 1 << 40)
        space.link(self.small, self.deep, b"other name")
        space.symlink(self.deep, b"link", b"../data")
        space.create(self.deep, b"pipe", stat.S_IFIFO | 0o600)
        space.set_xattr(self.file, b"user.colour", b"red")

    def make_file(self, parent: int, name: bytes, size: int) -> int:
        """Make a file with all its chunks."""
        inode = self.space.create(parent, name)
        self.set_inode(inode.ino, size=size)
        self.write(inode.ino, 0, size)
        return inode.ino

    def inode(self, ino: int) -> Inode:
        record = self.view.get(keys.inode(ino))
        assert record is not None
        return Inode.decode(record)

    def set_inode(self, ino: int, /, **fields: object) -> None:
        inode = self.inode(ino)._replace(**fields)
        self.view.apply({keys.inode(ino): inode.encode()})

    def write(self, ino: int, offset: int, length: int) -> None:
        """Put data on the iods; the metadata are not told."""
        layout = self.inode(ino).layout
        assert layout is not None
        for piece in pieces(layout, offset, length):
            chain = layout.chains[piece.column]
            first, last = piece.offset // BLOCK_SIZE, (piece.offset + piece.length - 1)
            for block in range(first, last // BLOCK_SIZE + 1):
                self.iods[chain].put(ino, piece.column, piece.row, block)

    def upkeep(self) -> None:
        """Carry out the purge and trim queues, as the mds does after a repair."""
        for key, _ in self.view.scan(b"p", b"q", 1000):
            ino = int.from_bytes(key[1:])
            for iod in self.iods.values():
                for place in [place for place in iod.files if place[0] == ino]:
                    del iod.files[place]
            self.view.apply({key: None})
        for key, value in self.view.scan(b"t", b"u", 1000):
            try:
                layout, size = Remains.decode(value)
            except KaError:
                return  # the real one tries again, for ever
            for (ino, column), iod in self.chunk_files():
                if ino == int.from_bytes(key[1:]):
                    row, offset = column_cut(layout, size, column)
                    cut = row, -(-offset // BLOCK_SIZE)
                    left = {at for at in iod.files[ino, column] if at < cut}
                    iod.files[ino, column] = left
                    if not left:
                        del iod.files[ino, column]
            self.view.apply({key: None})

    def chunk_files(self) -> list[tuple[tuple[int, int], FakeIod]]:
        return [(place, iod) for iod in self.iods.values() for place in iod.files]

    def iod_of(self, ino: int, column: int = 0) -> FakeIod:
        layout = self.inode(ino).layout
        assert layout is not None
        return self.iods[layout.chains[column]]

    def places(self, ino: int) -> set[tuple[int, int]]:
        """Return (iod, column) of an inode's chunk files."""
        return {
            (number, column)
            for number, iod in self.iods.items()
            for at, column in iod.files
            if at == ino
        }

    def cookie(self, parent: int, name: bytes) -> int:
        value = self.view.get(keys.dentry(parent, name))
        assert value is not None
        cookie: int = codec.decode(value)[2]
        return cookie

    def check(self, *, repair: bool = False, verify: bool = False) -> Report:
        async def main() -> Report:
            with trio.fail_after(60):
                return await check(
                    self.mds, self.iods, repair=repair, verify=verify, now_ns=START_NS
                )

        return trio.run(main)

    def findings(self, **options: bool) -> list[Finding]:
        return [finding for finding, _ in self.check(**options).results]

    def checks(self, **options: bool) -> list[str]:
        return [finding.check for finding in self.findings(**options)]

    def outcomes(self, **options: bool) -> list[tuple[str, Outcome]]:
        results = self.check(**options).results
        return [(finding.check, outcome) for finding, outcome in results]
