"""The chunk store of one iod: all chunk files below one directory.

Blocking; called from worker threads.  It owns the directory (a second opener is refused) and lets
one thread at a time into each chunk file; two chunk files never wait for each other.  What it
raises is KaError.

Position: chunk.py (format) -> chunkfile.py (order of system calls) -> this -> the iod's server.

Invariants
  * data come in and go out with their block sums: a payload that fails them changes nothing,
    stored data that fail them are never returned;
  * after `sync` returns, everything written before it was called survives a power loss.

Not here: striping, epochs, replication, the network.  `trim`, `zero` and `remove` reach stable
storage like writes do: by a sync.  Format and crash points: docs/on-disk-format.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

from common.checksum import ABSENT, Buffer, block_sum
from common.errors import Code, KaError, from_errno
from nfsp.iod import chunk, chunkplan
from nfsp.iod.chunk import BLOCK_SIZE, BOOT_ID_SIZE, ChunkHeader
from nfsp.iod.chunkcache import ChunkFileCache
from nfsp.iod.chunkfile import ChunkFile, Payload
from nfsp.iod.chunkrows import ChunkRows, OpenFile
from nfsp.iod.chunktree import ChunkFileInfo, ChunkTree
from nfsp.iod.disk import Disk

__all__ = ["ChunkFileInfo", "ChunkStore", "Extent", "Finding", "Place", "ReadPlan", "Usage"]

_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")
_RESERVE_BYTES = 64 * 1024 * 1024  # headers and metadata of the local file system
_STATVFS_TTL_S = 1.0


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of present blocks: [start, end) of the chunk in that row."""

    row: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Damage that a scrub found; `block` is None when it is the header."""

    inode: int
    column: int
    row: int
    block: int | None
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Space of the local file system; `available_bytes` leaves the reserve out."""

    total_bytes: int
    free_bytes: int
    available_bytes: int
    files_total: int
    files_free: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk's data begin in which file, and the sums of its blocks."""

    path: str
    file_inode: int
    offset: int
    sums: Sequence[int]


class ReadPlan:
    """Where the data of an aligned range lie.

    `sums` has one entry per block; `length` bytes at `file_offset` of `fd` are stored, what is
    missing behind them is zeros, and so is every block whose sum is ABSENT, whatever is read
    there.  The descriptor lives until `release`, or the end of the `with`.

    Nothing is verified and nothing is locked: a write at the same time makes the data differ from
    the sums, a trim makes them end early.  The reader notices and asks for `read_verified`.
    """

    __slots__ = ("_file", "fd", "file_offset", "length", "sums")

    def __init__(
        self, sums: list[int], file: OpenFile | None, file_offset: int, length: int
    ) -> None:
        self.sums = sums
        self.fd = file.fd if file is not None else -1
        self.file_offset = file_offset
        self.length = length
        self._file = file

    def release(self) -> None:
        file, self._file, self.fd = self._file, None, -1
        if file is not None:
            file.release()

    def __enter__(self) -> ReadPlan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class ChunkStore:
    """The chunk files below *directory*, which is created if it does not exist."""

    def __init__(
        self,
        directory: Path,
        *,
        fd_cache_max: int = 512,
        reserve_bytes: int = _RESERVE_BYTES,
        boot_id: bytes | None = None,
        disk: Disk | None = None,
    ) -> None:
        """Open the store; EBUSY if somebody else has it open.

        *boot_id* names this boot of the machine, *disk* does the system calls; both default to
        the real ones.
        """
        self._disk = disk or Disk()
        self.boot_id = boot_id or bytes.fromhex(_BOOT_ID_PATH.read_text().strip().replace("-", ""))
        assert len(self.boot_id) == BOOT_ID_SIZE
        self._reserve_bytes = reserve_bytes
        self._data = directory / "data"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = self._take(directory / "lock")
            self._data.mkdir(mode=0o700, exist_ok=True)
            for path in (directory, directory.parent):
                self._disk.fsync_directory(str(path))
        except OSError as error:
            raise _translated(error, directory=directory) from error
        self._tree = ChunkTree(str(self._data), self._disk)
        self._files = ChunkFileCache(fd_cache_max, self._make_file)
        self._space_lock = threading.Lock()
        self._space_left = 0
        self._space_known_until_s = 0.0

    @staticmethod
    def _take(path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise KaError(
                Code.EBUSY, "another process uses this chunk store", directory=path.parent
            ) from None
        return fd

    def close(self) -> None:
        """Close all files and give the directory free; no operation may be under way."""
        try:
            self._files.close()
        finally:
            os.close(self._lock_fd)

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def exists(self, inode: int, column: int) -> bool:
        """Return whether there is such a chunk file."""
        return os.path.exists(self._tree.path(inode, column))

    # -- data

    def write(
        self,
        inode: int,
        column: int,
        row: int,
        offset: int,
        pieces: Sequence[Buffer],
        sums: Sequence[int],
        *,
        chunk_size: int,
        sync: bool = False,
    ) -> int:
        """Write consecutive *pieces* at *offset* of the chunk; return the chunk's new version.

        *sums* has for each touched block the block sum of the piece of data inside that block.
        Raises PAYLOAD_CORRUPT if one does not fit, ENOSPC if there is no room, CHUNK_CORRUPT if
        old data that must be kept are damaged; nothing is changed then.
        """
        length = sum(map(len, pieces))
        _check_range(row, offset, length, chunk_size)
        overlaps = chunk.block_overlaps(offset, length)
        parts = chunk.split_by_block(pieces, overlaps)
        if len(sums) != len(parts):
            raise KaError(Code.EINVAL, "one sum is needed for each touched block")
        for overlap, part, expected in zip(overlaps, parts, sums, strict=True):
            if block_sum(part, BLOCK_SIZE) != expected:
                raise KaError(
                    Code.PAYLOAD_CORRUPT, inode=inode, column=column, row=row, block=overlap.block
                )
        refuse_new = not self._has_room(length)
        payload = Payload(offset, length, pieces, overlaps, parts, sums)
        with self._locked(inode, column) as file:
            version = file.write(row, payload, chunk_size=chunk_size, refuse_new=refuse_new)
        if sync:
            self.sync(inode, column)
        return version

    def read(
        self, inode: int, column: int, row: int, offset: int, length: int, *, chunk_size: int
    ) -> ReadPlan:
        """Return where the data of a range aligned to blocks lie; it is not verified here."""
        _check_aligned(row, offset, length, chunk_size)
        first, last = offset // BLOCK_SIZE, (offset + length) // BLOCK_SIZE
        with self._locked(inode, column) as file:
            rows = file.open()
            if rows is None:
                return ReadPlan([ABSENT] * (last - first), None, 0, 0)
            header = rows.header(row, chunk_size)
            stored = chunkplan.stored_length(header, offset, length, rows.size)
            start = chunk.data_start(row, chunk_size) + offset
            held = rows.file.acquire() if stored else None
            return ReadPlan(list(header.sums[first:last]), held, start, stored)

    def read_now(
        self, inode: int, column: int, row: int, offset: int, length: int, *, chunk_size: int
    ) -> tuple[list[int], bytes] | None:
        """Return what `read_verified` would, unverified, if memory holds it; None: ask again there.

        Never waits, neither for a disk nor for a lock: for callers that must not be held up.
        """
        _check_aligned(row, offset, length, chunk_size)
        first, last = offset // BLOCK_SIZE, (offset + length) // BLOCK_SIZE
        with self._files.locked_now(inode, column) as file:
            rows = file.rows if file is not None else None
            header = rows.known(row, chunk_size) if rows is not None else None
            if rows is None or header is None:
                return None
            data = rows.read_now(header, offset, length)
            return None if data is None else (list(header.sums[first:last]), data)

    def read_verified(
        self, inode: int, column: int, row: int, offset: int, length: int, *, chunk_size: int
    ) -> tuple[list[int], bytes]:
        """Return the sums and the stored data of a range aligned to blocks, verified.

        What is missing behind the data is zeros.  Raises CHUNK_CORRUPT.
        """
        _check_aligned(row, offset, length, chunk_size)
        first, last = offset // BLOCK_SIZE, (offset + length) // BLOCK_SIZE
        with self._locked(inode, column) as file:
            rows = file.open()
            if rows is None:
                return [ABSENT] * (last - first), b""
            header = rows.header(row, chunk_size)
            return list(header.sums[first:last]), rows.read_verified(header, offset, length)

    def locate(self, inode: int, column: int, row: int, *, chunk_size: int) -> Place | None:
        """Return where a chunk lies, for a reader who checks what is there; None: nowhere."""
        _check_range(row, 0, 1, chunk_size)
        with self._locked(inode, column) as file:
            rows = file.open()
            if rows is None:
                return None
            return self._place(rows, rows.header(row, chunk_size))

    def locate_now(self, inode: int, column: int, row: int, *, chunk_size: int) -> Place | None:
        """Return what `locate` would, if memory holds it; None: ask again there.  Never waits."""
        _check_range(row, 0, 1, chunk_size)
        with self._files.locked_now(inode, column) as file:
            rows = file.rows if file is not None else None
            header = rows.known(row, chunk_size) if rows is not None else None
            return None if rows is None or header is None else self._place(rows, header)

    def _place(self, rows: ChunkRows, header: ChunkHeader) -> Place | None:
        path = self._tree.path(header.inode, header.column)
        start = chunk.data_start(header.row, header.chunk_size)
        if start >= rows.size:
            return None
        return Place(path, os.fstat(rows.fd).st_ino, start, header.sums)

    def trim(self, inode: int, column: int, *, row: int, offset: int, chunk_size: int) -> None:
        """Drop everything at or after that place of the chunk file."""
        _check_range(row, offset, 1, chunk_size)
        with self._locked(inode, column) as file:
            file.trim(row, offset, chunk_size=chunk_size)

    def zero(
        self, inode: int, column: int, row: int, offset: int, length: int, *, chunk_size: int
    ) -> None:
        """Punch a hole into one chunk: whole blocks become absent, parts of blocks zeros."""
        _check_range(row, offset, length, chunk_size)
        with self._locked(inode, column) as file:
            file.zero(row, offset, length, chunk_size=chunk_size)

    def remove(self, inode: int, column: int) -> bool:
        """Remove the chunk file; return whether there was one."""
        with self._locked(inode, column) as file:
            return file.remove()

    # -- durability

    def sync(self, inode: int, column: int) -> None:
        """Make everything written to the chunk file before this call durable."""
        with self._pinned(inode, column) as file, file.sync_lock:
            with file.lock:
                rows = file.begin_sync()
                if rows is None:
                    return
                held, entry_durable = rows.file.acquire(), rows.entry_durable
            try:
                self._disk.fdatasync(held.fd)
                if not entry_durable:
                    self._tree.sync_entry(inode)
            except OSError:
                with file.lock:
                    file.sync_failed = True
                raise
            finally:
                held.release()
            with file.lock:
                file.end_sync(rows)

    def sync_many(self, keys: Sequence[tuple[int, int]]) -> None:
        """Make several chunk files durable; all are tried, the first failure is raised."""
        failure: KaError | None = None
        for inode, column in keys:
            try:
                self.sync(inode, column)
            except KaError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def settle(self) -> None:
        """Write down what earlier syncs made durable; to be called when the iod has time.

        Until then, and after a restart of the machine, damage to that data would be taken for the
        trace of an interrupted write.  Files in use at this moment are left for the next time.
        """
        for inode, column in self._files.idle():
            with self._locked(inode, column) as file:
                file.settle()

    # -- inspection

    def list(self, after: tuple[int, int] | None, limit: int) -> list[ChunkFileInfo]:
        """Return up to *limit* chunk files after that (inode, column), in order."""
        return list(islice(self._tree.walk(after), limit))

    def extents(
        self, inode: int, column: int, *, chunk_size: int, row: int = 0, rows_max: int = 1024
    ) -> tuple[Sequence[Extent], int | None]:
        """Return the runs of present blocks from *row* on, and the row to go on from.

        At most *rows_max* rows with anything in them are looked at; None says that was all.
        """
        _check_range(row, 0, 1, chunk_size)
        extents: list[Extent] = []
        with self._locked(inode, column) as file:
            rows = file.open()
            if rows is None:
                return extents, None
            for count, present in enumerate(rows.rows_from(row, chunk_size)):
                if count == rows_max:
                    return extents, present
                header = rows.header(present, chunk_size)
                extents += [Extent(present, *run) for run in chunkplan.present_runs(header)]
        return extents, None

    def verify(self, inode: int, column: int) -> Sequence[Finding]:
        """Scrub one chunk file: read all of it from the disk and return what is damaged.

        The file is free for others between two rows.
        """
        with self._locked(inode, column) as file:
            rows = file.open()
            try:
                chunk_size = rows.discover_chunk_size() if rows is not None else None
            except KaError as error:
                return [Finding(inode, column, 0, None, error.message)]
        if chunk_size is None:
            return []
        findings: list[Finding] = []
        row: int | None = 0
        while row is not None:
            with self._locked(inode, column) as file:
                rows = file.open()
                row = next(rows.rows_from(row, chunk_size), None) if rows is not None else None
                if rows is None or row is None:
                    break
                try:
                    blocks = rows.damaged_blocks(rows.header(row, chunk_size))
                except KaError as error:
                    findings.append(Finding(inode, column, row, None, error.message))
                else:
                    message = "stored data fail their checksum"
                    findings += [Finding(inode, column, row, block, message) for block in blocks]
            row += 1
        return findings

    def usage(self) -> Usage:
        """Return the space of the local file system."""
        status = os.statvfs(self._data)
        available = status.f_bavail * status.f_frsize - self._reserve_bytes
        return Usage(
            status.f_blocks * status.f_frsize,
            status.f_bfree * status.f_frsize,
            max(0, available),
            status.f_files,
            status.f_ffree,
        )

    # -- helpers

    def _make_file(self, inode: int, column: int) -> ChunkFile:
        return ChunkFile(inode, column, tree=self._tree, disk=self._disk, boot_id=self.boot_id)

    @contextlib.contextmanager
    def _pinned(self, inode: int, column: int) -> Iterator[ChunkFile]:
        try:
            with self._files.pinned(inode, column) as file:
                yield file
        except OSError as error:
            raise _translated(error, inode=inode, column=column) from error

    @contextlib.contextmanager
    def _locked(self, inode: int, column: int) -> Iterator[ChunkFile]:
        with self._pinned(inode, column) as file, file.lock:
            yield file

    def _has_room(self, length: int) -> bool:
        """Return whether new data of *length* leave the reserve untouched."""
        now_s = time.monotonic()
        with self._space_lock:
            if now_s >= self._space_known_until_s:
                self._space_left = self.usage().available_bytes
                self._space_known_until_s = now_s + _STATVFS_TTL_S
            self._space_left -= length
            return self._space_left >= 0


def _translated(error: OSError, **context: object) -> KaError:
    number = errno.ENOSPC if error.errno == errno.EDQUOT else error.errno or errno.EIO
    return KaError(from_errno(number), error.strerror or "", **context)


def _check_range(row: int, offset: int, length: int, chunk_size: int) -> None:
    if not chunk.is_chunk_size(chunk_size):
        raise KaError(Code.EINVAL, "that is no chunk size", chunk_size=chunk_size)
    if row < 0 or offset < 0 or length <= 0 or offset + length > chunk_size:
        raise KaError(
            Code.EINVAL, "the range is outside of the chunk", row=row, offset=offset, length=length
        )


def _check_aligned(row: int, offset: int, length: int, chunk_size: int) -> None:
    _check_range(row, offset, length, chunk_size)
    if offset % BLOCK_SIZE or length % BLOCK_SIZE:
        raise KaError(
            Code.EINVAL, "the range is not aligned to blocks", offset=offset, length=length
        )
