"""Peers that hold the key and talk nonsense: every message with every kind of value in its fields.

The key is what gives power over data, so the data may suffer; the daemons and the consistency of
the metadata may not.  KA_STRANGE=20000 sends that many, KA_STRANGE_SEED other ones.
"""

from __future__ import annotations

import os
import random
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest
import trio

from common.endpoint import dial
from common.errors import Code, KaError
from common.messages import Catalogue
from common.session import Identity
from nfsp import wire
from nfsp.client.volume import Volume
from nfsp.fsck.findings import Severity
from nfsp.model import ROOT
from tests.conftest import TOKEN
from tests.support.running import Cluster

COUNT = int(os.environ.get("KA_STRANGE", "1500"))
SEED = int(os.environ.get("KA_STRANGE_SEED", "1"))
ADMIN = (wire.Repair,)
"""Writes whatever it is told to: it belongs to fsck."""

INTEGERS = (
    -(2**63), -1, 0, 1, 2, 3, 4, 5, 255, 4096, 65535, 2**31, 2**32, 2**40, 2**62, 2**63 - 1,
    2**64 - 1,
)  # fmt: skip
BYTES = (
    b"", b"a", b"b", b"d", b"..", b".", b"a/b", b"\0", b"x" * 255, b"x" * 256, b"x" * 9000,
    b"user.x", b"security.capability", b"system.posix_acl_access", b"user.nfsp.layout",
)  # fmt: skip
TEXTS = ("", "x", "x" * 5000, "\n\x1b[31m", "ä")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        made = Cluster(Path(name) / "c", iods=1)
        made.start()
        yield made
        made.stop()


def value(rng: random.Random, kind: type) -> Any:
    if kind is int:
        return rng.choice(INTEGERS) if rng.random() < 0.5 else rng.randrange(8)
    if kind is bytes:
        return rng.choice(BYTES) if rng.random() < 0.8 else rng.randbytes(rng.randrange(60))
    if kind is bool:
        return rng.random() < 0.5
    if kind is str:
        return rng.choice(TEXTS)
    assert kind is list
    items: list[Callable[[], Any]] = [
        lambda: None,
        lambda: value(rng, int),
        lambda: value(rng, bytes),
        lambda: [value(rng, int), value(rng, int)],
        lambda: [value(rng, int), value(rng, int), True],
        list,
    ]
    return [rng.choice(items)() for _ in range(rng.randrange(4))]


def strange(rng: random.Random, catalogue: Catalogue) -> Any:
    classes = [cls for cls in catalogue.classes().values() if cls not in ADMIN]
    cls = rng.choice(classes)
    hints = get_type_hints(cls)
    fields: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]
    return cls(*(value(rng, get_origin(hints[name]) or hints[name]) for name in fields))


async def talk(
    cluster: Cluster, place: tuple[str, str], catalogue: Catalogue, rng: random.Random, count: int
) -> list[str]:
    """Send strange messages; return those that are answered by neither sense nor a refusal."""
    number, bugs = 0, []
    identity = Identity(cluster.config.cluster.id, "client", "odd", secrets.token_bytes(16))
    left = count
    while left:
        number += 1
        connection = await dial(
            *place, identity=identity, key=cluster.key, connection_number=number
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(connection.run)
            if rng.random() < 0.8 and catalogue is wire.MDS:
                hello = wire.SessionOpen("odd", 1, "", False, 64)
                await connection.call(catalogue.encode(hello), timeout=20)
            while left and connection.is_open:
                left -= 1
                message = strange(rng, catalogue)
                if type(message) is wire.Close:
                    connection.notify(catalogue.encode(message))  # it has no answer
                    continue
                payload = [rng.randbytes(rng.choice((1, 100, 32768, 65536)))]
                into = memoryview(bytearray(1 << 24))
                try:
                    await connection.call(
                        catalogue.encode(message),
                        payload if rng.random() < 0.4 else (),
                        timeout=20,
                        into=into,
                    )
                except KaError as error:
                    if error.code in (Code.INTERNAL, Code.TIMEOUT):
                        bugs.append(f"{message!r:.500}: {error}")
            nursery.cancel_scope.cancel()
    return bugs


async def test_strange_messages_are_refused_by_a_daemon_that_lives_on(cluster: Cluster) -> None:
    rng = random.Random(SEED)
    pids = [cluster.pid(name) for name in cluster.names]
    mds, iod = cluster.config.mds[0], cluster.config.iod[0]
    async with Volume.open(cluster.config, cluster.key) as volume:
        for name in (b"a", b"b"):
            handle, _ = await volume.create_file(
                ROOT, name, stat.S_IFREG | 0o644, uid=0, gid=0, exclusive=True
            )
            await volume.write(handle, 0, bytes(100_000))
            await volume.release(handle)
        await volume.create(ROOT, b"d", stat.S_IFDIR | 0o755, uid=0, gid=0)
        bugs = await talk(cluster, (mds.address, mds.socket), wire.MDS, rng, COUNT)
        bugs += await talk(cluster, (iod.address, iod.socket), wire.IOD, rng, COUNT)
        assert not bugs, "\n".join(bugs)
        await volume.create(ROOT, b"still alive", stat.S_IFDIR | 0o755, uid=0, gid=0)
        assert (await volume.lookup(ROOT, b"still alive")).is_dir
    assert [cluster.pid(name) for name in cluster.names] == pids
    for daemon in cluster.names:
        assert "Traceback" not in cluster.log(daemon)
    await trio.to_thread.run_sync(cluster.restart)
    report = await trio.to_thread.run_sync(cluster.fsck)
    damage = [
        (one.check, one.where, one.what)
        for one, _ in report.results
        if one.severity is Severity.DAMAGE and not one.check.startswith("chunks.")
    ]
    assert not damage
