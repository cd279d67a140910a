"""What the engine's tests share: short-lived engines on temporary directories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import Code, KaError
from nfsp.mds.engine import KEY_END, Engine
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_engine import LmdbEngine

SMALL = LmdbConfig(
    segment_size=8192,
    checkpoint_size=2048,
    checkpoint_entries=16,
    overlay_entries_max=24,
    map_size=1 << 20,
)


def content(engine: Engine) -> list[tuple[bytes, bytes]]:
    return engine.scan(b"", KEY_END, 1 << 30)


@contextmanager
def refused(code: Code) -> Iterator[None]:
    with pytest.raises(KaError) as caught:
        yield
    assert caught.value.code is code


def fill(engine: LmdbEngine, count: int, *, size: int = 100, start: int = 0) -> None:
    for number in range(start, start + count):
        engine.apply({b"%08d" % number: b"v" * size}, epoch=0)


@contextmanager
def opened(directory: Path, config: LmdbConfig = SMALL) -> Iterator[LmdbEngine]:
    engine = LmdbEngine.open(directory, config)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def created(directory: Path, config: LmdbConfig = SMALL) -> Iterator[LmdbEngine]:
    engine = LmdbEngine.create(directory, config)
    try:
        yield engine
    finally:
        engine.close()
