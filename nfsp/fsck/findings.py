"""What the checker says: findings, the repair of each as data, and the report with its exit code.

Pure.  A finding names its check (docs/operations.md#fsck lists all of them), how bad it is, where
it is, and carries the repair, if there is one.  `nfsp.fsck.mend` turns a repair into records.

Severity is about users: `leftover` is the harmless remains of interrupted work (space, stale
queue entries); `damage` is what somebody could notice.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.codec import Value
from common.errors import EXIT_DAMAGED, EXIT_UNREACHABLE

__all__ = [
    "EXIT_LEFTOVERS",
    "ChunkMend",
    "DropEntry",
    "Finding",
    "LinkLost",
    "Mend",
    "MoveEntry",
    "NewCookie",
    "Outcome",
    "QueueTrim",
    "Rebuild",
    "RecordMend",
    "Release",
    "RemoveChunks",
    "Report",
    "SetEntry",
    "SetFields",
    "SetRecord",
    "Severity",
    "not_mended",
    "show",
]

EXIT_LEFTOVERS = 1
"""Leftovers were found, and nothing worse."""

FINDINGS_MAX = 100_000
"""Findings kept (some 500 bytes each).  Those beyond it are counted; the next run finds them."""


class Severity(enum.Enum):
    LEFTOVER = "leftover"
    DAMAGE = "damage"


class Outcome(enum.Enum):
    """What became of a finding."""

    REPORTED = "reported"
    """It can be mended; that was not asked for."""
    MENDED = "mended"
    SKIPPED = "not mended"
    """The repair was given up: somebody has changed the records, or it did not apply."""
    UNMENDABLE = "cannot be mended"


@dataclass(frozen=True, slots=True)
class SetRecord:
    """Give a record a value (None deletes), if it still is as seen."""

    key: bytes
    seen: bytes | None
    value: bytes | None


@dataclass(frozen=True, slots=True)
class SetFields:
    """Change fields of an inode.  A sound `next_cookie` is only ever raised."""

    ino: int
    fields: tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class SetEntry:
    """Write both records of a directory entry."""

    parent: int
    name: bytes
    ino: int
    kind: int
    cookie: int


@dataclass(frozen=True, slots=True)
class DropEntry:
    """Delete the entry with this cookie, and its name record if that is known or can be read."""

    parent: int
    name: bytes | None
    cookie: int


@dataclass(frozen=True, slots=True)
class MoveEntry:
    """Give an entry a name that is allowed, in the same directory."""

    parent: int
    name: bytes
    new_name: bytes


@dataclass(frozen=True, slots=True)
class NewCookie:
    """Give an entry a cookie of its own."""

    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class LinkLost:
    """Link an inode into /lost+found.  Its present entry, if `parent` is not 0, is dropped."""

    ino: int
    parent: int
    cookie: int


@dataclass(frozen=True, slots=True)
class Release:
    """Finish the deletion of an unlinked inode that nobody has open."""

    ino: int


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Write a new inode for a directory whose own is missing or unreadable."""

    ino: int
    parent: int
    nlink: int
    next_cookie: int
    xattr_count: int


@dataclass(frozen=True, slots=True)
class RemoveChunks:
    """Delete a chunk file of an iod."""

    iod: int
    ino: int
    column: int


@dataclass(frozen=True, slots=True)
class QueueTrim:
    """Have the mds drop what lies behind a file's end, if the inode still is as seen and none of
    the sessions (all that there are) has it open for writing."""

    ino: int
    inode: bytes
    sessions: tuple[int, ...]


RecordMend = (
    SetRecord
    | SetFields
    | SetEntry
    | DropEntry
    | MoveEntry
    | NewCookie
    | LinkLost
    | Release
    | Rebuild
)
ChunkMend = RemoveChunks | QueueTrim
Mend = RecordMend | ChunkMend


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    severity: Severity
    check: str
    """Which check found it: `entry.dangling`, `chunks.leftover`, ..."""
    what: str
    ino: int = 0
    """The inode it is about, if any."""
    parent: int = 0
    name: bytes | None = None
    """The entry it is about, if it is about an entry."""
    where: str = ""
    """Path or inode number, filled in when the tree is known."""
    repair: str = ""
    mend: Mend | None = None

    @property
    def identity(self) -> tuple[str, int, int, bytes | None, str]:
        """What makes it the same finding in the next round of mending."""
        return self.check, self.ino, self.parent, self.name, self.what

    def as_data(self, outcome: Outcome) -> dict[str, Value]:
        """Return the finding as JSON can hold it."""
        return {
            "severity": self.severity.value,
            "check": self.check,
            "where": self.where,
            "inode": self.ino,
            "what": self.what,
            "repair": self.repair,
            "outcome": outcome.value,
        }


@dataclass(slots=True)
class Report:
    """Everything one run found.  The exit code tells what was found, not what is left."""

    results: list[tuple[Finding, Outcome]] = field(default_factory=list)
    omitted: int = 0
    """Findings beyond FINDINGS_MAX, only counted."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be looked at, and why: one line each."""
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, finding: Finding, outcome: Outcome) -> None:
        if len(self.results) < FINDINGS_MAX:
            self.results.append((finding, outcome))
        else:
            self.omitted += 1

    @property
    def exit_code(self) -> int:
        severities = {finding.severity for finding, _ in self.results}
        if Severity.DAMAGE in severities:
            return EXIT_DAMAGED
        if self.unchecked:
            return EXIT_UNREACHABLE
        return EXIT_LEFTOVERS if severities else 0

    def as_data(self) -> dict[str, Value]:
        """Return the report as JSON can hold it."""
        return {
            "findings": [finding.as_data(outcome) for finding, outcome in self.results],
            "omitted": self.omitted,
            "unchecked": self.unchecked,
            "counts": self.counts,
            "exit_code": self.exit_code,
        }


def not_mended(finding: Finding) -> Outcome:
    """Return the outcome of a finding when mending was not asked for."""
    return Outcome.REPORTED if finding.mend else Outcome.UNMENDABLE


def show(names: Iterable[bytes]) -> str:
    """Return a path from the root as text; bytes that are not text are escaped."""
    return "/" + "/".join(name.decode("utf-8", "backslashreplace") for name in names)
