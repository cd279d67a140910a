"""An environment: a system, or several side by side, as it is to be on a node's disks.

Pure.  `envfile.py` makes these from YAML, `partitions.py` lays them out, `plan.py` says what they
would do to a node.

Disks are named by role ("system", "data"); which disk of a node plays a role is the node's matter
(`nodes.py`: by serial number).  A disk either gets a partition table here, or is filled whole by a
raw image that brings one.

Invariants (checked by `validate`, so that all others can rely on them)
  * names of disks, of systems, and of partitions across all disks are unique;
  * every image has one target that exists, every partition at most one image;
  * at most one partition of a disk takes the rest, and it is the last; sizes are whole MiB;
  * a system that Linux boots has exactly one root, and mount points are unique in it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from common.sizes import SIZE

__all__ = [
    "MIB",
    "BootSpec",
    "Compression",
    "DiskSpec",
    "Environment",
    "Filesystem",
    "Firmware",
    "Image",
    "ImageKind",
    "Label",
    "Loader",
    "OsKind",
    "PartitionSpec",
    "PartitionType",
    "PostStep",
    "System",
]

MIB = 1024 * 1024
PARTITION_COUNT_MAX = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")
_GUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_MBR_ID = re.compile(r"0x[0-9a-f]{8}")
_ARGUMENTS = re.compile(r"[ -~]*")


class Label(enum.Enum):
    GPT = "gpt"
    MBR = "mbr"


class PartitionType(enum.Enum):
    LINUX = "linux"
    SWAP = "swap"
    ESP = "esp"
    """The EFI system partition."""
    BIOS_BOOT = "bios-boot"
    """Where GRUB's core goes on a GPT disk booted by a BIOS."""
    WINDOWS = "windows"
    MSR = "msr"
    RECOVERY = "recovery"
    LVM = "lvm"


class Filesystem(enum.Enum):
    EXT4 = "ext4"
    XFS = "xfs"
    BTRFS = "btrfs"
    VFAT = "vfat"
    NTFS = "ntfs"
    SWAP = "swap"


class ImageKind(enum.Enum):
    TAR = "tar"
    RAW = "raw"
    PARTCLONE = "partclone"
    WIM = "wim"


class Compression(enum.Enum):
    NONE = "none"
    ZSTD = "zstd"
    GZIP = "gzip"
    XZ = "xz"


class OsKind(enum.Enum):
    LINUX = "linux"
    WINDOWS = "windows"


class Loader(enum.Enum):
    GRUB = "grub"
    WINDOWS = "windows"
    NONE = "none"
    """The image brings one that needs nothing."""


class Firmware(enum.Enum):
    AUTO = "auto"
    """As the node was booted."""
    BIOS = "bios"
    UEFI = "uefi"


@dataclass(frozen=True, slots=True)
class PartitionSpec:
    name: str
    type: PartitionType = PartitionType.LINUX
    size: Annotated[int | None, SIZE] = None
    """None: the rest of the disk."""
    format: Filesystem | None = None
    mount: str | None = None
    options: str = "defaults"
    guid: str | None = None
    """GPT only; to be kept, for a Windows boot store refers to it; else one is made per node."""
    image_guid: str | None = None
    """GPT only: what the images call this partition, where that is not `guid`."""
    bootable: bool = False

    @property
    def filesystem(self) -> Filesystem | None:
        """What it is formatted with: `format`, and swap without a word."""
        return Filesystem.SWAP if self.type is PartitionType.SWAP else self.format

    def validate(self) -> None:
        _named(self.name, "partition")
        if self.type is PartitionType.SWAP and self.format not in (None, Filesystem.SWAP):
            raise ValueError(f"partition {self.name}: swap is not formatted with a file system")
        if self.size is not None and (self.size < MIB or self.size % MIB):
            raise ValueError(f"partition {self.name}: size must be whole MiB, at least one")
        if self.mount is not None and (
            not self.mount.startswith("/") or re.search(r"[\s\\#]|/\.\.?(/|$)", self.mount)
        ):
            raise ValueError(f"partition {self.name}: not a mount point: {self.mount!r}")
        if not re.fullmatch(r"[!-~]+", self.options):
            raise ValueError(f"partition {self.name}: not mount options: {self.options!r}")
        for guid in (self.guid, self.image_guid):
            if guid is not None and not _GUID.fullmatch(guid):
                raise ValueError(f"partition {self.name}: not a GUID: {guid!r}")


@dataclass(frozen=True, slots=True)
class DiskSpec:
    name: str
    label: Label = Label.GPT
    disk_id: str | None = None
    """A GUID (GPT) or 0x and eight digits (MBR) to be kept; else one is made per node."""
    image_disk_id: str | None = None
    """GPT only: what the images call this disk, where that is not `disk_id`."""
    min_size: Annotated[int, SIZE] = 0
    partitions: tuple[PartitionSpec, ...] = ()

    def validate(self) -> None:
        _named(self.name, "disk")
        _unique((part.name for part in self.partitions), "partition")
        if len(self.partitions) > PARTITION_COUNT_MAX:
            raise ValueError(f"disk {self.name}: more than {PARTITION_COUNT_MAX} partitions")
        if any(part.size is None for part in self.partitions[:-1]):
            raise ValueError(f"disk {self.name}: only the last partition can take the rest")
        pattern = _GUID if self.label is Label.GPT else _MBR_ID
        if self.disk_id is not None and not pattern.fullmatch(self.disk_id):
            raise ValueError(f"disk {self.name}: not an id of a {self.label.value} disk")
        if self.image_disk_id is not None and not _GUID.fullmatch(self.image_disk_id):
            raise ValueError(f"disk {self.name}: not a GUID: {self.image_disk_id!r}")
        if self.label is Label.MBR:
            if self.image_disk_id is not None:
                raise ValueError(f"disk {self.name}: image_disk_id needs a GPT disk")
            for part in self.partitions:
                if (part.guid or part.image_guid) is not None:
                    raise ValueError(f"partition {part.name}: a guid needs a GPT disk")
                if part.type in (PartitionType.BIOS_BOOT, PartitionType.MSR):
                    raise ValueError(f"partition {part.name}: {part.type.value} needs a GPT disk")


@dataclass(frozen=True, slots=True)
class Image:
    file: str
    """A path, from the description's own directory."""
    kind: ImageKind
    checksum: str
    """Of the file as stored: sha256: and 64 digits."""
    partition: str | None = None
    disk: str | None = None
    """Raw only: the whole disk."""
    compression: Compression = Compression.NONE
    size: Annotated[int, SIZE] = 0
    """What it takes when unpacked; 0: not told, so not checked."""
    index: int = 1
    """Of the image in a WIM."""
    grow: Filesystem | None = None
    """What the image brings, and is to fill the partition; of a disk, the last partition's."""

    @property
    def in_place(self) -> bool:
        """Whether the file's bytes are the disk's: then the disk shows what has come of it."""
        return self.kind is ImageKind.RAW and self.compression is Compression.NONE

    @property
    def begins_again(self) -> bool:
        """A raw image of which the disk cannot show what has come: its sums are of other bytes."""
        return self.kind is ImageKind.RAW and not self.in_place

    def validate(self) -> None:
        if not self.file or "\0" in self.file:
            raise ValueError("an image needs a file")
        if not _CHECKSUM.fullmatch(self.checksum):
            raise ValueError(f"image {self.file}: checksum must be sha256: and 64 hex digits")
        if (self.partition is None) == (self.disk is None):
            raise ValueError(f"image {self.file}: give a partition or a disk")
        if self.disk is not None and self.kind is not ImageKind.RAW:
            raise ValueError(f"image {self.file}: only a raw image fills a whole disk")
        if self.kind is ImageKind.WIM and self.compression is not Compression.NONE:
            raise ValueError(f"image {self.file}: a WIM brings its own compression")
        if self.index < 1:
            raise ValueError(f"image {self.file}: index counts from 1")
        if self.grow is not None and self.kind not in (ImageKind.RAW, ImageKind.PARTCLONE):
            raise ValueError(f"image {self.file}: a {self.kind.value} fills its partition anyway")
        if self.grow in (Filesystem.VFAT, Filesystem.SWAP):
            raise ValueError(f"image {self.file}: grow takes ext4, xfs, btrfs or ntfs")


@dataclass(frozen=True, slots=True)
class BootSpec:
    loader: Loader = Loader.GRUB
    firmware: Firmware = Firmware.AUTO
    label: str = ""
    """What the firmware's menu calls it; the system's name if empty."""
    kernel: str = "/vmlinuz"
    initrd: str = "/initrd.img"
    arguments: str = ""
    """Kernel command line.  Anybody on the machine can read it: no secrets."""
    efi_path: str = ""
    """The EFI program on the ESP, for a system whose boot loader the image brings."""

    def validate(self) -> None:
        for value in (self.label, self.kernel, self.initrd, self.arguments, self.efi_path):
            if not _ARGUMENTS.fullmatch(value) or set("\"'`$\\;{}") & set(value):
                raise ValueError(f"boot: {value!r} has characters that a boot loader would read")


@dataclass(frozen=True, slots=True)
class PostStep:
    """One thing to do in the new system: a built-in, a template or a script of yours."""

    builtin: str | None = None
    template: str | None = None
    dest: str | None = None
    mode: str = "0644"
    script: str | None = None

    def validate(self) -> None:
        given = [name for name in (self.builtin, self.template, self.script) if name is not None]
        if len(given) != 1:
            raise ValueError("a post_install step is one of builtin, template, script")
        if (self.template is None) != (self.dest is None):
            raise ValueError("a template needs a dest, and nothing else has one")
        if self.dest is not None and (not self.dest.startswith("/") or ".." in self.dest):
            raise ValueError(f"dest must be an absolute path: {self.dest!r}")
        if not re.fullmatch(r"0[0-7]{3}", self.mode):
            raise ValueError(f"mode must be like 0644: {self.mode!r}")


@dataclass(frozen=True, slots=True)
class System:
    name: str
    images: tuple[Image, ...]
    os: OsKind = OsKind.LINUX
    root: str | None = None
    """The partition that holds the system; else the one mounted at /, or its only image's."""
    boot: BootSpec = BootSpec()
    post_install: tuple[PostStep, ...] = ()

    def validate(self) -> None:
        _named(self.name, "system")
        if not self.images:
            raise ValueError(f"system {self.name}: no images")
        if self.os is OsKind.WINDOWS and self.boot.loader is Loader.GRUB:
            raise ValueError(f"system {self.name}: set boot.loader to windows or none")


@dataclass(frozen=True, slots=True)
class Environment:
    name: str
    version: int
    disks: tuple[DiskSpec, ...]
    systems: tuple[System, ...]
    description: str = ""
    default: str | None = None
    """The system to boot after deployment; the first if not given."""

    def validate(self) -> None:
        _named(self.name, "environment")
        if self.version < 1:
            raise ValueError("version counts from 1")
        if not self.disks or not self.systems:
            raise ValueError("an environment has disks and systems")
        _unique((disk.name for disk in self.disks), "disk")
        _unique((system.name for system in self.systems), "system")
        _unique((part.name for _, part in self.partitions()), "partition")
        if self.default is not None and self.default not in {one.name for one in self.systems}:
            raise ValueError(f"default: no system {self.default!r}")
        self._validate_images()
        for system in self.systems:
            self._validate_root(system)
        mounts = [part.mount for _, part in self.partitions() if part.mount is not None]
        _unique(mounts, "mount point")
        _unique(self._guids(), "GUID")

    def _guids(self) -> Iterator[str]:
        """Yield each disk's and partition's own GUIDs, new and old.

        Were one's new GUID another's old one, orders carried out twice would mix them up.
        """
        pairs = [(disk.disk_id, disk.image_disk_id) for disk in self.disks]
        pairs += [(part.guid, part.image_guid) for _, part in self.partitions()]
        for pair in pairs:
            yield from {guid.lower() for guid in pair if guid is not None}

    def _validate_images(self) -> None:
        disks = {disk.name: disk for disk in self.disks}
        parts = {part.name: part for _, part in self.partitions()}
        taken: set[str] = set()
        for image in self.images():
            target = image.partition or image.disk or ""
            if target in taken:
                raise ValueError(f"image {image.file}: {target} already gets another")
            taken.add(target)
            if image.disk is not None:
                if image.disk not in disks:
                    raise ValueError(f"image {image.file}: no disk {image.disk!r}")
                if disks[image.disk].partitions:
                    raise ValueError(
                        f"image {image.file}: disk {image.disk} gets partitions of its own"
                    )
                continue
            if image.partition not in parts:
                raise ValueError(f"image {image.file}: no partition {image.partition!r}")
            there = parts[image.partition].format
            if image.grow is not None and there not in (None, image.grow):
                raise ValueError(
                    f"image {image.file}: grow says {image.grow.value}, partition"
                    f" {image.partition} has format {there.value if there else ''}"
                )
            formats = {ImageKind.TAR: None, ImageKind.WIM: Filesystem.NTFS}
            if image.kind in formats:
                made = parts[image.partition].format
                wanted = formats[image.kind]
                if made is None or (wanted is not None and made is not wanted):
                    word = wanted.value if wanted else "a file system"
                    raise ValueError(
                        f"image {image.file}: partition {image.partition} needs format {word}"
                    )

    def _validate_root(self, system: System) -> None:
        whole_disk = all(image.disk is not None for image in system.images)
        if system.root is not None and system.root not in {p.name for _, p in self.partitions()}:
            raise ValueError(f"system {system.name}: no partition {system.root!r}")
        if not whole_disk and self.root_of(system) is None:
            raise ValueError(f"system {system.name}: no partition is mounted at /; set root")
        if whole_disk and (system.post_install or system.boot.loader is not Loader.NONE):
            raise ValueError(
                f"system {system.name}: a whole-disk image takes boot.loader none and no"
                " post_install"
            )

    def partitions(self) -> Iterator[tuple[DiskSpec, PartitionSpec]]:
        for disk in self.disks:
            for part in disk.partitions:
                yield disk, part

    def images(self) -> Iterator[Image]:
        for system in self.systems:
            yield from system.images

    def root_of(self, system: System) -> PartitionSpec | None:
        """Return the partition that holds a system; None if it comes on a whole disk."""
        parts = {part.name: part for _, part in self.partitions()}
        if system.root is not None:
            return parts[system.root]
        own = [parts[image.partition] for image in system.images if image.partition in parts]
        at_root = [part for part in own if part.mount == "/"]
        found = at_root or own
        return found[0] if len(found) == 1 else None

    @property
    def default_system(self) -> System:
        wanted = self.default or self.systems[0].name
        return next(system for system in self.systems if system.name == wanted)

    @property
    def image_size(self) -> int:
        """Bytes that land on the disks of a node, as far as the images tell."""
        return sum(image.size for image in self.images())


def _named(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a name for a {what}: {name[:80]!r} (a-z, 0-9, '_', '.', '-')")


def _unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} occurs twice")
        seen.add(name)
