"""Laws of exactly-once answers, open files, and sessions that end."""

from __future__ import annotations

import pytest

from common import codec
from common.errors import Code
from nfsp import keys, wire
from nfsp.mds import queues, sessions
from nfsp.mds.view import PurgeReady
from nfsp.model import FILE_SIZE_MAX, ROOT
from tests.support.memory_view import MemoryView
from tests.support.space import Space, refused


@pytest.fixture
def space() -> Space:
    return Space()


def records(space: Space, prefix: bytes) -> list[bytes]:
    return sorted(key for key in space.view.records if key.startswith(prefix))


# ---------------------------------------------------------------- exactly once


def test_repeated_mutation_gets_the_first_answer() -> None:
    view = MemoryView()
    assert sessions.replay(view, 1, 0, 1) is None
    view.apply(sessions.answered(1, 0, 1, b"answer"))
    assert sessions.replay(view, 1, 0, 1) == b"answer"
    assert sessions.replay(view, 1, 0, 2) is None
    assert sessions.replay(view, 1, 1, 1) is None
    assert sessions.replay(view, 2, 0, 1) is None


def test_numbers_may_skip_what_was_refused_or_never_arrived() -> None:
    view = MemoryView()
    view.apply(sessions.answered(1, 0, 7, b""))
    for sequence in (8, 9, 1 << 40):
        assert sessions.replay(view, 1, 0, sequence) is None


def test_an_older_number_or_a_wrong_slot_breaks_the_protocol() -> None:
    view = MemoryView()
    view.apply(sessions.answered(1, 0, 7, b""))
    for sequence in (-1, 0, 1, 6):
        with refused(Code.PROTOCOL):
            sessions.replay(view, 1, 0, sequence)
    for slot in (-1, 1 << 16):
        with refused(Code.PROTOCOL):
            sessions.replay(view, 1, slot, 1)


# ---------------------------------------------------------------- opening and closing


def test_open_for_writing_is_on_record_until_the_close(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.open(file)
    assert records(space, b"w") == []
    for _ in range(2):
        space.open(file, writable=True)
        assert records(space, b"w") == [keys.writer(1, file)]
    for _ in range(2):
        space.close(file)
        assert records(space, b"w") == []


def test_only_files_open_for_writing(space: Space) -> None:
    link = space.symlink(ROOT, b"l", b"t").ino
    with refused(Code.EISDIR):
        space.open(ROOT, writable=True)
    with refused(Code.EINVAL):
        space.open(link, writable=True)
    for ino in (99, -1):
        with refused(Code.ESTALE):
            space.open(ino)
    assert not space.opens


def test_close_of_what_never_was_is_harmless(space: Space) -> None:
    before = dict(space.view.records)
    space.close(99)
    space.close(ROOT)
    assert space.view.records == before
    with refused(Code.ESTALE):
        space.close(-1)


def test_writers_are_listed_in_pages(space: Space) -> None:
    inos = [space.create(ROOT, b"%d" % number).ino for number in range(3)]
    for session in (1, 2):
        space.session = session
        for ino in inos:
            space.open(ino, writable=True)
    first = sessions.writers(space.view, (0, 0), 4)
    rest = sessions.writers(space.view, first[-1], 4)
    assert first + rest == [(session, ino) for session in (1, 2) for ino in inos]


# ---------------------------------------------------------------- the end of a session


def test_expired_writers_tail_is_trimmed_at_the_recorded_size(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    space.wrote(file, 100)
    [trim] = space.expire(1)
    assert (trim.ino, trim.remains.size, trim.end) == (file, 100, FILE_SIZE_MAX)
    assert [ino for ino, _ in queues.trim_queue(space.view, 0, 9)] == [file]
    assert records(space, b"w") == []
    space.check()


def test_tail_stays_while_others_write_and_goes_with_the_last(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    for session in (2, 3):
        space.session = session
        space.open(file, writable=True)
    assert space.expire(1) == []
    assert space.expire(2) == []
    space.wrote(file, 500)  # what session 3 wrote meanwhile is not trimmed
    space.session = 3
    space.close(file)
    assert [trim.remains.size for trim in space.trims] == [500]
    assert records(space, b"w") == []
    space.check()


def test_reader_that_leaves_does_not_trim_the_tail(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    space.session = 2
    space.open(file, writable=True)
    space.expire(1)
    space.session = 3
    space.open(file)
    space.close(file)
    assert not space.effects
    assert records(space, b"w") == [keys.writer(0, file), keys.writer(2, file)]
    space.check()


def test_expired_session_leaves_no_record(space: Space) -> None:
    before = {key for key in space.view.records if key[:1] in b"srwo"}
    space.view.apply({keys.session(1): b"x"})
    for number in range(5):
        space.create(ROOT, b"%d" % number, open=True)
        space.view.apply(sessions.answered(1, number, 1, b"x"))
    space.view.apply(sessions.answered(2, 0, 1, b"kept"))
    space.expire(1, limit=2)
    left = {key for key in space.view.records if key[:1] in b"srwo"}
    assert left - before == {keys.slot(2, 0)}


def test_orphans_of_an_expired_session_are_released(space: Space) -> None:
    files = [space.create(ROOT, b"%d" % number, open=True).ino for number in range(5)]
    for number, ino in enumerate(files):
        space.wrote(ino, 1)
        space.unlink(ROOT, b"%d" % number)
    space.session = 2
    space.open(files[2])
    effects = space.expire(1, limit=2)
    purged = {effect.ino for effect in effects if isinstance(effect, PurgeReady)}
    assert purged == set(files) - {files[2]}
    assert records(space, b"o") == [keys.orphan(files[2])]
    space.check()
    space.close(files[2])
    assert space.purged == {files[2]}
    space.check()


def test_unreported_chunks_of_an_expired_orphan_are_purged_too(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    space.unlink(ROOT, b"f")
    space.expire(1)
    [(ino, remains)] = queues.purge_queue(space.view, 0, 9)
    assert (ino, remains.size) == (file, FILE_SIZE_MAX)
    assert queues.trim_queue(space.view, 0, 9) == []
    space.check()


def test_orphan_record_without_inode_is_dropped(space: Space) -> None:
    space.view.apply({keys.orphan(77): codec.encode([])})
    space.expire(1)
    assert records(space, b"o") == []


def test_reply_of_a_mutation_travels_as_stored(space: Space) -> None:
    made = space.create(ROOT, b"f")
    answer = wire.MDS.encode(wire.InodeReply(made.encode()))
    space.view.apply(sessions.answered(1, 0, 1, answer))
    stored = sessions.replay(space.view, 1, 0, 1)
    assert stored is not None
    assert wire.MDS.decode(stored) == wire.InodeReply(made.encode())
