"""Registry hives as Windows keeps them, made without it: an empty one, a SYSTEM, a boot store.

hivex makes no hive out of nothing, so the empty one is put together here; the rest is merged into
it as text by `hivexregedit`.  The layout of device elements is the one that `bcdedit` writes for a
partition of a GPT disk.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from pathlib import Path

from regipy.registry import RegistryHive

from tests.support.loop_disk import run

__all__ = [
    "BOOTMGR",
    "LOADER",
    "RECOVERY",
    "WINRE",
    "boot_store",
    "device",
    "mounted",
    "ramdisk",
    "system",
    "values",
]

_NONE = 0xFFFFFFFF
_PAGE = 4096
_ROOT = b"ROOT"
BOOTMGR = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}"
LOADER = "{11111111-1111-11e1-8111-111111111111}"
WINRE = "\\Recovery\\WindowsRE\\Winre.wim"
RECOVERY = "{22222222-2222-22e2-8222-222222222222}"


def _cell(content: bytes) -> bytes:
    size = -(-(len(content) + 4) // 8) * 8
    return struct.pack("<i", -size) + content.ljust(size - 4, b"\0")


def _empty() -> bytes:
    """Return a hive with a root key and, behind it, a security descriptor."""
    descriptor = bytes.fromhex("010004800000000000000000000000000000000000")

    def root(security_at: int) -> bytes:
        return _cell(
            struct.pack("<2sHQ9I", b"nk", 0x2C, 0, 0, 0, 0, 0, _NONE, _NONE, 0, _NONE, security_at)
            + struct.pack("<6I2H", _NONE, 0, 0, 0, 0, 0, len(_ROOT), 0)
            + _ROOT
        )

    at = 32 + len(root(0))
    security = _cell(b"sk\0\0" + struct.pack("<IIII", at, at, 1, len(descriptor)) + descriptor)
    page = struct.pack("<4sIIQQI", b"hbin", 0, _PAGE, 0, 0, 0) + root(at) + security
    left = _PAGE - len(page)
    page += struct.pack("<i", left).ljust(left, b"\0")
    head = struct.pack("<4sIIQIIIIIII", b"regf", 1, 1, 0, 1, 5, 0, 1, 32, _PAGE, 1)
    head = head.ljust(508, b"\0")
    total = 0
    for (word,) in struct.iter_unpack("<I", head):
        total ^= word
    return (head + struct.pack("<I", total)).ljust(_PAGE, b"\0") + page


def _merge(path: Path, keys: Mapping[str, Mapping[str, str | int | bytes]]) -> Path:
    """Make the hive at *path* if need be, and put values under keys, as `regedit` would."""
    if not path.exists():
        path.write_bytes(_empty())
    lines = ["Windows Registry Editor Version 5.00", ""]
    for key, of_it in keys.items():
        words = key.split("\\")
        above = ("\\".join(words[:count]) for count in range(1, len(words) + 1))
        lines += [f"\n[HIVE\\{one}]" for one in above]
        lines += [f'"{_quoted(name)}"={_literal(value)}' for name, value in of_it.items()]
    text = "\n".join([*lines, ""])
    run("hivexregedit", "--merge", "--prefix", "HIVE", path, stdin=text.encode())
    return path


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\")


def _literal(value: str | int | bytes) -> str:
    if isinstance(value, bytes):
        return "hex:" + ",".join(f"{byte:02x}" for byte in value)
    return f"dword:{value:08x}" if isinstance(value, int) else f'"{_quoted(value)}"'


def device(partition: str, disk: str) -> bytes:
    """Return a device element that names a partition."""
    qualified = struct.pack("<IIII", 6, 0, 0x48, 0) + uuid.UUID(partition).bytes_le
    qualified += struct.pack("<II", 0, 0) + uuid.UUID(disk).bytes_le + bytes(16)
    return bytes(16) + qualified


def ramdisk(partition: str, disk: str, path: str) -> bytes:
    """Return a device element for an image in a file of a partition, as recovery has it."""
    file = struct.pack("<II", 1, 0x62) + device(partition, disk)[16:]
    file += f"{path}\0".encode("utf-16-le")
    return uuid.UUID(RECOVERY[1:-1]).bytes_le + struct.pack("<IIII", 3, 0, len(file), 0) + file


def boot_store(path: Path, *, disk: str, esp: str, windows: str, recovery: str) -> Path:
    """Make a BCD with a boot manager, a loader and a recovery system."""
    elements = {
        (BOOTMGR, "11000001"): device(esp, disk),
        (LOADER, "11000001"): device(windows, disk),
        (LOADER, "21000001"): device(windows, disk),
        (LOADER, "12000002"): "\\Windows\\system32\\winload.efi",
        (RECOVERY, "11000001"): ramdisk(recovery, disk, WINRE),
    }
    keys = {
        f"Objects\\{of}\\Elements\\{kind}": {"Element": elements[of, kind]} for of, kind in elements
    }
    return _merge(path, {"Description": {"KeyName": "BCD00000000"}, **keys})


def mounted(partition: str) -> bytes:
    """Return what MountedDevices holds for a partition of a GPT disk."""
    return b"DMIO:ID:" + uuid.UUID(partition).bytes_le


def system(path: Path, letters: Mapping[str, bytes]) -> Path:
    """Make a SYSTEM whose second control set is the current one."""
    keys: dict[str, Mapping[str, str | int | bytes]] = {
        "Select": {"Current": 2},
        "MountedDevices": letters,
    }
    for number in (1, 2):
        here = f"ControlSet{number:03}"
        keys[f"{here}\\Control\\ComputerName\\ComputerName"] = {"ComputerName": "GOLDEN"}
        keys[f"{here}\\Services\\Tcpip\\Parameters"] = {
            "Hostname": "golden",
            "Domain": "kept.example",
        }
    return _merge(path, keys)


def values(path: Path, key: str) -> dict[str, object]:
    """Return a key's values as regipy, which has nothing of hivex, reads them."""
    node = RegistryHive(str(path)).get_key(f"\\{key}")
    return {one.name: one.value for one in node.iter_values(trim_values=False)}
