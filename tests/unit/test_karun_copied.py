"""Laws of what is asked of a copy, where it goes, and what is said of it in the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import KaError
from karun.agent import frames
from karun.agent.place import SUM_SIZE, pack
from karun.agent.target import STAGE_NAME, filled, resolve
from karun.copied import Copied, exit_code, racks_of, report, with_latecomers
from karun.nodes import Names


def result(rank: int, reason: str | None = None, note: str = "") -> Copied:
    return Copied(rank, f"n{rank}", reason, note)


def test_exit_codes_tell_all_some_and_none_apart() -> None:
    assert exit_code([result(0), result(1)]) == 0
    assert exit_code([result(0), result(1, "full")]) == 2
    assert exit_code([result(0, "full"), result(1, "lost")]) == 1


def test_a_report_has_one_line_for_each_reason_and_note() -> None:
    results = [result(0, "full"), result(1), result(2, "full"), result(3, note="slow")]
    assert report(results, Names(["n0", "n1", "n2", "n3"])) == ["n[0,2]: full", "n3: note: slow"]
    assert report([result(0)], Names(["n0"])) == []


def test_who_came_late_is_noted_besides_what_else_is_said_of_it() -> None:
    found = with_latecomers([result(0), result(1), result(2, note="slow")], {1: 7.2, 2: 8.0})
    assert [one.note for one in found] == [
        "", "was reached only after 7 s", "was reached only after 8 s; slow",
    ]  # fmt: skip


@given(st.sets(st.integers(0, 99), min_size=1), st.none() | st.integers(1, 30))
def test_racks_hold_every_node_and_only_the_first_may_be_empty(
    ranks: set[int], rack_size: int | None
) -> None:
    racks = racks_of(sorted(ranks), rack_size)
    assert sum(racks) == len(ranks)
    assert 0 not in racks[1:]
    if rack_size:
        assert racks[0] == sum(rank < rack_size for rank in ranks)


def test_a_rack_of_nobody_is_refused() -> None:
    with pytest.raises(KaError, match="at least one"):
        racks_of([0], 0)


def test_names_are_filled_in_and_percent_signs_kept() -> None:
    assert filled("/srv/%h/%%h-%h%", "n1") == "/srv/n1/%h-n1%"


def test_a_destination_is_what_it_is_to_cp(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    directory = str(tmp_path / "directory")
    new = str(tmp_path / "new")

    def found(path: str, *, is_tree: bool = False, into: bool = False) -> str:
        return resolve(path, "x", is_tree=is_tree, into=into)

    for is_tree in (False, True):
        assert found(new, is_tree=is_tree) == new
        assert found(directory, is_tree=is_tree) == f"{directory}/x"
        assert found(f"{directory}/", is_tree=is_tree) == f"{directory}/x"
        assert found(f"{new}/", is_tree=is_tree) == f"{new}/x"
        assert found(new, is_tree=is_tree, into=True) == f"{new}/x"
    assert found(str(tmp_path / "link")) == str(tmp_path / "file")


def test_a_tree_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / STAGE_NAME).mkdir()
    assert resolve(str(tmp_path), "x", is_tree=True, into=False) == str(tmp_path)
    assert resolve(str(tmp_path), "x", is_tree=False, into=False) == f"{tmp_path}/x"


def test_what_has_no_name_goes_into_no_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        resolve(str(tmp_path), "", is_tree=False, into=False)


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileExistsError):
        resolve(str(tmp_path / "fifo"), "x", is_tree=False, into=False)


@given(st.binary(max_size=100), st.text(max_size=20))
def test_a_parcel_holds_what_was_packed(content: bytes, name: str) -> None:
    parcel = pack("/to", [(name, 0o644, 1, 2, 3, content)], into=True)
    fields = frames.unpack(parcel[SUM_SIZE:])
    assert fields[0] == b"/to"
    assert fields[1] == b"1"
    assert frames.text(fields[2]) == name
    assert fields[7] == content
