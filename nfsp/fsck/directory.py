"""A directory with something odd in it: read whole and judged entry by entry.

Pure.  Some 400 bytes for each entry, for one directory at a time.  The name record is the truth
where both forms exist: lookups go by it.  What is judged here was left out, or noted as odd, by
the streaming passes of nfsp/fsck/entries.py.
"""

from __future__ import annotations

import struct

from common import codec
from nfsp import keys
from nfsp.fsck import steps, table
from nfsp.fsck.entries import (
    Entry,
    count_name,
    counted_row,
    decode_entry,
    decode_twin,
    name_is_valid,
)
from nfsp.fsck.findings import (
    DropEntry,
    MoveEntry,
    NewCookie,
    SetEntry,
    SetFields,
    SetRecord,
    Severity,
)
from nfsp.fsck.survey import Survey
from nfsp.fsck.table import COOKIE_MAX, DIR
from nfsp.model import FIRST_COOKIE, ROOT

__all__ = ["passes"]

DAMAGE = Severity.DAMAGE

_unpack_q = struct.Struct(">Q").unpack_from


def passes(survey: Survey) -> steps.Steps[None]:
    """Judge the directories that were flagged."""
    for parent in sorted(survey.flagged):
        directory = _Directory(survey, parent)
        yield from directory.read()
        directory.judge()


class _Directory:
    """A directory with something odd in it, read whole."""

    def __init__(self, survey: Survey, ino: int) -> None:
        self.survey = survey
        self.ino = ino
        self.row = survey.table.find(ino)
        self.entries: dict[bytes, tuple[bytes, Entry | None]] = {}
        self.twins: dict[int, tuple[bytes, Entry | None]] = {}
        self.settled: set[int] = set()
        """Cookies whose readdir record is right or has been spoken of."""

    def read(self) -> steps.Steps[None]:
        def entry(key: bytes, value: bytes) -> None:
            self.entries[key[9:]] = value, decode_entry(key, value)

        def twin(key: bytes, value: bytes) -> None:
            if len(key) == 17:
                self.twins[_unpack_q(key, 9)[0]] = value, decode_twin(key, value)

        for prefix, handle in (
            (keys.dentry(self.ino, b""), entry),
            (keys.cookie(self.ino, 0)[:9], twin),
        ):
            yield from steps.each(prefix, keys.prefix_end(prefix), handle)

    def judge(self) -> None:
        if self.row < 0 or self.survey.table.kinds[self.row] != DIR:
            self._judge_homeless()
            return
        owners = {
            entry.cookie: name
            for name, (_, entry) in self.entries.items()
            if entry and self.twins.get(entry.cookie, (b"", None))[1] == entry
        }
        for name, (value, entry) in self.entries.items():
            if entry is None:
                self._judge_unreadable(name, value)
            else:
                self._judge_entry(entry, owners)
        for cookie, (value, twin) in self.twins.items():
            if cookie not in self.settled:
                self._judge_unclaimed(cookie, value, twin)
        self._judge_next_cookie()

    def _judge_homeless(self) -> None:
        """There is no directory here: what is named comes to /lost+found, if it has no other."""
        for name, (value, entry) in self.entries.items():
            key = keys.dentry(self.ino, name)
            what = f"entry in directory {self.ino}, which does not exist"
            if entry is None:
                mend: SetRecord | DropEntry = SetRecord(key, value, None)
            else:
                mend = DropEntry(self.ino, name, entry.cookie)
                twin = self.twins.get(entry.cookie)
                if twin and twin[1] == entry:
                    self.settled.add(entry.cookie)
            self._add("entry.parent", what, name, "remove the entry", mend)
        for cookie, (value, _) in self.twins.items():
            if cookie not in self.settled:
                what = f"readdir entry of directory {self.ino}, which does not exist"
                self._drop_twin("entry.parent", what, cookie, value)

    def _judge_unreadable(self, name: bytes, value: bytes) -> None:
        twin = self._twin_named(name)
        key = keys.dentry(self.ino, name)
        if twin is None:
            mend = SetRecord(key, value, None)
            self._add("entry.unreadable", "unreadable entry", name, "remove the entry", mend)
            return
        self.settled.add(twin.cookie)
        mend = SetRecord(key, value, codec.encode((twin.ino, twin.kind, twin.cookie)))
        repair = "restore it from the readdir entry"
        self._add("entry.unreadable", "unreadable entry", name, repair, mend)
        self._count(twin)

    def _judge_entry(self, entry: Entry, owners: dict[int, bytes]) -> None:
        rows = self.survey.table
        name, ino, kind, cookie = entry
        row = rows.find(ino)
        twin = self.twins.get(cookie)
        counted = counted_row(self.survey, self.row, entry) >= 0
        if twin and twin[1] == entry:
            self.settled.add(cookie)
        if row < 0:
            what = f"entry names inode {ino}, which does not exist"
            mend = DropEntry(self.ino, name, cookie)
            self._add("entry.dangling", what, name, "remove the entry", mend, ino)
            return
        if not counted:
            count_name(self.survey, row, self.row, cookie)
        if not name_is_valid(name):
            new_name = b"#%d-%d" % (ino, cookie)
            self.settled.add(cookie)
            move = MoveEntry(self.ino, name, new_name)
            repair = f"rename it to {new_name.decode()}"
            self._add("entry.name", "a name that is not allowed", name, repair, move, ino)
            return
        known = rows.kinds[row]
        owner = owners.setdefault(cookie, name)
        if owner != name or not FIRST_COOKIE <= cookie <= COOKIE_MAX:
            what = f"cookie {cookie} is impossible or taken by another entry"
            self._add("entry.cookie", what, name, "give it a new cookie", NewCookie(self.ino, name))
        elif known not in (kind, table.UNREADABLE):
            what = f"entry of kind {kind:#o} names an inode of kind {known:#o}"
            self.settled.add(cookie)
            set_entry = SetEntry(self.ino, name, ino, known, cookie)
            self._add("entry.kind", what, name, "correct the kind", set_entry, ino)
        elif cookie not in self.settled:
            self.settled.add(cookie)
            seen = twin[0] if twin else None
            right = codec.encode((name, ino, kind))
            what = "readdir entry is wrong" if twin else "readdir entry is missing"
            put = SetRecord(keys.cookie(self.ino, cookie), seen, right)
            self._add("entry.twin", what, name, "write it as the name says", put, ino)

    def _judge_unclaimed(self, cookie: int, value: bytes, twin: Entry | None) -> None:
        """A readdir record that no name record owns: a stale one, or the name was lost."""
        if twin is None or not self._is_lost_name(twin):
            what = "readdir entry without a name" if twin else "unreadable readdir entry"
            self._drop_twin("entry.stale", what, cookie, value, twin)
            return
        key = keys.dentry(self.ino, twin.name)
        mend = SetRecord(key, None, codec.encode((twin.ino, twin.kind, cookie)))
        repair = "restore it from the readdir entry"
        self._add("entry.lost", "the name record is missing", twin.name, repair, mend, twin.ino)
        self.entries[twin.name] = b"", twin
        self._count(twin)

    def _is_lost_name(self, twin: Entry) -> bool:
        rows = self.survey.table
        row = rows.find(twin.ino)
        if row < 0 or rows.kinds[row] not in (twin.kind, table.UNREADABLE):
            return False
        if twin.name in self.entries or not name_is_valid(twin.name):
            return False
        if not FIRST_COOKIE <= twin.cookie <= COOKIE_MAX:
            return False
        expected = 1 if twin.kind == DIR else max(rows.nlinks[row], 1)
        return twin.ino != ROOT and rows.names[row] < expected

    def _judge_next_cookie(self) -> None:
        rows = self.survey.table
        cookies = [entry.cookie for _, entry in self.entries.values() if entry]
        least = max(filter(COOKIE_MAX.__ge__, (*cookies, *self.twins)), default=0) + 1
        least = max(least, FIRST_COOKIE)
        if rows.flags[self.row] & table.REBUILD:
            rows.next_cookies[self.row] = least
        elif not least <= rows.next_cookies[self.row] <= COOKIE_MAX + 1:
            what = f"the next cookie is {rows.next_cookies[self.row]}; {least} would be right"
            rows.next_cookies[self.row] = least
            mend = SetFields(self.ino, (("next_cookie", least),))
            self.survey.add(
                DAMAGE,
                "inode.cookies",
                what,
                ino=self.ino,
                repair=f"set it to {least}",
                mend=mend,
            )

    def _twin_named(self, name: bytes) -> Entry | None:
        """Return the readdir entry that an unreadable name record can be restored from."""
        rows = self.survey.table
        for cookie, (_, twin) in self.twins.items():
            if twin and twin.name == name and cookie not in self.settled:
                row = rows.find(twin.ino)
                if row >= 0 and rows.kinds[row] in (twin.kind, table.UNREADABLE):
                    return twin if name_is_valid(name) else None
        return None

    def _count(self, entry: Entry) -> None:
        row = self.survey.table.find(entry.ino)
        count_name(self.survey, row, self.row, entry.cookie)

    def _add(
        self,
        check: str,
        what: str,
        name: bytes,
        repair: str,
        mend: SetRecord | DropEntry | MoveEntry | SetEntry | NewCookie,
        ino: int = 0,
    ) -> None:
        self.survey.add(
            DAMAGE, check, what, ino=ino, parent=self.ino, name=name, repair=repair, mend=mend
        )

    def _drop_twin(
        self, check: str, what: str, cookie: int, value: bytes, twin: Entry | None = None
    ) -> None:
        name = twin.name if twin else b"cookie %d" % cookie
        mend = SetRecord(keys.cookie(self.ino, cookie), value, None)
        self._add(check, what, name, "remove the readdir entry", mend)
