"""A copy between network namespaces with shaped links: right bytes, and the uplink spared."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bench.copysystems import KaCopy, KaStripes, Setting
from bench.netlab import NetLab
from tests.support.transfers import random_file

SIZE = 2 << 20

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and iproute2"
)


@pytest.mark.parametrize("way", [KaCopy, KaStripes])
def test_a_slow_uplink_is_crossed_once(tmp_path: Path, way: type[KaCopy]) -> None:
    data = random_file(tmp_path / "source", SIZE)
    racks = (2, 3)
    with NetLab((3, 3), rate_mbit=200, uplink_mbit=50) as lab:
        setting = Setting(lab, tmp_path / "source", tmp_path, racks, 200, 50)
        for node in setting.nodes:
            setting.target(node).parent.mkdir()
        before = lab.uplink_sizes()[0]
        way().copy(setting)
        crossed = lab.uplink_sizes()[0] - before
        for node in setting.nodes:
            assert setting.target(node).read_bytes() == data
    assert SIZE < crossed < 1.5 * SIZE
