"""SQLite files of the tools: private, brought up to date when opened, written all or nothing.

The only importer of sqlite3.  One file may be open in several processes (a write-ahead log).  What
a durable transaction has returned from survives a loss of power, any other a kill.  Damage, a full
disk and a lock that is not given raise KaError EIO, and nothing of a transaction is there; numbers
of more than 64 bits and text that is not Unicode raise USAGE.

Blocking; one thread at a time.  Not here: what the tables mean.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from common.errors import Code, KaError

__all__ = ["Database"]

BUSY_TIMEOUT_S = 10.0


class Database:
    """An open file; a context manager."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path, owner: str, upgrades: Sequence[str]) -> Self:
        """Open the file, made if it is not there; raises USAGE with what to do.

        Each of *upgrades* makes of a file of one version one of the next; the first of an empty
        one.  *owner*: the tool whose file it is.
        """
        try:
            # Made by us first, so that it is private from its first byte on.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if path.stat().st_mode & 0o077:
                raise KaError(Code.USAGE, f"{path}: others may read it: chmod 600 {path}")
            connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except OSError as error:
            raise KaError(Code.USAGE, f"{path}: cannot open: {error.strerror}") from None
        except sqlite3.Error as error:
            raise KaError(Code.USAGE, f"{path}: cannot open: {error}") from None
        database = cls(path, connection)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
            with database.transaction():
                database._upgrade(owner, upgrades)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise KaError(Code.USAGE, f"{path}: not a store of {owner}: {error}") from None
        except BaseException:
            connection.close()
            raise
        return database

    def _upgrade(self, owner: str, upgrades: Sequence[str]) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(upgrades):
            raise KaError(
                Code.USAGE, f"{self.path}: made by a later version of {owner} ({version})"
            )
        for upgrade in upgrades[version:]:
            for statement in upgrade.split(";\n"):
                self._connection.execute(statement)
        self._connection.execute(f"PRAGMA user_version = {len(upgrades)}")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return all rows; fetched here, for damage may come to light at any of them."""
        with self._telling():
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, values: Sequence[Any] = ()) -> Any:
        """Return the first row, None if there is none."""
        with self._telling():
            return self._connection.execute(query, values).fetchone()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Write; inside of `transaction`.  The cursor tells `rowcount` and `lastrowid`."""
        with self._telling():
            return self._connection.execute(statement, values)

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        with self._telling():
            self._connection.executemany(statement, rows)

    def data_version(self) -> int:
        """Return a number that changes when another connection has written."""
        (number,) = self.row("PRAGMA data_version")
        return int(number)

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """Write, all or nothing; durable: on stable storage at the end of the block."""
        with self._telling():
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            with self._telling():
                self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise KaError(Code.EIO, f"{self.path}: {error}") from None
        except (OverflowError, UnicodeEncodeError) as error:
            raise KaError(Code.USAGE, f"no number or text that can be stored: {error}") from None
