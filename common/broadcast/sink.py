"""The sink for files and directories: written beside, verified, put in place.

Nothing at the destination changes before every chunk was read back and found right: what travels
as soon as it is written, while the processor's cache holds it, all else in the end.  Until then
the new files are below a stage, a directory at the destination whose name begins with `.ka-part`;
it stays when a transfer ends early.  What it holds, and what the destination itself holds under
the same names, is summed when the next transfer begins: so resume and delta need no records.

A file of which nothing travels stays where it is; any other is built anew in the stage, out of the
old one's chunks where these are right, and renamed.  Extra files at the destination are left alone.

The destination may be hostile: every path is walked one component at a time below a descriptor,
and no link is followed (`place`).  What the table may say is `image`'s business.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import os
from collections.abc import Collection, Iterator, Sequence

from common.broadcast import chunkset
from common.broadcast.filecache import FileCache, write_at
from common.broadcast.image import Content, Entry, EntryKind, Piece
from common.broadcast.manifest import Manifest
from common.broadcast.place import Place
from common.checksum import Summing
from common.errors import Code, KaError, from_errno
from common.storage import sync_file_system

__all__ = ["FileSink"]

SYNC_ONE_BY_ONE_MAX = 16
"""More files than this are flushed by one call for the whole file system."""


class FileSink:
    """A destination: a file if the image is one, else a directory."""

    is_prompt = True

    def __init__(self, path: str | bytes) -> None:
        self._path = os.fsencode(os.path.abspath(path))
        self._manifest: Manifest | None = None
        self._entries: Sequence[Entry] = ()
        self._content = Content(())
        self._place: Place | None = None
        self._stage = -1
        self._staged: set[int] = set()
        """Entries that have a file in the stage."""
        self._files = FileCache(self._open)
        self._pinned: list[int] = []
        """The descriptor of the only file, kept open for `locate`."""
        self._buffers: list[memoryview] = []
        """To read back into: one for each thread that writes.  Fresh memory costs page faults."""
        self._read_back: dict[int, Summing] = {}
        """Chunks that are being written, with the sum of what reads back."""
        self._right_ones: set[int] = set()
        """Those that have read back as they should, since they were written.

        Not bits in an int: `write` changes it in a thread while `put` does in another.
        """

    # ------------------------------------------------------------ a Sink

    def open(self, manifest: Manifest, entries: Sequence[Entry]) -> int:
        self._manifest, self._entries = manifest, entries
        self._content = Content(entries)
        if self._content.size != manifest.size:
            raise KaError(Code.PROTOCOL, "the table of files does not fit the manifest")
        try:
            return self._prepare()
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, chunks: Sequence[tuple[int, memoryview]]) -> list[int]:
        for chunk, data in chunks:
            self.put(chunk, 0, data)
        return [chunk for chunk, _ in chunks]

    def put(self, chunk: int, at: int, part: memoryview) -> None:
        assert self._manifest is not None
        manifest = self._manifest
        if at == 0:
            self._read_back[chunk] = manifest.algorithm.begin()
            self._right_ones.discard(chunk)
        summing = self._read_back[chunk]
        start, size = manifest.extent(chunk)
        end = at + len(part)
        together = self._content.piece(start + at, len(part)) if self._pinned else None
        if together is not None:  # spares what most of a large file's pieces need not pay for
            self._put_at(self._pinned[0], part, together.offset, summing)
        else:
            for piece in self._content.pieces(start + at, len(part)):
                with self._files.lend(piece.entry) as fd:
                    self._put_at(fd, part[: piece.length], piece.offset, summing)
                part = part[piece.length :]
        if end == size and self._read_back.pop(chunk).digest() == manifest.sum_at(chunk):
            self._right_ones.add(chunk)

    def _put_at(self, fd: int, part: memoryview, offset: int, summing: Summing) -> None:
        """Write a part, and sum what is read back."""
        write_at(fd, part, offset)
        try:
            buffer = self._buffers.pop()
        except IndexError:
            assert self._manifest is not None
            buffer = memoryview(bytearray(self._manifest.chunk_size))
        summing.update(buffer[: os.preadv(fd, [buffer[: len(part)]], offset)])
        self._buffers.append(buffer)

    def verify(self) -> list[int]:
        self._sync_stage()
        bad = [chunk for chunk, right in self._right(self._right_ones) if not right]
        if not bad:
            try:
                self._put_in_place()
            except OSError as error:
                raise self._unwritable(error) from None
        return bad

    def abort(self) -> None:
        """Nothing here waits for anything but the disk."""

    def close(self) -> None:
        self._files.close()
        for fd in self._pinned:
            os.close(fd)
        self._pinned.clear()
        if self._place is not None:
            self._place.close()
            self._place = None
        if self._stage >= 0:
            os.close(self._stage)
            self._stage = -1

    # ------------------------------------------------------------ a Store

    def locate(self, chunk: int) -> tuple[int, int] | None:
        if not self._pinned:
            return None
        assert self._manifest is not None
        piece = self._content.piece(*self._manifest.extent(chunk))
        return None if piece is None else (self._pinned[0], piece.offset)

    def read(self, chunk: int) -> bytes:
        assert self._manifest is not None
        buffer = memoryview(bytearray(self._manifest.extent(chunk)[1]))
        return bytes(self._read_pieces(self._pieces(chunk), buffer) or b"")

    # ------------------------------------------------------------ what is there already

    def _prepare(self) -> int:
        """Take the stage and find out what need not travel."""
        root = self._entries[0]
        self._place = Place(self._path, is_directory=root.kind is EntryKind.DIRECTORY)
        self._stage = self._place.open_stage()
        try:
            fcntl.flock(self._stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = f"{os.fsdecode(self._path)} is being written by another transfer"
            raise KaError(Code.BUSY, reason) from None
        there = set(os.listdir(self._stage))
        names = {os.fsdecode(_stage_name(entry)): i for i, entry in enumerate(self._entries)}
        for name in there.difference(names):
            os.unlink(name, dir_fd=self._stage)  # of another image
        for name in there.intersection(names):
            index = names[name]
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._stage)
            if _fits(fd, self._entries[index]):
                self._staged.add(index)
            else:
                os.unlink(name, dir_fd=self._stage)
            os.close(fd)
        have = chunkset.from_indexes(chunk for chunk, right in self._right() if right)
        self._build(have)
        if len(self._entries) == 1 and self._entries[0].ranges:
            with self._files.lend(0) as fd:
                self._pinned.append(os.dup(fd))
        return have

    def _build(self, have: int) -> None:
        """Make a staged file for each that is not whole, with what is right of the old one."""
        assert self._manifest is not None
        kept: dict[int, list[Piece]] = {}
        lacking: set[int] = set()
        if not have:
            lacking.update(index for index, entry in enumerate(self._entries) if entry.ranges)
        for chunk in range(self._manifest.chunk_count if have else 0):
            for piece in self._pieces(chunk):
                if have >> chunk & 1:
                    kept.setdefault(piece.entry, []).append(piece)
                else:
                    lacking.add(piece.entry)
        for index, entry in enumerate(self._entries):
            if entry.kind is not EntryKind.FILE or index in self._staged:
                continue
            old = self._open_final(entry)
            if old >= 0 and index not in lacking and _fits(old, entry):
                os.close(old)
                continue  # it stays
            self._make_staged(index, entry, old, kept.get(index, []))
        self._files.forget()

    def _make_staged(self, index: int, entry: Entry, old: int, pieces: list[Piece]) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_stage_name(entry), flags, 0o600, dir_fd=self._stage)
        try:
            os.ftruncate(fd, entry.size)
            for piece in pieces:
                _copy(old, fd, piece)
        finally:
            os.close(fd)
            if old >= 0:
                os.close(old)
        self._staged.add(index)

    # ------------------------------------------------------------ the end

    def _sync_stage(self) -> None:
        """Put what is in the stage on stable storage."""
        if len(self._staged) > SYNC_ONE_BY_ONE_MAX:
            sync_file_system(self._stage)
            return
        for index in self._staged:
            with self._files.lend(index) as fd:
                os.fsync(fd)

    def _put_in_place(self) -> None:
        assert self._place is not None
        place = self._place
        directories: list[Entry] = []
        for index, entry in enumerate(self._entries):
            if entry.kind is EntryKind.DIRECTORY:
                place.make_directory(entry)
                directories.append(entry)
            elif entry.kind is EntryKind.HARD_LINK:
                place.make_link(entry)
            elif entry.kind is not EntryKind.FILE:
                place.make_special(entry)
            elif index in self._staged:
                fd = os.open(_stage_name(entry), os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._stage)
                place.dress(fd, entry)
                place.rename_from(self._stage, _stage_name(entry), entry)
            else:
                place.dress(self._open_final(entry), entry)
        self._staged.clear()
        self._files.forget()
        place.remove_stage()
        for entry in reversed(directories):  # what was made inside has changed their times
            place.dress_directory(entry)
        if len(self._entries) > SYNC_ONE_BY_ONE_MAX:
            sync_file_system(self._stage)
        else:
            place.sync_directories()

    def _unwritable(self, error: OSError) -> KaError:
        path = os.fsdecode(self._path)
        reason = error.strerror or str(error)
        return KaError(from_errno(error.errno or 0), f"cannot write {path}: {reason}")

    # ------------------------------------------------------------ files

    def _pieces(self, chunk: int) -> list[Piece]:
        assert self._manifest is not None
        return list(self._content.pieces(*self._manifest.extent(chunk)))

    def _read_pieces(self, pieces: Sequence[Piece], buffer: memoryview) -> memoryview | None:
        """Read a chunk from wherever it is; None when a part of it is nowhere."""
        end = 0
        for piece in pieces:
            try:
                with self._files.lend(piece.entry) as fd:
                    end += os.preadv(fd, [buffer[end : end + piece.length]], piece.offset)
            except FileNotFoundError:
                return None
        return buffer[:end]

    def _right(self, known: Collection[int] = ()) -> Iterator[tuple[int, bool]]:
        """Yield each chunk but the *known* ones, and whether it is there and its sum is right."""
        assert self._manifest is not None
        buffer = memoryview(bytearray(self._manifest.chunk_size))
        absent = -1
        for chunk in range(self._manifest.chunk_count):
            if chunk in known:
                continue
            pieces = self._pieces(chunk)
            if pieces[0].entry == absent:  # the other chunks of a large file
                yield chunk, False
                continue
            data = self._read_pieces(pieces, buffer)
            absent = pieces[0].entry if data is None and len(pieces) == 1 else -1
            yield chunk, data is not None and self._manifest.verify(chunk, data)

    def _open(self, index: int) -> int:
        entry = self._entries[index]
        if index in self._staged:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(_stage_name(entry), flags, dir_fd=self._stage)
        fd = self._open_final(entry)
        if fd < 0:
            raise FileNotFoundError
        return fd

    def _open_final(self, entry: Entry) -> int:
        """Return the file in its final place, or -1 when there is none that can be used."""
        assert self._place is not None
        return self._place.open_file(entry)


def _stage_name(entry: Entry) -> bytes:
    return hashlib.blake2b(entry.path, digest_size=16).hexdigest().encode()


def _fits(fd: int, entry: Entry) -> bool:
    """Return whether a file has the right size, and no data where there should be a hole."""
    size = os.fstat(fd).st_size
    if size != entry.size:
        return False
    if sum(length for _, length in entry.ranges) == size:
        return True
    ends = [offset + length for offset, length in entry.ranges]
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return True
        end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        at = bisect.bisect_left(ends, end)
        if at == len(ends) or entry.ranges[at][0] > start:
            return False
    return True


def _copy(source: int, target: int, piece: Piece) -> None:
    """Copy within the file system, sharing blocks where it can."""
    left, offset = piece.length, piece.offset
    while left:
        try:
            count = os.copy_file_range(source, target, left, offset, offset)
        except OSError:
            count = os.pwrite(target, os.pread(source, min(left, 1 << 20), offset), offset)
        if not count:
            raise KaError(Code.EIO, "the destination was changed while it was being read")
        left -= count
        offset += count
