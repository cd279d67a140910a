"""Windows' file system without Windows: NTFS by WIM and by partclone, compared by ntfs-3g."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import Code
from kadeploy.environment import MIB
from kadeploy.orders import Customize, Format, MountPoint, NewFile, Place, WriteImage
from tests.support.loop_disk import Node, checksum, lacking, loop_disk, run

_WHY = lacking("losetup", "mkntfs", "ntfs-3g", "wimcapture", "wimapply", "partclone.ntfs")
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

SIZE = 48 * MIB
ACL = "system.ntfs_acl"


@contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    point = directory / "look"
    point.mkdir(exist_ok=True)
    run("ntfs-3g", "-o", "streams_interface=xattr", device, point)
    try:
        yield point
    finally:
        run("umount", point)


def make_golden(device: str, directory: Path) -> None:
    """Fill a volume with what makes NTFS different from a directory of files."""
    run("mkntfs", "-Q", "-F", "-q", "-L", "golden", device)
    with mounted(device, directory) as root:
        (root / "Windows/System32").mkdir(parents=True)
        big = root / "Windows/System32/big.dll"
        big.write_bytes(os.urandom(2_000_000))
        os.link(big, root / "Windows/copy.dll")
        note = root / "Grüße.txt"
        note.write_bytes(b"main stream")
        os.setxattr(note, "user.Zone.Identifier", b"[ZoneTransfer]\r\nZoneId=3\r\n")
        # A descriptor of its own: everybody may read, nobody may write.
        other = bytearray(os.getxattr(big, ACL))
        os.setxattr(note, ACL, bytes(other))
        note.chmod(0o444)


def picture(device: str, directory: Path) -> dict[str, object]:
    """All that must survive."""
    found: dict[str, object] = {}
    with mounted(device, directory) as root:
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            streams = {
                key: os.getxattr(path, key) for key in os.listxattr(path) if key.startswith("user.")
            }
            content = path.read_bytes() if path.is_file() else b""
            links = path.stat().st_nlink if path.is_file() else 0
            found[name] = (content, streams, os.getxattr(path, ACL), links)
    return found


@pytest.mark.parametrize("kind", ["wim", "partclone"])
def test_deploy_of_ntfs_keeps_streams_descriptors_and_links(tmp_path: Path, kind: str) -> None:
    golden, image = tmp_path / "golden", tmp_path / "image"
    with loop_disk(golden, SIZE) as source:
        make_golden(source, tmp_path)
        before = picture(source, tmp_path)
        if kind == "wim":
            run("wimcapture", source, image, "--pipable", "--compress=fast")
        else:
            run("partclone.ntfs", "-c", "-s", source, "-o", image, "-L", "/dev/null")
    assert before["Windows/copy.dll"][3] == 2  # type: ignore[index]
    data = image.read_bytes()
    # The target is larger: a WIM does not mind, partclone leaves the rest.
    with loop_disk(tmp_path / "disk", SIZE + 16 * MIB) as device:
        node = Node(tmp_path)
        place = Place(device, str(tmp_path / "disk"), SIZE + 16 * MIB)
        node.do_all([Format(place, "ntfs", "", "windows")])
        order = WriteImage(place, kind, "none", checksum(data), 0, 1, "ntfs")
        answer = node.do(order, data)
        assert answer["ok"], answer
        assert answer["verified"] == {"wim": "stream", "partclone": "read-back"}[kind]
        assert picture(device, tmp_path) == before
        middle = len(data) // 2
        broken = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        assert node.do(order, broken)["code"] == Code.PAYLOAD_CORRUPT.number


def test_deploy_puts_unattend_into_ntfs(tmp_path: Path) -> None:
    with loop_disk(tmp_path / "disk", SIZE) as device:
        node = Node(tmp_path)
        place = Place(device, str(tmp_path / "disk"), SIZE)
        node.do_all([Format(place, "ntfs", "", "windows")])
        new = NewFile.of("/Windows/Panther/unattend.xml", b"<unattend/>")
        mounts = (MountPoint(place, "/", "ntfs"),)
        node.do_all([Customize(mounts, (), (new,), ())])
        with mounted(device, tmp_path) as root:
            assert (root / "Windows/Panther/unattend.xml").read_bytes() == b"<unattend/>"
