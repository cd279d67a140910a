"""The main store of the embedded engine: an LMDB environment that checkpoints are written to.

Owns data.mdb and lock.mdb, the read transaction that serves the event loop, and the guard: LMDB's
pages have no checksums, so each value is stored behind the XXH3-64 of key and value.  That nothing
is found is believed only between two neighbours that are whole and in order: a damaged key, or a
damaged separator above it, would otherwise make a record vanish.  Not found out like that: damage
to the few bytes of a page that say how many records it has or where the next page is; fsck notices
that records are missing.

Invariants
  * data and the state record (checkpoint sequence, epoch) change in one transaction;
  * `write` runs wholly in one thread, as LMDB demands; all else in the event loop's thread;
  * the reader is renewed after each `write`, so only snapshots keep old pages alive;
  * the map is enlarged only while no transaction is open; open snapshots become invalid then.

Not here: when to write, the journal, what to do about errors.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import lmdb

from common.checksum import digest, digest_bytes
from common.errors import Code, KaError, from_errno
from nfsp.mds.engine import KEY_SIZE_MAX
from nfsp.mds.overlay import Overlay, Pair

__all__ = [
    "DATA_NAME",
    "LmdbStore",
    "MapFull",
    "Snapshot",
    "StoreState",
]

VERSION = 1
DATA_NAME = "data.mdb"
_STATE_KEY = b"state"
_STATE = struct.Struct("<4sI16sQQ")  # magic, version, store, checkpoint sequence, epoch
_SUM = struct.Struct("<Q")
_MAGIC = b"KaMS"
_GUARD_SIZE = 8
_SPACE_MIN = 4 << 20
"""Bytes.  LMDB reports a short write, which is how a disk fills up, as EIO: with less than this
left on the disk we take it for what it most likely is."""


class MapFull(Exception):
    """The memory map must be enlarged before the write can be repeated."""


@dataclass(frozen=True, slots=True)
class StoreState:
    """The one record that says what the data are."""

    store: bytes
    """Identity, 16 bytes."""
    checkpoint_sequence: int
    epoch: int


class _View:
    """Reads from one LMDB read transaction."""

    def __init__(self, environment: lmdb.Environment, database: lmdb._Database) -> None:
        self._transaction = environment.begin(database)
        self._cursor = self._transaction.cursor()

    def get(self, key: bytes) -> bytes | None:
        """Return the verified value of *key*."""
        if not 0 < len(key) <= KEY_SIZE_MAX:
            return None
        try:
            stored = self._transaction.get(key)
        except lmdb.Error as error:
            raise _damaged(error) from error
        if stored is None:
            if self._require_order(key) == key:  # a cursor may come there on another way
                raise _damaged_value(key)
            return None
        if not _is_whole(key, stored):
            raise _damaged_value(key)
        return stored[_GUARD_SIZE:]

    def page(self, start: bytes, end: bytes, limit: int) -> list[Pair]:
        """Return at most *limit* pairs with start <= key < end, values as stored."""
        try:
            if self._require_order(start) is None:
                return []
            self._cursor.set_range(start)
            pairs = list(islice(self._cursor.iternext(), limit))
        except lmdb.Error as error:
            raise _damaged(error) from error
        keys = [key for key, _ in pairs]
        if keys != sorted(keys):
            raise _damaged_value(start)
        if keys and keys[-1] >= end:
            # Where the range ends is found by halving, not by comparing each key.
            low, high = 0, len(pairs) - 1
            while low < high:
                middle = (low + high) // 2
                if keys[middle] < end:
                    low = middle + 1
                else:
                    high = middle
            del pairs[low:]
        return pairs

    @staticmethod
    def verify(pairs: list[Pair]) -> list[Pair]:
        """Return *pairs* of `page` with their verified values."""
        verified: list[Pair] = []
        before = b""
        for key, stored in pairs:
            value = stored[_GUARD_SIZE:]
            if digest_bytes(key + value) != stored[:_GUARD_SIZE] or key <= before:
                raise _damaged_value(key)
            verified.append((key, value))
            before = key
        return verified

    def _require_order(self, key: bytes) -> bytes | None:
        """Return the first key at or behind *key*; raise unless it and its predecessor are sound.

        A search led astray by one damaged key ends beside that key, or at the edge of a page whose
        neighbour across the edge is on the wrong side.
        """
        cursor = self._cursor
        following: bytes | None = None
        try:
            if cursor.set_range(key):
                following, stored = cursor.item()
                if following < key or not _is_whole(following, stored):
                    raise _damaged_value(key)
                has_previous = cursor.prev()
            else:
                has_previous = cursor.last()
            if has_previous:
                previous, stored = cursor.item()
                if previous >= key or not _is_whole(previous, stored):
                    raise _damaged_value(key)
        except lmdb.Error as error:
            raise _damaged(error) from error
        return following

    def close(self) -> None:
        self._cursor.close()
        self._transaction.abort()


class Snapshot:
    """A view of the store at one moment, until it is closed or the map is enlarged."""

    def __init__(self, view: _View, registry: set[Snapshot]) -> None:
        self._view: _View | None = view
        self._registry = registry
        registry.add(self)

    def get(self, key: bytes) -> bytes | None:
        return self._valid().get(key)

    def scan(self, start: bytes, end: bytes, limit: int) -> list[Pair]:
        view = self._valid()
        return view.verify(view.page(start, end, limit))

    def close(self) -> None:
        self._registry.discard(self)
        if self._view is not None:
            self._view.close()
            self._view = None

    def _valid(self) -> _View:
        if self._view is None:
            raise KaError(Code.BUSY, "the snapshot was given up as the store grew; take another")
        return self._view


class LmdbStore:
    """An open environment."""

    def __init__(self, directory: Path, map_size: int) -> None:
        self._directory = directory
        self._environment = _open_environment(directory, map_size)
        try:
            self._require_whole_file()
            self._data = self._environment.open_db(b"data")
            self._meta = self._environment.open_db(b"meta")
        except lmdb.Error as error:
            self._environment.close()
            raise self._write_failure(error) from error
        except BaseException:
            self._environment.close()
            raise
        self._snapshots: set[Snapshot] = set()
        self.reader = _View(self._environment, self._data)

    def load(self) -> StoreState | None:
        """Return the state record; None where no store was made yet."""
        try:
            with self._environment.begin(self._meta) as transaction:
                found = transaction.get(_STATE_KEY)
        except lmdb.Error as error:
            raise _damaged(error) from error
        return None if found is None else _decode_state(found)

    def write(self, overlay: Overlay, state: StoreState) -> None:
        """Write a checkpoint, durably.  For a worker thread; `renew_reader` afterwards.

        Raises MapFull, or KaError ENOSPC or EIO; the store is then as before and the same call
        may be repeated, for nothing that a failed transaction wrote is ever relied upon.
        """
        try:
            with self._environment.begin(self._data, write=True) as transaction:
                put = transaction.put
                delete = transaction.delete
                for key, value in overlay.ordered():
                    if value is None:
                        delete(key)
                    else:
                        put(key, digest_bytes(key + value) + value)
                put(_STATE_KEY, _encode_state(state), db=self._meta)
        except lmdb.MapFullError as error:
            raise MapFull from error
        except lmdb.Error as error:
            raise self._write_failure(error) from error

    def renew_reader(self) -> None:
        """Let readers see what was written last."""
        self.reader.close()
        self.reader = _View(self._environment, self._data)

    def grow(self) -> None:
        """Double the memory map.  After an error the environment cannot be used any more."""
        self.reader.close()
        self._close_snapshots()
        try:
            self._environment.set_mapsize(2 * self._environment.info()["map_size"])
        except lmdb.Error as error:
            raise KaError(
                Code.INTERNAL, "the memory map of the metadata store cannot grow", error=error
            ) from error
        self.reader = _View(self._environment, self._data)

    def snapshot(self) -> Snapshot:
        return Snapshot(_View(self._environment, self._data), self._snapshots)

    def close(self) -> None:
        self._close_snapshots()
        self.reader.close()
        self._environment.close()

    def _close_snapshots(self) -> None:
        for snapshot in list(self._snapshots):
            snapshot.close()

    def _require_whole_file(self) -> None:
        """A page that the file lacks would end the process with SIGBUS once it is touched."""
        pages = self._environment.info()["last_pgno"] + 1
        expected = pages * self._environment.stat()["psize"]
        size = (self._directory / DATA_NAME).stat().st_size
        if size < expected:
            raise KaError(
                Code.ENGINE_DAMAGED,
                f"the metadata store is damaged: {self._directory / DATA_NAME} is cut short",
                size=size,
                expected=expected,
            )

    def _write_failure(self, error: lmdb.Error) -> KaError:
        if isinstance(error, (lmdb.PanicError, lmdb.CorruptedError, lmdb.PageNotFoundError)):
            # Panic: LMDB failed to write its meta page and no longer knows which one counts.
            return _damaged(error)
        status = os.statvfs(self._directory)
        is_full = status.f_bavail * status.f_frsize < _SPACE_MIN
        if error.code in (errno.ENOSPC, errno.EDQUOT) or (error.code == errno.EIO and is_full):
            return KaError(Code.ENOSPC, f"no space left for a checkpoint in {self._directory}")
        return KaError(Code.EIO, "a checkpoint of the metadata store failed", error=error)


def _open_environment(directory: Path, map_size: int) -> lmdb.Environment:
    path = directory / DATA_NAME
    size = path.stat().st_size if path.exists() else 0
    try:
        return lmdb.open(
            os.fspath(directory),
            # LMDB does not remember that a map has grown: leave room above what is there.
            map_size=max(map_size, 2 * size),
            max_dbs=2,
            mode=0o600,
        )
    except lmdb.VersionMismatchError as error:
        raise KaError(
            Code.WRONG_VERSION, f"{path} was written by another version of LMDB", error=error
        ) from error
    except (lmdb.InvalidError, lmdb.CorruptedError) as error:
        raise _damaged(error) from error
    except lmdb.Error as error:
        raise KaError(from_errno(error.code), f"cannot open {path}", error=error) from error


def _is_whole(key: bytes, stored: bytes) -> bool:
    return digest_bytes(key + stored[_GUARD_SIZE:]) == stored[:_GUARD_SIZE]


def _encode_state(state: StoreState) -> bytes:
    body = _STATE.pack(_MAGIC, VERSION, state.store, state.checkpoint_sequence, state.epoch)
    return _SUM.pack(digest(body)) + body


def _decode_state(data: bytes) -> StoreState:
    body = data[_SUM.size :]
    if len(body) != _STATE.size or _SUM.unpack_from(data)[0] != digest(body):
        raise KaError(
            Code.ENGINE_DAMAGED,
            "the metadata store is damaged: its state record fails its checksum",
        )
    _, version, store, checkpoint_sequence, epoch = _STATE.unpack(body)
    if version != VERSION:
        raise KaError(
            Code.WRONG_VERSION,
            f"the metadata store has format version {version}, this program reads {VERSION}",
        )
    return StoreState(store, checkpoint_sequence, epoch)


def _damaged(error: lmdb.Error) -> KaError:
    return KaError(Code.ENGINE_DAMAGED, "the metadata store is damaged", error=error)


def _damaged_value(key: bytes) -> KaError:
    return KaError(
        Code.ENGINE_DAMAGED,
        "the metadata store is damaged: a value fails its checksum",
        key=key.hex(),
    )
