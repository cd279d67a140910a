"""Sinks for one run of bytes: a block device, and the standard input of a command.

Both take images of one file only.  A device's own content is the only record of what was written
before: it is summed when a transfer begins, and what is right need not travel.  Where the image has
holes the device is made to read as zeros.  A command gets every byte once, in order, holes as
zeros; the chunks are spooled in a nameless file as well, for other nodes to be fed from, and one
counts as written when the command has taken it: so a slow command holds its own node back, and
nobody else.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from common.broadcast import chunkset
from common.broadcast.filecache import write_at
from common.broadcast.image import Content, Entry, holes
from common.broadcast.manifest import Manifest
from common.errors import Code, KaError, from_errno
from common.storage import punch

__all__ = ["CommandSink", "DeviceSink"]

ZEROS = bytes(1 << 20)
PUNCH_SIZE = 1 << 30
"""At once: a disk may take its time, and a thread in a system call cannot be ended."""
SECTOR_SIZE = 4096
"""The largest of any disk: what is aligned to it is aligned."""
SAMPLE_COUNT = 64
"""Chunks that are looked at before all of a device is: it may hold something else altogether."""


class _FlatSink:
    """Chunks in one open file, at the place that the content gives them."""

    def __init__(self) -> None:
        self._fd = -1
        self._manifest: Manifest | None = None
        self._content = Content(())

    def _begin(self, manifest: Manifest, entries: Sequence[Entry]) -> Entry:
        if len(entries) != 1 or entries[0].path:
            raise KaError(Code.USAGE, "a directory can be written to a directory only")
        self._manifest, self._content = manifest, Content(entries)
        if self._content.size != manifest.size:
            raise KaError(Code.PROTOCOL, "the table of files does not fit the manifest")
        return entries[0]

    def locate(self, chunk: int) -> tuple[int, int] | None:
        assert self._manifest is not None
        piece = self._content.piece(*self._manifest.extent(chunk))
        return None if piece is None else (self._fd, piece.offset)

    def read(self, chunk: int) -> bytes:
        assert self._manifest is not None
        pieces = self._content.pieces(*self._manifest.extent(chunk))
        return b"".join(os.pread(self._fd, piece.length, piece.offset) for piece in pieces)

    def put(self, chunk: int, at: int, part: memoryview) -> None:
        assert self._manifest is not None
        start, _ = self._manifest.extent(chunk)
        for piece in self._content.pieces(start + at, len(part)):
            write_at(self._fd, part[: piece.length], piece.offset)
            part = part[piece.length :]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DeviceSink(_FlatSink):
    """A block device, or an existing file that is treated like one."""

    is_prompt = True

    def __init__(self, path: str | bytes, sha256: str = "") -> None:
        """*sha256*: of the whole image, in hex; compared when it is read back."""
        super().__init__()
        self._path = os.fsdecode(path)
        self._sha256 = sha256
        self._entry: Entry | None = None
        self.size = 0
        self.content_size = 0
        """Without holes: what travels at most."""
        self.there_size = 0
        """Of that, what was there already."""

    def open(self, manifest: Manifest, entries: Sequence[Entry]) -> int:
        entry = self._entry = self._begin(manifest, entries)
        try:
            exclusively = os.O_EXCL if stat.S_ISBLK(os.stat(self._path).st_mode) else 0
            # The kernel refuses O_EXCL for a device that is mounted.
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | exclusively)
            room = os.lseek(self._fd, 0, os.SEEK_END)
            if room < entry.size:
                reason = f"{self._path} has {room} bytes, {entry.size} are needed"
                raise KaError(Code.ENOSPC, reason)
            found = self._found(manifest)
            for offset, length in holes(entry):
                self._empty(offset, length)
        except OSError as error:
            reason = f"cannot write {self._path}: {error.strerror}"
            raise KaError(from_errno(error.errno or 0), reason) from None
        self.size, self.content_size = entry.size, manifest.size
        self.there_size = sum(manifest.extent(chunk)[1] for chunk in found)
        return chunkset.from_indexes(found)

    def write(self, chunks: Sequence[tuple[int, memoryview]]) -> list[int]:
        for chunk, data in chunks:
            self.put(chunk, 0, data)
        return [chunk for chunk, _ in chunks]

    def verify(self) -> list[int]:
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # read the device, not memory
        return self._read_back()

    def abort(self) -> None:
        """Nothing here waits for anything but the disk."""

    def _found(self, manifest: Manifest) -> list[int]:
        """Return the chunks that are there, or none if not even one of a sample is."""

        def is_there(chunk: int) -> bool:
            try:
                return manifest.verify(chunk, self.read(chunk))
            except OSError:
                return False  # a bad sector; writing may cure it

        count = manifest.chunk_count
        if not any(is_there(chunk) for chunk in range(0, count, max(1, count // SAMPLE_COUNT))):
            return []
        return [chunk for chunk in range(count) if is_there(chunk)]

    def _empty(self, offset: int, length: int) -> None:
        """Make a range read as zeros: given back to the disk where it promises that, or written."""
        end = offset + length
        first = min(end, -(-offset // SECTOR_SIZE) * SECTOR_SIZE)
        last = max(first, end // SECTOR_SIZE * SECTOR_SIZE)
        self._write_zeros(offset, first)
        while first < last and punch(self._fd, first, min(PUNCH_SIZE, last - first)):
            first += min(PUNCH_SIZE, last - first)
        self._write_zeros(first, end)

    def _write_zeros(self, offset: int, end: int) -> None:
        """Write zeros where there are none."""
        while offset < end:
            zeros = memoryview(ZEROS)[: end - offset]
            if os.pread(self._fd, len(zeros), offset) != zeros:
                write_at(self._fd, zeros, offset)
            offset += len(zeros)

    def _read_back(self) -> list[int]:
        """Return the damaged chunks; raises EIO, or PAYLOAD_CORRUPT if the image is another one."""
        manifest, entry = self._manifest, self._entry
        assert manifest is not None
        assert entry is not None
        total = hashlib.sha256()
        wrong, position = [], 0
        for chunk in range(manifest.chunk_count):
            data = memoryview(self.read(chunk))
            if not manifest.verify(chunk, data):
                wrong.append(chunk)
            for piece in self._content.pieces(*manifest.extent(chunk)):
                self._read_hole(position, piece.offset, total)
                self._take(total, data[: piece.length])
                data = data[piece.length :]
                position = piece.offset + piece.length
        self._read_hole(position, entry.size, total)
        if self._sha256 and not wrong and total.hexdigest() != self._sha256:
            raise KaError(Code.PAYLOAD_CORRUPT, "the stream is not the image: its sum differs")
        return wrong

    def _read_hole(self, offset: int, end: int, total: hashlib._Hash) -> None:
        while offset < end:
            data = os.pread(self._fd, min(len(ZEROS), end - offset), offset)
            if data != memoryview(ZEROS)[: end - offset]:
                raise KaError(Code.EIO, f"{self._path} does not read as zeros at {offset}")
            self._take(total, data)
            offset += len(data)

    def _take(self, total: hashlib._Hash, data: bytes | memoryview) -> None:
        if self._sha256:
            total.update(data)


class CommandSink(_FlatSink):
    """The standard input of a command, which is run without a shell."""

    is_prompt = False

    def __init__(self, command: Sequence[str], spool_directory: str | None = None) -> None:
        super().__init__()
        self._command = list(command)
        self._spool_directory = spool_directory
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._entry: Entry | None = None
        self._spooled = 0
        """A set of chunks."""
        self._next = 0
        """The chunk that the command gets next."""
        self._position = 0
        """Bytes that the command has had."""

    def open(self, manifest: Manifest, entries: Sequence[Entry]) -> int:
        self._entry = self._begin(manifest, entries)
        try:
            with tempfile.TemporaryFile(dir=self._spool_directory, prefix="ka-spool-") as spool:
                self._fd = os.dup(spool.fileno())
            with self._lock:
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE)
        except OSError as error:
            reason = f"cannot run {self._command[0]}: {error.strerror}"
            raise KaError(from_errno(error.errno or 0), reason) from None
        return 0

    def write(self, chunks: Sequence[tuple[int, memoryview]]) -> list[int]:
        assert self._manifest is not None
        for chunk, data in chunks:
            self.put(chunk, 0, data)
            self._spooled |= 1 << chunk
        taken = []
        while self._spooled >> self._next & 1:
            data = memoryview(self.read(self._next))
            for piece in self._content.pieces(*self._manifest.extent(self._next)):
                self._feed_zeros(piece.offset)
                self._feed(data[: piece.length])
                data = data[piece.length :]
            taken.append(self._next)
            self._next += 1
        return taken

    def verify(self) -> list[int]:
        """The command has had everything: wait for its verdict."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._entry is not None
        self._feed_zeros(self._entry.size)
        self._process.stdin.close()
        code = self._process.wait()
        if code:
            raise self._failure(code)
        return []

    def abort(self) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()

    def close(self) -> None:
        if self._process is not None:
            self.abort()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait()
        super().close()

    def _feed_zeros(self, until: int) -> None:
        while self._position < until:
            self._feed(memoryview(ZEROS)[: until - self._position])

    def _feed(self, data: memoryview) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            while data:
                count = os.write(self._process.stdin.fileno(), data)
                data = data[count:]
                self._position += count
        except BrokenPipeError:
            raise self._failure(self._process.wait()) from None

    def _failure(self, code: int) -> KaError:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        return KaError(Code.EIO, f"{self._command[0]} {how}")
