"""Where partitions lie on a disk, and the sfdisk script that puts them there.

Pure.  The head computes every sector itself, so that a plan is what will be, to the byte, and the
same description makes the same table on equal disks, identifiers included: those are derived from
environment, node and serial, unless the description gives them.  A table that an image has brought
is the node's to read; how far its last partition can grow is decided here, too.

Invariants
  * starts are multiples of 1 MiB (which suits 512-byte and 4 KiB sectors, RAID and flash);
  * nothing reaches into GPT's copy at the end of the disk;
  * on an MBR disk, a fifth partition and what follows the third are logical (numbers from 5).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from common.errors import Code, KaError
from common.sizes import format_size
from kadeploy.disks import Disk, partition_number, partition_path
from kadeploy.environment import MIB, DiskSpec, Filesystem, Label, PartitionSpec, PartitionType

__all__ = [
    "DiskLayout",
    "Grown",
    "Placed",
    "grow_last",
    "lay_out",
    "render_sfdisk",
    "size_needed",
]

PRIMARY_COUNT_MAX = 4
LOGICAL_FIRST = 5
MBR_SECTOR_COUNT_MAX = 2**32 - 1
_IDENTITIES = uuid.UUID("6b612d64-6570-6c6f-792d-706172747300")

# GPT type GUIDs: UEFI 2.10 table 5-7, Discoverable Partitions Specification, Microsoft's list.
_GPT_TYPES = {
    PartitionType.LINUX: "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    PartitionType.SWAP: "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F",
    PartitionType.ESP: "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    PartitionType.BIOS_BOOT: "21686148-6449-6E6F-744E-656564454649",
    PartitionType.WINDOWS: "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7",
    PartitionType.MSR: "E3C9E316-0B5C-4DB8-817D-F92DF00215AE",
    PartitionType.RECOVERY: "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC",
    PartitionType.LVM: "E6D6D379-F507-44C2-A23C-238F2A3DF928",
}
_EXTENDED = ("5", "F", "85")
_PROTECTIVE = "EE"
_MBR_TYPES = {
    PartitionType.LINUX: "83",
    PartitionType.SWAP: "82",
    PartitionType.ESP: "EF",
    PartitionType.WINDOWS: "7",
    PartitionType.RECOVERY: "27",
    PartitionType.LVM: "8E",
}


@dataclass(frozen=True, slots=True)
class Placed:
    """A partition with its place.  `extended`: the MBR container, which has no spec."""

    number: int
    start: int
    size: int
    type: str
    path: str
    spec: PartitionSpec | None
    part_uuid: str = ""
    filesystem_uuid: str = ""
    """What it will be formatted with; empty where that cannot be chosen or nothing is formatted."""


@dataclass(frozen=True, slots=True)
class DiskLayout:
    spec: DiskSpec
    disk: Disk
    disk_id: str
    partitions: tuple[Placed, ...]

    def named(self, name: str) -> Placed | None:
        found = (one for one in self.partitions if one.spec is not None and one.spec.name == name)
        return next(found, None)


def size_needed(spec: DiskSpec) -> int:
    """Return the bytes that a disk needs at least for a description's partitions."""
    if not spec.partitions:
        return 0
    logical = max(0, len(spec.partitions) - _primary_count(spec))
    fixed = sum(part.size or MIB for part in spec.partitions)
    return fixed + (2 + logical) * MIB


def lay_out(spec: DiskSpec, disk: Disk, identity: str) -> DiskLayout:
    """Return where everything goes; *identity* tells this node and environment from others.

    Raises USAGE when it does not fit.
    """
    disk_id = spec.disk_id or _disk_id(spec.label, identity)
    if not spec.partitions:
        return DiskLayout(spec, disk, "", ())
    end = _end(spec.label, disk)
    primaries = _primary_count(spec)
    placed: list[Placed] = []
    position = MIB
    for index, part in enumerate(spec.partitions):
        logical = index >= primaries
        if logical and index == primaries:
            path = partition_path(disk.path, PRIMARY_COUNT_MAX)
            placed.append(Placed(PRIMARY_COUNT_MAX, position, end - position, "F", path, None))
        if logical:
            position += MIB  # the table of the logical partition
        size = part.size if part.size is not None else end - position
        if size < MIB or position + size > end:
            raise KaError(
                Code.USAGE,
                f"{disk.describe()}: partition {part.name} of {format_size(part.size or MIB)}"
                f" does not fit behind {format_size(position)}",
            )
        number = LOGICAL_FIRST + index - primaries if logical else index + 1
        placed.append(_place(spec, part, disk, number, position, size, disk_id, identity))
        position += size
    return DiskLayout(spec, disk, disk_id, tuple(placed))


def _end(label: Label, disk: Disk) -> int:
    """Return where partitions end at the latest."""
    if label is Label.GPT:
        return disk.size // MIB * MIB - MIB
    return min(disk.size, MBR_SECTOR_COUNT_MAX * disk.sector_size) // MIB * MIB


@dataclass(frozen=True, slots=True)
class Grown:
    """A disk's last partition, and what it becomes when it takes the rest."""

    number: int
    start: int
    size: int
    new_size: int


def grow_last(disk: Disk) -> Grown:
    """Return how a disk's last partition fills it; never smaller.  Raises USAGE if it cannot."""
    if not disk.partitions:
        raise KaError(Code.USAGE, f"{disk.path}: the image has brought no partition to grow")
    last = max(disk.partitions, key=lambda one: one.start)
    label = Label.GPT if disk.label == "gpt" else Label.MBR
    number = partition_number(disk.path, last.path)
    if label is Label.MBR and last.type == _PROTECTIVE:
        raise KaError(
            Code.USAGE, f"{disk.path}: the image's table is for disks with sectors of another size"
        )
    if label is Label.MBR and (number >= LOGICAL_FIRST or last.type in _EXTENDED):
        raise KaError(
            Code.USAGE, f"{last.path}: the last partition is a logical one, and cannot be grown"
        )
    room = _end(label, disk) - last.start
    return Grown(number, last.start, last.size, max(last.size, room))


def _place(
    spec: DiskSpec,
    part: PartitionSpec,
    disk: Disk,
    number: int,
    start: int,
    size: int,
    disk_id: str,
    identity: str,
) -> Placed:
    made = uuid.uuid5(_IDENTITIES, f"{identity}/{part.name}")
    if spec.label is Label.GPT:
        kind, part_uuid = _GPT_TYPES[part.type], (part.guid or str(made)).lower()
    else:
        kind, part_uuid = _MBR_TYPES[part.type], f"{disk_id[2:]}-{number:02x}"
    return Placed(
        number=number,
        start=start,
        size=size,
        type=kind,
        path=partition_path(disk.path, number),
        spec=part,
        part_uuid=part_uuid,
        filesystem_uuid=_filesystem_uuid(part.filesystem, f"{identity}/{part.name}"),
    )


def _filesystem_uuid(filesystem: Filesystem | None, identity: str) -> str:
    if filesystem is None or filesystem is Filesystem.NTFS:
        return ""  # mkntfs takes none
    made = uuid.uuid5(_IDENTITIES, f"{identity}/filesystem")
    if filesystem is Filesystem.VFAT:
        digits = made.hex[:8].upper()
        return f"{digits[:4]}-{digits[4:]}"
    return str(made)


def _disk_id(label: Label, identity: str) -> str:
    made = uuid.uuid5(_IDENTITIES, identity)
    return str(made).upper() if label is Label.GPT else f"0x{made.hex[:8]}"


def _primary_count(spec: DiskSpec) -> int:
    count = len(spec.partitions)
    if spec.label is Label.GPT or count <= PRIMARY_COUNT_MAX:
        return count
    return PRIMARY_COUNT_MAX - 1


def render_sfdisk(layout: DiskLayout) -> str:
    """Return the script for `sfdisk DISK`; empty when a raw image brings the table."""
    if not layout.partitions:
        return ""
    sector = layout.disk.sector_size
    gpt = layout.spec.label is Label.GPT
    lines = [
        f"label: {'gpt' if gpt else 'dos'}",
        f"label-id: {layout.disk_id}",
        "unit: sectors",
        f"sector-size: {sector}",
        "",
    ]
    for one in layout.partitions:
        words = [f"start={one.start // sector}", f"size={one.size // sector}", f"type={one.type}"]
        if one.spec is not None and gpt:
            words += [f"uuid={one.part_uuid.upper()}", f'name="{one.spec.name}"']
        if one.spec is not None and one.spec.bootable:
            words.append('attrs="LegacyBIOSBootable"' if gpt else "bootable")
        elif one.spec is not None and one.spec.type is PartitionType.RECOVERY and gpt:
            # Windows leaves it alone and gives it no letter.
            words.append('attrs="RequiredPartition GUID:63"')
        lines.append(f"{one.number} : {', '.join(words)}")
    return "\n".join(lines) + "\n"
