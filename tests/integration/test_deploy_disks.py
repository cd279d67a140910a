"""The node's program on loop devices: tables, file systems, images read back, customisation."""

from __future__ import annotations

import gzip
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import Code
from kadeploy import descriptions
from kadeploy.disks import facts_from_json
from kadeploy.environment import MIB
from kadeploy.nodes import NodeDisk, Nodes, NodeSpec
from kadeploy.orders import Customize, NewFile, Partition, Place, WriteImage, to_json
from kadeploy.plan import NodePlan, make_plan
from tests.support.loop_disk import Node, checksum, lacking, loop_disk, partition, run

_WHY = lacking("losetup", "sfdisk", "mkfs.ext4", "zstd")
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

DISK_SIZE = 192 * MIB

DESCRIPTION = """
name: small
version: 1
disks:
  - name: system
    label: {label}
    partitions:
      - {{name: swap, type: swap, size: 8MiB}}
      - {{name: root, format: ext4, size: 96MiB, mount: /}}
      - {{name: data, format: ext4, mount: /srv}}
systems:
  - name: linux
    images: [{{file: root.tar, kind: tar, partition: root, checksum: "{checksum}",
              compression: {compression}}}]
    boot: {{loader: none}}
    post_install: [{{builtin: hostname}}, {{builtin: fstab}}, {{builtin: machine-id}}]
"""


def make_tree(path: Path) -> None:
    """Make a small root with all that a tar of one may hold."""
    for name in ("etc", "usr/bin", "srv", "tmp", "var/lib"):
        (path / name).mkdir(parents=True, mode=0o755)
    (path / "etc/hostname").write_text("golden\n")
    (path / "usr/bin/tool").write_bytes(os.urandom(3_000_000))
    (path / "usr/bin/tool").chmod(0o4755)
    os.link(path / "usr/bin/tool", path / "usr/bin/other")
    os.symlink("/etc/hostname", path / "etc/name")
    os.mkfifo(path / "var/pipe")
    os.mknod(path / "var/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with open(path / "var/sparse", "wb") as file:
        file.truncate(20 * MIB)
        file.seek(10 * MIB)
        file.write(b"middle")
    os.setxattr(path / "etc/hostname", "user.note", b"kept")
    os.setxattr(
        path / "usr/bin/tool",
        "security.capability",
        bytes.fromhex("0100000200040000000000000000000000000000"),
    )  # cap_net_bind_service=ep
    os.chown(path / "srv", 1234, 4321)


def make_tar(tree: Path) -> bytes:
    words = ["tar", "--create", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls",
             "--sparse", f"--directory={tree}", "."]  # fmt: skip
    return subprocess.run(words, check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tree = tmp_path_factory.mktemp("tree")
    make_tree(tree)
    return make_tar(tree)


@contextmanager
def planned(
    directory: Path, data: bytes, label: str = "gpt", compression: str = "none"
) -> Iterator[tuple[Node, NodePlan]]:
    """A disk, the node's program and the plan that it made of its own facts."""
    path = directory / "disk"
    node = Node(directory)
    text = DESCRIPTION.format(label=label, checksum=checksum(data), compression=compression)
    environment = descriptions.parse_environment(text, directory / "env.yaml")
    spec = NodeSpec("pc1", (NodeDisk("system", str(path)),))
    with loop_disk(path, DISK_SIZE):
        answer = node.ask("facts")
        facts = facts_from_json(answer["facts"])
        plan = make_plan(
            environment, spec, Nodes((spec,)), facts, read=str, stored_sizes={"root.tar": len(data)}
        )
        yield node, plan


@contextmanager
def looking_into(place: Place, directory: Path) -> Iterator[Path]:
    """Mount what was written, by means of our own, for looking at it."""
    point = directory / "look"
    point.mkdir(exist_ok=True)
    with partition(place) as device:
        run("mount", "-o", "ro", device, point)
        try:
            yield point
        finally:
            run("umount", point)


@pytest.mark.parametrize(("label", "compression"), [("gpt", "zstd"), ("mbr", "none")])
def test_deploy_tar_to_a_blank_disk(
    tmp_path: Path, archive: bytes, label: str, compression: str
) -> None:
    data = archive
    if compression == "zstd":
        data = subprocess.run(["zstd", "-c"], input=archive, capture_output=True, check=True).stdout
    with planned(tmp_path, data, label, compression) as (node, plan):
        node.do_all(plan.prepare)
        answer = node.do(plan.images[0].order, data)
        assert answer == {
            "ok": True,
            "size": len(archive),
            "file_count": 3,
            "verified": "read-back",
        }
        node.do_all(plan.finish)
        table = json.loads(run("sfdisk", "--json", plan.layouts[0].disk.path))["partitiontable"]
        assert [one["start"] * 512 for one in table["partitions"]] == [
            one.start for one in plan.layouts[0].partitions
        ]
        with looking_into(plan.images[0].order.place, tmp_path) as root:
            assert (root / "etc/hostname").read_text() == "pc1\n"
            assert (root / "etc/machine-id").read_text() == ""
            assert "UUID=" in (root / "etc/fstab").read_text()
            assert os.readlink(root / "etc/name") == "/etc/hostname"
            assert (root / "usr/bin/other").stat().st_nlink == 2
            assert stat.S_IMODE((root / "usr/bin/tool").stat().st_mode) == 0o4755
            assert os.getxattr(root / "usr/bin/tool", "security.capability")
            assert (root / "srv").stat().st_uid == 1234
            assert (root / "var/null").is_char_device()
            assert (root / "var/sparse").stat().st_blocks * 512 < MIB


def test_deploy_again_over_a_disk_with_data_gives_the_same(tmp_path: Path, archive: bytes) -> None:
    with planned(tmp_path, archive) as (node, plan):
        for _ in range(2):
            node.do_all(plan.prepare)
            assert node.do(plan.images[0].order, archive)["ok"]
            node.do_all(plan.finish)


def test_deploy_refuses_another_disk_and_touches_nothing(tmp_path: Path, archive: bytes) -> None:
    with planned(tmp_path, archive) as (node, plan):
        node.do_all(plan.prepare)
        before = checksum((tmp_path / "disk").read_bytes())
        (table, *_) = plan.prepare
        assert isinstance(table, Partition)
        for change in ({"serial": "other"}, {"disk_size": 5}):
            wrong = replace(table, place=replace(table.place, **change))
            answer = node.do(wrong)
            assert answer["code"] == Code.USAGE.number
            assert "not the disk that was planned" in answer["error"]
        assert checksum((tmp_path / "disk").read_bytes()) == before


@pytest.mark.parametrize("fault", ["flipped", "short", "longer"])
@pytest.mark.parametrize("kind", ["tar", "raw"])
def test_deploy_of_a_damaged_stream_fails_and_says_so(
    tmp_path: Path, archive: bytes, kind: str, fault: str
) -> None:
    middle = len(archive) // 2
    data = {
        "flipped": archive[:middle] + bytes([archive[middle] ^ 1]) + archive[middle + 1 :],
        "short": archive[:middle],
        "longer": archive + b"x",
    }[fault]
    with planned(tmp_path, archive) as (node, plan):
        node.do_all(plan.prepare)
        order = replace(plan.images[0].order, kind=kind)
        answer = node.do(order, data)
        assert answer["code"] == Code.PAYLOAD_CORRUPT.number, answer


def test_deploy_raw_writes_zeros_too_and_reads_back(tmp_path: Path) -> None:
    data = os.urandom(MIB) + bytes(4 * MIB) + os.urandom(MIB)
    packed = gzip.compress(data, compresslevel=1)
    with loop_disk(tmp_path / "disk", 16 * MIB) as device:
        Path(device).write_bytes(b"\xff" * (16 * MIB))
        place = Place(device, str(tmp_path / "disk"), 16 * MIB)
        order = WriteImage(place, "raw", "gzip", checksum(packed), len(data), 1, "")
        answer = Node(tmp_path).do(order, packed)
        assert answer == {"ok": True, "size": len(data), "verified": "read-back"}
        assert Path(device).read_bytes()[: len(data)] == data
        small = replace(order, place=replace(place, number=1, start=MIB, size=2 * MIB))
        assert Node(tmp_path).do(small, packed)["code"] == Code.ENOSPC.number


def test_deploy_tar_of_absolute_names_is_read_back_from_the_new_system(tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    golden.mkdir()
    (golden / "file").write_text("golden")
    words = ["tar", "--create", "--absolute-names", str(golden)]
    data = subprocess.run(words, check=True, capture_output=True).stdout
    (golden / "file").write_text("of this host, at the same place")
    with planned(tmp_path, data) as (node, plan):
        node.do_all(plan.prepare)
        answer = node.do(plan.images[0].order, data)
        assert answer.get("verified") == "read-back", answer
        with looking_into(plan.images[0].order.place, tmp_path) as root:
            assert (root / str(golden).lstrip("/") / "file").read_text() == "golden"


def test_deploy_onto_a_full_file_system_names_the_cause(tmp_path: Path, archive: bytes) -> None:
    with planned(tmp_path, archive) as (node, plan):
        node.do_all(plan.prepare)
        small = plan.layouts[0].named("swap")
        assert small is not None
        order = plan.images[0].order
        place = replace(order.place, number=small.number, start=small.start, size=small.size)
        with open(tmp_path / "disk", "r+b") as disk:
            disk.seek(small.start)
            made = tmp_path / "small"
            made.write_bytes(bytes(2 * MIB))
            run("mkfs.ext4", "-q", "-F", made)
            disk.write(made.read_bytes())
        answer = node.do(replace(order, place=place), archive)
        assert not answer["ok"]
        assert "No space left" in answer["error"]


def test_deploy_files_stay_inside_the_new_system(tmp_path: Path, archive: bytes) -> None:
    """A link in the image to /…/outside leads to the same path inside it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    with planned(tmp_path, archive) as (node, plan):
        node.do_all(plan.prepare)
        assert node.do(plan.images[0].order, archive)["ok"]
        (first, *_) = [one for one in plan.finish if isinstance(one, Customize)]
        link = replace(first, files=(), remove=("etc/name",), scripts=())
        node.do_all([link])
        with looking_into(plan.images[0].order.place, tmp_path) as root:
            assert not (root / "etc/name").is_symlink()
            assert (root / "etc/hostname").exists()
        up = replace(first, files=(NewFile.of("/../../../outside-file", b"x"),), remove=())
        node.do_all([up])
        assert not Path("/outside-file").exists()


def test_deploy_order_begun_again_ends_what_is_left_of_the_first(
    tmp_path: Path, archive: bytes
) -> None:
    with planned(tmp_path, archive) as (node, plan):
        node.do_all(plan.prepare)
        order = plan.images[0].order
        with node.start("do") as first:
            assert first.stdin is not None
            first.stdin.write(json.dumps(to_json(order)).encode() + b"\n" + archive[:-1])
            first.stdin.flush()
            node.do_all(plan.prepare)
            assert first.wait(10) == -signal.SIGKILL
        assert node.do(order, archive)["ok"]


@pytest.mark.parametrize("stream", [b"", b"{}", b'{"do": "erase"}', b"[1]", b"\xff\n"])
def test_deploy_node_answers_nonsense_in_one_line(tmp_path: Path, stream: bytes) -> None:
    answer = Node(tmp_path).ask("do", stream)
    assert answer["code"] == Code.PROTOCOL.number
