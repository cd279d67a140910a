"""Copying: one or more sources to every node of a run, verified there.

Small files ride on the run itself: they go down its connections, and the agent puts them in their
places (karun/agent/place.py).  Everything else is broadcast (karun/broadcasting.py), by a process
on each node that is started for it.

A copy ends for each node by itself; what fails for all (a source that cannot be read, or changes
meanwhile) is a KaError.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from common.broadcast.source import spool_stream
from common.errors import Code, KaError, from_errno
from karun.agent import place
from karun.agent.process import CODE_NOT_FOUND
from karun.copied import Copied, CopyOptions, Step, with_latecomers
from karun.crew import Crew, Outcome, require_file_names
from karun.reasons import refusal
from karun.results import printable

__all__ = ["RIDE_SIZE_MAX", "STDIN", "copy"]

STDIN = "-"
RIDE_SIZE_MAX = 64 << 10
"""A process for the broadcast costs a node about as much as to be sent so much by the run."""
RIDE_SIZE_MAX_ONE_HOST = 1 << 20
"""Where all nodes are one machine those processes are all that machine's."""
assert RIDE_SIZE_MAX_ONE_HOST < place.SIZE_MAX
WORDS_SIZE_MAX = 4096
"""Kept of what a node says of its failure."""


@dataclass(frozen=True, slots=True)
class Item:
    """One source, looked at."""

    path: str
    name: str
    """By which it is known in a directory; empty for standard input."""
    status: os.stat_result
    spool: int = -1
    """Descriptor of what came over standard input."""

    @property
    def is_tree(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


async def copy(
    crew: Crew,
    sources: Sequence[str],
    destination: str,
    *,
    options: CopyOptions,
    on_progress: Callable[[Step], None] | None,
    on_output: Callable[[int, bytes], None] | None,
) -> list[Copied]:
    """See `karun.crew.Crew.copy`."""
    _check(crew.nodes, sources, destination, options)
    items = await trio.to_thread.run_sync(_look_at, sources)
    try:
        if _may_ride(crew, items, destination, options):
            results = await _ride(crew, items, destination, sudo=options.sudo)
        else:
            from karun.broadcasting import Broadcast  # loading it takes longer than small files do

            sending = Broadcast(crew, destination, options, on_progress, on_output)
            results = await sending.send(items)
        return with_latecomers(results, crew.came_s)
    finally:
        for item in items:
            if item.spool >= 0:
                os.close(item.spool)


def _check(
    nodes: Sequence[str], sources: Sequence[str], destination: str, options: CopyOptions
) -> None:
    if not sources:
        raise KaError(Code.USAGE, "nothing to copy")
    if bool(destination) == bool(options.command):
        raise KaError(Code.USAGE, "need a destination, or a command instead of one")
    if options.command and len(sources) > 1:
        raise KaError(Code.USAGE, "a command takes one source")
    if "%h" in destination.replace("%%", ""):
        require_file_names(nodes)


def _look_at(sources: Sequence[str]) -> list[Item]:
    try:
        items = [_item(path) for path in sources]
    except OSError as error:
        reason = f"cannot read {error.filename}: {error.strerror}"
        raise KaError(from_errno(error.errno or 0), reason) from None
    names = [item.name for item in items]
    if len(set(names)) < len(names):
        raise KaError(Code.USAGE, "two sources have the same name")
    return items


def _item(path: str) -> Item:
    """Look at a source; a stream is read to its end, and kept."""
    if path == STDIN:
        spool = spool_stream(0)
        return Item(path, "", os.fstat(spool), spool)
    status = os.stat(path)
    if stat.S_ISFIFO(status.st_mode):
        with open(path, "rb", buffering=0) as stream:
            spool = spool_stream(stream.fileno())
        return Item(path, "", os.fstat(spool), spool)
    if stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK):
        raise OSError(22, "is neither a file, a directory nor a disk", path)
    return Item(path, os.path.basename(os.path.abspath(path)), status)


# ------------------------------------------------------------ on the run itself


def _may_ride(crew: Crew, items: Sequence[Item], destination: str, options: CopyOptions) -> bool:
    if options.command or destination.startswith("/dev/"):
        return False  # a device is not written by renaming
    size_max = options.ride_size_max
    if size_max is None:
        size_max = RIDE_SIZE_MAX_ONE_HOST if crew.via == "local" else RIDE_SIZE_MAX
    plain = all(stat.S_ISREG(item.status.st_mode) and not _has_attributes(item) for item in items)
    return plain and sum(item.status.st_size for item in items) <= size_max


def _has_attributes(item: Item) -> bool:
    try:
        return bool(os.listxattr(item.path if item.spool < 0 else item.spool))
    except OSError:
        return False


async def _ride(crew: Crew, items: Sequence[Item], destination: str, *, sudo: bool) -> list[Copied]:
    parcel = await trio.to_thread.run_sync(_pack, items, destination)
    words = _Words()
    outcomes = await crew.command(["place"], task=True, sudo=sudo, stdin=parcel, sink=words)
    return [_judged(outcome, words.last(outcome.rank)) for outcome in outcomes]


def _pack(items: Sequence[Item], destination: str) -> bytes:
    files: list[tuple[bytes | str | int, ...]] = []
    for item in items:
        try:
            with open(item.path if item.spool < 0 else os.dup(item.spool), "rb") as file:
                file.seek(0)
                content = file.read()
                status = os.fstat(file.fileno())
        except OSError as error:
            reason = f"cannot read {item.path}: {error.strerror}"
            raise KaError(from_errno(error.errno or 0), reason) from None
        if len(content) != item.status.st_size:
            raise KaError(Code.EIO, f"{item.path} was changed while it was being read")
        mode = stat.S_IMODE(status.st_mode)
        files.append((item.name, mode, status.st_uid, status.st_gid, status.st_mtime_ns, content))
    return place.pack(destination, files, into=len(items) > 1)


class _Words:
    """A sink that keeps the end of what each node says on standard error."""

    def __init__(self) -> None:
        self._words: dict[int, bytes] = {}

    def output(self, rank: int, stream: int, data: bytes) -> None:
        if stream == 2:
            self._words[rank] = (self._words.get(rank, b"") + data)[-WORDS_SIZE_MAX:]

    def exited(self, rank: int, code: int, signal: int) -> None:
        pass

    def failed(self, rank: int, stage: str, reason: str) -> None:
        pass

    def last(self, rank: int) -> str:
        lines = self._words.get(rank, b"").decode("utf-8", "replace").splitlines()
        return printable(lines[-1]) if lines else ""


def _judged(outcome: Outcome, words: str) -> Copied:
    reason: str | None = None
    if outcome.stage:
        reason = outcome.reason
    elif outcome.signal:
        reason = f"was ended by signal {outcome.signal}"
    elif outcome.code == CODE_NOT_FOUND:
        reason = refusal(words) or words or "its agent cannot copy"
    elif outcome.code:
        reason = refusal(words) or words or f"failed with code {outcome.code}"
    return Copied(outcome.rank, outcome.node, reason)
