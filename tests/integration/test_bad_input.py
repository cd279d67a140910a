"""What users and strangers get wrong: one clear line, the right exit code, nothing left behind."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfsp import cli, mounting
from tests.conftest import TOKEN
from tests.support import leaks
from tests.support.running import Cluster, nfsp

FUSE = pytest.mark.fuse
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def cluster(base: Path) -> Iterator[Cluster]:
    made = Cluster(base / "c", iods=2, timeout_s=5)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def point(base: Path) -> Iterator[Path]:
    """A free mount point."""
    path = base / "m"
    path.mkdir()
    yield path
    leaks.unmount(path)
    path.rmdir()


def quickly(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fork, which spares it a start of the interpreter."""
    words = ["nfsp", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            code = 70
            try:
                sys.stdout, sys.stderr = io.TextIOWrapper(out), io.TextIOWrapper(err)
                sys.argv = words
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read().decode(), err.read().decode())


def refused(result: subprocess.CompletedProcess[str], code: int, pattern: str) -> None:
    """Assert that a command said one line, the right one, and ended with the right code."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("nfsp: ")
    assert re.search(pattern, lines[0]), lines[0]
    assert result.returncode == code, (result.returncode, lines[0])


def edited(cluster: Cluster, name: str, old: str, new: str) -> Path:
    """A copy of the cluster's configuration with one thing changed."""
    path = cluster.directory / name
    text = cluster.config_path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


# ---------------------------------------------------------------- configuration


def test_a_missing_configuration_is_named(base: Path) -> None:
    refused(quickly("-c", base / "no.toml", "status"), 2, r"no cluster configuration: /.*no\.toml")


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("chunk_size", "chunksize", r"unknown key 'chunksize' \(did you mean 'chunk_size'\?\)"),
        ("[cluster]", "[cluster", r"edited\.toml: Expected .*at line 1"),
        ("[[iod]]", "[[iods]]", "unknown key 'iods'"),
        ("chunk_size = 65536", "chunk_size = 65537", "chunk_size must be a power of two"),
        ("chunk_size = 65536", 'chunk_size = "much"', "not a size"),
        ('address = "127.0.0.1:', 'address = "127.0.0.1', "not an address"),
        ('\nid = "', "\nid = 7\n#", "'id' must be a string"),
        ("timeout_s = 5", "timeout_s = -1", "timeout_s"),
        ("session_ttl_s = 60.0", "session_ttl_s = 0", "session_ttl_s"),
        ('"cluster.key"', '"no.key"', "cannot read the key"),
        ('"cluster.key"', '"cluster.toml"', "others may read the key|hexadecimal"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_place(
    cluster: Cluster, old: str, new: str, pattern: str
) -> None:
    path = edited(cluster, "edited.toml", old, new)
    refused(quickly("-c", path, "status"), 2, pattern)


def test_a_key_that_others_can_read_is_refused(cluster: Cluster) -> None:
    key = cluster.directory / "open.key"
    shutil.copy(cluster.key_path, key)
    key.chmod(0o644)
    path = edited(cluster, "edited.toml", "cluster.key", "open.key")
    refused(quickly("-c", path, "status"), 2, "others may read the key: chmod 600")


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "code", "pattern"),
    [
        (["down", "{base}"], 2, "no cluster in"),
        (["up", "{base}/x", "--iods", "0"], 2, "--iods takes 1 to"),
        (["up", "{base}/x", "--iods", "many"], 2, "not a valid integer"),
        (["up", "{base}/x", "--mds", "2"], 2, "--mds 1"),
        (["up", "/proc/x"], 2, "cannot write to /proc/x"),
        (["up", "/dev/null"], 2, "cannot write to /dev/null"),
        (["-c", "{config}", "iod", "99"], 2, r"no \[\[iod\]\] with id 99"),
        (["-c", "{config}", "mds", "0"], 1, "already running: mds0"),
        (["-c", "{config}", "iod", "1"], 1, "already running: iod1"),
        (["-c", "{config}", "mkfs"], 1, "in use by another process|holds a metadata store"),
        (["-c", "{config}", "mkfs", "--owner", "me"], 2, "UID:GID"),
        (["-c", "{config}", "mount", "/nowhere/at/all"], 2, "not a directory: /nowhere/at/all"),
        (["-c", "{config}", "mount", "/etc/passwd"], 2, "not a directory"),
        (["-c", "{config}", "mount", "/proc"], 1, "something is mounted there already: /proc"),
        (["-c", "{config}", "mount", "{base}", "-o", "tiemout=3"], 2, "unknown mount option"),
        (["-c", "{config}", "mount", "{base}", "-o", "timeout=soon"], 2, "not a number: 'soon'"),
        (["-c", "{config}", "mount", "{base}", "-o", "timeout=-1"], 2, "timeout"),
        (["-c", "{config}", "mount", "{base}", "-o", "timeout=nan"], 2, "timeout"),
        (["-c", "{config}", "mount", "{base}", "-o", "attr_timeout=-1"], 2, "attr_timeout"),
        (["-c", "{config}", "mount", "{base}", "-o", "dirty=lots"], 2, "not a size"),
        (["umount", "{base}"], 2, "nothing is mounted at"),
        (["umount", "/proc"], 2, "is a mount of proc, not of nfsp"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["-c", "{config}", "layout", "/"], 2, "/: "),
        (["-c", "{config}", "export", "/"], 2, "name them with --to"),
    ],
)
def test_wrong_arguments_are_refused_with_a_hint(
    cluster: Cluster, base: Path, arguments: list[str], code: int, pattern: str
) -> None:
    filled = [text.format(base=base, config=cluster.config_path) for text in arguments]
    refused(quickly(*filled), code, pattern)
    assert not (base / "x").exists()


# ---------------------------------------------------------------- who may come in


@FUSE
def test_a_wrong_key_and_a_wrong_cluster_cannot_mount(cluster: Cluster, point: Path) -> None:
    key = cluster.directory / "wrong.key"
    key.write_text("00" * 32)
    key.chmod(0o600)
    path = edited(cluster, "edited.toml", "cluster.key", "wrong.key")
    refused(nfsp("-c", path, "mount", point, limit_s=20), 4, "wrong cluster key")
    result = nfsp("-c", path, "status")
    assert result.returncode == 3
    assert result.stdout.count("wrong cluster key") == 3
    assert not result.stderr
    refused(nfsp("-c", path, "fsck", limit_s=20), 4, "wrong cluster key")
    path = edited(cluster, "edited.toml", '\nid = "', '\nid = "x')
    refused(nfsp("-c", path, "mount", point, limit_s=20), 4, "another cluster")


# ---------------------------------------------------------------- mount points


@FUSE
def test_a_second_mount_and_a_busy_unmount_are_refused(cluster: Cluster, point: Path) -> None:
    mounting.mount_in_background(cluster.config_path, point, ())
    refused(nfsp("-c", cluster.config_path, "mount", point), 1, "mounted there already")
    (point / "f").write_text("x")
    with open(point / "f") as file:
        refused(nfsp("umount", point), 1, "busy.*close what uses it")
        assert file.read() == "x"
    (point / "f").unlink()
    assert nfsp("umount", point).returncode == 0
    refused(nfsp("umount", point), 2, "nothing is mounted")


@FUSE
def test_a_dead_mount_is_called_by_its_name_and_can_be_removed(
    cluster: Cluster, point: Path
) -> None:
    pid = mounting.mount_in_background(cluster.config_path, point, ())
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    refused(
        nfsp("-c", cluster.config_path, "mount", point), 1, f"dead mount.*nfsp umount {point}"
    )
    assert nfsp("umount", point).returncode == 0


@FUSE
@ROOT_ONLY
def test_a_missing_fuse_device_is_named(cluster: Cluster, point: Path) -> None:
    command = (
        "mount -t tmpfs none /dev && touch /dev/null && "
        f"exec {sys.executable} -m nfsp -c {cluster.config_path} mount {point}"
    )
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    refused(result, 2, "/dev/fuse is missing")


@FUSE
@ROOT_ONLY
def test_a_read_only_cluster_directory_can_be_mounted_from_but_not_run_in(
    cluster: Cluster, point: Path
) -> None:
    script = f"""
        mount --bind {cluster.directory} {cluster.directory} &&
        mount -o remount,bind,ro {cluster.directory} || exit 99
        {sys.executable} -m nfsp -c {cluster.config_path} mds 0; echo $?
        {sys.executable} -m nfsp up {cluster.directory}; echo $?
        {sys.executable} -m nfsp -c {cluster.config_path} mount {point} && ls {point} &&
        {sys.executable} -m nfsp umount {point}; echo $?
    """
    cluster.kill("mds0")
    try:
        writable = subprocess.run(
            ["unshare", "-m", "sh", "-c", script],
            capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "XDG_RUNTIME_DIR": str(cluster.directory.parent / "xdg")},
        )  # fmt: skip
    finally:
        cluster.start()
    lines = writable.stderr.splitlines()
    assert len(lines) == 3, writable.stderr
    assert all(line.startswith("nfsp: ") for line in lines)
    assert all("Read-only file system" in line for line in lines[:2]), lines
    assert "mds0" in lines[2]


# ---------------------------------------------------------------- names


@FUSE
def test_a_name_of_255_bytes_is_fine_and_one_of_256_is_too_long(
    cluster: Cluster, point: Path
) -> None:
    mounting.mount_in_background(cluster.config_path, point, ())
    name = "ä" * 127 + "x"
    (point / name).write_text("x")
    assert os.listdir(point) == [name]
    for call in (
        lambda path: path.write_text("x"), lambda path: path.mkdir(),
        lambda path: path.stat(), lambda path: (point / name).rename(path),
        lambda path: path.symlink_to("x"), lambda path: path.hardlink_to(point / name),
    ):  # fmt: skip
        with pytest.raises(OSError, match="File name too long"):
            call(point / (name + "y"))
    (point / name).unlink()


# ---------------------------------------------------------------- up and down


@FUSE
def test_up_and_down_can_be_said_twice(base: Path, point: Path) -> None:
    directory = base / "twice"
    up = ["up", directory, "--iods", 1, "--mount", point, "--daemon"]
    result = nfsp(*up)
    assert (result.returncode, result.stderr) == (0, "")
    (point / "f").write_text("kept")
    again = nfsp("up", directory, "--daemon")
    assert (again.returncode, again.stderr) == (0, "")
    assert "started" not in again.stdout
    refused(nfsp(*up), 1, "mounted there already")
    assert (point / "f").read_text() == "kept"  # what ran before still does
    for _ in range(2):
        result = nfsp("down", directory)
        assert (result.returncode, result.stderr) == (0, "")
        assert not os.path.ismount(point)
    result = nfsp(*up)
    assert (result.returncode, result.stderr) == (0, "")
    assert (point / "f").read_text() == "kept"
    with open(point / "f"):
        refused(nfsp("down", directory), 1, "busy")
        assert (point / "f").read_text() == "kept"
    assert nfsp("down", directory).returncode == 0
