"""What kaboot remembers: steps of nodes, machines seen, names learned, and every boot stage.

One SQLite file (common/database.py), shared by the server and the commands.  What a call returned
from is there after a kill; steps and names after a loss of power too.  Events are not synced one by
one: a room that boots makes thousands, and dnsmasq waits for nobody.  Times are arguments.

Invariants
  * a change of a step and the event that tells of it are one transaction;
  * the number of events and of unknown machines is bounded: a stranger with many MACs fills
    nothing.

Blocking: callers in trio go through a thread, one at a time.  Not here: what a step means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.database import Database
from common.errors import Code, KaError
from kaboot.model import Assignment, Machine, Step

__all__ = ["Event", "MachineRow", "Store"]

EVENTS_MAX = 500_000
EVENTS_SLACK = 1000
"""Old events are dropped this many at a time."""
MACHINES_MAX = 20_000

_UPGRADES = (
    """
CREATE TABLE assignment (
    node TEXT PRIMARY KEY, step TEXT NOT NULL, profile TEXT NOT NULL, since_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE machine (
    mac TEXT PRIMARY KEY,
    node TEXT,             -- its name, if it was learned
    platform TEXT NOT NULL, arch TEXT NOT NULL, serial TEXT NOT NULL, product TEXT NOT NULL,
    address TEXT NOT NULL, -- where it was last
    stage TEXT NOT NULL, detail TEXT NOT NULL, -- its last event
    first_ns INTEGER NOT NULL, last_ns INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX machine_node ON machine (node) WHERE node IS NOT NULL;
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at_ns INTEGER NOT NULL,
    mac TEXT NOT NULL, node TEXT NOT NULL, stage TEXT NOT NULL, detail TEXT NOT NULL
) STRICT;
CREATE INDEX event_node ON event (node, id);
CREATE TABLE learning (position INTEGER PRIMARY KEY, node TEXT NOT NULL UNIQUE) STRICT;
""",
)


@dataclass(frozen=True, slots=True)
class Event:
    """One stage of a machine's boot, or a change of its step; `node` is empty for a stranger."""

    id: int
    at_ns: int
    mac: str
    node: str
    stage: str
    detail: str


@dataclass(frozen=True, slots=True)
class MachineRow:
    """A machine that was seen: what it is, and where its last boot came to."""

    machine: Machine
    learned: str | None
    stage: str
    detail: str
    first_ns: int
    last_ns: int


class Store:
    """The open file.  Close it; a context manager does."""

    def __init__(self, database: Database) -> None:
        self.path = database.path
        self._db = database

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open the file, made if it is not there; raises KaError."""
        return cls(Database.open(path, "kaboot", _UPGRADES))

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def data_version(self) -> int:
        """Return a number that changes when another process has written."""
        return self._db.data_version()

    # ------------------------------------------------------------ steps

    def assignments(self) -> dict[str, tuple[Assignment, int]]:
        """Return what nodes were assigned and when (ns); a node may be missing."""
        rows = self._db.rows("SELECT node, step, profile, since_ns FROM assignment")
        return {
            node: (Assignment(Step(step), profile), since) for node, step, profile, since in rows
        }

    def assignment(self, node: str) -> Assignment | None:
        row = self._db.row("SELECT step, profile FROM assignment WHERE node = ?", (node,))
        return None if row is None else Assignment(Step(row[0]), row[1])

    def assign(
        self, nodes: Sequence[str], assignment: Assignment, now_ns: int, *, why: str
    ) -> None:
        """Set the step of nodes, all of them or none."""
        with self._db.transaction():
            for node in nodes:
                self._assign(node, assignment, now_ns, why)

    def advance(
        self, node: str, before: Assignment, assignment: Assignment, now_ns: int, *, why: str
    ) -> bool:
        """Set a node's step if it is still `before`; return whether it was.

        `before` is also what a node without an assignment has by the inventory.
        """
        with self._db.transaction():
            if (self.assignment(node) or before) != before:
                return False
            self._assign(node, assignment, now_ns, why)
            return True

    def _assign(self, node: str, assignment: Assignment, now_ns: int, why: str) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO assignment VALUES (?, ?, ?, ?)",
            (node, assignment.step.value, assignment.profile, now_ns),
        )
        self._event(now_ns, "", node, "step", f"{assignment} ({why})")

    # ------------------------------------------------------------ machines and events

    def saw(self, machine: Machine, node: str, stage: str, detail: str, now_ns: int) -> None:
        """Record a stage of a machine's boot; facts that are empty leave the old ones."""
        with self._db.transaction(durable=False):
            self._event(now_ns, machine.mac, node, stage, detail)
            if not self._is_known(machine.mac) and self._count_machines() >= MACHINES_MAX:
                return
            self._db.execute(
                """
                INSERT INTO machine VALUES (?, NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (mac) DO UPDATE SET
                    platform = coalesce(nullif(excluded.platform, ''), platform),
                    arch = coalesce(nullif(excluded.arch, ''), arch),
                    serial = coalesce(nullif(excluded.serial, ''), serial),
                    product = coalesce(nullif(excluded.product, ''), product),
                    address = coalesce(nullif(excluded.address, ''), address),
                    stage = excluded.stage, detail = excluded.detail, last_ns = excluded.last_ns
                """,
                (
                    machine.mac, machine.platform, machine.arch, machine.serial, machine.product,
                    machine.address, stage, detail, now_ns, now_ns,
                ),
            )  # fmt: skip

    def machines(self) -> list[MachineRow]:
        """Return the machines seen, in the order of their first appearance."""
        rows = self._db.rows(
            "SELECT mac, platform, arch, serial, product, address, node, stage, detail, first_ns,"
            " last_ns FROM machine ORDER BY first_ns, mac"
        )
        return [MachineRow(Machine(*row[:6]), *row[6:]) for row in rows]

    def mac_at(self, address: str) -> str | None:
        """Return the machine that was last seen at an address."""
        row = self._db.row(
            "SELECT mac FROM machine WHERE address = ? ORDER BY last_ns DESC LIMIT 1", (address,)
        )
        return None if row is None else str(row[0])

    def events(self, *, after: int = 0, node: str = "", count: int = 1000) -> list[Event]:
        """Return events with an id above `after`, oldest first; without it, the last `count`."""
        order = "ASC" if after else "DESC"
        rows = self._db.rows(
            "SELECT id, at_ns, mac, node, stage, detail FROM event"
            f" WHERE id > ? AND (? = '' OR node = ? OR mac = ?) ORDER BY id {order} LIMIT ?",
            (after, node, node, node, count),
        )
        return [Event(*row) for row in sorted(rows)]

    def _is_known(self, mac: str) -> bool:
        return bool(self._db.row("SELECT 1 FROM machine WHERE mac = ?", (mac,)))

    def _count_machines(self) -> int:
        (count,) = self._db.row("SELECT count(*) FROM machine")
        return int(count)

    def _event(self, now_ns: int, mac: str, node: str, stage: str, detail: str) -> None:
        cursor = self._db.execute(
            "INSERT INTO event (at_ns, mac, node, stage, detail) VALUES (?, ?, ?, ?, ?)",
            (now_ns, mac, node, stage, detail),
        )
        number = cursor.lastrowid or 0
        if number % EVENTS_SLACK == 0:
            self._db.execute("DELETE FROM event WHERE id <= ?", (number - EVENTS_MAX,))

    # ------------------------------------------------------------ names

    def learned(self) -> dict[str, str]:
        """Return learned names: MAC to node."""
        rows = self._db.rows("SELECT mac, node FROM machine WHERE node IS NOT NULL ORDER BY mac")
        return dict(rows)

    def learn(self, mac: str, node: str, now_ns: int, *, why: str) -> bool:
        """Give a machine that was seen its name, unless it or the name is taken meanwhile."""
        with self._db.transaction():
            taken = self._db.row("SELECT 1 FROM machine WHERE node = ?", (node,))
            if taken:
                return False
            cursor = self._db.execute(
                "UPDATE machine SET node = ? WHERE mac = ? AND node IS NULL", (node, mac)
            )
            if cursor.rowcount == 0:
                return False
            self._db.execute("DELETE FROM learning WHERE node = ?", (node,))
            self._db.execute("UPDATE event SET node = ? WHERE mac = ? AND node = ''", (node, mac))
            self._event(now_ns, mac, node, "learned", why)
            return True

    def forget(self, names: Sequence[str]) -> list[str]:
        """Undo learning, by node or MAC, and forget the machine; return the MACs forgotten.

        Raises USAGE for a name of which nothing is known, and forgets none then.
        """
        forgotten: list[str] = []
        with self._db.transaction():
            for name in names:
                rows = self._db.rows(
                    "DELETE FROM machine WHERE node = ? OR mac = ? RETURNING mac", (name, name)
                )
                if not rows:
                    raise KaError(Code.USAGE, f"nothing was learned of {name[:80]}")
                forgotten += [mac for (mac,) in rows]
        return forgotten

    def queue(self) -> list[str]:
        """Return the names that are given out next."""
        return [row[0] for row in self._db.rows("SELECT node FROM learning ORDER BY position")]

    def set_queue(self, names: Sequence[str]) -> None:
        """Replace the names that are given out; none ends the learning."""
        with self._db.transaction(durable=False):
            self._db.execute("DELETE FROM learning")
            self._db.executemany("INSERT INTO learning VALUES (?, ?)", list(enumerate(names)))
