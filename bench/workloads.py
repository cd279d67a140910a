"""The load: what is done to a file system, given nothing but a directory on it.

Each workload does a fixed amount of work and times only that; it prepares before and checks the
data after, outside the timed part.  A check that fails raises: a figure of a file system that
returned something else is not printed.

Workloads come in groups, in the order of WORKLOADS.  A group starts in an empty directory and one
workload uses what those it `needs` left there.  `cold` ones are run after every cache was dropped
(inside.py does that).

Parallel load is made by processes, not threads: with threads the interpreter's lock is the
bottleneck (8 threads make files on a local disk slower than one; 8 processes twice as fast as
one).  On the local disk from the page cache the loops here reach several hundred thousand reads
and tens of thousands of files a second, well above what any system measured here does.
"""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.model import MIB, Scale, Unit
from bench.realtree import RealTree
from common.checksum import digest
from common.errors import Code, KaError

__all__ = ["WORKLOADS", "Place", "Timed", "Workload", "groups", "plan"]

SMALL_SIZE = 4096
"""Of the small files and of the random reads: one page."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group works, and with what."""

    directory: Path
    scale: Scale
    tree: RealTree
    seed: int


@dataclass(frozen=True, slots=True)
class Timed:
    """The timed part of one workload."""

    seconds: float
    amount: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the tables."""

    name: str
    group: str
    unit: Unit
    meaning: str
    run: Callable[[Place], Timed]
    check: Callable[[Place], None] | None = None
    cold: bool = False
    needs: tuple[str, ...] = ()


# --- the large file -------------------------------------------------------------------------


def _block(place: Place) -> bytearray:
    """Return 1 MiB that does not compress; a block's own index overwrites its start."""
    return bytearray(random.Random(place.seed).randbytes(MIB))


def _stamp(block: bytearray, index: int) -> None:
    block[:8] = index.to_bytes(8, "little")


def _large(place: Place) -> Path:
    return place.directory / "large"


def _write_large(place: Place) -> Timed:
    block, count = _block(place), place.scale.size_bytes // MIB
    started = time.perf_counter()
    file = os.open(_large(place), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for index in range(count):
            _stamp(block, index)
            _write_all(file, block)
        os.fsync(file)
    finally:
        os.close(file)
    return Timed(time.perf_counter() - started, count * MIB)


def _write_all(file: int, data: bytes | bytearray) -> None:
    written = os.write(file, data)
    while written < len(data):
        written += os.write(file, memoryview(data)[written:])


def _read_large(place: Place) -> Timed:
    buffer = bytearray(MIB)
    total = 0
    started = time.perf_counter()
    file = os.open(_large(place), os.O_RDONLY)
    try:
        while got := os.readv(file, [buffer]):
            total += got
    finally:
        os.close(file)
    seconds = time.perf_counter() - started
    _expect(total == place.scale.size_bytes, f"read {total} bytes of {place.scale.size_bytes}")
    return Timed(seconds, total)


def _check_large(place: Place) -> None:
    expected = _block(place)
    with _large(place).open("rb", buffering=0) as file:
        for index in range(place.scale.size_bytes // MIB):
            _stamp(expected, index)
            _expect(_read_exactly(file, MIB) == expected, f"MiB {index} came back different")


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _random_reads(depth: int) -> Callable[[Place], Timed]:
    def run(place: Place) -> Timed:
        pages = place.scale.size_bytes // SMALL_SIZE
        wanted = place.scale.read_count * (1 if depth == 1 else 4)
        chosen = random.Random(f"{place.seed}/{depth}").sample(range(pages), min(wanted, pages))

        def worker(index: int) -> None:
            buffers = [bytearray(SMALL_SIZE)]
            file = os.open(_large(place), os.O_RDONLY)
            for page in chosen[index::depth]:
                got = os.preadv(file, buffers, page * SMALL_SIZE)
                _expect(got == SMALL_SIZE, f"a read of {SMALL_SIZE} bytes gave {got}")
            os.close(file)

        return Timed(_in_parallel(worker, depth), len(chosen))

    return run


# --- small files ----------------------------------------------------------------------------


def _small_content(place: Place, worker: int, index: int) -> bytes:
    """Return a small file's content: random, and different in each file."""
    base = random.Random(place.seed + 1).randbytes(SMALL_SIZE - 16)
    return worker.to_bytes(8, "little") + index.to_bytes(8, "little") + base


def _create_small(kind: str, workers: int, *, fsync: bool = False) -> Callable[[Place], Timed]:
    def run(place: Place) -> Timed:
        count = _per_worker(place, kind) * workers
        for number in range(workers):
            (place.directory / kind / str(number)).mkdir(parents=True)
        body = _small_content(place, 0, 0)[16:]

        def worker(number: int) -> None:
            directory = f"{place.directory}/{kind}/{number}/"
            mark = number.to_bytes(8, "little")
            for index in range(count // workers):
                content = mark + index.to_bytes(8, "little") + body
                path = f"{directory}{index:06d}"
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                written = os.write(file, content)
                if fsync:
                    os.fsync(file)
                os.close(file)
                _expect(written == SMALL_SIZE, f"a write of {SMALL_SIZE} bytes took {written}")

        return Timed(_in_parallel(worker, workers), count)

    return run


def _per_worker(place: Place, kind: str) -> int:
    scale = place.scale
    counts = {"one": scale.file_count, "eight": scale.file_count // 4, "fsync": scale.fsync_count}
    return max(1, counts[kind])


def _check_sizes(kind: str, workers: int) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        for number in range(workers):
            with os.scandir(place.directory / kind / str(number)) as entries:
                sizes = [entry.stat().st_size for entry in entries]
            _expect(len(sizes) == _per_worker(place, kind), f"{len(sizes)} files are listed")
            _expect(set(sizes) == {SMALL_SIZE}, f"sizes {sorted(set(sizes))[:5]} are listed")

    return check


def _walk_stat(place: Place) -> Timed:
    expected = sum(
        workers * (_per_worker(place, kind) + 1) + 1 for kind, workers in (("one", 1), ("eight", 8))
    )
    started = time.perf_counter()
    count = _stat_below(f"{place.directory}/one") + _stat_below(f"{place.directory}/eight") + 2
    seconds = time.perf_counter() - started
    _expect(count == expected, f"the walk met {count} entries of {expected}")
    return Timed(seconds, count)


def _stat_below(directory: str) -> int:
    count = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            count += 1
            entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                count += _stat_below(entry.path)
    return count


def _read_small(place: Place) -> Timed:
    per_worker = _per_worker(place, "eight")
    paths = [f"{place.directory}/eight/{n}/{i:06d}" for n in range(8) for i in range(per_worker)]
    started = time.perf_counter()
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        content = os.read(file, SMALL_SIZE)
        os.close(file)
        _expect(len(content) == SMALL_SIZE, f"{path} has {len(content)} bytes")
    return Timed(time.perf_counter() - started, len(paths))


def _check_small(place: Place) -> None:
    for number in range(8):
        for index in range(_per_worker(place, "eight")):
            path = place.directory / "eight" / str(number) / f"{index:06d}"
            same = path.read_bytes() == _small_content(place, number, index)
            _expect(same, f"{path} came back different")


# --- the real tree --------------------------------------------------------------------------


def _untar(place: Place) -> Timed:
    target = place.directory / "untar"
    target.mkdir()
    seconds = _command("tar", "-xf", str(place.tree.archive), "-C", str(target))
    return Timed(seconds, place.tree.entry_count)


def _tar(place: Place) -> Timed:
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
    _expect(tar.returncode == 0, f"tar ended with exit code {tar.returncode}")
    _expect(total >= place.tree.size_bytes, f"tar read {total} bytes of {place.tree.size_bytes}")
    return Timed(seconds, place.tree.entry_count)


def _check_tree(place: Place) -> None:
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
            _expect(same, f"{path} came back different")
    _expect(count == place.tree.entry_count, f"{count} entries in the archive")


def _remove_tree(place: Place) -> Timed:
    seconds = _command("rm", "-rf", str(place.directory / "untar"))
    _expect(not (place.directory / "untar").exists(), "the tree is still there")
    return Timed(seconds, place.tree.entry_count)


# --- how it is run --------------------------------------------------------------------------


def _command(*arguments: str) -> float:
    started = time.perf_counter()
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - started
    _expect(done.returncode == 0, f"{arguments[0]} ended with exit code {done.returncode}")
    return seconds


def _in_parallel(worker: Callable[[int], None], count: int) -> float:
    """Run *worker* in *count* processes let go at once; return the seconds until the last ended."""
    if count == 1:
        started = time.perf_counter()
        worker(0)
        return time.perf_counter() - started
    gate, opener = os.pipe()
    pids = [_fork_behind(gate, opener, worker, number) for number in range(count)]
    os.close(gate)
    started = time.perf_counter()
    os.close(opener)  # end of file at the gate of everyone
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    seconds = time.perf_counter() - started
    _expect(not any(codes), f"{sum(map(bool, codes))} of {count} workers failed")
    return seconds


def _fork_behind(gate: int, opener: int, worker: Callable[[int], None], number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.close(opener)
        os.read(gate, 1)
        worker(number)
        code = 0
    except (OSError, KaError) as error:
        os.write(2, f"worker {number}: {error}\n".encode())
    finally:
        os._exit(code)


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise KaError(Code.EIO, otherwise)


WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "write", "large", Unit.BYTES,
        "one large file, 1 MiB at a time, then fsync and close",
        _write_large,
    ),
    Workload(
        "read_cold", "large", Unit.BYTES,
        "the same file, 1 MiB at a time, after all caches were dropped",
        _read_large, _check_large, cold=True, needs=("write",),
    ),
    Workload(
        "read_warm", "large", Unit.BYTES,
        "the same file again, just read",
        _read_large, needs=("write", "read_cold"),
    ),
    Workload(
        "randread_1", "large", Unit.READS,
        "4 KiB at random places of it, one at a time, cold",
        _random_reads(1), cold=True, needs=("write",),
    ),
    Workload(
        "randread_16", "large", Unit.READS,
        "the same by 16 workers at once, cold",
        _random_reads(16), cold=True, needs=("write",),
    ),
    Workload(
        "create_1", "small", Unit.FILES,
        "create, write 4 KiB, close; one worker, one directory",
        _create_small("one", 1), _check_sizes("one", 1),
    ),
    Workload(
        "create_8", "small", Unit.FILES,
        "the same by 8 workers, each in its own directory",
        _create_small("eight", 8), _check_sizes("eight", 8),
    ),
    Workload(
        "create_fsync", "small", Unit.FILES,
        "create, write 4 KiB, fsync, close; one worker",
        _create_small("fsync", 1, fsync=True), _check_sizes("fsync", 1),
    ),
    Workload(
        "stat_cold", "small", Unit.FILES,
        "list every directory and stat every entry of create_1 and create_8, cold",
        _walk_stat, cold=True, needs=("create_1", "create_8"),
    ),
    Workload(
        "stat_warm", "small", Unit.FILES,
        "the same walk again at once",
        _walk_stat, needs=("create_1", "create_8", "stat_cold"),
    ),
    Workload(
        "smallread_cold", "small", Unit.FILES,
        "open, read, close each file of create_8, cold; one worker",
        _read_small, _check_small, cold=True, needs=("create_8",),
    ),
    Workload(
        "untar", "tree", Unit.FILES,
        "tar -x of a real tree (the archive is on the local disk)",
        _untar,
    ),
    Workload(
        "tar_cold", "tree", Unit.FILES,
        "tar -c of that tree into a pipe, cold",
        _tar, _check_tree, cold=True, needs=("untar",),
    ),
    Workload(
        "rm", "tree", Unit.FILES,
        "rm -rf of that tree",
        _remove_tree, needs=("untar",),
    ),
)  # fmt: skip


def groups() -> list[str]:
    """Return the groups in the order in which they run."""
    return list(dict.fromkeys(workload.group for workload in WORKLOADS))


def plan(group: str, selected: Sequence[str]) -> list[Workload]:
    """Return what *group* has to run so that *selected* can, in order."""
    wanted: set[str] = set()
    for workload in reversed(WORKLOADS):  # what is needed always comes earlier
        if workload.group == group and (workload.name in selected or workload.name in wanted):
            wanted |= {workload.name, *workload.needs}
    return [workload for workload in WORKLOADS if workload.name in wanted]
