"""Workloads on many files of 4 KiB: make, list and stat, read.

Three sets below the group's directory, each with one directory for each worker: `one`, `eight`
and `fsync`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from bench.load import Place, Timed, expect, in_parallel

__all__ = ["check_contents", "check_sizes", "create", "read_each", "walk_stat"]

SMALL_SIZE = 4096
_MARK_SIZE = 16
"""Each file starts with its worker's and its own number, so a mix-up shows."""


def _small_content(place: Place, worker: int, index: int) -> bytes:
    """Return a small file's content: random, and different in each file."""
    base = random.Random(place.seed + 1).randbytes(SMALL_SIZE - _MARK_SIZE)
    return worker.to_bytes(8, "little") + index.to_bytes(8, "little") + base


def create(kind: str, workers: int, *, fsync: bool = False) -> Callable[[Place], Timed]:
    def run(place: Place) -> Timed:
        count = _per_worker(place, kind) * workers
        for number in range(workers):
            (place.directory / kind / str(number)).mkdir(parents=True)
        body = _small_content(place, 0, 0)[_MARK_SIZE:]

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
                expect(written == SMALL_SIZE, f"a write of {SMALL_SIZE} bytes took {written}")

        return Timed(in_parallel(worker, workers), count)

    return run


def _per_worker(place: Place, kind: str) -> int:
    scale = place.scale
    counts = {"one": scale.file_count, "eight": scale.file_count // 4, "fsync": scale.fsync_count}
    return max(1, counts[kind])


def check_sizes(kind: str, workers: int) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        for number in range(workers):
            with os.scandir(place.directory / kind / str(number)) as entries:
                sizes = [entry.stat().st_size for entry in entries]
            expect(len(sizes) == _per_worker(place, kind), f"{len(sizes)} files are listed")
            expect(set(sizes) == {SMALL_SIZE}, f"sizes {sorted(set(sizes))[:5]} are listed")

    return check


def walk_stat(place: Place) -> Timed:
    expected = sum(
        workers * (_per_worker(place, kind) + 1) + 1 for kind, workers in (("one", 1), ("eight", 8))
    )
    started = time.perf_counter()
    count = _stat_below(f"{place.directory}/one") + _stat_below(f"{place.directory}/eight") + 2
    seconds = time.perf_counter() - started
    expect(count == expected, f"the walk met {count} entries of {expected}")
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


def read_each(place: Place) -> Timed:
    per_worker = _per_worker(place, "eight")
    paths = [f"{place.directory}/eight/{n}/{i:06d}" for n in range(8) for i in range(per_worker)]
    started = time.perf_counter()
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        content = os.read(file, SMALL_SIZE)
        os.close(file)
        expect(len(content) == SMALL_SIZE, f"{path} has {len(content)} bytes")
    return Timed(time.perf_counter() - started, len(paths))


def check_contents(place: Place) -> None:
    for number in range(8):
        for index in range(_per_worker(place, "eight")):
            path = place.directory / "eight" / str(number) / f"{index:06d}"
            same = path.read_bytes() == _small_content(place, number, index)
            expect(same, f"{path} came back different")
