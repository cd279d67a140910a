"""An NTFS volume with what makes one different from a directory of files, and a look at one.

Made and looked at by ntfs-3g's programs, which have nothing of wimlib's or partclone's: what these
keep is compared by the bytes that the driver and `ntfscat` find.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kadeploy.node.devices import wait_until_free
from tests.support.loop_disk import PATH, run

__all__ = ["descriptor", "is_clean", "make_golden", "mounted", "picture"]

HIDDEN, SYSTEM, SPARSE, REPARSE, COMPRESSED = 0x2, 0x4, 0x200, 0x400, 0x800
"""Bits of a file's attributes."""
_KEPT = ("acl", "attrib", "reparse_data", "object_id", "dos_name", "ea")
_MOUNT_POINT = 0xA0000003


@contextmanager
def mounted(device: str, directory: Path, *options: str) -> Iterator[Path]:
    point = directory / "look"
    point.mkdir(exist_ok=True)
    run("ntfs-3g", "-o", ",".join(["streams_interface=xattr", *options]), device, point)
    try:
        yield point
    finally:
        run("umount", point)
        wait_until_free(device)


def descriptor(*entries: tuple[int, str]) -> bytes:
    """Return a security descriptor, owned by the administrators: a mask for each SID."""
    owner = _sid("S-1-5-32-544")
    aces = b""
    for mask, sid in entries:
        body = struct.pack("<I", mask) + _sid(sid)
        aces += struct.pack("<BBH", 0, 0, 4 + len(body)) + body
    acl = struct.pack("<BBHHH", 2, 0, 8 + len(aces), len(entries), 0) + aces
    offsets = (20, 20 + len(owner), 0, 20 + 2 * len(owner))
    return struct.pack("<BBH4I", 1, 0, 0x8004, *offsets) + owner * 2 + acl


def _sid(text: str) -> bytes:
    _, _, authority, *parts = text.split("-")
    words = [int(part) for part in parts]
    head = struct.pack(">BBHI", 1, len(words), 0, int(authority))
    return head + struct.pack(f"<{len(words)}I", *words)


def _set(path: Path, name: str, value: bytes) -> None:
    os.setxattr(path, f"system.ntfs_{name}", value, follow_symlinks=False)


def make_golden(device: str, directory: Path) -> None:
    run("mkntfs", "-Q", "-F", "-q", "-L", "golden", device)
    # Compression is what its directory says when a file is made.
    with mounted(device, directory, "compression") as root:
        (root / "Windows/System32").mkdir(parents=True)
        big = root / "Windows/System32/big.dll"
        big.write_bytes(os.urandom(2_000_000))
        os.link(big, root / "Windows/copy.dll")
        os.link(big, root / "Windows/System32/third.dll")
        note = root / "Grüße.txt"
        note.write_bytes(b"main stream")
        os.setxattr(note, "user.Zone.Identifier", b"[ZoneTransfer]\r\nZoneId=3\r\n")
        os.setxattr(note, "user.empty", b"")
        os.setxattr(root / "Windows", "user.of a directory", b"streams here, too")
        _set(note, "acl", descriptor((0x120089, "S-1-1-0"), (0x1F01FF, "S-1-5-18")))
        _set(root / "Windows", "acl", descriptor((0x1200A9, "S-1-5-21-1-2-3-1001")))
        packed = root / "packed"
        packed.mkdir()
        _set(packed, "attrib", struct.pack("<I", COMPRESSED))
        (packed / "log.txt").write_bytes(b"the same line again\n" * 20_000)
        with open(root / "sparse", "wb") as file:
            file.truncate(8 << 20)
            file.seek(5 << 20)
            file.write(b"middle")
        named = root / "A long name with spaces.ini"
        named.write_bytes(b"[x]\r\n")
        _set(named, "dos_name", b"ALONGN~1.INI")
        _set(named, "attrib", struct.pack("<I", HIDDEN | SYSTEM))
        _set(named, "object_id", bytes(range(16)))
        (root / "Users").mkdir()
        junction = root / "Documents and Settings"
        junction.mkdir()
        _set(junction, "reparse_data", _junction("C:\\Users"))
        (root / "empty").mkdir()
        many = root / "many"
        many.mkdir()
        for index in range(300):  # more than fits into the index root
            (many / f"file {index:04}").write_bytes(b"%d" % index)
    large = directory / "stream"
    large.write_bytes(os.urandom(300_000))  # more than an extended attribute can show
    run("ntfscp", "-q", "-N", "large", device, large, "/Windows/copy.dll")


def _junction(target: str) -> bytes:
    full, shown = f"\\??\\{target}".encode("utf-16-le"), target.encode("utf-16-le")
    names = struct.pack("<HHHH", 0, len(full), len(full) + 2, len(shown))
    body = names + full + b"\0\0" + shown + b"\0\0"
    return struct.pack("<IHH", _MOUNT_POINT, len(body), 0) + body


def picture(device: str, directory: Path) -> dict[str, dict[str, Any]]:
    """Return all that must survive, by name."""
    found: dict[str, dict[str, Any]] = {}
    with mounted(device, directory, "ro", "show_sys_files") as root:
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            if name.startswith("$"):
                continue
            status = path.lstat()
            kept: dict[str, Any] = {"mode": status.st_mode, "links": status.st_nlink}
            for key in _KEPT:
                kept[key] = _attribute(path, f"system.ntfs_{key}")
            kept["times"] = _attribute(path, "system.ntfs_times")[:16]  # made and written
            if path.is_file() and not path.is_symlink():
                kept["size"] = status.st_size
            kept["streams"] = [
                one.removeprefix("user.")
                for one in sorted(os.listxattr(path, follow_symlinks=False))
                if one.startswith("user.")
            ]
            found[name] = kept
    for name, kept in found.items():
        names = [*kept["streams"], *([None] if "size" in kept else [])]
        kept["sums"] = {one: _sum(device, name, one) for one in names}
    return found


def _attribute(path: Path, name: str) -> bytes:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return b""  # it has none


def _sum(device: str, name: str, stream: str | None) -> str:
    words = ["ntfscat", "--quiet", device, name]
    words += ["--attribute-name", stream] if stream else []
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PATH": PATH})
    assert done.returncode == 0, (words, done.stderr)
    return hashlib.sha256(done.stdout).hexdigest()


def is_clean(device: str) -> bool:
    """Whether `ntfsfix` finds nothing to do; nothing is done."""
    said = run("ntfsfix", "--no-action", device)
    return "processed successfully" in said
