"""Reads from the chunk files of iods on this host, without passing the bytes through their daemons.

The iod says where a chunk lies and what its sums are (`wire.Locate`); the data are read from the
chunk file itself.  Nothing is locked and nobody tells us of changes, so an answer is a hint, and
the bytes must prove themselves.  A read counts only if
  * every block of it was present when we asked, and its bytes fit the sum;
  * the chunk file still has its name after that.
Bytes that lie in the chunk file and fit a sum which the iod has given are what a read at this
moment returns, however old the sum.  Whatever is otherwise (a race with a writer, a hole, damage, a
file that cannot be opened because it is another user's or another mount namespace's) is left to
the ordinary way, which tells one from the other.

Bounded: `SPOTS_MAX` places are kept, each with an open descriptor, and none longer than about two
`KEEP_S`: a deleted file's space must come free.  Never mapped: a file cut short would be SIGBUS.
"""

from __future__ import annotations

import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import trio

from common.checksum import ABSENT
from common.errors import Code, KaError
from common.metrics import counter
from nfsp import wire
from nfsp.client.block_sums import bad_blocks
from nfsp.model import BLOCK_SIZE, Layout
from nfsp.striping import Piece

__all__ = ["SIZE_MIN", "LocalReads"]

SIZE_MIN = 256 * 1024
"""Below, one question for the data costs less than one for their place."""
SPOTS_MAX = 64
KEEP_S = 1.0
BARRED_S = 10.0
"""How long an iod is not asked again whose chunk files cannot be opened here."""
THREADS_MAX = 8

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_bytes_read = counter("nfsp_local_read_bytes_total", "Bytes read from chunk files on this host")

_Key = tuple[int, int, int, int, int]
"""(epoch, iod, inode, column, row)"""
_Locate = Callable[[int, wire.Locate], Awaitable[wire.LocateReply]]


class _Spot:
    """Where one chunk lies; without sums: not to be read here."""

    __slots__ = ("fd", "offset", "sums", "until", "users")

    def __init__(self, fd: int, offset: int, sums: tuple[int, ...], until: float) -> None:
        self.fd = fd
        self.offset = offset
        self.sums = sums
        self.until = until
        self.users = 1

    def release(self) -> None:
        self.users -= 1
        if not self.users and self.fd >= 0:
            os.close(self.fd)


class LocalReads:
    """The chunks of iods on this host that are being read.  `run` must be running."""

    def __init__(self, locate: _Locate, *, patience_s: float) -> None:
        """*locate* asks an iod; a disk may take *patience_s* to answer."""
        self._locate = locate
        self._patience_s = patience_s
        self._spots: OrderedDict[_Key, _Spot] = OrderedDict()
        self._asking: dict[_Key, trio.Event] = {}
        self._barred: dict[int, float] = {}
        self._filled = trio.Event()
        self._threads = trio.CapacityLimiter(THREADS_MAX)

    async def run(self) -> None:
        """Forget what has become old; ends by cancellation."""
        try:
            while True:
                await self._filled.wait()
                await trio.sleep(KEEP_S)
                for key in [key for key, spot in self._spots.items() if not _is_new(spot)]:
                    self._drop(key)
                if not self._spots:
                    self._filled = trio.Event()
        finally:
            for key in list(self._spots):
                self._drop(key)

    async def read(
        self, epoch: int, iod: int, layout: Layout, ino: int, piece: Piece, into: memoryview
    ) -> bool:
        """Fill *into* with a piece of whole blocks; False: it must be read the ordinary way.

        Raises KaError if the iod does not say where the chunk lies, or the disk hangs: a thread may
        then still write into *into*, which must not be used again.
        """
        if self._barred.get(iod, 0.0) > trio.current_time():
            return False
        key = (epoch, iod, ino, piece.column, piece.row)
        spot = await self._spot(key, layout.chunk_size)
        first = piece.offset // BLOCK_SIZE
        sums = spot.sums[first : first + piece.length // BLOCK_SIZE]
        if not sums or ABSENT in sums:
            return False
        spot.users += 1
        try:
            is_true = await self._fill(spot, spot.offset + piece.offset, into, sums)
        finally:
            spot.release()
        if is_true:
            _bytes_read.inc(piece.length)
        elif self._spots.get(key) is spot:
            self._drop(key)
        return is_true

    async def _fill(
        self, spot: _Spot, offset: int, into: memoryview, sums: tuple[int, ...]
    ) -> bool:
        size = _read_now(spot.fd, offset, into)
        try:
            if size < len(into):
                with trio.move_on_after(self._patience_s) as scope:
                    size = await trio.to_thread.run_sync(
                        _read_rest, spot.fd, offset, into, size,
                        limiter=self._threads, abandon_on_cancel=True,
                    )  # fmt: skip
                if scope.cancelled_caught:
                    raise KaError(Code.TIMEOUT, "the disk does not answer")
            packed = struct.pack(f"<{len(sums)}Q", *sums)
            return not bad_blocks(packed, into, size) and os.fstat(spot.fd).st_nlink > 0
        except OSError:
            return False

    async def _spot(self, key: _Key, chunk_size: int) -> _Spot:
        while key in self._asking:
            await self._asking[key].wait()
        spot = self._spots.get(key)
        if spot is not None:
            if _is_new(spot):
                return spot
            self._drop(key)
        asking = self._asking[key] = trio.Event()
        try:
            epoch, iod, ino, column, row = key
            until = trio.current_time() + KEEP_S
            reply = await self._locate(iod, wire.Locate(epoch, ino, column, row, chunk_size))
            spot = self._spots[key] = self._open(iod, reply, until)
        finally:
            del self._asking[key]
            asking.set()
        self._filled.set()
        if len(self._spots) > SPOTS_MAX:
            self._drop(next(iter(self._spots)))
        return spot

    def _open(self, iod: int, reply: wire.LocateReply, until: float) -> _Spot:
        nowhere = _Spot(-1, 0, (), until)
        if not reply.path:
            return nowhere
        try:
            fd = os.open(reply.path, _FLAGS)
            status = os.fstat(fd)
        except OSError:
            self._barred[iod] = trio.current_time() + BARRED_S
            return nowhere
        if not stat.S_ISREG(status.st_mode) or status.st_ino != reply.file_ino:
            os.close(fd)  # made anew since, or another one by the same name
            return nowhere
        sums = struct.unpack(f"<{len(reply.sums) // 8}Q", reply.sums)
        return _Spot(fd, reply.offset, sums, until)

    def _drop(self, key: _Key) -> None:
        self._spots.pop(key).release()


def _is_new(spot: _Spot) -> bool:
    return spot.until > trio.current_time()


def _read_now(fd: int, offset: int, into: memoryview) -> int:
    """Read what is in memory; return how much it was."""
    try:
        return os.preadv(fd, [into], offset, os.RWF_NOWAIT)
    except OSError:  # nothing is; or the file system cannot tell
        return 0


def _read_rest(fd: int, offset: int, into: memoryview, done: int) -> int:
    """Read on until *into* is full or the file ends; return how much there is.  In a thread."""
    os.posix_fadvise(fd, offset + done, len(into) - done, os.POSIX_FADV_WILLNEED)
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if not count:
            break
        done += count
    return done
