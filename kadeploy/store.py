"""What kadeploy remembers: environments, deployments, where every node is, what every step took.

One SQLite file (common/database.py), private because descriptions may hold what not everybody
should read.  What `save` has returned from survives kill -9 and a power cut.

Invariants
  * an environment's name and version mean one text for ever: another text is refused;
  * one head at a time carries out a deployment (`claim`, a lock that ends with the process).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from common.database import Database
from common.errors import Code, KaError
from kadeploy.workflow import NodeState, Status, StepRecord

__all__ = ["DeploymentRow", "EnvironmentRow", "HistoryRow", "LastRow", "Store"]

_UPGRADES = (
    """
CREATE TABLE environments (
    name TEXT NOT NULL, version INTEGER NOT NULL, path TEXT NOT NULL, text TEXT NOT NULL,
    digest TEXT NOT NULL, added_ms INTEGER NOT NULL, PRIMARY KEY (name, version)
) STRICT;
CREATE TABLE deployments (
    id INTEGER PRIMARY KEY AUTOINCREMENT, environment TEXT NOT NULL, version INTEGER NOT NULL,
    request TEXT NOT NULL, started_ms INTEGER NOT NULL, ended_ms INTEGER
) STRICT;
CREATE TABLE nodes (
    deployment INTEGER NOT NULL REFERENCES deployments (id), name TEXT NOT NULL,
    state TEXT NOT NULL, changed_ms INTEGER NOT NULL, PRIMARY KEY (deployment, name)
) STRICT;
CREATE TABLE steps (
    deployment INTEGER NOT NULL REFERENCES deployments (id), node TEXT NOT NULL,
    macro TEXT NOT NULL, implementation TEXT NOT NULL, step TEXT NOT NULL,
    attempt INTEGER NOT NULL, ended_ms INTEGER NOT NULL, took_ms INTEGER NOT NULL,
    ok INTEGER NOT NULL, reason TEXT NOT NULL
) STRICT;
CREATE INDEX steps_by_node ON steps (deployment, node);
""",
    """
CREATE TABLE cancels (
    deployment INTEGER NOT NULL REFERENCES deployments (id), node TEXT NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (deployment, node)
) STRICT;
""",
)
_FLOCK = "hhqqi"
"""C's struct flock: type, whence, start, length, process."""


@dataclass(frozen=True, slots=True)
class EnvironmentRow:
    name: str
    version: int
    path: str
    """Of the description; its images and templates are beside it."""
    text: str
    digest: str
    added_ms: int


@dataclass(frozen=True, slots=True)
class DeploymentRow:
    id: int
    environment: str
    version: int
    request: dict[str, Any]
    started_ms: int
    ended_ms: int | None


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One try of a step, as stored."""

    node: str
    macro: str
    implementation: str
    step: str
    attempt: int
    ended_ms: int
    took_ms: int
    ok: bool
    reason: str


@dataclass(frozen=True, slots=True)
class LastRow:
    """What a node was in last."""

    deployment: int
    environment: str
    version: int
    status: Status


class Store:
    """Open with `Store.open`; a context manager.  Blocking; one thread at a time."""

    def __init__(self, database: Database) -> None:
        self._db = database

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open or make the store; raises USAGE with what to do."""
        with contextlib.suppress(OSError):  # opening the file says what is wrong
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(Database.open(path, "kadeploy", _UPGRADES))

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------ environments

    def add_environment(
        self, name: str, version: int, path: Path, text: str, now_ms: int
    ) -> EnvironmentRow:
        """Record a description; raises USAGE when the version is there with another text."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        with self._db.transaction():
            for row in self.environments(name):
                if row.version == version and row.digest != digest:
                    raise KaError(
                        Code.USAGE,
                        f"{name} version {version} is there with another text: raise the version",
                    )
            row = EnvironmentRow(name, version, str(path), text, digest, now_ms)
            self._db.execute(
                "INSERT INTO environments VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET path = excluded.path",
                (name, version, str(path), text, digest, now_ms),
            )
        return row

    def environments(self, name: str | None = None) -> list[EnvironmentRow]:
        """Return all, or all versions of one, oldest first."""
        rows = self._db.rows(
            "SELECT * FROM environments WHERE ?1 IS NULL OR name = ?1 ORDER BY name, version",
            (name,),
        )
        return [EnvironmentRow(*row) for row in rows]

    def environment(self, name: str, version: int | None = None) -> EnvironmentRow:
        """Return one version, the newest if none is named; raises USAGE."""
        found = [row for row in self.environments(name) if version in (None, row.version)]
        if not found:
            what = name if version is None else f"{name} version {version}"
            raise KaError(Code.USAGE, f"no environment {what}: see `kadeploy env list`")
        return found[-1]

    # ------------------------------------------------------------ deployments

    def begin(
        self,
        environment: EnvironmentRow,
        request: dict[str, Any],
        nodes: Sequence[str],
        now_ms: int,
    ) -> int:
        """Record a deployment with all its nodes at the start; return its number."""
        with self._db.transaction():
            number = self._db.execute(
                "INSERT INTO deployments (environment, version, request, started_ms)"
                " VALUES (?, ?, ?, ?)",
                (environment.name, environment.version, json.dumps(request), now_ms),
            ).lastrowid
            assert number is not None
            self._put_nodes(number, (NodeState(name) for name in nodes), now_ms)
        return number

    def withdraw(self, number: int) -> None:
        """Forget a deployment of which nothing was done."""
        with self._db.transaction():
            self._db.execute("DELETE FROM cancels WHERE deployment = ?", (number,))
            self._db.execute("DELETE FROM nodes WHERE deployment = ?", (number,))
            self._db.execute("DELETE FROM deployments WHERE id = ?", (number,))

    def save(
        self,
        deployment: int,
        nodes: Iterable[NodeState],
        records: Iterable[StepRecord],
        now_ms: int,
        clock_offset_ms: int = 0,
    ) -> None:
        """Store what changed.  *clock_offset_ms*: from the records' clock to the calendar's."""
        with self._db.transaction():
            self._put_nodes(deployment, nodes, now_ms)
            self._db.executemany(
                "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (
                        deployment,
                        one.node,
                        one.macro,
                        one.implementation,
                        one.step,
                        one.attempt,
                        one.ended_ms + clock_offset_ms,
                        one.ended_ms - one.started_ms,
                        one.ok,
                        one.reason,
                    )
                    for one in records
                ),
            )

    def _put_nodes(self, deployment: int, nodes: Iterable[NodeState], now_ms: int) -> None:
        # An update in place: the nodes keep their order.
        self._db.executemany(
            "INSERT INTO nodes VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET state = excluded.state, changed_ms = excluded.changed_ms",
            (
                (deployment, node.name, json.dumps(asdict(node), default=_plain), now_ms)
                for node in nodes
            ),
        )

    def end(self, deployment: int, now_ms: int) -> None:
        """Record that all nodes have their verdicts; what has ended already ended then."""
        with self._db.transaction():
            self._db.execute(
                "UPDATE deployments SET ended_ms = ? WHERE id = ? AND ended_ms IS NULL",
                (now_ms, deployment),
            )

    def deployments(
        self, count: int = 1000, *, number: int | None = None, open_only: bool = False
    ) -> list[DeploymentRow]:
        """Return the last ones, oldest first; only that *number*, only those not ended."""
        rows = self._db.rows(
            "SELECT * FROM deployments WHERE (?1 IS NULL OR id = ?1)"
            " AND (NOT ?2 OR ended_ms IS NULL) ORDER BY id DESC LIMIT ?3",
            (number, open_only, count),
        )
        made = [
            DeploymentRow(number, name, version, json.loads(request), started_ms, ended_ms)
            for number, name, version, request, started_ms, ended_ms in rows
        ]
        return made[::-1]

    def deployment(self, number: int | None = None) -> DeploymentRow:
        """Return one, the last if no number is given; raises USAGE."""
        found = self.deployments(1, number=number)
        if not found:
            raise KaError(Code.USAGE, "no such deployment: see `kadeploy history`")
        return found[0]

    def nodes(self, deployment: int) -> list[NodeState]:
        rows = self._db.rows(
            "SELECT state FROM nodes WHERE deployment = ? ORDER BY rowid", (deployment,)
        )
        states = (json.loads(state) for (state,) in rows)
        return [NodeState(**{**state, "status": Status(state["status"])}) for state in states]

    def history(self, deployment: int, node: str | None = None) -> list[HistoryRow]:
        """Return every try of every step, in the order they ended."""
        rows = self._db.rows(
            "SELECT node, macro, implementation, step, attempt, ended_ms, took_ms, ok, reason"
            " FROM steps WHERE deployment = ?1 AND (?2 IS NULL OR node = ?2) ORDER BY rowid",
            (deployment, node),
        )
        made = (HistoryRow(*row) for row in rows)
        return [replace(row, ok=bool(row.ok)) for row in made]

    def last(self) -> dict[str, LastRow]:
        """Return for each node the deployment it was in last."""
        rows = self._db.rows(
            "SELECT name, max(id), environment, version, json_extract(state, '$.status')"
            " FROM nodes JOIN deployments ON id = deployment GROUP BY name"
        )
        return {
            name: LastRow(number, environment, version, Status(status))
            for name, number, environment, version, status in rows
        }

    def data_version(self) -> int:
        """Return a number that changes when another connection has written."""
        return self._db.data_version()

    # ------------------------------------------------------------ wishes of operators

    def ask_cancel(self, deployment: int, nodes: Iterable[str], reason: str) -> None:
        """Record that nodes are to be given up; the deployment's head looks once a second."""
        with self._db.transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO cancels VALUES (?, ?, ?)",
                ((deployment, node, reason) for node in nodes),
            )

    def cancels(self, deployment: int) -> dict[str, str]:
        """Return the nodes to be given up, and why."""
        query = "SELECT node, reason FROM cancels WHERE deployment = ?"
        return dict(self._db.rows(query, (deployment,)))

    def has(self, node: str) -> tuple[str, int] | None:
        """Return environment and version that a node was last deployed with; None if it failed."""
        row = self._db.row(
            "SELECT environment, version, json_extract(state, '$.status') FROM nodes"
            " JOIN deployments ON id = deployment WHERE name = ? ORDER BY id DESC LIMIT 1",
            (node,),
        )
        if row is None or row[2] != Status.DEPLOYED.value:
            return None
        return row[0], row[1]

    @contextlib.contextmanager
    def claim(self, deployment: int) -> Iterator[None]:
        """Be the only head of a deployment meanwhile; raises BUSY when another is."""
        with self._lock_file() as file:
            try:
                _lock(file, fcntl.F_OFD_SETLK, deployment)
            except BlockingIOError:
                message = f"deployment {deployment} is being carried out by another process"
                raise KaError(Code.BUSY, message) from None
            yield

    def require_free(self, names: Iterable[str], but: int = 0) -> None:
        """Raise BUSY if a head, of another deployment than *but*, has one of these nodes."""
        wanted = set(names)
        for row in self.deployments(open_only=True):
            if row.id == but or not self.claimed(row.id):
                continue
            for node in self.nodes(row.id):
                if node.name in wanted and not node.ended:
                    raise KaError(Code.BUSY, f"{node.name} is being deployed by {row.id}")

    def claimed(self, deployment: int) -> bool:
        """Whether a head carries it out."""
        with self._lock_file() as file:
            return _lock(file, fcntl.F_OFD_GETLK, deployment) != fcntl.F_UNLCK

    def _lock_file(self) -> BinaryIO:
        path = self._db.path.with_name(f"{self._db.path.name}.lock")
        return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb+")


def _lock(file: BinaryIO, command: int, deployment: int) -> int:
    """Do something with the lock of a deployment, a byte of the file; return who has it.

    The lock belongs to the open file, so it holds against the same process too.
    """
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, deployment, 1, 0)
    kind: int = struct.unpack(_FLOCK, fcntl.fcntl(file, command, asked))[0]
    return kind


def _plain(value: object) -> str:
    assert isinstance(value, Status)
    return value.value
