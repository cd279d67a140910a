"""One metadata server as a process: `mkfs` makes its store, `run_mds` serves it."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import trio

from common import log, metrics
from common.endpoint import listen, parse_address, serve
from common.errors import Code, KaError
from common.session import Identity
from common.transport import Connection
from nfsp import keys, wire
from nfsp.clock import now_ns
from nfsp.config import ClusterConfig, MdsConfig
from nfsp.iod_links import IodLinks
from nfsp.mds import clustermap, create
from nfsp.mds.engine import Engine
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_engine import LmdbEngine
from nfsp.mds.server import MdsServer
from nfsp.mds.upkeep import Upkeep
from nfsp.model import ClusterMap, Layout, Superblock

__all__ = ["mkfs", "open_engine", "run_mds"]

FORMAT = 1
FENCE_TIMEOUT_S = 5.0
IOD_PATIENCE_S = 10.0

_log = log.get("nfsp.mds")


def _iods(config: ClusterConfig) -> list[tuple[int, str, str]]:
    return [(iod.id, iod.address, iod.socket) for iod in config.iod]


def _engine_config(mds: MdsConfig) -> LmdbConfig:
    usual = LmdbConfig()
    return replace(
        usual,
        segment_size=mds.journal_size,
        checkpoint_size=min(usual.checkpoint_size, mds.journal_size),
        checkpoint_entries=min(usual.checkpoint_entries, mds.cache_entries),
        overlay_entries_max=mds.cache_entries,
    )


def open_engine(mds: MdsConfig) -> LmdbEngine:
    """Open an mds's store; raises NOT_FORMATTED, EBUSY, ENGINE_DAMAGED."""
    return LmdbEngine.open(Path(mds.data), _engine_config(mds))


async def mkfs(config: ClusterConfig, mds: MdsConfig, *, uid: int, gid: int) -> Superblock:
    """Make an empty file system owned by *uid* and *gid*; raises EEXIST if there is one."""
    layout = Layout(config.cluster.chunk_size, config.cluster.stripe_width, 1, ())
    superblock = Superblock(
        FORMAT, uuid.uuid4().bytes, config.cluster.id, mds.id, now_ns(), layout
    )
    mds.data.parent.mkdir(parents=True, exist_ok=True)
    engine = _new_engine(Path(mds.data), _engine_config(mds))
    try:
        writes = create.mkfs(
            superblock,
            clustermap.first_map(_iods(config)),
            now_ns=superblock.created_ns,
            uid=uid,
            gid=gid,
        )
        await engine.claim(engine.epoch + 1)
        await engine.wait_durable(engine.apply(writes, epoch=engine.epoch))
        await engine.checkpoint()
    finally:
        engine.close()
    return superblock


def _new_engine(path: Path, config: LmdbConfig) -> LmdbEngine:
    """Make a store, or take up one that an interrupted mkfs has left without a file system."""
    try:
        return LmdbEngine.create(path, config)
    except KaError as error:
        if error.code is not Code.EEXIST:
            raise
        engine = LmdbEngine.open(path, config)
        if engine.get(keys.SUPERBLOCK) is not None:
            engine.close()
            raise
        return engine


async def run_mds(
    config: ClusterConfig, mds: MdsConfig, key: bytes, *, ready: Callable[[], None]
) -> None:
    """Serve one mds until cancelled; `ready` is called when it can be reached."""
    engine = open_engine(mds)
    try:
        record = engine.get(keys.SUPERBLOCK)
        if record is None:
            raise KaError(Code.NOT_FORMATTED, f"{mds.data}: no file system; run `nfsp mkfs`")
        superblock = Superblock.decode(record)
        if superblock.format != FORMAT:
            raise KaError(
                Code.WRONG_VERSION,
                f"{mds.data} has format {superblock.format}, this nfsp reads format {FORMAT}",
            )
        if superblock.cluster_id != config.cluster.id or superblock.shard != mds.id:
            raise KaError(
                Code.WRONG_CLUSTER,
                f"{mds.data} belongs to mds {superblock.shard} of cluster {superblock.cluster_id}",
            )
        await engine.claim(engine.epoch + 1)
        cluster_map = await _current_map(config, engine)
        await _serve(config, mds, key, engine, cluster_map, ready)
    finally:
        await _settle(engine)
        engine.close()


async def _settle(engine: LmdbEngine) -> None:
    """Put on stable storage what was answered: after a clean stop nothing may be missing."""
    with trio.CancelScope(shield=True):
        try:
            await engine.wait_durable(engine.statistics().last_sequence)
        except KaError as error:
            _log.error("settle.failed", reason=str(error))


async def _current_map(config: ClusterConfig, engine: Engine) -> ClusterMap:
    record = engine.get(keys.CLUSTER_MAP)
    assert record is not None
    known = ClusterMap.decode(record)
    merged = clustermap.merge(known, _iods(config))
    if merged != known:
        _log.info("map.changed", epoch=merged.epoch)
        sequence = engine.apply({keys.CLUSTER_MAP: merged.encode()}, epoch=engine.epoch)
        await engine.wait_durable(sequence)
    return merged


async def _serve(
    config: ClusterConfig,
    mds: MdsConfig,
    key: bytes,
    engine: Engine,
    cluster_map: ClusterMap,
    ready: Callable[[], None],
) -> None:
    identity = Identity(config.cluster.id, "mds", f"mds{mds.id}", secrets.token_bytes(16))
    fence = wire.IOD.encode(wire.Fence(cluster_map.epoch))

    async def announce(connection: Connection) -> None:
        await connection.call(fence, timeout=FENCE_TIMEOUT_S)

    iods = IodLinks(
        identity=identity, key=key, patience_s=IOD_PATIENCE_S, on_connect=announce
    )
    server: MdsServer
    upkeep = Upkeep(engine, lambda writes: server.apply(writes), iods)
    server = MdsServer(engine, upkeep, cluster_map, session_ttl_s=mds.session_ttl_s)
    sockets = listen(mds.address, mds.socket)
    if mds.metrics:
        metrics.serve_http(*parse_address(mds.metrics))
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            await nursery.start(iods.run)
            await iods.use_map(cluster_map)
            nursery.start_soon(upkeep.run)
            nursery.start_soon(server.reap)
            _log.info("mds.started", mds=mds.id, address=mds.address, epoch=engine.epoch)
            ready()
            await serve(sockets, identity=identity, key=key, handler=server.handle)
    finally:
        for sock in sockets:
            sock.close()
