"""What an image has brought, fitted to its place: a partition table, a partition, a file system.

Position: after the image is written and read back.  How far a partition can grow is decided in
partitions.py; sfdisk changes the table, and keeps of it what is not to change.  File systems are
grown by their own programs, with nothing mounted where these can do that.

Carried out again it finds nothing to do.  What is there must be what the description says, and is
looked at before anything is changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.errors import Code, KaError
from kadeploy.disks import Disk, facts_from_json
from kadeploy.node import devices
from kadeploy.node.devices import run
from kadeploy.orders import Fit, MountPoint, Place
from kadeploy.partitions import grow_last

__all__ = ["fit"]

GROW_SIZE_MIN = 4 << 20
"""Less is what a file system leaves unused at its end, whatever it is."""
_SFDISK = ("sfdisk", "--quiet", "--no-tell-kernel", "--wipe=never", "--wipe-partitions=never")


def fit(order: Fit, root: Path) -> None:
    """Carry out the order.  *root*: where to mount what can only grow when it is mounted."""
    place = order.place
    devices.check(place)
    if place.number == 0:
        place = _fit_table(order)
    elif order.filesystem:
        _require(place, order.filesystem)
    if order.filesystem:
        _grow(place, order.filesystem, root)


def _fit_table(order: Fit) -> Place:
    """Make a table use its whole disk; return the place of its last partition."""
    disk, path = _read(order.place), order.place.disk
    place = order.place
    if order.filesystem:
        last = grow_last(disk)
        place = replace(place, number=last.number, start=last.start, size=last.size)
        devices.reread_table(path)
        _require(place, order.filesystem)
    if disk.label == "gpt":
        run([*_SFDISK, "--relocate", "gpt-bak-std", path])
    if order.filesystem and last.new_size != last.size:
        size = last.new_size // disk.sector_size
        run([*_SFDISK, "-N", str(last.number), path], stdin=f"size={size}\n".encode())
        place = replace(place, size=last.new_size)
    devices.reread_table(path)
    return place


def _read(place: Place) -> Disk:
    (disk,) = facts_from_json(devices.facts([place.disk])).disks
    return disk


def _require(place: Place, filesystem: str) -> None:
    """Raise USAGE unless this file system is there."""
    with devices.opened(place) as device:
        found = devices.filesystem_of(device)
    if found != filesystem:
        where = f"partition {place.number} of {place.disk}"
        raise KaError(Code.USAGE, f"{where} is to grow as {filesystem}, but the image has {found}")


def _grow(place: Place, filesystem: str, root: Path) -> None:
    if filesystem in ("xfs", "btrfs"):
        with devices.mounted([MountPoint(place, "/", filesystem)], root) as directory:
            words = ["btrfs", "filesystem", "resize", "max"]
            run([*(words if filesystem == "btrfs" else ["xfs_growfs"]), str(directory)])
        return
    with devices.opened(place) as device:
        if filesystem == "ext4":
            run(["e2fsck", "-f", "-p", device], good=(0, 1))  # 1: mended
            run(["resize2fs", device])
        elif filesystem == "ntfs":
            # It schedules a check of the volume by Windows; and would not do its work again then.
            if place.size - _ntfs_size(device) >= GROW_SIZE_MIN:
                run(["ntfsresize", "--no-progress-bar", device], stdin=b"y\n")
        else:
            raise KaError(Code.USAGE, f"no way to grow a file system {filesystem!r}")


def _ntfs_size(device: str) -> int:
    """Return what a volume's boot sector says of its size."""
    with open(device, "rb") as file:
        head = file.read(512)
    return int.from_bytes(head[40:48], "little") * int.from_bytes(head[11:13], "little")
