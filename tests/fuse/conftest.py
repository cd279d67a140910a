"""One mounted cluster for each module of this directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.cluster import Cluster, running

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.fuse)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of three iods and a mount of it; fsck must find it clean after the module."""
    prefix = f"ka-{os.environ[leaks.TOKEN_VARIABLE]}-"
    with tempfile.TemporaryDirectory(prefix=prefix) as name, running(Path(name)) as cluster:
        yield cluster
