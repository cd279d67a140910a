"""Windows' file system without Windows: NTFS down the chain to two disks, by WIM and partclone.

The disks are compared with the golden volume by what ntfs-3g finds on them: every stream's bytes,
descriptors, links, short names, times, what is sparse, compressed and a junction.
"""

from __future__ import annotations

import struct
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.errors import Code
from kadeploy import descriptions
from kadeploy.disks import facts_from_json
from kadeploy.environment import MIB
from kadeploy.nodes import NodeDisk, Nodes, NodeSpec
from kadeploy.orders import Customize, Format, MountPoint, NewFile, Place
from kadeploy.plan import NodePlan, make_plan
from tests.support import ntfs
from tests.support.deploy_chain import send
from tests.support.loop_disk import Node, checksum, lacking, loop_disk, partition, run

_WHY = lacking(
    "losetup", "mkntfs", "lowntfs-3g", "ntfscat", "wimcapture", "wimapply", "partclone.ntfs"
)
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

SIZE = 48 * MIB
DISK_ID = "11111111-2222-3333-4444-555555555555"
WINDOWS_ID = "AAAAAAAA-0000-4000-8000-BBBBBBBBBBBB"
DESCRIPTION = """
name: windows
version: 1
disks:
  - name: system
    disk_id: {disk}
    partitions:
      - {{name: esp, type: esp, size: 36MiB, format: vfat}}
      - {{name: msr, type: msr, size: 16MiB}}
      - {{name: windows, type: windows, size: 56MiB, format: ntfs, guid: {windows}}}
      - {{name: recovery, type: recovery, format: ntfs}}
systems:
  - name: windows
    os: windows
    root: windows
    images: [{{file: image, kind: {kind}, partition: windows, checksum: "{checksum}"}}]
    boot: {{loader: windows}}
"""


@dataclass(frozen=True)
class Golden:
    files: dict[str, dict[str, Any]]
    images: dict[str, Path]


@pytest.fixture(scope="module", name="golden")
def _golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    directory = tmp_path_factory.mktemp("golden")
    images = {kind: directory / kind for kind in ("wim", "partclone")}
    with loop_disk(directory / "disk", SIZE) as device:
        ntfs.make_golden(device, directory)
        files = ntfs.picture(device, directory)
        run("wimcapture", device, images["wim"], "--pipable", "--compress=fast")
        run("partclone.ntfs", "-c", "-s", device, "-o", images["partclone"], "-L", "/dev/null")
    return Golden(files, images)


def plan_for(directory: Path, name: str, kind: str, image: Path) -> NodePlan:
    """Return the plan for a node whose disk is a file of its name, made of its own facts."""
    text = DESCRIPTION.format(
        disk=DISK_ID, windows=WINDOWS_ID, kind=kind, checksum=checksum(image.read_bytes())
    )
    environment = descriptions.parse_environment(text, directory / "env.yaml")
    spec = NodeSpec(name, (NodeDisk("system", str(directory / f"{name}.disk")),))
    facts = facts_from_json(Node(directory).ask("facts")["facts"])
    return make_plan(environment, spec, Nodes((spec,)), facts, read=str, stored_sizes={})


def table(path: Path) -> tuple[str, list[tuple[str, str, int]]]:
    """Read GPT: the disk's GUID, and type, GUID and attributes of each partition."""
    with open(path, "rb") as disk:
        disk.seek(512)
        head = disk.read(512)
        at, count, size = struct.unpack_from("<QII", head, 72)
        disk.seek(at * 512)
        entries = [disk.read(size) for _ in range(count)]
    return _guid(head[56:]), [
        (_guid(one), _guid(one[16:]), struct.unpack_from("<Q", one, 48)[0])
        for one in entries
        if any(one[:16])
    ]


def _guid(data: bytes) -> str:
    return str(uuid.UUID(bytes_le=data[:16]))


@pytest.mark.parametrize("kind", ["wim", "partclone"])
def test_deploy_of_ntfs_down_the_chain_gives_two_disks_like_the_golden_one(
    tmp_path: Path, golden: Golden, kind: str
) -> None:
    image = golden.images[kind]
    names = ("pc1", "pc2")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(loop_disk(tmp_path / f"{name}.disk", 160 * MIB))
        plans = {name: plan_for(tmp_path, name, kind, image) for name in names}
        for plan in plans.values():
            Node(tmp_path).do_all(plan.prepare)
        reports = send(image, {name: plans[name].images[0].order for name in names}, tmp_path)
        assert reports == dict.fromkeys(names, "")
        for name in names:
            disk_id, partitions = table(tmp_path / f"{name}.disk")
            assert disk_id == DISK_ID
            assert [one[0] for one in partitions] == [
                "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
                "e3c9e316-0b5c-4db8-817d-f92df00215ae",
                "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7",
                "de94bba4-06d1-4d40-a16a-bfd50179d6ac",
            ]
            assert partitions[2][1] == WINDOWS_ID.lower()
            assert partitions[3][2] == 1 << 63 | 1  # required, and no letter
            with partition(plans[name].images[0].order.place) as device:
                assert ntfs.picture(device, tmp_path) == golden.files
                assert ntfs.is_clean(device)


def test_deploy_golden_volume_has_what_the_others_are_compared_by(golden: Golden) -> None:
    def bits(name: str) -> int:
        return int.from_bytes(golden.files[name]["attrib"], "little")

    assert golden.files["Windows/copy.dll"]["links"] == 3
    assert golden.files["Windows/copy.dll"]["streams"] == ["large"]
    assert golden.files["Windows"]["streams"] == ["of a directory"]
    assert bits("sparse") & ntfs.SPARSE
    assert bits("packed/log.txt") & ntfs.COMPRESSED
    assert bits("Documents and Settings") & ntfs.REPARSE
    assert golden.files["A long name with spaces.ini"]["dos_name"] == b"ALONGN~1.INI"
    assert len({one["acl"] for one in golden.files.values()}) == 3


@pytest.mark.parametrize("kind", ["wim", "partclone"])
def test_deploy_of_a_damaged_ntfs_image_fails_and_says_so(
    tmp_path: Path, golden: Golden, kind: str
) -> None:
    data = golden.images[kind].read_bytes()
    middle = len(data) // 2
    broken = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    with loop_disk(tmp_path / "pc1.disk", 160 * MIB):
        plan = plan_for(tmp_path, "pc1", kind, golden.images[kind])
        node = Node(tmp_path)
        node.do_all(plan.prepare)
        answer = node.do(plan.images[0].order, broken)
        assert answer["code"] == Code.PAYLOAD_CORRUPT.number


def test_deploy_puts_files_where_windows_has_them_whatever_their_case(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with loop_disk(path, SIZE) as device:
        place = Place(device, str(path), SIZE)
        mounts = (MountPoint(place, "/", "ntfs"),)
        node = Node(tmp_path)
        node.do_all([Format(place, "ntfs", "", "windows")])
        with ntfs.mounted(device, tmp_path) as root:
            (root / "WINDOWS/panther").mkdir(parents=True)
        new = NewFile.of("/Windows/Panther/unattend.xml", b"<unattend/>")
        node.do_all([Customize(mounts, (), (new,), ())] * 2)
        with ntfs.mounted(device, tmp_path) as root:
            assert [one.name for one in root.iterdir()] == ["WINDOWS"]
            assert (root / "WINDOWS/panther/unattend.xml").read_bytes() == b"<unattend/>"


def test_deploy_refuses_a_windows_that_only_sleeps(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with loop_disk(path, SIZE) as device:
        place = Place(device, str(path), SIZE)
        node = Node(tmp_path)
        node.do_all([Format(place, "ntfs", "", "windows")])
        with ntfs.mounted(device, tmp_path) as root:
            (root / "hiberfil.sys").write_bytes(b"hibr".ljust(4096, b"\0"))
        order = Customize((MountPoint(place, "/", "ntfs"),), (), (NewFile.of("/x", b"y"),), ())
        answer = node.do(order)
        assert answer["code"] == Code.USAGE.number, answer
        assert "not shut down whole" in answer["error"]
