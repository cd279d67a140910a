"""The store: private, durable, bounded, and shared by processes."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import Code, KaError
from kaboot import store as store_module
from kaboot.model import Assignment, Machine, Step
from kaboot.store import Store

MAC = "52:54:00:00:00:01"
INSTALL, DEPLOYED = Assignment(Step.INSTALL), Assignment(Step.DEPLOYED)

# Changes a step and says so, again and again, until it is killed.
WRITER = """
import sys
from pathlib import Path
from kaboot.model import Assignment, Step
from kaboot.store import Store
store = Store.open(Path(sys.argv[1]))
for number in range(1_000_000):
    store.assign(["pc1"], Assignment(Step.CUSTOM, f"p{number}"), number, why=f"{number}")
    print(number, flush=True)
"""


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "kaboot.db"


def test_only_its_owner_can_read_it(path: Path) -> None:
    with Store.open(path) as store:
        store.assign(["pc1"], INSTALL, 1, why="test")
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_was_answered_is_there_after_a_kill(path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 20:
                process.send_signal(signal.SIGKILL)
                break
        said = [20, *(int(line) for line in process.stdout.read().split())]
        process.wait()
        process.stdout.close()
        with Store.open(path) as store:
            kept = store.assignment("pc1")
            assert kept is not None
            number = int(kept.profile[1:])
            assert number in (said[-1], said[-1] + 1)
            last = store.events(count=1)[0]
            assert (last.stage, last.detail) == ("step", f"custom:p{number} ({number})")


def test_an_assignment_of_many_is_seen_by_another_process_at_once(path: Path) -> None:
    with Store.open(path) as one, Store.open(path) as other:
        before = other.data_version()
        one.assign(["pc1", "pc2"], INSTALL, 5, why="set")
        assert other.data_version() != before
        assert other.assignments() == {"pc1": (INSTALL, 5), "pc2": (INSTALL, 5)}


def test_a_step_advances_only_from_where_it_was(path: Path) -> None:
    with Store.open(path) as store:
        assert store.advance("pc1", INSTALL, DEPLOYED, 1, why="installed")
        assert not store.advance("pc1", INSTALL, DEPLOYED, 2, why="installed again")
        store.assign(["pc1"], Assignment(Step.RESCUE), 3, why="set")
        assert not store.advance("pc1", DEPLOYED, Assignment(Step.LOCAL), 4, why="up, late")
        assert store.assignment("pc1") == Assignment(Step.RESCUE)


def test_facts_a_machine_does_not_repeat_are_kept(path: Path) -> None:
    with Store.open(path) as store:
        store.saw(Machine(MAC, "pcbios", "i386", "SER", "Box", "10.0.0.1"), "", "script", "", 1)
        store.saw(Machine(MAC, address="10.0.0.2"), "", "lease", "", 2)
        (row,) = store.machines()
        assert row.machine == Machine(MAC, "pcbios", "i386", "SER", "Box", "10.0.0.2")
        assert (row.stage, row.first_ns, row.last_ns) == ("lease", 1, 2)
        assert store.mac_at("10.0.0.2") == MAC
        assert store.mac_at("10.0.0.1") is None


def test_a_name_is_learned_once_and_its_events_get_the_name(path: Path) -> None:
    with Store.open(path) as store:
        store.set_queue(["pc1", "pc2"])
        store.saw(Machine(MAC), "", "script", "", 1)
        store.saw(Machine("52:54:00:00:00:02"), "", "script", "", 2)
        assert store.learn(MAC, "pc1", 3, why="test")
        assert not store.learn("52:54:00:00:00:02", "pc1", 4, why="taken")
        assert not store.learn(MAC, "pc2", 4, why="named already")
        assert store.learned() == {MAC: "pc1"}
        assert store.queue() == ["pc2"]
        assert [event.stage for event in store.events(node="pc1")] == ["script", "learned"]
        with pytest.raises(KaError, match="nothing was learned of pc2"):
            store.forget(["pc1", "pc2"])
        assert store.forget(["pc1"]) == [MAC]
        assert store.learned() == {}


def test_strangers_and_events_do_not_grow_without_bound(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MACHINES_MAX", 10)
    monkeypatch.setattr(store_module, "EVENTS_MAX", 20)
    monkeypatch.setattr(store_module, "EVENTS_SLACK", 10)
    with Store.open(path) as store:
        for number in range(100):
            store.saw(Machine(f"52:54:00:00:00:{number:02x}"), "", "script", "", number)
        assert len(store.machines()) == 10
        assert 20 <= len(store.events()) <= 30
        store.saw(Machine("52:54:00:00:00:00"), "", "kernel", "", 1000)
        assert store.machines()[0].stage == "kernel"


def test_events_are_read_from_where_one_left_off(path: Path) -> None:
    with Store.open(path) as store:
        for number in range(10):
            store.saw(Machine(MAC), f"pc{number % 2}", "script", str(number), number)
        last = store.events(count=3)
        assert [event.detail for event in last] == ["7", "8", "9"]
        assert [event.detail for event in store.events(after=last[0].id)] == ["8", "9"]
        assert {event.node for event in store.events(node="pc1")} == {"pc1"}
        assert len(store.events(node=MAC)) == 10


def test_a_full_disk_is_one_line_and_nothing_half_written(path: Path) -> None:
    with Store.open(path) as store:
        store.assign(["pc1"], INSTALL, 1, why="test")
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        sets = ([f"n{number}-{index}" for index in range(50)] for number in range(1000))
        written = 0
        with contextlib.suppress(KaError):
            for names in sets:
                store.assign(names, DEPLOYED, 2, why="x" * 100)
                written += 1
        with pytest.raises(KaError, match="full") as caught:
            store.assign(next(sets), DEPLOYED, 2, why="x" * 100)
        assert caught.value.code is Code.EIO
        kept = set(store.assignments()) - {"pc1"}
        assert len(kept) == 50 * written, "whole sets only"
        store._db.execute("PRAGMA max_page_count = 100000")
        store.assign(["pc1"], DEPLOYED, 3, why="space again")


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" * 8])
def test_a_foreign_file_is_refused_in_one_line(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(KaError) as caught:
        Store.open(path)
    assert "\n" not in str(caught.value)


def test_a_store_of_a_later_kaboot_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    path.chmod(0o600)
    with pytest.raises(KaError, match="made by a later version of kaboot"):
        Store.open(path)
