"""Workloads on a tree of real files: unpack, pack, remove, by the programs people use for it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tarfile
import time

from bench.load import Place, Timed, expect, timed_command
from bench.model import MIB
from common.checksum import digest

__all__ = ["check_tree", "remove", "tar_to_pipe", "untar"]


def untar(place: Place) -> Timed:
    target = place.directory / "untar"
    target.mkdir()
    seconds = timed_command("tar", "-xf", str(place.tree.archive), "-C", str(target))
    return Timed(seconds, place.tree.entry_count)


def tar_to_pipe(place: Place) -> Timed:
    # GNU tar reads no file when it sees /dev/null as its output, so the archive goes to a pipe.
    started = time.perf_counter()
    with subprocess.Popen(
        ["tar", "-cf", "-", "-C", str(place.directory), "untar"], stdout=subprocess.PIPE
    ) as tar:
        assert tar.stdout is not None
        fcntl.fcntl(tar.stdout, fcntl.F_SETPIPE_SZ, MIB)
        buffer, total = bytearray(MIB), 0
        while got := os.readv(tar.stdout.fileno(), [buffer]):
            total += got
    seconds = time.perf_counter() - started
    expect(tar.returncode == 0, f"tar ended with exit code {tar.returncode}")
    expect(total >= place.tree.size_bytes, f"tar read {total} bytes of {place.tree.size_bytes}")
    return Timed(seconds, place.tree.entry_count)


def check_tree(place: Place) -> None:
    count = 0
    with tarfile.open(place.tree.archive) as tar:
        for member in tar:
            path = place.directory / "untar" / member.name
            count += 1
            if member.isdir():
                same = path.is_dir()
            elif member.issym():
                same = os.readlink(path) == member.linkname
            else:
                content = tar.extractfile(member)
                assert content is not None
                same = digest(path.read_bytes()) == digest(content.read())
            expect(same, f"{path} came back different")
    expect(count == place.tree.entry_count, f"{count} entries in the archive")


def remove(place: Place) -> Timed:
    seconds = timed_command("rm", "-rf", str(place.directory / "untar"))
    expect(not (place.directory / "untar").exists(), "the tree is still there")
    return Timed(seconds, place.tree.entry_count)
