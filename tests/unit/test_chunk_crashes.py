"""The chunk store against a dumb model, and at every point at which it can be stopped."""

from __future__ import annotations

import contextlib
import errno
import random
import tempfile
import threading
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
    deadline=None, max_examples=600, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
HISTORY = st.lists(ops(), min_size=1, max_size=8)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        yield Path(name) / "store"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where possible: what a crash leaves is computed here, not found on a disk."""
    with _directory() as root:
        root.mkdir()
        yield root


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
    """Do *before*, then stop inside of *op*; return the content before, None if it finished.

    After a failure that is not lasting, *op* is repeated, and the content after it is returned.
    """
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
            if not finished:
                with contextlib.suppress(KaError):  # a sync that failed goes on failing
                    apply_to_store(store, op)
                apply_to_model(model, op)
                _compare(store, model)
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


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_refused_system_call_of_the_usual_operations_is_undone(
    tmp_path: Path, name: str
) -> None:
    before, op = SCENARIOS[name]
    for fail_at in range(20):
        root = tmp_path / str(fail_at)
        model = _stop(root, before, op, OSError(errno.ENOSPC, "full"), fail_at, 0.5)
        if model is None:
            break
        _carry_on(root, model, op, [Op("write", row=2, length=_W, fill=7), op])
    assert 1 <= fail_at < 19


def test_file_trimmed_to_nothing_right_after_opening_can_be_written(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        apply_to_store(store, Op("write", row=1, length=9, fill=1))
    model = new_model()
    with opened(tmp_path) as store:
        for op in (Op("trim"), Op("write", row=1, offset=7, length=9, fill=2)):
            apply_to_store(store, op)
            apply_to_model(model, op)
        _compare(store, model)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_chunk_cut_by_a_kill_is_recovered_before_the_file_grows_over_it(
    tmp_path: Path, part: float
) -> None:
    cut = Op("write", length=_W, fill=1)
    model = _stop(tmp_path, [], cut, Killed(), 0, part)
    assert model is not None
    next_row = Op("write", row=1, length=_W, fill=2)
    with opened(tmp_path, boot_id=b"b" * 16) as store:
        apply_to_store(store, next_row)
        apply_to_model(model, next_row)
        _old_or_new(store, model, cut)


@pytest.mark.parametrize("offset", [6000, 50000])
def test_bytes_of_a_write_that_was_killed_do_not_appear_around_the_next_one(
    tmp_path: Path, offset: int
) -> None:
    killed = Op("write", row=1, offset=5000, length=40000, fill=1)
    model = _stop(tmp_path, [], killed, Killed(), 1, 0.0)
    assert model is not None
    small = Op("write", row=1, offset=offset, length=10, fill=2)
    with opened(tmp_path, boot_id=b"b" * 16) as store:
        apply_to_store(store, small)
        apply_to_model(model, small)
        _compare(store, model)


@pytest.mark.parametrize("name", SCENARIOS)
def test_power_loss_after_the_usual_operations_is_safe(tmp_path: Path, name: str) -> None:
    before, op = SCENARIOS[name]
    for seed in range(40):
        root = tmp_path / str(seed)
        disk = PowerDisk()
        model = new_model()
        with opened(root, disk) as store:
            for earlier in [*before, *(Op("sync", key) for key in KEYS)]:
                apply_to_store(store, earlier)
                apply_to_model(model, earlier)
            if seed % 2:
                store.settle()
                store.sync(*op.key)
            apply_to_store(store, op)
            if seed % 3:
                store.settle()
        disk.lose_power(random.Random(seed), root / "data")
        with opened(root, boot_id=b"b" * 16) as store:
            _old_or_new(store, model, op)


def test_write_during_a_sync_is_not_taken_for_durable(tmp_path: Path) -> None:
    class BusyDisk(PowerDisk):
        during: Op | None = None

        def fdatasync(self, fd: int) -> None:
            super().fdatasync(fd)
            if self.during is not None:
                op, self.during = self.during, None
                writer = threading.Thread(target=apply_to_store, args=(store, op))
                writer.start()
                writer.join()

    first, second = (Op("write", length=_W, fill=fill) for fill in (1, 2))
    for seed in range(20):
        root, disk, model = tmp_path / str(seed), BusyDisk(), new_model()
        with opened(root, disk) as store:
            apply_to_store(store, first)
            apply_to_model(model, first)
            disk.during = second
            apply_to_store(store, Op("sync"))
            assert disk.during is None
            store.settle()
        disk.lose_power(random.Random(seed), root / "data")
        with opened(root, boot_id=b"b" * 16) as store:
            _old_or_new(store, model, second)


def test_power_loss_does_not_bring_back_bytes_of_a_write_that_was_killed(tmp_path: Path) -> None:
    killed = Op("write", row=1, offset=0, length=32768, fill=1)
    later = Op("write", row=1, offset=0, length=32768, fill=2)
    for seed in range(20):
        root = tmp_path / str(seed)
        model = _stop(root, [Op("write", row=2, length=1, fill=3)], killed, Killed(), 1, 0.0)
        assert model is not None
        disk = PowerDisk()
        with opened(root, disk, boot_id=b"b" * 16) as store:
            store.sync(*killed.key)
            apply_to_store(store, later)
        disk.lose_power(random.Random(seed), root / "data")
        with opened(root, boot_id=b"c" * 16) as store:
            _old_or_new(store, model, later)


@settings(QUICK, max_examples=60)
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
