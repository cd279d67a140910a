"""A writing load that remembers what it was promised, and the judge of what a crash left of it.

`python -m tests.support.crash_load DIRECTORY LOG SEED THREADS` works until SIGTERM: each thread in
a directory of its own, one operation after the other, each fsynced or of the name space.  LOG, on
another file system, gets one line before and one after every operation.  So what must be there
after a crash is known but for one operation of each thread, which may have happened or not.

`judge` replays a log and compares; it returns what is wrong, one line each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["judge"]

State = dict[str, bytes | None]
"""Name -> content; None: a directory."""
Operation = list[Any]
"""[kind, name, ...]"""

SIZES = (0, 1, 100, 4096, 20_000, 70_000, 200_000, 500_000)
NAMES = 12


def _data(key: int, size: int) -> bytes:
    return random.Random(key).randbytes(size)


# ---------------------------------------------------------------- what operations mean


def _after(state: State, operation: Operation) -> State:
    """Return the state after an operation."""
    kind, name, *rest = operation
    after = dict(state)
    old = after.get(name) or b""
    if kind in ("create", "replace"):
        after[name] = _data(*rest)
    elif kind == "append":
        after[name] = old + _data(*rest)
    elif kind == "overwrite":
        key, size, offset = rest
        grown = old + bytes(max(0, offset + size - len(old)))
        after[name] = grown[:offset] + _data(key, size) + grown[offset + size :]
    elif kind == "cut":
        after[name] = old[: rest[0]]
    elif kind == "rename":
        after[rest[0]] = after.pop(name)
    elif kind == "mkdir":
        after[name] = None
    else:
        assert kind in ("unlink", "rmdir")
        del after[name]
    return after


def _choose(rng: random.Random, state: State) -> Operation:
    """Return an operation that the state allows."""
    name = f"{rng.choice('fd')}{rng.randrange(NAMES)}"
    key, size = rng.getrandbits(32), rng.choice(SIZES)
    if name not in state:
        return ["mkdir", name] if name[0] == "d" else ["create", name, key, size]
    old = state[name]
    if old is None:
        return ["rmdir", name]
    kind = rng.choice(("append", "overwrite", "overwrite", "replace", "replace", "cut", "rename"))
    if kind == "append":
        return [kind, name, key, size] if len(old) < 2_000_000 else ["unlink", name]
    if kind == "overwrite":
        return [kind, name, key, size or 1, rng.randrange(len(old) + 100_000)]
    if kind == "cut":
        return [kind, name, rng.randrange(len(old) + 1)] if old else ["unlink", name]
    if kind == "rename":
        free = [new for new in (f"f{number}" for number in range(NAMES)) if new not in state]
        return [kind, name, rng.choice(free)] if free else ["unlink", name]
    return [kind, name, key, size]


def _carry_out(directory: Path, operation: Operation) -> None:
    kind, name, *rest = operation
    path = directory / name
    if kind == "create":
        _write(path, os.O_CREAT | os.O_EXCL, _data(*rest))
    elif kind == "append":
        _write(path, os.O_APPEND, _data(*rest))
    elif kind == "overwrite":
        key, size, offset = rest
        _write(path, 0, _data(key, size), offset)
    elif kind == "replace":
        _write(directory / f"{name}~", os.O_CREAT | os.O_TRUNC, _data(*rest))
        (directory / f"{name}~").rename(path)
    elif kind == "cut":
        _write(path, 0, b"", cut=rest[0])
    elif kind == "rename":
        path.rename(directory / rest[0])
    elif kind == "mkdir":
        path.mkdir()
    elif kind == "rmdir":
        path.rmdir()
    else:
        path.unlink()


def _write(path: Path, flags: int, data: bytes, offset: int = 0, cut: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        if cut is not None:
            os.ftruncate(fd, cut)
        if not flags & os.O_APPEND:
            os.lseek(fd, offset, os.SEEK_SET)
        for start in range(0, len(data), 30_000):
            os.write(fd, data[start : start + 30_000])
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- the load


def _work(directory: Path, log: int, seed: int, thread: int, stop: threading.Event) -> None:
    def note(*line: object) -> None:
        os.write(log, (json.dumps([thread, *line]) + "\n").encode())

    rng, state = random.Random(f"{seed} {thread}"), State()
    mine = directory / f"t{thread}"
    try:
        mine.mkdir()
        note("ready")
        while not stop.is_set():
            operation = _choose(rng, state)
            note("begun", operation)
            _carry_out(mine, operation)
            note("done")
            state = _after(state, operation)
    except OSError as error:
        note("failed", str(error))


def main(arguments: Sequence[str]) -> None:
    directory, log_path, seed, threads = arguments
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    workers = [
        threading.Thread(target=_work, args=(Path(directory), log, int(seed), thread, stop))
        for thread in range(int(threads))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


# ---------------------------------------------------------------- the judge


def judge(directory: Path, log_path: Path, *, may_fail: bool) -> tuple[list[str], int]:
    """Return what contradicts the log in *directory*, and how many operations were promised.

    *may_fail*: an operation may have been answered with an error, because the mount was killed.
    """
    by_thread: dict[int, list[list[Any]]] = {}
    for line in log_path.read_text().splitlines():
        thread, *rest = json.loads(line)
        by_thread.setdefault(thread, []).append(rest)
    wrong: list[str] = []
    promised = 0
    for thread, lines in sorted(by_thread.items()):
        state, pending = State(), None
        for what, *rest in lines:
            if what == "begun":
                pending = rest[0]
            elif what == "done":
                assert pending is not None
                state, pending = _after(state, pending), None
                promised += 1
            elif what == "failed" and not may_fail:
                wrong.append(f"t{thread}: {pending} failed: {rest[0]}")
        if lines[0][0] == "ready":
            where = directory / f"t{thread}"
            wrong += [f"t{thread}: {line}" for line in _compare(where, state, pending)]
    return wrong, promised


def _compare(directory: Path, state: State, pending: Operation | None) -> Iterator[str]:
    try:
        found: State = {
            path.name: None if path.is_dir() else path.read_bytes() for path in directory.iterdir()
        }
    except OSError as error:
        yield f"cannot be read: {error}"
        return
    possible = [state] if pending is None else [state, _after(state, pending)]
    kind, touched = (pending[0], pending[1]) if pending is not None else ("", "")
    if kind == "replace":
        found.pop(f"{touched}~", None)
    for name in sorted({*found, *itertools.chain(*possible)}):
        allowed = [one.get(name, "absent") for one in possible]
        actual = found.get(name, "absent")
        if actual in allowed:
            continue
        in_part = kind in ("create", "append", "overwrite") and name == touched
        if in_part and isinstance(actual, bytes) and _is_mixture(actual, possible, name):
            continue
        yield f"{name} is {_show(actual)}, not {' or '.join(map(_show, allowed))}; {pending}"
    if kind == "rename" and found.keys() not in [one.keys() for one in possible]:
        yield f"half renamed: {pending}"


def _is_mixture(actual: bytes, possible: list[State], name: str) -> bool:
    """Whether an interrupted write explains it: each byte is old, new, or not yet written."""
    old, new = (one.get(name) or b"" for one in possible)
    if not min(len(old), len(new)) <= len(actual) <= max(len(old), len(new)):
        return False
    size = len(actual)
    old, new = (text[:size] + bytes(max(0, size - len(text))) for text in (old, new))
    return all(byte in (a, b) for byte, a, b in zip(actual, old, new, strict=True))


def _show(content: object) -> str:
    if isinstance(content, bytes):
        return f"{len(content)} bytes {content[:8].hex()}.."
    return "a directory" if content is None else str(content)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
