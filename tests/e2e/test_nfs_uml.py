"""The kernel's NFS server on a mount: versions 3 and 4.2, in a real kernel.

One guest tries all scenarios in turn (nfs_scenarios.py), since its start takes longer than they do.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import trio

from nfsp.client.volume import Volume
from nfsp.config import load_cluster
from nfsp.model import ROOT
from tests.e2e.nfs_scenarios import BIG_COUNT, BIG_NAME, MARK, SCENARIOS
from tests.support import uml
from tests.support.cluster import nfsp

pytestmark = [pytest.mark.uml, pytest.mark.fuse, pytest.mark.slow]
CHECKOUT = Path(__file__).parent.parent.parent
CREATORS = 16


async def _fill(config_path: Path) -> None:
    """Make the big directory, without a mount in between."""
    config, key = load_cluster(config_path)
    async with Volume.open(config, key) as volume:
        big = await volume.create(ROOT, BIG_NAME.encode(), stat.S_IFDIR | 0o755, uid=0, gid=0)

        async def create(first: int) -> None:
            for number in range(first, BIG_COUNT, CREATORS):
                name = f"entry-{number}".encode()
                await volume.create(big.ino, name, stat.S_IFIFO | 0o600, uid=0, gid=0)

        async with trio.open_nursery() as nursery:
            for first in range(CREATORS):
                nursery.start_soon(create, first)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    base = tmp_path_factory.mktemp("nfs")
    seed = base / "seed"
    nfsp("up", seed, "--iods", "3", "--daemon")
    try:
        trio.run(_fill, seed / "cluster.toml")
    finally:
        nfsp("down", seed)
    outcome = uml.boot(
        [sys.executable, "-m", "tests.e2e.nfs_scenarios", seed],
        share=base / "share", working_directory=CHECKOUT, time_limit_s=500,
    )  # fmt: skip
    print(outcome.output)
    last = outcome.check().splitlines()[-1]
    return json.loads(last.removeprefix(MARK))


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_nfs(name: str, outcomes: dict[str, str | None]) -> None:
    failure = outcomes[name]
    assert failure is None, failure
