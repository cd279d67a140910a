"""The judge of crashes itself: it accepts what a crash may leave, and nothing else."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import pytest

from tests.support import crash_load
from tests.support.crash_load import judge


def write_log(path: Path, *lines: list[object]) -> Path:
    path.write_text("".join(json.dumps([0, *line]) + "\n" for line in (["ready"], *lines)))
    return path


def run_load(directory: Path, log_path: Path, seed: int, operations: int) -> None:
    """Do what the load does, for a number of operations."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    stop = threading.Event()
    count = 0
    real = crash_load._carry_out

    def counted(*arguments: object) -> None:
        nonlocal count
        real(*arguments)  # type: ignore[arg-type]
        count += 1
        if count == operations:
            stop.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crash_load, "_carry_out", counted)
        crash_load._work(directory, log, seed, 0, stop)
    os.close(log)


@pytest.mark.parametrize("seed", range(5))
def test_a_peaceful_run_is_accepted_and_any_change_is_not(tmp_path: Path, seed: int) -> None:
    log = tmp_path / "log"
    run_load(tmp_path, log, seed, 60)
    wrong, promised = judge(tmp_path, log, may_fail=False)
    assert not wrong
    assert promised == 60
    files = [path for path in (tmp_path / "t0").iterdir() if path.is_file()]
    victim = random.Random(seed).choice([path for path in files if path.stat().st_size])
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert len(judge(tmp_path, log, may_fail=False)[0]) == 1
    victim.unlink()
    assert len(judge(tmp_path, log, may_fail=False)[0]) == 1


def test_an_interrupted_write_may_be_there_in_part_but_not_as_something_else(
    tmp_path: Path,
) -> None:
    old, new = crash_load._data(1, 1000), crash_load._data(2, 1000)
    log = write_log(
        tmp_path / "log",
        ["begun", ["create", "f0", 1, 1000]], ["done"],
        ["begun", ["overwrite", "f0", 2, 1000, 500]],
    )  # fmt: skip
    (tmp_path / "t0").mkdir()
    file = tmp_path / "t0" / "f0"
    for content, verdict in (
        (old, True),
        (old[:500] + new, True),
        (old + new[500:600], True),
        (old[:500] + new[:250] + old[750:] + bytes(100), True),
        (old[:999], False),
        (old[:500] + bytes(500), False),
        (old[:500] + new + b"x", False),
        (new, False),
    ):
        file.write_bytes(content)
        assert (not judge(tmp_path, log, may_fail=False)[0]) is verdict


def test_a_rename_is_whole_or_has_not_happened(tmp_path: Path) -> None:
    data = crash_load._data(1, 10)
    log = write_log(
        tmp_path / "log",
        ["begun", ["create", "f0", 1, 10]], ["done"], ["begun", ["rename", "f0", "f1"]],
    )  # fmt: skip
    (tmp_path / "t0").mkdir()
    one, two = tmp_path / "t0" / "f0", tmp_path / "t0" / "f1"
    assert judge(tmp_path, log, may_fail=False)[0]
    one.write_bytes(data)
    assert not judge(tmp_path, log, may_fail=False)[0]
    two.write_bytes(data)
    assert judge(tmp_path, log, may_fail=False)[0]
    one.unlink()
    assert not judge(tmp_path, log, may_fail=False)[0]


def test_an_error_is_only_excused_when_the_mount_was_killed(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", ["begun", ["mkdir", "d0"]], ["failed", "EIO"])
    (tmp_path / "t0").mkdir()
    assert judge(tmp_path, log, may_fail=False)[0]
    assert not judge(tmp_path, log, may_fail=True)[0]
