"""Images smaller than their place: tables fitted to larger disks, file systems grown in them.

What comes out is looked at by others than who made it: GPT by its own sums here, and by libblkid;
file systems by their checkers and drivers.
"""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.errors import Code, KaError
from kadeploy import descriptions, imagecheck
from kadeploy.disks import facts_from_json
from kadeploy.environment import MIB, Filesystem, Image, ImageKind
from kadeploy.nodes import NodeDisk, Nodes, NodeSpec
from kadeploy.orders import Fit, Place
from kadeploy.plan import NodePlan, make_plan
from tests.support import ntfs
from tests.support.deploy_chain import send
from tests.support.loop_disk import PATH, Node, checksum, lacking, loop_disk, partition, run

_WHY = lacking("losetup", "sfdisk", "partx", "mkfs.ext4", "mkntfs", "mkfs.xfs", "mkfs.btrfs")
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

FIRST = Place("", "", 0, 1, MIB, 4 * MIB)
LAST_START = 5 * MIB
DISK_ID = "2d3c0f6a-5d0e-4c5b-9a53-0f2b6a7c1d11"
LAST_ID = "91f2b2ee-6f0c-4f4e-8f0a-3a1d1ce1a111"
TABLES = {
    "gpt": f"label: gpt\nlabel-id: {DISK_ID}\n1: start=2048, size=8192, type=linux\n"
    f'2: start=10240, type=linux, uuid={LAST_ID}, name="last one", attrs="LegacyBIOSBootable"\n',
    "dos": "label: dos\nlabel-id: 0x12345678\n1: start=2048, size=8192, type=c\n"
    "2: start=10240, type=83, bootable\n",
}
IMAGE_SIZES = {"ext4": 40 * MIB, "ntfs": 40 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


@dataclass(frozen=True, slots=True)
class Volume:
    """How to make a file system, and how to look at one."""

    name: str
    directory: Path

    def make(self, device: str) -> dict[str, Any]:
        """Make it and return what is in it."""
        if self.name == "ntfs":
            ntfs.make_golden(device, self.directory)
        else:
            force = "-F" if self.name == "ext4" else "-f"
            run(f"mkfs.{self.name}", "-q", force, device)
            with self._mounted(device) as root:
                for index in range(20):
                    (root / f"d{index % 3}").mkdir(exist_ok=True)
                    (root / f"d{index % 3}/f{index}").write_bytes(os.urandom(index * 10_000))
        return self.look(device)

    def look(self, device: str) -> dict[str, Any]:
        if self.name == "ntfs":
            run("ntfsfix", "--clear-dirty", device)  # Windows is to check what was grown
            return ntfs.picture(device, self.directory)
        with self._mounted(device, "-o", "ro") as root:
            files = [path for path in root.rglob("*") if path.is_file()]
            return {str(path.relative_to(root)): path.read_bytes() for path in files}

    def size(self, device: str) -> int:
        """Return what the driver makes of it, its own records not counted."""
        if self.name == "ntfs":
            with ntfs.mounted(device, self.directory, "ro") as root:
                there = os.statvfs(root)
        else:
            with self._mounted(device, "-o", "ro") as root:
                there = os.statvfs(root)
        return there.f_blocks * there.f_frsize

    def check(self, device: str) -> None:
        """Find nothing wrong."""
        if self.name == "ntfs":
            run("ntfsresize", "--info", device)
            assert ntfs.is_clean(device)
        elif self.name == "ext4":
            run("e2fsck", "-f", "-n", device)
        elif self.name == "xfs":
            run("xfs_repair", "-n", device)
        else:
            run("btrfs", "check", "--readonly", device)

    @contextmanager
    def _mounted(self, device: str, *options: str) -> Iterator[Path]:
        point = self.directory / "look"
        point.mkdir(exist_ok=True)
        run("mount", *options, device, point)
        try:
            yield point
        finally:
            run("umount", point)


def gpt_of(path: Path) -> tuple[dict[str, int], bytes]:
    """Read both copies of a GPT by what UEFI says of it; return the header and the entries."""
    size = path.stat().st_size
    last = size // 512 - 1
    with open(path, "rb") as disk:

        def header(at: int, other: int) -> tuple[dict[str, int], bytes]:
            disk.seek(at * 512)
            head = disk.read(92)
            assert head.startswith(b"EFI PART")
            names = ("sum", "mine", "other", "first", "last", "entries", "count", "size", "sums")
            values = struct.unpack_from("<16xI4xQQQQ16xQIII", head)
            found = dict(zip(names, values, strict=True))
            assert zlib.crc32(head[:16] + bytes(4) + head[20:]) == found["sum"]
            assert (found["mine"], found["other"]) == (at, other)
            disk.seek(found["entries"] * 512)
            entries = disk.read(found["count"] * found["size"])
            assert zlib.crc32(entries) == found["sums"]
            return found, entries

        first, entries = header(1, last)
        second, others = header(last, 1)
        assert entries == others
        assert first["last"] == second["last"] < second["entries"]
        disk.seek(446)
        kind, start, count = struct.unpack("<4xB3xII", disk.read(16))
        assert (kind, start, count) == (0xEE, 1, min(last, 0xFFFFFFFF))
    return first, entries


def entries_of(image: Path) -> bytes:
    with open(image, "rb") as file:
        file.seek(2 * 512)
        return file.read(128 * 128)


def plan_for(directory: Path, image: Path, target: str, partitions: str = "") -> NodePlan:
    """Return the plan for a disk of its own facts."""
    text = (
        f"name: small\nversion: 1\ndisks: [{{name: system{partitions}}}]\n"
        f"systems:\n  - name: one\n    boot: {{loader: none}}\n"
        f'    images: [{{file: image, checksum: "{checksum(image.read_bytes())}", {target}}}]\n'
    )
    environment = descriptions.parse_environment(text, directory / "env.yaml")
    spec = NodeSpec("pc1", (NodeDisk("system", str(directory / "disk")),))
    facts = facts_from_json(Node(directory).ask("facts")["facts"])
    return make_plan(environment, spec, Nodes((spec,)), facts, read=str, stored_sizes={})


def image_of(
    directory: Path, label: str, filesystem: str
) -> tuple[Path, Volume, dict[str, Any], bytes]:
    """Make an image of a disk; return it, its volume with what is in it, and its first partition.

    Its size is a whole number of MiB and some sectors.
    """
    image = directory / "image"
    volume = Volume(filesystem, directory)
    size = LAST_START + IMAGE_SIZES[filesystem] + MIB + 7 * 512
    with loop_disk(image, size) as device:
        with open(device, "wb") as disk:
            disk.write(b"\xebboot code".ljust(440, b"\x90"))
        run("sfdisk", "--quiet", "--no-tell-kernel", device, stdin=TABLES[label].encode())
        last = Place(device, "", 0, 2, LAST_START, IMAGE_SIZES[filesystem])
        with partition(last, read_only=False) as part:
            files = volume.make(part)
    kept = os.urandom(FIRST.size)
    with open(image, "r+b") as file:
        file.seek(FIRST.start)
        file.write(kept)
    return image, volume, files, kept


def deployed(directory: Path, image: Path, plan: NodePlan) -> None:
    """Carry the plan out, its end twice: a head may be killed, and do so."""
    node = Node(directory)
    node.do_all(plan.prepare)
    reports = send(image, {"pc1": plan.images[0].order}, directory)
    assert reports == {"pc1": ""}
    for _ in range(2):
        node.do_all(plan.finish)


@pytest.mark.parametrize(
    ("label", "filesystem"),
    [
        ("gpt", "ext4"),
        ("gpt", "ntfs"),
        ("dos", "ext4"),
        ("dos", "ntfs"),
        ("gpt", "xfs"),
        ("dos", "btrfs"),
    ],
)
def test_deploy_of_a_disks_image_to_a_larger_disk_fills_it(
    tmp_path: Path, label: str, filesystem: str
) -> None:
    image, volume, files, kept = image_of(tmp_path, label, filesystem)
    size = 2 * image.stat().st_size // 4096 * 4096 + 512
    with loop_disk(tmp_path / "disk", size) as device:
        target = f"kind: raw, disk: system, grow: {filesystem}"
        deployed(tmp_path, image, plan_for(tmp_path, image, target))
        end = size // MIB * MIB - (MIB if label == "gpt" else 0)
        with open(device, "rb") as disk:
            assert disk.read(440) == b"\xebboot code".ljust(440, b"\x90")
            disk.seek(FIRST.start)
            assert disk.read(FIRST.size) == kept
        if label == "gpt":
            _, entries = gpt_of(tmp_path / "disk")
            # Of the last partition's entry only its end is another one.
            old = entries_of(image)
            assert entries[128 + 40 : 128 + 48] != old[128 + 40 : 128 + 48]
            assert entries[: 128 + 40] == old[: 128 + 40]
            assert entries[128 + 48 :] == old[128 + 48 :]
        shown = run("partx", "--show", "--noheadings", "--output", "START,END", device).split()
        assert [int(word) for word in shown[2:]] == [LAST_START // 512, end // 512 - 1]
        last = Place(device, "", size, 2, LAST_START, end - LAST_START)
        with partition(last, read_only=False) as part:
            assert volume.look(part) == files
            volume.check(part)
            assert volume.size(part) > last.size * 0.75 > IMAGE_SIZES[filesystem]


def test_deploy_of_a_gpt_disks_image_without_growth_moves_the_copy_alone(tmp_path: Path) -> None:
    image, _, _, _ = image_of(tmp_path, "gpt", "ext4")
    with loop_disk(tmp_path / "disk", 100 * MIB):
        deployed(tmp_path, image, plan_for(tmp_path, image, "kind: raw, disk: system"))
        header, entries = gpt_of(tmp_path / "disk")
        assert header["last"] == 100 * MIB // 512 - 34
        assert entries == entries_of(image)


@pytest.mark.parametrize("filesystem", ["ext4", "ntfs"])
@pytest.mark.parametrize("kind", ["raw", "partclone"])
def test_deploy_of_a_partitions_image_fills_its_partition(
    tmp_path: Path, filesystem: str, kind: str
) -> None:
    image, volume = tmp_path / "image", Volume(filesystem, tmp_path)
    with loop_disk(tmp_path / "golden", 40 * MIB) as device:
        files = volume.make(device)
        run(f"partclone.{filesystem}", "-c", "-s", device, "-o", image, "-L", "/dev/null")
    if kind == "raw":
        (tmp_path / "golden").rename(image)
    partitions = f", partitions: [{{name: all, format: {filesystem}}}]"
    target = f"kind: {kind}, partition: all, grow: {filesystem}"
    with loop_disk(tmp_path / "disk", 128 * MIB):
        plan = plan_for(tmp_path, image, target, partitions)
        deployed(tmp_path, image, plan)
        with partition(plan.images[0].order.place, read_only=False) as part:
            there = volume.look(part)
            assert {name: there[name] for name in files} == files
            assert len(there) <= len(files) + 3  # /etc/kadeploy-deployed
            volume.check(part)
            assert volume.size(part) > 100 * MIB


@pytest.mark.parametrize(
    ("spoil", "said"),
    [("other", "is to grow as ext4, but the image has ntfs"), ("none", "has no file system")],
)
def test_deploy_of_another_file_system_than_the_descriptions_changes_nothing(
    tmp_path: Path, spoil: str, said: str
) -> None:
    image, _, _, _ = image_of(tmp_path, "gpt", "ntfs")
    if spoil == "none":
        with open(image, "r+b") as file:
            file.seek(LAST_START)
            file.write(bytes(16 * MIB))
    with loop_disk(tmp_path / "disk", 100 * MIB):
        plan = plan_for(tmp_path, image, "kind: raw, disk: system, grow: ext4")
        assert Node(tmp_path).do(plan.images[0].order, image.read_bytes())["ok"]
        before = checksum((tmp_path / "disk").read_bytes())
        (order,) = plan.finish
        assert isinstance(order, Fit)
        answer = Node(tmp_path).do(order)
        assert answer["code"] == Code.USAGE.number
        assert said in answer["error"]
        assert checksum((tmp_path / "disk").read_bytes()) == before


def test_deploy_image_that_cannot_grow_is_refused_before_anything_is_deployed(
    tmp_path: Path,
) -> None:
    image, _, _, _ = image_of(tmp_path, "gpt", "ext4")

    def said(path: Path, grow: Filesystem, **place: str) -> str:
        wanted = Image(path.name, ImageKind.RAW, checksum(b""), grow=grow, **place)
        try:
            imagecheck.check_image(tmp_path, wanted, sums=False)
        except KaError as error:
            return str(error)
        return ""

    assert said(image, Filesystem.EXT4, disk="system") == ""
    assert "is to grow as xfs, but has ext4" in said(image, Filesystem.XFS, disk="system")
    with open(image, "rb") as file:
        file.seek(LAST_START)
        (tmp_path / "part").write_bytes(file.read())
    assert said(tmp_path / "part", Filesystem.EXT4, partition="root") == ""
    assert "no partition to grow" in said(tmp_path / "part", Filesystem.EXT4, disk="system")
    (tmp_path / "empty").touch()
    assert "it is empty" in said(tmp_path / "empty", Filesystem.EXT4, disk="system")
    logical = b"label: dos\n1: size=2048\n2: type=5\n5: size=8192\n"
    run("sfdisk", "--quiet", image, stdin=logical)
    assert "a logical one, and cannot" in said(image, Filesystem.EXT4, disk="system")


def test_deploy_of_a_volume_that_was_not_shut_down_whole_names_the_cause(tmp_path: Path) -> None:
    image, _, _, _ = image_of(tmp_path, "dos", "ntfs")
    with loop_disk(tmp_path / "disk", 100 * MIB):
        plan = plan_for(tmp_path, image, "kind: raw, disk: system, grow: ntfs")
        assert Node(tmp_path).do(plan.images[0].order, image.read_bytes())["ok"]
        last = Place(plan.layouts[0].disk.path, "", 0, 2, LAST_START, IMAGE_SIZES["ntfs"])
        with partition(last, read_only=False) as part:
            words = ["ntfsresize", "--no-progress-bar", "--size", "30M", part]  # leaves it marked
            subprocess.run(words, input=b"y\n", capture_output=True, check=True, env={"PATH": PATH})
        (order,) = plan.finish
        answer = Node(tmp_path).do(order)
        assert answer["code"] == Code.EIO.number
        assert "scheduled for check" in answer["error"]
