"""The chunk store against a dumb model, and at every point at which it can be stopped."""

from __future__ import annotations

import contextlib
import errno
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import Code, KaError
from nfsp.iod.chunkstore import ChunkStore
from tests.support.chunk_model import (
    CHUNK_SIZE,
    KEYS,
    Key,
    Op,
    apply_to_model,
    apply_to_store,
    content,
    new_model,
    opened,
    ops,
    strays,
)
from tests.support.fault_disk import FaultDisk, Killed, PowerDisk

QUICK = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
HISTORY = st.lists(ops(), min_size=1, max_size=12)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        yield Path(name) / "store"


def _compare(store: ChunkStore, model: dict[Key, bytearray]) -> None:
    for key in KEYS:
        assert strays(content(store, key), [bytes(model[key])]) == [], key


@QUICK
@given(st.lists(st.one_of(ops(), st.just(Op("reopen"))), max_size=25))
def test_store_agrees_with_naive_model(history: list[Op]) -> None:
    model = new_model()
    with _directory() as root, contextlib.ExitStack() as stack:
        store = stack.enter_context(opened(root))
        for op in history:
            if op.kind == "reopen":
                stack.close()
                store = stack.enter_context(opened(root))
            else:
                apply_to_store(store, op)
                apply_to_model(model, op)
            assert strays(content(store, op.key), [bytes(model[op.key])]) == []
        _compare(store, model)
        for key in KEYS:
            assert store.verify(*key) == []


def _stop(
    root: Path, before: list[Op], op: Op, failure: BaseException, fail_at: int, part: float
) -> dict[Key, bytearray] | None:
    """Do *before*, then stop inside of *op*; return the content before, None if it finished."""
    model = new_model()
    disk = FaultDisk()
    store = ChunkStore(root, fd_cache_max=2, reserve_bytes=0, boot_id=b"b" * 16, disk=disk)
    finished = False
    try:
        for earlier in before:
            apply_to_store(store, earlier)
            apply_to_model(model, earlier)
        disk.arm(fail_at, failure, part=part)
        with contextlib.suppress(Killed, KaError):
            apply_to_store(store, op)
            finished = disk.calls <= fail_at
        if not isinstance(failure, Killed):
            disk.disarm()
            _old_or_new(store, model, op)
    finally:
        with contextlib.suppress(Killed):
            store.close()
    return None if finished else model


def _old_or_new(store: ChunkStore, model: dict[Key, bytearray], op: Op) -> None:
    after = {key: bytearray(old) for key, old in model.items()}
    apply_to_model(after, op)
    for key in KEYS:
        found = content(store, key)
        assert strays(found, [bytes(model[key]), bytes(after[key])]) == [], key
        model[key][:] = found


def _carry_on(root: Path, model: dict[Key, bytearray], op: Op, later: list[Op]) -> None:
    with opened(root, boot_id=b"b" * 16) as store:
        _old_or_new(store, model, op)
        for further in later:
            apply_to_store(store, further)
            apply_to_model(model, further)
        _compare(store, model)
        assert all(store.verify(*key) == [] for key in KEYS)


@QUICK
@given(HISTORY, ops(), HISTORY, st.integers(0, 4), st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9]))
def test_killed_operation_leaves_old_or_new_bytes_in_its_range_and_nothing_else_changed(
    before: list[Op], op: Op, later: list[Op], fail_at: int, part: float
) -> None:
    with _directory() as root:
        model = _stop(root, before, op, Killed(), fail_at, part)
        if model is not None:
            _carry_on(root, model, op, later)


@QUICK
@given(HISTORY, ops(), HISTORY, st.integers(0, 4), st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9]))
def test_refused_system_call_leaves_old_or_new_bytes_in_its_range_and_nothing_else_changed(
    before: list[Op], op: Op, later: list[Op], fail_at: int, part: float
) -> None:
    with _directory() as root:
        model = _stop(root, before, op, OSError(errno.ENOSPC, "full"), fail_at, part)
        if model is not None:
            _carry_on(root, model, op, [further for further in later if further.kind != "sync"])


_W = CHUNK_SIZE
SCENARIOS = {
    "create": ([], Op("write", row=0, length=4096, fill=1)),
    "create in the middle": ([], Op("write", row=1, offset=5000, length=40000, fill=1)),
    "overwrite": ([Op("write", length=_W, fill=1)], Op("write", offset=9, length=40000, fill=2)),
    "overwrite durable": (
        [Op("write", length=_W, fill=1, sync=True), Op("settle")],
        Op("write", offset=9, length=40000, fill=2),
    ),
    "append": ([Op("write", length=100, fill=1)], Op("write", offset=100, length=9000, fill=2)),
    "grow over two blocks": (
        [Op("write", length=100, fill=1)],
        Op("write", offset=50, length=40000, fill=2),
    ),
    "next row": ([Op("write", length=_W, fill=1)], Op("write", row=1, length=_W, fill=2)),
    "trim": ([Op("write", length=_W, fill=1)], Op("trim", offset=40000)),
    "trim durable": (
        [Op("write", row=r, length=_W, fill=1, sync=True) for r in range(3)],
        Op("trim", row=1, offset=100),
    ),
    "zero": ([Op("write", length=_W, fill=1)], Op("zero", offset=100, length=60000)),
}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("part", [0.0, 0.04, 0.5, 0.99])
def test_every_kill_point_of_the_usual_operations_is_safe(
    tmp_path: Path, name: str, part: float
) -> None:
    before, op = SCENARIOS[name]
    for fail_at in range(20):
        root = tmp_path / str(fail_at)
        model = _stop(root, before, op, Killed(), fail_at, part)
        if model is None:
            break
        _carry_on(root, model, op, [Op("write", row=2, length=_W, fill=7), op])
    assert 1 <= fail_at < 19


@settings(QUICK, max_examples=150)
@given(st.lists(HISTORY, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_power_loss_keeps_what_was_synced_and_is_never_taken_for_corruption(
    lives: list[list[Op]], rng: random.Random
) -> None:
    with _directory() as root:
        durable = {key: bytes(content) for key, content in new_model().items()}
        for life, history in enumerate(lives):
            disk = PowerDisk()
            model = {key: bytearray(content) for key, content in durable.items()}
            since: dict[Key, list[bytes]] = {key: [old] for key, old in durable.items()}
            with opened(root, disk, boot_id=bytes([life]) * 16) as store:
                for key in KEYS:
                    if life:
                        store.sync(*key)
                for op in history:
                    apply_to_store(store, op)
                    apply_to_model(model, op)
                    since[op.key].append(bytes(model[op.key]))
                    if op.kind == "sync" or op.sync:
                        since[op.key] = [bytes(model[op.key])]
            disk.lose_power(rng, root / "data")
            with opened(root, boot_id=bytes([100 + life]) * 16) as store:
                for key in KEYS:
                    found = content(store, key)
                    assert strays(found, since[key]) == [], key
                    assert store.verify(*key) == []
                    durable[key] = found


def test_failed_sync_is_not_followed_by_one_that_succeeds(tmp_path: Path) -> None:
    disk = FaultDisk()
    with opened(tmp_path, disk) as store:
        apply_to_store(store, Op("write", length=4096, fill=1))
        disk.arm(0, OSError(errno.EIO, "input/output error"))
        for _ in range(2):
            with pytest.raises(KaError) as caught:
                store.sync(*KEYS[0])
            assert caught.value.code is Code.EIO
        disk.disarm()
        apply_to_store(store, Op("remove"))
        apply_to_store(store, Op("write", length=4096, fill=1, sync=True))
