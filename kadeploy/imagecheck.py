"""Images' files, looked at on the head: there, with the sum and the content of their description.

Only to tell early what a node would refuse later: where the head lacks the programs, or an image is
compressed, nothing is said of its content.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from common.errors import Code, KaError
from kadeploy.disks import Disk, facts_from_json
from kadeploy.environment import Image
from kadeploy.node import devices
from kadeploy.partitions import grow_last

__all__ = ["check_image"]


def check_image(directory: Path, image: Image, *, sums: bool) -> None:
    """Raise USAGE when an image is not there, or not what is said of it.  *sums*: read it all."""
    path = directory / image.file
    try:
        with open(path, "rb") as file:
            if sums:
                found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
                if found != image.checksum:
                    raise KaError(Code.USAGE, f"image {path}: its checksum is {found}")
    except OSError as error:
        raise KaError(Code.USAGE, f"image {path}: {error.strerror}") from None
    has_tools = shutil.which("sfdisk") and shutil.which("blkid")
    if image.grow is not None and image.in_place and has_tools:
        _check_growth(path, image.grow.value, is_disk=image.disk is not None)


def _check_growth(path: Path, grow: str, *, is_disk: bool) -> None:
    offset = size = 0
    if is_disk:
        last = grow_last(_disk(path))
        offset, size = last.start, last.size
    found = devices.filesystem_of(str(path), offset, size)
    if found != grow:
        raise KaError(Code.USAGE, f"image {path}: is to grow as {grow}, but has {found}")


def _disk(path: Path) -> Disk:
    """Return an image as the disk that it will be."""
    try:
        table = json.loads(devices.run(["sfdisk", "--json", str(path)]))
    except KaError:
        table = {}
    entry = {
        "path": str(path),
        "size": path.stat().st_size,
        "type": "disk",
        "serial": "",
        "model": "",
        "log-sec": table.get("partitiontable", {}).get("sectorsize", 512),
        "ro": False,
        "fstype": None,
    }
    listed = {"blockdevices": [entry]}
    content = {"lsblk": listed, "sfdisk": {str(path): table}, "firmware": "bios"}
    for disk in facts_from_json(content).disks:
        return disk
    raise KaError(Code.USAGE, f"image {path}: it is empty")
