"""Gathering: a file or a directory of every node, each under the node's name in one directory.

What nodes give (karun/agent/give.py) comes up the tree as output of a command does, with its
back-pressure: no more than a window of each node is ever in memory.  It is written to a part file;
when all has come, and its sum is right, it is put in its place.  Nothing is seen there before.

A node is not trusted with this machine: its table of files is checked as that of a broadcast is,
no link is followed, set-id bits, capabilities and device nodes are left out.
"""

from __future__ import annotations

import os
from _blake2 import blake2b
from collections.abc import Callable, Sequence
from io import BufferedReader

import trio

from common.broadcast.image import Entry, EntryKind, decode_table, image_id
from common.broadcast.place import Place
from common.errors import Code, KaError, from_errno
from karun import archive
from karun.agent import frames
from karun.agent.give import SUM_SIZE
from karun.agent.heavy import HEAVY
from karun.copied import Copied, Step
from karun.crew import Crew, require_file_names
from karun.feed import CHUNK_SIZE
from karun.orders import Invocation
from karun.reasons import refusal
from karun.results import printable

__all__ = ["gather"]

PLACING_COUNT_MAX = 4
"""Nodes whose files are put in their places at a time."""
WORDS_SIZE_MAX = 4096
COPY_SIZE = 1 << 20
TABLE_SIZE_MAX = 64 << 20
_PART = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_LEFT_OUT = (EntryKind.CHARACTER, EntryKind.BLOCK)


async def gather(
    crew: Crew,
    source: str,
    directory: str,
    *,
    sudo: bool,
    on_progress: Callable[[Step], None] | None,
) -> list[Copied]:
    """See `karun.crew.Crew.gather`."""
    require_file_names(crew.nodes)
    try:
        await trio.to_thread.run_sync(lambda: os.makedirs(directory, exist_ok=True))
    except OSError as error:
        raise _unwritable(directory, error) from None
    heavy = await trio.to_thread.run_sync(archive.build_heavy)
    gathering = _Gathering(crew, directory, source, heavy, on_progress, sudo=sudo)
    try:
        return await gathering.run()
    finally:
        gathering.remove_parts()


class _Gathering:
    """One gather; also the sink of its command."""

    def __init__(
        self,
        crew: Crew,
        directory: str,
        source: str,
        heavy: archive.Archive,
        on_progress: Callable[[Step], None] | None,
        *,
        sudo: bool,
    ) -> None:
        self._crew = crew
        self._directory = os.fsencode(os.path.abspath(directory))
        self._name = source
        self._invocation = Invocation(
            ["give", heavy.digest, source], fed=True, task=True, sudo=sudo
        )
        self._heavy = heavy
        self._is_heavy_sent = False
        self._on_progress = on_progress
        self._results: dict[int, Copied] = {}
        self._kinds: dict[int, bytes] = {}
        """The first line of each: how it comes."""
        self._sums: dict[int, blake2b] = {}
        self._stderr: dict[int, bytes] = {}
        self._size = self._done_count = 0
        self._arrived, self._placing = trio.open_memory_channel[int](len(crew.nodes))
        self._error: KaError | None = None
        self._changed = trio.Event()

    async def run(self) -> list[Copied]:
        orders = self._crew.orders
        self._command = orders.command(self._invocation, self)
        self._command.done = self._notice
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(PLACING_COUNT_MAX):
                    nursery.start_soon(self._place_arrived)
                while len(self._results) < len(self._crew.nodes) and self._error is None:
                    await self._changed.wait()
                    self._changed = trio.Event()
                nursery.cancel_scope.cancel()
        finally:
            if self._command.pending and not orders.closed:
                orders.abandon(self._command)
        if self._error is not None:
            raise self._error
        return [self._results[rank] for rank in range(len(self._crew.nodes))]

    def remove_parts(self) -> None:
        for rank in range(len(self._crew.nodes)):
            try:
                os.unlink(self._part(rank))
            except OSError:
                pass

    def _notice(self) -> None:
        self._changed.set()

    def _part(self, rank: int) -> bytes:
        name = os.fsencode(self._crew.nodes[rank])
        return os.path.join(self._directory, b".%s.karun-%d" % (name, os.getpid()))

    def _finish(self, rank: int, reason: str | None) -> None:
        self._results[rank] = Copied(rank, self._crew.nodes[rank], reason)
        self._done_count += reason is None
        self._notice()
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            step = Step(self._name, 0, len(self._crew.nodes), self._done_count, self._size)
            self._on_progress(step)

    # ------------------------------------------------------------ what comes (Sink)

    def output(self, rank: int, stream: int, data: bytes) -> None:
        if stream == 2:
            self._stderr[rank] = (self._stderr.get(rank, b"") + data)[-WORDS_SIZE_MAX:]
            return
        if rank not in self._sums:
            line, newline, data = (self._kinds.get(rank, b"") + data).partition(b"\n")
            self._kinds[rank] = line[:WORDS_SIZE_MAX]
            if not newline:
                return
            self._sums[rank] = blake2b(digest_size=SUM_SIZE)
            if line == b"need":
                self._send_heavy()
        self._sums[rank].update(data)
        self._size += len(data)
        try:
            fd = os.open(self._part(rank), _PART, 0o600)
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(fd, left) :]
            finally:
                os.close(fd)
        except OSError as error:
            self._error = _unwritable(os.fsdecode(self._directory), error)
            self._notice()
        self._tell()

    def exited(self, rank: int, code: int, signal: int) -> None:
        lines = self._stderr.pop(rank, b"").decode("utf-8", "replace").splitlines()
        last = lines[-1] if lines else ""
        sums = self._sums.get(rank)
        if code or signal:
            how = f"was ended by signal {signal}" if signal else f"failed with code {code}"
            said = refusal(last) or printable(last)
            self._finish(rank, said if last and code else how)
        elif sums is None or last != f"sum {sums.hexdigest()}":
            self._finish(rank, "what came is damaged or cut off")
        else:
            self._arrived.send_nowait(rank)

    def failed(self, rank: int, _stage: str, reason: str) -> None:
        self._finish(rank, reason)

    def _send_heavy(self) -> None:
        if not self._is_heavy_sent:
            self._is_heavy_sent = True
            frame = frames.encode(HEAVY, 0, self._heavy.data)
            for at in range(0, len(frame), CHUNK_SIZE):
                self._crew.orders.feed(self._command, frame[at : at + CHUNK_SIZE])

    # ------------------------------------------------------------ putting it in its place

    async def _place_arrived(self) -> None:
        async for rank in self._placing:
            target = os.path.join(self._directory, os.fsencode(self._crew.nodes[rank]))
            reason: str | None = None
            try:
                await trio.to_thread.run_sync(
                    _put, self._part(rank), self._kinds[rank] == b"small", target
                )
            except KaError as error:
                reason = str(error)
            except OSError as error:
                reason = str(_unwritable(os.fsdecode(target), error))
            self._finish(rank, reason)


def _put(part: bytes, is_small: bool, target: bytes) -> None:
    """Put what has come in its place; raises KaError, OSError."""
    with open(part, "rb") as file:
        size = int.from_bytes(file.read(4), "little")
        if size > TABLE_SIZE_MAX:
            raise KaError(Code.PROTOCOL, "a table of files of impossible size")
        table = file.read(size)
        if is_small:
            length = os.fstat(file.fileno()).st_size - file.tell()
            entries = [_plain(table, length)]
        else:
            entries = decode_table(table, image_id("", table))
        _put_entries(file, entries, target)
    os.unlink(part)


def _plain(facts: bytes, length: int) -> Entry:
    try:
        mode, uid, gid, mtime_ns = map(frames.number, frames.unpack(facts))
    except ValueError:
        raise KaError(Code.PROTOCOL, "not the facts of a file") from None
    ranges = ((0, length),) if length else ()
    return Entry(b"", EntryKind.FILE, mode, uid, gid, mtime_ns, length, ranges)


def _put_entries(file: BufferedReader, entries: Sequence[Entry], target: bytes) -> None:
    place = Place(target, is_directory=entries[0].kind is EntryKind.DIRECTORY)
    try:
        stage = place.open_stage()
        directories = []
        try:
            for untrusted in entries:
                entry = _harmless(untrusted)
                if entry.kind is EntryKind.DIRECTORY:
                    place.make_directory(entry)
                    directories.append(entry)
                elif entry.kind is EntryKind.HARD_LINK:
                    place.make_link(entry)
                elif entry.kind is EntryKind.FILE:
                    place.dress(_staged(file, stage, entry), entry)
                    place.rename_from(stage, b"part", entry)
                elif entry.kind not in _LEFT_OUT:
                    place.make_special(entry)
        finally:
            _remove_stage(place, stage)
        for entry in reversed(directories):  # what was made inside has changed their times
            place.dress_directory(entry)
        place.sync_directories()
    finally:
        place.close()


def _staged(file: BufferedReader, stage: int, entry: Entry) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(b"part", flags, 0o600, dir_fd=stage)
    try:
        os.ftruncate(fd, entry.size)
        for offset, length in entry.ranges:
            while length:
                data = file.read(min(length, COPY_SIZE))
                if not data:
                    raise KaError(Code.PROTOCOL, "less came than the table of files says")
                os.pwrite(fd, data, offset)
                offset += len(data)
                length -= len(data)
        os.fsync(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_stage(place: Place, stage: int) -> None:
    try:
        os.unlink(b"part", dir_fd=stage)
    except FileNotFoundError:
        pass
    os.close(stage)
    place.remove_stage()


def _harmless(entry: Entry) -> Entry:
    xattrs = tuple(one for one in entry.xattrs if one[0].startswith((b"user.", b"system.posix")))
    return entry._replace(mode=entry.mode & 0o1777, xattrs=xattrs)


def _unwritable(path: str, error: OSError) -> KaError:
    reason = f"cannot write {path}: {error.strerror or error}"
    return KaError(from_errno(error.errno or 0), reason)
