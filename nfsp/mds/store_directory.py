"""The directory of a metadata store: who may open it, what is made and opened in which order.

Owns owner.lock, creation, and the first look at what is there.  lmdb_engine takes over the parts.

Invariants
  * the lock is taken before anything is read or written and released after all is closed;
  * the journal is whole and durable before the main store's state record exists: a directory
    without that record holds no store and may be formatted, one with it has all its parts.

Not here: the files' formats, what is done with them later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import Code, KaError, from_errno
from nfsp.mds.journal import Record
from nfsp.mds.journal_files import Journal, create_segments, open_journal
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_store import DATA_NAME, LmdbStore, StoreState
from nfsp.mds.overlay import Overlay

__all__ = ["StoreDirectory", "open_directory"]

_LOCK_NAME = "owner.lock"
_STORE_ID_SIZE = 16


@dataclass(slots=True)
class StoreDirectory:
    """Everything that is open in a store's directory."""

    path: Path
    lock: int
    store: LmdbStore
    state: StoreState
    journal: Journal
    unsaved_records: list[list[Record]]
    """What the journal has and the main store has not, per segment, older first."""

    def close(self) -> None:
        self.journal.close()
        self.store.close()
        os.close(self.lock)


def open_directory(path: Path, config: LmdbConfig, *, is_new: bool) -> StoreDirectory:
    """Open the store in *path*, or make a new one there.

    Raises EEXIST if a new one would replace another, NOT_FORMATTED, EBUSY if another process has
    it, ENGINE_DAMAGED, WRONG_VERSION, or what the local file system answers.
    """
    config.validate()
    with contextlib.ExitStack() as undo:
        try:
            if is_new:
                path.mkdir(mode=0o700, exist_ok=True)
            elif not (path / DATA_NAME).exists():
                raise _not_formatted(path)
            lock = _take_lock(path)
            undo.callback(os.close, lock)
            store = LmdbStore(path, config.map_size)
            undo.callback(store.close)
            state = store.load()
            if is_new:
                if state is not None:
                    raise KaError(Code.EEXIST, f"{path} holds a metadata store already")
                state = _format(path, config, store)
            if state is None:
                raise _not_formatted(path)
            journal, records = open_journal(path, state.store, state.checkpoint_sequence)
        except OSError as error:
            raise KaError(
                from_errno(error.errno or errno.EIO),
                f"cannot open the metadata store in {path}: {error.strerror}",
            ) from error
        undo.pop_all()
        return StoreDirectory(path, lock, store, state, journal, records)


def _take_lock(directory: Path) -> int:
    """Return a descriptor that holds the directory's lock until it is closed."""
    descriptor = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise KaError(
            Code.EBUSY, f"the metadata store in {directory} is in use by another process"
        ) from None
    return descriptor


def _format(directory: Path, config: LmdbConfig, store: LmdbStore) -> StoreState:
    state = StoreState(os.urandom(_STORE_ID_SIZE), checkpoint_sequence=0, epoch=0)
    create_segments(directory, state.store, config.segment_size)
    _sync_directory(directory)
    store.write(Overlay(), state)
    store.renew_reader()
    _sync_directory(directory.parent)
    return state


def _sync_directory(directory: Path) -> None:
    """Make the names in *directory* durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_formatted(directory: Path) -> KaError:
    return KaError(Code.NOT_FORMATTED, f"no metadata store in {directory}; run nfsp mkfs")
