"""A metadata store, and a process that damages copies of it and reads everything from them.

`build` makes a store of which a part lies in LMDB, a part durably in the journal and a part only
written there.  `python -m tests.support.store_probe STORE
WORK` reads lines `FILE OFFSET MASK`, flips those bits in a copy, and answers with one of VERDICTS.
LMDB trusts its pages: the process may die, which is why it is one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import trio

from common.errors import KaError
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_engine import LmdbEngine

__all__ = ["VERDICTS", "build"]

VERDICTS = ("right", "refused", "noticed", "wrong")
CONFIG = LmdbConfig(segment_size=1 << 18, checkpoint_size=1 << 17, map_size=1 << 24)
CHECKPOINTED, DURABLE, APPLIED = 1000, 1050, 1090
"""Batches."""

State = dict[bytes, bytes]


def _batch(number: int, state: State) -> dict[bytes, bytes | None]:
    """Return changes like those of a create, and now and then of an unlink."""
    ino, parent = number.to_bytes(8), (number % 7).to_bytes(8)
    batch: dict[bytes, bytes | None] = {
        b"i" + ino: bytes([number % 251]) * (90 + number % 100),
        b"d" + parent + b"name %d" % number: ino,
        b"c" + parent + ino: b"name %d" % number,
        b"n": ino,
    }
    if number % 400 == 77:
        batch[b"x" + ino + b"user.big"] = bytes([number % 256]) * 10_000
    if number % 5 == 0:
        gone = b"i" + (number // 2).to_bytes(8)
        if gone in state:
            batch[gone] = None
    return batch


def _truth() -> list[State]:
    """Return the state after every sequence number: the claim of the epoch is the first."""
    truth = [State(), State()]
    for number in range(APPLIED):
        state = dict(truth[-1])
        for key, value in _batch(number, truth[-1]).items():
            if value is None:
                del state[key]
            else:
                state[key] = value
        truth.append(state)
    return truth


def build(directory: Path) -> None:
    """Make the store."""

    async def make() -> None:
        engine = LmdbEngine.create(directory, CONFIG)
        await engine.claim(1)
        for number, state in enumerate(_truth()[1:-1]):
            sequence = engine.apply(_batch(number, state), epoch=1)
            if number <= CHECKPOINTED and number % 100 == 0:
                await engine.checkpoint()
            if number == DURABLE:
                await engine.wait_durable(sequence)
        engine.close()

    trio.run(make)


def _probe(work: Path, truth: list[State]) -> str:
    """Return the verdict on a damaged store."""
    try:
        engine = LmdbEngine.open(work, CONFIG)
    except KaError:
        return "refused"
    noticed = False
    try:
        sequence = engine.statistics().last_sequence
        if not DURABLE + 2 <= sequence < len(truth):
            return f"wrong: it ends with batch {sequence}"
        state = truth[sequence]
        for key in {**truth[-1], **truth[-40], **state, **truth[500], b"d": b"", b"z": b""}:
            try:
                if engine.get(key) != state.get(key):
                    return f"wrong: {key!r}"
            except KaError:
                noticed = True
        try:
            found, start = [], b"\0"
            while page := engine.scan(start, b"\xff", 50):
                found += page
                start = page[-1][0] + b"\0"
            if found != sorted(state.items()):
                return "wrong: scan"
        except KaError:
            noticed = True
    finally:
        engine.close()
    return "noticed" if noticed else "right"


def main() -> None:
    store, work = Path(sys.argv[1]), Path(sys.argv[2])
    truth = _truth()
    for line in sys.stdin:
        name, offset, mask = line.split()
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(store, work)
        with open(work / name, "r+b") as file:
            file.seek(int(offset))
            byte = file.read(1)[0]
            file.seek(int(offset))
            file.write(bytes([byte ^ int(mask)]))
        print(_probe(work, truth), flush=True)


if __name__ == "__main__":
    main()
