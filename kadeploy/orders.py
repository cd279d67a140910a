"""Orders: all that a node is told to do, fully worked out, as plain data.

Pure; needs nothing but Python, for the node's program uses it too.  The head decides everything
(sizes, identifiers, texts); the node executes and verifies.  Every order may be carried out again
after it was cut off.

On the wire an order is a JSON object with its name under "do".  A node's answer is one JSON line,
`{"ok": true, ...}` or `{"ok": false, "error": "one line"}`.
"""

from __future__ import annotations

import base64
import dataclasses
from dataclasses import dataclass
from typing import Any

from common.errors import Code, KaError

__all__ = [
    "TOKEN_PATH",
    "Customize",
    "Fit",
    "Format",
    "HiveEdit",
    "HiveValue",
    "IdChange",
    "InstallBoot",
    "MountPoint",
    "NewFile",
    "Order",
    "Partition",
    "Place",
    "Start",
    "WriteImage",
    "from_json",
    "to_json",
]

TOKEN_PATH = "/etc/kadeploy-deployed"
"""Is in every Linux system that was deployed, and says by which deployment."""


@dataclass(frozen=True, slots=True)
class Place:
    """A disk (number 0) or one of its partitions, with what it must look like."""

    disk: str
    serial: str
    disk_size: int
    number: int = 0
    start: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Partition:
    """Write a partition table.  Old signatures in the new partitions go with it."""

    place: Place
    script: str


@dataclass(frozen=True, slots=True)
class Format:
    place: Place
    filesystem: str
    uuid: str
    label: str


@dataclass(frozen=True, slots=True)
class MountPoint:
    place: Place
    path: str
    filesystem: str


@dataclass(frozen=True, slots=True)
class WriteImage:
    """Write what comes on standard input, and read it back."""

    place: Place
    kind: str
    compression: str
    checksum: str
    """Of the stream, sha256: and hex; a stream with another sum is an error."""
    size: int
    """Unpacked; 0: not told."""
    index: int
    filesystem: str

    @property
    def in_place(self) -> bool:
        """Whether the stream's bytes are the disk's: then the disk shows what has come of it."""
        return self.kind == "raw" and self.compression == "none"


@dataclass(frozen=True, slots=True)
class Fit:
    """Fit what an image has brought to its place.

    Of a whole disk: the partition table; of GPT the copy goes to the disk's end.
    """

    place: Place
    filesystem: str
    """What is to fill its place, and the last partition with it; empty: nothing."""


@dataclass(frozen=True, slots=True)
class NewFile:
    path: str
    mode: int
    content: str
    """Base64."""

    @classmethod
    def of(cls, path: str, content: bytes, mode: int = 0o644) -> NewFile:
        return cls(path, mode, base64.b64encode(content).decode())

    @property
    def data(self) -> bytes:
        return base64.b64decode(self.content, validate=True)


@dataclass(frozen=True, slots=True)
class HiveValue:
    """A string in a registry of Windows."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class IdChange:
    """A disk's or partition's GUID in an image, and what it is on this node: maybe the same."""

    old: str
    new: str


@dataclass(frozen=True, slots=True)
class HiveEdit:
    """Change a key of a registry hive: set strings in it, make it name this node's disks."""

    path: str
    key: str
    """Words between backslashes; `CurrentControlSet` is the one that Windows boots."""
    values: tuple[HiveValue, ...] = ()
    ids: tuple[IdChange, ...] = ()
    """Changed in all binary values of the key and below it."""
    ids_needed: bool = False
    """That none of them is there is an error: the hive is of another disk."""
    drop_others: bool = False
    """Binary values that hold none of them go."""


@dataclass(frozen=True, slots=True)
class Customize:
    """Put files into the new system, take some away, run scripts in it (chroot), edit hives."""

    mounts: tuple[MountPoint, ...]
    remove: tuple[str, ...]
    """Patterns, from the new root."""
    files: tuple[NewFile, ...]
    scripts: tuple[NewFile, ...]
    ssh_host_keys: bool = False
    """Make the machine's own."""
    hives: tuple[HiveEdit, ...] = ()


@dataclass(frozen=True, slots=True)
class InstallBoot:
    """Make the disk start the new system."""

    mounts: tuple[MountPoint, ...]
    firmware: str
    disk: Place
    grub: bool
    kernel: str
    initrd: str
    arguments: str
    title: str
    esp_number: int = 0
    efi_path: str = ""
    boot_next: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Leave the deployment environment: kexec into the new system, or reboot."""

    how: str
    mounts: tuple[MountPoint, ...] = ()
    kernel: str = ""
    initrd: str = ""
    command_line: str = ""


Order = Partition | Format | WriteImage | Fit | Customize | InstallBoot | Start
_ORDERS: dict[str, type[Order]] = {
    "partition": Partition,
    "format": Format,
    "write-image": WriteImage,
    "fit": Fit,
    "customize": Customize,
    "install-boot": InstallBoot,
    "start": Start,
}
_NAMES = {cls: name for name, cls in _ORDERS.items()}
_NESTED: dict[str, type[Any]] = {
    "place": Place,
    "disk": Place,
    "mounts": MountPoint,
    "files": NewFile,
    "scripts": NewFile,
    "hives": HiveEdit,
    "values": HiveValue,
    "ids": IdChange,
}


def to_json(order: Order) -> dict[str, Any]:
    """Return an order as JSON's plain values."""
    return {"do": _NAMES[type(order)], **dataclasses.asdict(order)}


def from_json(content: dict[str, Any]) -> Order:
    """Return the order that `to_json` made plain; raises PROTOCOL."""
    try:
        rest = dict(content)
        order: Order = _made(_ORDERS[rest.pop("do")], rest)
        return order
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KaError(Code.PROTOCOL, f"not an order: {error!r:.200}") from None


def _made(cls: type[Any], content: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for key, value in content.items():
        inner = _NESTED.get(key)
        if isinstance(value, list):
            values[key] = tuple(_made(inner, one) if inner else one for one in value)
        elif inner is not None and isinstance(value, dict):
            values[key] = _made(inner, value)
        else:
            values[key] = value
    return cls(**values)
