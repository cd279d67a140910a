"""What the workloads have in common: where they work, how they are timed, how they fail.

Parallel load is made by processes, not threads: with threads the interpreter's lock is the
bottleneck (on a local disk 8 threads make files slower than one does, 8 processes faster).  From
the page cache of a local disk these loops reach several hundred thousand reads and tens of
thousands of new files a second, well above what is measured with them.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.model import Scale
from bench.realtree import RealTree
from common.errors import Code, KaError

__all__ = ["Place", "Timed", "expect", "in_parallel", "timed_command"]


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


def timed_command(*arguments: str) -> float:
    started = time.perf_counter()
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - started
    expect(done.returncode == 0, f"{arguments[0]} ended with exit code {done.returncode}")
    return seconds


def in_parallel(worker: Callable[[int], None], count: int) -> float:
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
    expect(not any(codes), f"{sum(map(bool, codes))} of {count} workers failed")
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


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise KaError(Code.EIO, otherwise)
