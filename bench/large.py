"""Workloads on one large file: sequential writing and reading, reading at random places.

The data do not compress and every MiB is different, so neither a store that compresses nor one
that loses track of an offset can look good.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from bench.load import Place, Timed, expect, in_parallel
from bench.model import MIB

__all__ = ["check_large", "random_reads", "read_large", "write_large"]

_PAGE_SIZE = 4096


def _block(place: Place) -> bytearray:
    """Return 1 MiB that does not compress; a block's own index overwrites its start."""
    return bytearray(random.Random(place.seed).randbytes(MIB))


def _stamp(block: bytearray, index: int) -> None:
    block[:8] = index.to_bytes(8, "little")


def _large(place: Place) -> Path:
    return place.directory / "large"


def write_large(place: Place) -> Timed:
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


def read_large(place: Place) -> Timed:
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
    expect(total == place.scale.size_bytes, f"read {total} bytes of {place.scale.size_bytes}")
    return Timed(seconds, total)


def check_large(place: Place) -> None:
    expected = _block(place)
    with _large(place).open("rb", buffering=0) as file:
        for index in range(place.scale.size_bytes // MIB):
            _stamp(expected, index)
            expect(_read_exactly(file, MIB) == expected, f"MiB {index} came back different")


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def random_reads(depth: int) -> Callable[[Place], Timed]:
    def run(place: Place) -> Timed:
        pages = place.scale.size_bytes // _PAGE_SIZE
        wanted = place.scale.read_count * (1 if depth == 1 else 4)
        chosen = random.Random(f"{place.seed}/{depth}").sample(range(pages), min(wanted, pages))

        def worker(index: int) -> None:
            buffers = [bytearray(_PAGE_SIZE)]
            file = os.open(_large(place), os.O_RDONLY)
            for page in chosen[index::depth]:
                got = os.preadv(file, buffers, page * _PAGE_SIZE)
                expect(got == _PAGE_SIZE, f"a read of {_PAGE_SIZE} bytes gave {got}")
            os.close(file)

        return Timed(in_parallel(worker, depth), len(chosen))

    return run
