"""Devices of a node while other programs hold them.  Needs root and loop devices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kadeploy.node import devices
from kadeploy.orders import MountPoint, Place
from tests.support.loop_disk import lacking, loop_disk, run

_WHY = lacking("losetup", "mkntfs", "lowntfs-3g", "unshare")
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

SIZE = 16 << 20


def test_an_ntfs_volume_is_nobodys_once_unmounted_though_another_program_had_it_mounted(
    tmp_path: Path,
) -> None:
    with loop_disk(tmp_path / "disk", SIZE) as device:
        run("mkntfs", "-Q", "-F", "-q", device)
        place = Place(device, str(tmp_path / "disk"), SIZE)
        point = MountPoint(place, "/", "ntfs")
        with devices.mounted([point], tmp_path / "root") as root:
            (root / "one").write_bytes(b"1")
            # It has a copy of all mounts, this one among them, until it ends.
            other = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", "echo; exec sleep 0.5"], stdout=-1
            )
            assert other.stdout is not None
            assert other.stdout.readline()
        with other:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
