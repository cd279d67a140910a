"""Laws of `karun gather`, and of both commands' output and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from karun.api import Copied, Run
from karun.copied import exit_code
from tests.support.copies import random_file

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes: needs root")


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(1, count + 1)]


async def gather(nodes: list[str], source: str, directory: Path) -> list[Copied]:
    async with Run(nodes, "local") as run:
        return await run.gather(source, str(directory))


def reasons(results: list[Copied]) -> dict[str, str]:
    return {result.node: result.reason for result in results if result.reason is not None}


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 7_000_003])
async def test_files_of_any_size_arrive_with_their_attributes(tmp_path: Path, size: int) -> None:
    data = {node: random_file(tmp_path / node, size) for node in names(3)}
    for node in names(3):
        (tmp_path / node).chmod(0o640)
        os.utime(tmp_path / node, ns=(1, 1_234_567_890_123_456_789))
    results = await gather(names(3), f"{tmp_path}/%h", tmp_path / "new/all")
    assert exit_code(results) == 0, reasons(results)
    for node in names(3):
        found = tmp_path / "new/all" / node
        assert found.read_bytes() == data[node]
        assert found.stat().st_mode & 0o7777 == 0o640
        assert found.stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert sorted(os.listdir(tmp_path / "new/all")) == names(3)


async def test_a_tree_arrives_with_links_holes_and_extended_attributes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    data = random_file(tree / "file", 300_000)
    os.link(tree / "file", tree / "below/hard")
    os.symlink("/nowhere", tree / "soft")
    os.setxattr(tree / "file", b"user.of", b"the tree")
    with (tree / "sparse").open("wb") as file:
        file.truncate(10 << 20)
    for _ in range(2):  # what is there already is replaced
        results = await gather(names(2), str(tree), tmp_path / "all")
        assert exit_code(results) == 0, reasons(results)
    for node in names(2):
        found = tmp_path / "all" / node
        assert (found / "file").read_bytes() == data
        assert (found / "file").stat().st_ino == (found / "below/hard").stat().st_ino
        assert os.readlink(found / "soft") == "/nowhere"
        assert os.getxattr(found / "file", b"user.of") == b"the tree"
        assert (found / "sparse").stat().st_size == 10 << 20
        assert (found / "sparse").stat().st_blocks == 0
        assert (found / "below").stat().st_mtime_ns == (tree / "below").stat().st_mtime_ns
        assert sorted(os.listdir(found)) == ["below", "file", "soft", "sparse"]


async def test_a_node_without_it_is_named_and_costs_the_others_nothing(tmp_path: Path) -> None:
    random_file(tmp_path / "n1", 10)
    results = await gather(names(3), f"{tmp_path}/%h", tmp_path / "all")
    assert exit_code(results) == 2
    assert reasons(results) == {
        node: f"cannot read {tmp_path}/{node}: No such file or directory" for node in ("n2", "n3")
    }
    assert os.listdir(tmp_path / "all") == ["n1"]


async def test_what_is_neither_file_nor_directory_is_not_given(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    results = await gather(names(1), f"{tmp_path}/fifo", tmp_path / "all")
    assert "is neither a file nor a directory" in reasons(results)["n1"]


async def test_a_link_at_the_destination_is_not_followed_out_of_it(tmp_path: Path) -> None:
    for path in ("tree/below", "all/n1", "outside"):
        (tmp_path / path).mkdir(parents=True)
    random_file(tmp_path / "tree/below/file", 10)
    (tmp_path / "all/n1/below").symlink_to(tmp_path / "outside")
    results = await gather(names(1), f"{tmp_path}/tree", tmp_path / "all")
    assert exit_code(results) == 0, reasons(results)
    assert os.listdir(tmp_path / "outside") == []
    assert (tmp_path / "all/n1/below/file").exists()


@ROOT_ONLY
async def test_a_node_cannot_leave_set_id_programs_or_devices_here(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "program").touch()
    (tree / "program").chmod(0o6755)
    os.mknod(tree / "zero", 0o666 | 0o020000, os.makedev(1, 5))
    results = await gather(names(1), str(tree), tmp_path / "all")
    assert exit_code(results) == 0, reasons(results)
    assert os.listdir(tmp_path / "all/n1") == ["program"]
    assert (tmp_path / "all/n1/program").stat().st_mode & 0o7777 == 0o755


async def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KaError, match="cannot write") as caught:
        await gather(names(1), "/etc/passwd", tmp_path / "file/all")
    assert caught.value.code is Code.ENOTDIR


async def test_many_nodes_give_at_once(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 2 << 20)
    results = await gather(names(40), f"{tmp_path}/source", tmp_path / "all")
    assert exit_code(results) == 0, reasons(results)
    assert {(tmp_path / "all" / node).read_bytes() == data for node in names(40)} == {True}


# ------------------------------------------------------------ the command line


async def karun(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [sys.executable, "-m", "karun.entry", *words],
        stdin=stdin, capture_stdout=True, capture_stderr=True, check=False,
    )  # fmt: skip


async def test_a_copy_is_one_line_when_all_is_well_and_none_when_quiet(tmp_path: Path) -> None:
    words = ["copy", "--via", "local", "-w", "n[1-3]", "/etc/passwd", f"{tmp_path}/%h"]
    done = await karun(*words)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.startswith(b"karun: 3 of 3 nodes")
    done = await karun(*words, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_some_and_none_have_exit_codes_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "n2").mkdir()
    words = ["copy", "--via", "local", "-w", "n[1-3]", "-q", "/etc/passwd"]
    done = await karun(*words, "--json", f"{tmp_path}/%h/x")
    assert done.returncode == 2
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [fact["ok"] for fact in facts] == [False, True, False]
    assert facts[0]["reason"] == f"cannot write {tmp_path}/n1/x: No such file or directory"
    done = await karun(*words, f"{tmp_path}/none/x")
    assert done.returncode == 1
    expected = f"karun: n[1-3]: cannot write {tmp_path}/none/x: No such file or directory\n"
    assert done.stderr.decode() == expected


async def test_standard_input_is_copied(tmp_path: Path) -> None:
    data = os.urandom(200_000)
    words = ["copy", "--via", "local", "-w", "n[1-2]", "-q", "-", f"{tmp_path}/%h"]
    assert (await karun(*words, stdin=data)).returncode == 0
    assert (tmp_path / "n2").read_bytes() == data


async def test_a_pipe_is_a_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = ["copy", "--via", "local", "-w", "n[1-2]", f"{tmp_path}/pipe", f"{tmp_path}/%h"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.Path(tmp_path / "pipe").write_bytes, b"what comes")
        assert (await karun(*words)).returncode == 0
    assert (tmp_path / "n2").read_bytes() == b"what comes"


async def test_progress_is_one_line_written_over_on_a_terminal(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 3 << 20)
    words = ["copy", "--via", "local", "-w", "n[1-2]", "--rate", "4MB"]
    mine, terminal = os.openpty()
    try:
        done = await trio.run_process(
            [sys.executable, "-m", "karun.entry", *words, f"{tmp_path}/source", f"{tmp_path}/%h"],
            stderr=terminal, check=False,
        )  # fmt: skip
        said = os.read(mine, 65536)
    finally:
        os.close(mine)
        os.close(terminal)
    assert done.returncode == 0
    assert said.startswith(b"\rsource: 0 of 2 nodes done")
    assert b" % of 3MiB, " in said
    assert said.count(b"\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["copy", "/etc/passwd"], 2, "need a source and a destination"),
        (["copy", "/no/such", "/tmp/"], 1, "cannot read /no/such: No such file or directory"),
        (["copy", "/dev/null", "/tmp/x"], 1,
         "cannot read /dev/null: is neither a file, a directory nor a disk"),
        (["copy", "--rate", "fast", "/etc/passwd", "/x"], 2, "not a rate (such as 1Gbit): 'fast'"),
        (["gather", "/etc/passwd", "/etc/passwd/all"], 1,
         "cannot write /etc/passwd/all: Not a directory"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_one_line(words: list[str], code: int, line: str) -> None:
    done = await karun(words[0], "--via", "local", "-w", "n1", *words[1:])
    assert done.stderr.decode() == f"karun: {line}\n"
    assert done.returncode == code
