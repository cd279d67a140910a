"""What one look at the metadata found out: the tables that later checks judge by.

Pure.  Filled by nfsp/fsck/records.py (everything but directory entries), entries.py and
directory.py (those), judged by tree.py.  Also here: what makes a record believable.
"""

from __future__ import annotations

from common import codec
from common.errors import KaError
from nfsp import keys
from nfsp.fsck import table
from nfsp.fsck.findings import FINDINGS_MAX, Finding, Mend, SetRecord, Severity
from nfsp.fsck.table import SortedInts, Table
from nfsp.model import (
    BLOCK_SIZE,
    CHUNK_SIZE_MAX,
    CHUNK_SIZE_MIN,
    STRIPE_WIDTH_MAX,
    ClusterMap,
    Inode,
    Layout,
)

__all__ = ["Survey", "decode_counter", "decode_inode", "encode_counter"]

DAMAGE = Severity.DAMAGE


class Survey:
    """What one look at the metadata found out."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.omitted = 0
        self.counts: dict[str, int] = {}
        self.shard = 0
        self.cluster_map: ClusterMap | None = None
        self.chains: dict[int, tuple[int, ...]] = {}
        """Chain number to its iods."""
        self.counters: dict[bytes, tuple[bytes | None, int]] = {}
        """Key of a counter to its record as seen and its value (0 if it cannot be read)."""
        self.ino_max = 0
        self.session_max = 0
        self.sessions: set[int] = set()
        self.table = Table()
        self.purging = SortedInts()
        self.trimming: set[int] = set()
        self.writing: set[int] = set()
        self.flagged: set[int] = set()
        """Directories (by number) of which some entry needs a closer look."""
        self.homeless: set[int] = set()
        """Numbers that have entries or are called directories, without a readable inode."""
        self.extra_names: list[tuple[int, int, int]] = []
        """(inode, parent, cookie) of names a directory must not have."""
        self.revived: set[int] = set()
        """Unlinked directories (orphans) that have entries."""

    def add(
        self,
        severity: Severity,
        check: str,
        what: str,
        *,
        ino: int = 0,
        parent: int = 0,
        name: bytes | None = None,
        repair: str = "",
        mend: Mend | None = None,
    ) -> None:
        """Note a finding."""
        if len(self.findings) >= FINDINGS_MAX:
            self.omitted += 1
            return
        self.findings.append(
            Finding(severity, check, what, ino, parent, name, repair=repair, mend=mend)
        )

    def drop(
        self, severity: Severity, check: str, what: str, key: bytes, value: bytes, ino: int = 0
    ) -> None:
        """Note a record that is to be deleted."""
        mend = SetRecord(key, value, None)
        self.add(severity, check, what, ino=ino, repair="delete the record", mend=mend)

    def malformed(self, key: bytes, value: bytes) -> None:
        self.drop(DAMAGE, "record.malformed", f"record with malformed key {key[:40]!r}", key, value)

    @property
    def next_ino(self) -> int:
        """The least number that was surely not given out when the view was pinned."""
        return max(self.counters[keys.NEXT_INO][1], self.ino_max + 1)

    def count(self, what: str, more: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + more

    def layout_is_sound(self, layout: Layout) -> bool:
        """Say whether every byte has its place under *layout*."""
        size, width, replicas, chains = layout
        if not all(type(number) is int for number in (size, width, replicas, *chains)):
            return False
        return (
            CHUNK_SIZE_MIN <= size <= CHUNK_SIZE_MAX
            and size % BLOCK_SIZE == 0
            and 1 <= width <= STRIPE_WIDTH_MAX
            and replicas >= 1
            and len(chains) == width
            and (self.cluster_map is None or all(chain in self.chains for chain in chains))
        )


def decode_inode(value: bytes) -> Inode | None:
    """Return the inode in a record, or None if there is none that could be believed."""
    try:
        inode = Inode.decode(value)
    except (KaError, TypeError, ValueError):
        return None
    if set(map(type, inode[:12])) != {int} or type(inode.target) is not bytes:
        return None
    if type(inode.parent) is not int or type(inode.next_cookie) is not int:
        return None
    if type(inode.xattr_count) is not int:
        return None
    if inode.mode < 0 or inode.mode >> 12 not in table.KINDS:
        return None
    return inode


def encode_counter(value: int) -> bytes:
    """Return the record of a counter (NEXT_INO, NEXT_SESSION)."""
    return codec.encode(value)


def decode_counter(value: bytes | None) -> int:
    try:
        number = codec.decode(value or b"")
    except KaError:
        return 0
    return number if type(number) is int and number > 0 else 0
