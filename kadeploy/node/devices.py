"""Disks and partitions of this node, checked against what the head was told of them.

Every order names its disk with serial and size; both are read again here, right before anything is
written.  A loop device's serial is the path of its file, so that images can be made and tests run.

Where the kernel has made no device for a partition (or cannot read the table's kind), one is made
for as long as it is needed: a loop device at the partition's offset.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import Code, KaError
from common.storage import sync_file_system
from kadeploy.disks import LSBLK_COLUMNS, partition_path
from kadeploy.orders import MountPoint, Place

__all__ = [
    "check",
    "facts",
    "filesystem_of",
    "flush",
    "flushed",
    "mounted",
    "opened",
    "reread_table",
    "run",
    "wait_until_free",
]

OUTPUT_SIZE_MAX = 2000
RELEASE_TIMEOUT_S = 30.0


def run(words: Sequence[str], *, stdin: bytes = b"", good: Container[int] = (0,)) -> str:
    """Run a program; return what it printed; raises EIO with its last lines.

    *good*: exit codes that are no failure.
    """
    try:
        done = subprocess.run(words, input=stdin, capture_output=True)
    except OSError as error:
        raise KaError(Code.EIO, f"{words[0]}: {error.strerror}") from None
    if done.returncode not in good:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-OUTPUT_SIZE_MAX:]
        line = " / ".join(said.splitlines()[-3:])
        raise KaError(Code.EIO, f"{words[0]} failed ({done.returncode}): {line}")
    return done.stdout.decode(errors="replace")


def facts(paths: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `disks.facts_from_json` reads, of all disks or of these."""
    words = ["lsblk", "--json", "--bytes", "--output", LSBLK_COLUMNS, *paths]
    listed: dict[str, Any] = json.loads(run(words))
    tables: dict[str, Any] = {}
    for entry in listed["blockdevices"]:
        if entry["type"] == "loop":
            entry["serial"] = _backing_file(entry["path"])
        if entry["type"] in ("disk", "loop"):
            with contextlib.suppress(KaError):  # no table is no fault
                tables[entry["path"]] = json.loads(run(["sfdisk", "--json", entry["path"]]))
    firmware = "uefi" if Path("/sys/firmware/efi").exists() else "bios"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"lsblk": listed, "sfdisk": tables, "firmware": firmware, "memory_size": memory}


def _backing_file(path: str) -> str | None:
    try:
        return Path(f"/sys/block/{Path(path).name}/loop/backing_file").read_text().strip()
    except OSError:
        return None


def check(place: Place) -> None:
    """Raise USAGE unless the disk is the one that was meant."""
    words = ["lsblk", "--json", "--bytes", "--nodeps", "--output", "SIZE,SERIAL,TYPE,RO"]
    (entry,) = json.loads(run([*words, place.disk]))["blockdevices"]
    serial = _backing_file(place.disk) if entry["type"] == "loop" else entry["serial"]
    serial = (serial or "").strip()
    if serial != place.serial or int(entry["size"]) != place.disk_size:
        raise KaError(
            Code.USAGE,
            f"{place.disk} is not the disk that was planned: serial {serial!r} of"
            f" {entry['size']} bytes, not {place.serial!r} of {place.disk_size}",
        )


def reread_table(disk: str) -> None:
    """Let the kernel see a disk's new partitions.

    That it cannot is no fault: `opened` makes what is missing.
    """
    subprocess.run(["blockdev", "--rereadpt", disk], capture_output=True)
    if shutil.which("udevadm"):
        subprocess.run(["udevadm", "settle", "--timeout=20"], capture_output=True)


@contextlib.contextmanager
def opened(place: Place) -> Iterator[str]:
    """Yield the path of a device for *place*, checked."""
    check(place)
    if place.number == 0:
        yield place.disk
        _flush(place.disk)
        return
    path = partition_path(place.disk, place.number)
    if _starts_at(path, place):
        yield path
        _flush(path)
        return
    words = ["losetup", "--find", "--show", f"--offset={place.start}", f"--sizelimit={place.size}"]
    loop = run([*words, place.disk]).strip()
    try:
        yield loop
        _flush(loop)
    finally:
        run(["losetup", "--detach", loop])


def _flush(device: str) -> None:
    """Put on the disk what is still in memory; `os.sync` would wait for all other disks too."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        flush(descriptor, device)
    finally:
        os.close(descriptor)


def filesystem_of(path: str, offset: int = 0, size: int = 0) -> str:
    """Return what a device, an image or a part of one holds; raises EIO if it cannot be read."""
    part = [f"--offset={offset}", f"--size={size}"] if size else []
    words = ["blkid", "--probe", "--match-tag", "TYPE", "--output", "value", *part, path]
    return run(words, good=(0, 2)).strip() or "no file system"


def flush(descriptor: int, name: str) -> None:
    """Put a device on its disk; raises EIO if anything that was written to it cannot be."""
    _flushing(os.fsync, descriptor, name)


@contextlib.contextmanager
def flushed(directory: Path) -> Iterator[None]:
    """Put the file system of *directory* on its disk in the end, as one.

    Raises EIO if anything that was written to it meanwhile cannot be.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield
        _flushing(sync_file_system, descriptor, str(directory))
    finally:
        os.close(descriptor)


def _flushing(call: Callable[[int], None], descriptor: int, name: str) -> None:
    try:
        call(descriptor)
    except OSError as error:
        raise KaError(Code.EIO, f"{name}: cannot be flushed: {error.strerror}") from None


def wait_until_free(device: str) -> None:
    """Wait until nobody has a device to himself; raises EIO after half a minute.

    A process that was started with a mount namespace of its own while a file system was mounted
    keeps it mounted for as long as it runs, whatever `umount` says here.  NTFS's driver, which is
    a program, may then still have things to write.
    """
    deadline_s = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                raise KaError(Code.EIO, f"{device}: {error.strerror}") from None
        else:
            return
        time.sleep(0.01)


def _starts_at(path: str, place: Place) -> bool:
    """Whether the kernel's device for a partition is there and is the planned one."""
    block = Path("/sys/class/block") / Path(path).name
    try:
        start = int((block / "start").read_text()) * 512
        size = int((block / "size").read_text()) * 512
    except (OSError, ValueError):
        return False
    if (start, size) != (place.start, place.size):
        raise KaError(
            Code.EIO, f"{path} is at {start}+{size}, planned was {place.start}+{place.size}"
        )
    return os.path.exists(path)


@contextlib.contextmanager
def mounted(mounts: Sequence[MountPoint], root: Path) -> Iterator[Path]:
    """Mount a system's file systems below *root*, root first; unmount at the end."""
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for one in mounts:
            device = stack.enter_context(opened(one.place))
            point = root if one.path == "/" else root / one.path.lstrip("/")
            if one.path != "/" and not point.resolve().is_relative_to(root.resolve()):
                raise KaError(Code.EIO, f"mount point {one.path} leads out of the new system")
            point.mkdir(parents=True, exist_ok=True)
            if one.filesystem == "ntfs":
                stack.callback(wait_until_free, device)
                # As Windows does, without regard to case: there must not be a second /windows.
                run(["lowntfs-3g", "-o", "streams_interface=xattr,ignore_case", device, str(point)])
            else:
                kind = ["-t", one.filesystem] if one.filesystem else []
                run(["mount", *kind, device, str(point)])
            stack.callback(run, ["umount", str(point)])
            stack.enter_context(flushed(point))
            if one.filesystem == "ntfs" and os.statvfs(point).f_flag & os.ST_RDONLY:
                raise KaError(
                    Code.USAGE,
                    "this Windows was not shut down whole (fast start is not): record it again",
                )
        yield root
