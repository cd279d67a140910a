"""Raw images by broadcast: cut off and gone on with, holes, disks that fail or are changed."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from common.broadcast.cost import Network
from common.broadcast.planner import Request, make_plan
from common.errors import Code, KaError
from kadeploy import broadcast, recording
from kadeploy.environment import MIB
from kadeploy.node import devices
from kadeploy.orders import MountPoint, Place, WriteImage
from tests.support.deploy_chain import Sent, sending
from tests.support.loop_disk import Node, checksum, lacking, loop_disk, partition, run
from tests.support.running import wait_until

_WHY = lacking("losetup", "mkfs.ext4")
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

DISK_SIZE = 32 * MIB
IMAGE_SIZE = 24 * MIB + 512
SLOW = dataclasses.replace(broadcast.OPTIONS, rate_limit=40e6)
"""So slow that a cut comes while the image does."""


def order_for(device: str, path: Path, data: bytes) -> WriteImage:
    place = Place(device, str(path), path.stat().st_size)
    return WriteImage(place, "raw", "none", checksum(data), len(data), 1, "")


def at_once(image: Path, orders: dict[str, WriteImage], directory: Path) -> Sent:
    return trio.run(sending, image, orders, directory)


def lacking_size(image: bytes, there: bytes) -> int:
    """Bytes of the chunks that are not there, found in the dullest way."""
    network = Network(broadcast.LINK_RATE, broadcast.LINK_RATE, latency_s=broadcast.LATENCY_S)
    size = make_plan(Request(len(image), (1,), network)).chosen.chunk_size
    starts = range(0, len(image), size)
    chunks = [(image[at : at + size], there[at : at + size]) for at in starts]
    return sum(len(wanted) for wanted, found in chunks if wanted != found[: len(wanted)])


def cut_off(image: Path, order: WriteImage, directory: Path, *, at: int, who: str) -> None:
    """Begin a broadcast to pc1; end the head or the node when byte *at* is on the disk."""
    wanted = image.read_bytes()[at : at + 64]

    def wait_and_cut() -> None:
        with open(order.place.disk, "rb", buffering=0) as disk:
            wait_until(lambda: os.pread(disk.fileno(), 64, at) == wanted, "the image has come")
        if who == "node":
            os.killpg(int((directory / "pc1/at-work").read_text()), signal.SIGKILL)

    async def go() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sending, image, {"pc1": order}, directory)
            await trio.to_thread.run_sync(wait_and_cut)
            nursery.cancel_scope.cancel()

    trio.run(go)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("who", ["head", "node"])
def test_deploy_raw_that_was_cut_off_sends_only_what_the_disk_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, seed: int
) -> None:
    chance = random.Random(f"{who}{seed}")
    data = chance.randbytes(IMAGE_SIZE)
    image = tmp_path / "image"
    image.write_bytes(data)
    with loop_disk(tmp_path / "disk", DISK_SIZE) as device:
        order = order_for(device, tmp_path / "disk", data)
        with monkeypatch.context() as slowly:
            slowly.setattr(broadcast, "OPTIONS", SLOW)
            at = chance.randrange(IMAGE_SIZE // 8, IMAGE_SIZE * 7 // 8)
            cut_off(image, order, tmp_path, at=at, who=who)
        if who == "head":
            Node(tmp_path / "pc1").ask("do")  # ends what is still at work there
        with open(device, "r+b", buffering=0) as disk:
            # What power that fails leaves of the last writes, or somebody who writes to the disk.
            disk.seek(chance.randrange(at))
            disk.write(b"changed")
        lacks = lacking_size(data, Path(device).read_bytes())
        assert 0 < lacks < len(data)
        sent = at_once(image, {"pc1": order}, tmp_path)
        assert sent.reports == {"pc1": ""}
        assert sent.size == lacks
        assert sent.notes["pc1"].endswith(" of 24.0MiB were there already")
        assert Path(device).read_bytes()[: len(data)] == data
        assert at_once(image, {"pc1": order}, tmp_path).size == 0


def test_deploy_raw_is_fed_on_by_a_node_that_had_it_already(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(IMAGE_SIZE)
    image = tmp_path / "image"
    image.write_bytes(data)
    with (
        loop_disk(tmp_path / "disk1", DISK_SIZE) as first,
        loop_disk(tmp_path / "disk2", DISK_SIZE) as second,
    ):
        orders = {
            "pc1": order_for(first, tmp_path / "disk1", data),
            "pc2": order_for(second, tmp_path / "disk2", data),
        }
        at_once(image, {"pc1": orders["pc1"]}, tmp_path)
        sent = at_once(image, orders, tmp_path)
        assert sent.reports == {"pc1": "", "pc2": ""}
        assert sent.notes["pc2"] == ""
        assert sent.size == 0
        assert Path(second).read_bytes()[: len(data)] == data


def test_deploy_raw_holes_do_not_travel_and_are_emptied_on_the_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        for offset in (MIB, 9 * MIB + 4096, 20 * MIB):
            file.seek(offset)
            file.write(os.urandom(12288))
        file.truncate(IMAGE_SIZE)  # not a multiple of what a disk can discard
    data = image.read_bytes()
    with loop_disk(tmp_path / "disk", DISK_SIZE) as device:
        Path(device).write_bytes(b"\xff" * DISK_SIZE)
        order = order_for(device, tmp_path / "disk", data)
        sent = at_once(image, {"pc1": order}, tmp_path)
        assert sent.reports == {"pc1": ""}
        assert sent.size == 3 * 12288
        assert Path(device).read_bytes() == data + b"\xff" * (DISK_SIZE - IMAGE_SIZE)
        assert (tmp_path / "disk").stat().st_blocks * 512 < DISK_SIZE - IMAGE_SIZE + MIB
        with open(device, "r+b", buffering=0) as disk:
            disk.seek(5 * MIB + 77)
            disk.write(b"somebody was here")
        again = at_once(image, {"pc1": order}, tmp_path)
        assert again.reports == {"pc1": ""}
        assert again.size == 0
        assert Path(device).read_bytes()[:IMAGE_SIZE] == data


def test_deploy_raw_stays_inside_its_partition(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB)
    image = tmp_path / "image"
    image.write_bytes(data)
    with loop_disk(tmp_path / "disk", DISK_SIZE) as device:
        Path(device).write_bytes(b"\xff" * DISK_SIZE)
        order = order_for(device, tmp_path / "disk", data)
        place = dataclasses.replace(order.place, number=2, start=5 * MIB, size=4 * MIB)
        order = dataclasses.replace(order, place=place)
        assert at_once(image, {"pc1": order}, tmp_path).reports == {"pc1": ""}
        there = Path(device).read_bytes()
        assert there == b"\xff" * 5 * MIB + data + b"\xff" * (DISK_SIZE - 8 * MIB)
        with partition(place) as part:
            assert Path(part).read_bytes()[: len(data)] == data
        small = dataclasses.replace(order, place=dataclasses.replace(place, size=2 * MIB))
        (report,) = at_once(image, {"pc1": small}, tmp_path).reports.values()
        assert "bytes, 3145728 are needed" in report
        assert Path(device).read_bytes() == there


def test_deploy_raw_of_an_image_that_is_not_the_descriptions_fails(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(3 * MIB))
    with loop_disk(tmp_path / "disk", DISK_SIZE) as device:
        order = order_for(device, tmp_path / "disk", b"another")
        (report,) = at_once(image, {"pc1": order}, tmp_path).reports.values()
        assert "its sum differs" in report


def test_deploy_raw_that_was_recorded_uncompressed_is_sparse_and_deploys(tmp_path: Path) -> None:
    data = os.urandom(MIB + 512) + bytes(9 * MIB) + os.urandom(MIB) + bytes(5 * MIB)
    image = tmp_path / "image"
    with loop_disk(tmp_path / "golden", len(data)) as device:
        Path(device).write_bytes(data)
        lines = recording.record("raw", device, image, compression="none", filesystem="")
        assert f'compression: none, checksum: "{checksum(data)}"' in list(lines)[-1]
    assert image.read_bytes() == data
    assert image.stat().st_blocks * 512 < 3 * MIB
    with loop_disk(tmp_path / "disk", DISK_SIZE) as device:
        sent = at_once(image, {"pc1": order_for(device, tmp_path / "disk", data)}, tmp_path)
        assert sent.reports == {"pc1": ""}
        assert sent.size < 3 * MIB


# ---------------------------------------------------------------- disks that fail


@contextmanager
def thin_disk(directory: Path, room: int) -> Iterator[tuple[str, Path]]:
    """A disk that says nothing of it, but loses what goes beyond *room* when it is flushed."""
    holder = directory / "thin"
    holder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", holder)
    try:
        with loop_disk(holder / "disk", 4 * room) as device:
            yield device, holder / "disk"
    finally:
        # The kernel lets go of a loop device when the last who looks at it has closed it.
        wait_until(lambda: subprocess.run(["umount", holder]).returncode == 0, "it is unmounted")


@pytest.mark.parametrize("way", ["broadcast", "stream"])
def test_deploy_raw_to_a_disk_that_fails_at_the_flush_is_an_error(tmp_path: Path, way: str) -> None:
    data = os.urandom(16 * MIB)
    image = tmp_path / "image"
    image.write_bytes(data)
    with thin_disk(tmp_path, 8 * MIB) as (device, path):
        order = order_for(device, path, data)
        if way == "broadcast":
            (report,) = at_once(image, {"pc1": order}, tmp_path).reports.values()
            assert "Input/output error" in report or "No space left" in report
        else:
            answer = Node(tmp_path).do(order, data)
            assert answer["code"] == Code.EIO.number
            assert "cannot be flushed" in answer["error"]


def test_deploy_files_that_are_lost_at_the_flush_are_an_error(tmp_path: Path) -> None:
    with thin_disk(tmp_path, 16 * MIB) as (device, path):
        run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", device)
        place = Place(device, str(path), path.stat().st_size)
        with (
            pytest.raises(KaError, match="cannot be flushed"),
            devices.mounted([MountPoint(place, "/", "ext4")], tmp_path / "root") as root,
        ):
            (root / "file").write_bytes(os.urandom(24 * MIB))
