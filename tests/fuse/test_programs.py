"""Programs that ask much of a file system: rsync, git, SQLite, and very large directories."""

from __future__ import annotations

import os
import random
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.support.cluster import Cluster, fill_directory

pytestmark = pytest.mark.slow
GIT_FILE_COUNT = 5_200
BIG_COUNT = 100_000
RSS_GROWTH_KIB_MAX = 8 * 1024


def _run(*words: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------- rsync


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes devices")
@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_rsync_there_and_back_is_equal(cluster: Cluster, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    _make_varied_tree(source)
    expected = _run("rsync", "-naHAXi", "--checksum", f"{source}/", f"{back}/")
    assert len(expected.splitlines()) > 250
    _run("rsync", "-aHAX", f"{source}/", f"{cluster.mount}/tree/")
    cluster.drop_caches()
    for root in (cluster.mount / "tree", back):
        if root == back:
            _run("rsync", "-aHAX", f"{cluster.mount}/tree/", f"{back}/")
        differences = _run("rsync", "-naHAXi", "--checksum", "--delete", f"{source}/", f"{root}/")
        assert differences == ""


def _make_varied_tree(root: Path) -> None:
    """A tree of everything that rsync -aHAX carries."""
    random_bytes = random.Random(5)
    for number in range(240):
        directory = root / f"d{number % 12}"
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"f{number}"
        file.write_bytes(random_bytes.randbytes(random_bytes.randrange(40_000)))
        file.chmod(random_bytes.randrange(0o1000))
        os.chown(file, number * 1000, number)
        os.utime(file, ns=(10**18, 10**18 + random_bytes.randrange(10**9)))
        if number % 10 == 0:
            os.setxattr(file, "user.note", random_bytes.randbytes(100))
        if number % 7 == 0:
            os.link(file, root / f"link{number}")
        if number % 30 == 0 and shutil.which("setfacl"):
            _run("setfacl", "-m", "u:1000:rw,g:100:r", file)
    (root / "large").write_bytes(random_bytes.randbytes(5_000_000))
    (root / "symlink").symlink_to("d1/f1")
    os.mkfifo(root / "fifo")
    os.mknod(root / "device", stat.S_IFCHR | 0o640, os.makedev(1, 7))
    (root / "d3").chmod(0o3711)
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(root)
        server.bind("socket")
        os.chdir(here)


# ---------------------------------------------------------------- git


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_clones_a_large_repository_soundly(cluster: Cluster, tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", cluster.mount / "clone"
    _make_repository(origin)
    _run("git", "clone", "--quiet", "--no-local", origin, clone)
    cluster.drop_caches()
    _run("git", "fsck", "--full", "--strict", cwd=clone)
    assert _run("git", "status", "--porcelain", cwd=clone) == ""
    assert len(_run("git", "ls-files", cwd=clone).splitlines()) == GIT_FILE_COUNT
    (clone / "new").write_text("new")
    _run("git", "add", "new", cwd=clone)
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    _run("git", *identity, "commit", "--quiet", "-m", "new", cwd=clone)
    _run("git", "gc", "--quiet", cwd=clone)
    _run("git", "fsck", "--full", "--strict", cwd=clone)
    assert _run("git", "status", "--porcelain", cwd=clone) == ""


def _make_repository(origin: Path) -> None:
    """One commit of many files, handed to git as a stream."""
    origin.mkdir()
    _run("git", "init", "--quiet", "--initial-branch=main", cwd=origin)
    lines = ["commit refs/heads/main", "committer t <t@example.org> 1600000000 +0000", "data 5"]
    lines += ["many", ""]
    for number in range(GIT_FILE_COUNT):
        text = f"file {number}\n" * (number % 90)
        lines += [f"M 100644 inline d{number % 61}/e{number % 7}/f{number}", f"data {len(text)}"]
        lines += [text]
    stream = "\n".join([*lines, ""])
    subprocess.run(
        ["git", "fast-import", "--quiet"], cwd=origin, input=stream, text=True, check=True
    )


# ---------------------------------------------------------------- SQLite


@pytest.mark.parametrize("mode", ["delete", "truncate", "wal"])
def test_sqlite_keeps_what_two_writers_commit(cluster: Cluster, mode: str) -> None:
    path = cluster.mount / f"{mode}.db"
    with sqlite3.connect(path) as database:
        assert database.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
        database.execute("create table t (writer integer, number integer)")
    database.close()
    script = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for number in range(60):
    database.execute("begin immediate")
    database.execute("insert into t values (?, ?)", (int(sys.argv[2]), number))
    database.execute("rollback" if number % 10 == 9 else "commit")
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", script, path, str(writer)]) for writer in (1, 2)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    database = sqlite3.connect(path)
    assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    rows = database.execute("select writer, count(*) from t group by writer").fetchall()
    database.close()
    assert rows == [(1, 54), (2, 54)]


# ---------------------------------------------------------------- a large directory


def _rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_a_directory_of_100_000_entries_lists_in_bounded_memory(cluster: Cluster) -> None:
    directory = cluster.mount / "big"
    trio.run(fill_directory, cluster.config_path, directory.name, BIG_COUNT)
    assert (directory / "0").stat().st_nlink == BIG_COUNT
    cluster.remount()
    pid = cluster.mount_pid(cluster.mount)
    assert len(os.listdir(cluster.mount)) >= 1
    before = _rss_kib(pid)
    names = os.listdir(directory)
    grown = _rss_kib(pid) - before
    assert len(names) == BIG_COUNT
    assert {int(name) for name in names} == set(range(BIG_COUNT))
    assert grown < RSS_GROWTH_KIB_MAX
    with os.scandir(directory) as entries:
        assert sum(entry.stat().st_nlink == BIG_COUNT for entry in entries) == BIG_COUNT
    assert _rss_kib(pid) - before < RSS_GROWTH_KIB_MAX
