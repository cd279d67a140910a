"""The kernel's NFS server on a mount: versions 3 and 4.2, in a real kernel.

One guest tries all scenarios in turn (nfs_scenarios.py), since its start takes longer than they do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trio

from tests.e2e.nfs_scenarios import BIG_COUNT, BIG_NAME, MARK, SCENARIOS
from tests.support import uml
from tests.support.cluster import fill_directory, nfsp

pytestmark = [pytest.mark.uml, pytest.mark.fuse, pytest.mark.slow]
CHECKOUT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    base = tmp_path_factory.mktemp("nfs")
    seed = base / "seed"
    nfsp("up", seed, "--iods", "3", "--daemon")
    try:
        trio.run(fill_directory, seed / "cluster.toml", BIG_NAME, BIG_COUNT)
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
