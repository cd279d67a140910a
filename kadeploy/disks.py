"""What a node has: its disks, as `lsblk` and `sfdisk` tell, and which of them plays which role.

Pure: JSON of the two programs in, disks out.  A disk is chosen by serial number alone.  Whatever
makes the choice doubtful - no such serial, two of it, mounted, read-only, too small - refuses
it, in a line that says what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import Code, KaError
from common.sizes import format_size
from kadeploy.environment import DiskSpec, Firmware
from kadeploy.nodes import NodeSpec

__all__ = [
    "LSBLK_COLUMNS",
    "Disk",
    "ExistingPartition",
    "Facts",
    "facts_from_json",
    "partition_number",
    "partition_path",
    "select_disk",
]

LSBLK_COLUMNS = "PATH,SIZE,TYPE,SERIAL,MODEL,LOG-SEC,RO,FSTYPE,LABEL,UUID,MOUNTPOINTS"


@dataclass(frozen=True, slots=True)
class ExistingPartition:
    path: str
    start: int
    """Bytes, as is size."""
    size: int
    type: str
    """GUID or MBR number, as sfdisk writes it."""
    filesystem: str
    label: str
    mounted: bool


@dataclass(frozen=True, slots=True)
class Disk:
    path: str
    size: int
    serial: str
    model: str
    sector_size: int
    read_only: bool
    mounted: tuple[str, ...]
    """Where it or anything on it is mounted or used as swap."""
    filesystem: str
    """What is on the disk itself, without a partition table; empty if nothing."""
    label: str
    """gpt, dos, or empty: no partition table."""
    partitions: tuple[ExistingPartition, ...] = ()

    def describe(self) -> str:
        model = f" {self.model}" if self.model else ""
        return f"{self.path} {format_size(self.size)}{model} serial {self.serial or '(none)'}"


@dataclass(frozen=True, slots=True)
class Facts:
    """A node's answer to the question what it is."""

    disks: tuple[Disk, ...]
    firmware: Firmware
    memory_size: int = 0


def partition_path(disk: str, number: int) -> str:
    """Return what the kernel calls a partition: sda1, nvme0n1p1."""
    return f"{disk}p{number}" if disk[-1:].isdigit() else f"{disk}{number}"


def partition_number(disk: str, path: str) -> int:
    """Return the number of a partition that the kernel calls *path*."""
    return int(path.removeprefix(partition_path(disk, 0)[:-1]))


def facts_from_json(content: Mapping[str, Any]) -> Facts:
    """Return the facts in `{"lsblk": ..., "sfdisk": {path: ...}, "firmware": ...}`.

    A node sent it: anything that does not look as the programs print it is refused (PROTOCOL).
    """
    try:
        tables = {str(path): table for path, table in content["sfdisk"].items()}
        disks = tuple(
            _disk(entry, tables.get(entry["path"]))
            for entry in content["lsblk"]["blockdevices"]
            if entry["type"] in ("disk", "loop") and int(entry["size"]) > 0
        )
        firmware = Firmware(content["firmware"])
        if firmware is Firmware.AUTO:
            raise ValueError("a node knows its firmware")
        return Facts(disks, firmware, int(content.get("memory_size", 0)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise KaError(Code.PROTOCOL, f"not the facts of a node: {error!r:.200}") from None


def _disk(entry: Mapping[str, Any], table: Mapping[str, Any] | None) -> Disk:
    content = (table or {}).get("partitiontable", {})
    sector_size = int(entry["log-sec"])
    if sector_size < 1:
        raise ValueError(f"a sector of {sector_size} bytes")
    below = {item["path"]: item for item in _below(entry)}
    partitions = tuple(
        _partition(item, below.get(item["node"], {}), sector_size)
        for item in content.get("partitions", ())
    )
    return Disk(
        path=str(entry["path"]),
        size=int(entry["size"]),
        serial=_text(entry["serial"]),
        model=_text(entry["model"]),
        sector_size=sector_size,
        read_only=bool(entry["ro"]),
        mounted=tuple(point for item in (entry, *below.values()) for point in _mounts(item)),
        filesystem=_text(entry["fstype"]),
        label=_text(content.get("label")),
        partitions=partitions,
    )


def _partition(
    item: Mapping[str, Any], device: Mapping[str, Any], sector: int
) -> ExistingPartition:
    return ExistingPartition(
        path=str(item["node"]),
        start=int(item["start"]) * sector,
        size=int(item["size"]) * sector,
        type=_text(item["type"]).upper(),
        filesystem=_text(device.get("fstype")),
        label=_text(device.get("label")),
        mounted=bool(_mounts(device)),
    )


def _below(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for child in entry.get("children") or ():
        yield child
        yield from _below(child)


def _mounts(item: Mapping[str, Any]) -> list[str]:
    return [str(point) for point in item.get("mountpoints") or () if point]


def _text(value: object) -> str:
    """What a disk calls itself ends up on terminals: printable, trimmed, short."""
    text = "" if value is None else str(value)
    return "".join(char for char in text if char.isprintable()).strip()[:120]


def select_disk(node: NodeSpec, spec: DiskSpec, disks: Sequence[Disk], size_min: int) -> Disk:
    """Return the disk that plays a role on a node; raises USAGE for anything doubtful.

    *size_min*: what the partitions or the image need at least.
    """
    serial = node.serial_of(spec.name)
    if serial is None:
        raise _refusal(node, spec, "the nodes file gives no serial for it", disks)
    found = [disk for disk in disks if disk.serial == serial]
    if not found:
        raise _refusal(node, spec, f"no disk has serial {serial}", disks)
    if len(found) > 1:
        raise _refusal(node, spec, f"{len(found)} disks have serial {serial}", found)
    (disk,) = found
    needed = max(size_min, spec.min_size)
    if disk.read_only:
        raise _refusal(node, spec, "it is read-only", found)
    if disk.mounted:
        raise _refusal(node, spec, f"it is in use at {', '.join(disk.mounted)}", found)
    if disk.size < needed:
        raise _refusal(node, spec, f"{format_size(needed)} are needed", found)
    return disk


def _refusal(node: NodeSpec, spec: DiskSpec, why: str, disks: Sequence[Disk]) -> KaError:
    there = "; ".join(disk.describe() for disk in disks) or "no disks at all"
    return KaError(Code.USAGE, f"{node.name}: disk {spec.name} refused: {why}. There: {there}")
