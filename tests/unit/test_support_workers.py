"""How tests are given to workers: where that goes wrong nothing fails, all only takes longer."""

from __future__ import annotations

import pytest


def test_a_module_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    # xdist writes the group of a test behind its name (tests/conftest.py).  Where it does not, as
    # 3.8 with pytest 9.2, every worker makes every cluster and boots every kernel.
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith(f"@tests/unit/{request.node.path.name}")
