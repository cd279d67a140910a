"""SQLite files of the tools: what is wrong with one is a line, and nothing half-written stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.database import Database
from common.errors import Code, KaError

UPGRADES = (
    "CREATE TABLE one (number INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT;\n",
    "CREATE TABLE two (number INTEGER REFERENCES one (number)) STRICT;\n",
)


def opened(path: Path, count: int = 2) -> Database:
    return Database.open(path, "a tool", UPGRADES[:count])


def test_a_file_is_private_and_an_older_one_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with opened(path, 1) as database, database.transaction():
        database.execute("INSERT INTO one VALUES (1, 'kept')")
    assert path.stat().st_mode & 0o777 == 0o600
    with opened(path) as database:
        assert database.rows("SELECT * FROM one") == [(1, "kept")]
        assert database.row("SELECT * FROM two") is None
    with pytest.raises(KaError, match=r"made by a later version of a tool \(2\)"):
        opened(path, 1)


def half(database: Database, then: str) -> None:
    with database.transaction():
        database.execute("INSERT INTO one VALUES (1, 'half')")
        database.execute(then)


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "db") as database:
        # A reference to nothing, and no SQL at all.
        for then in ("INSERT INTO two VALUES (9)", "whatever"):
            with pytest.raises(KaError) as caught:
                half(database, then)
            assert caught.value.code is Code.EIO
            assert database.rows("SELECT * FROM one") == []


def test_what_is_no_database_or_open_to_others_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "db"
    path.write_bytes(b"something else, kept by mistake in this place" * 100)
    path.chmod(0o600)
    with pytest.raises(KaError, match="not a store of a tool"):
        opened(path)
    assert path.read_bytes().startswith(b"something else")
    path.chmod(0o640)
    with pytest.raises(KaError, match="others may read it"):
        opened(path)


def test_damage_met_while_rows_are_read_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with opened(path) as database, database.transaction():
        for number in range(2000):
            database.execute("INSERT INTO one VALUES (?, ?)", (number, "x" * 100))
    content = bytearray(path.read_bytes())
    for page in range(8, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)
    with opened(path) as database, pytest.raises(KaError) as caught:
        database.rows("SELECT * FROM one ORDER BY number")
    assert caught.value.code is Code.EIO


@pytest.mark.parametrize("value", [1 << 63, "\udcff"])
def test_what_sqlite_cannot_hold_is_refused_in_one_line(tmp_path: Path, value: object) -> None:
    with opened(tmp_path / "db") as database:
        with pytest.raises(KaError, match="no number or text that can be stored") as caught:
            database.row("SELECT * FROM one WHERE number = ?", (value,))
        assert caught.value.code is Code.USAGE
        with pytest.raises(KaError, match="no number or text"), database.transaction():
            database.executemany("INSERT INTO one VALUES (?, 'half')", [(2,), (value,)])
        assert database.rows("SELECT * FROM one") == []
