"""Images: a stream onto a disk or into a file system, and read back from it.

The stream's SHA-256 is taken as it comes and compared at its end; what was written is then read
back from the disk (its cache dropped) and compared with what was unpacked:

  raw        the device, byte by byte
  tar        every file's content, size, mode and owner
  partclone  the device is cloned again and compared block by block (its header excepted)
  WIM        not read back: wimlib checks the SHA-1 of each stream that it writes

Bounds: memory is a few buffers, and for tar a digest for each file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.errors import Code, KaError
from kadeploy.node import devices
from kadeploy.orders import MountPoint, WriteImage

__all__ = ["filesystem", "write_image"]

BUFFER_SIZE = 1 << 20
PARTCLONE_HEADER_SIZE = 110
"""Image head of format 0002: the version of the program that made it, and a sum of that."""

_DECOMPRESSORS = {
    "none": ["cat"],
    "zstd": ["zstd", "-dc", "--long=31"],
    "gzip": ["gzip", "-dc"],
    "xz": ["xz", "-dc"],
}
_TAR = ["tar", "--extract", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls",
        "--same-permissions", "--sparse", "--file=-"]  # fmt: skip


@contextlib.contextmanager
def filesystem(order: WriteImage, root: Path) -> Iterator[Path | None]:
    """Mount what a tar is unpacked into; None for images that are written to a device."""
    if order.kind != "tar":
        yield None
        return
    with devices.mounted([MountPoint(order.place, "/", order.filesystem)], root) as directory:
        yield directory


def write_image(order: WriteImage, stream: IO[bytes], directory: Path | None) -> dict[str, Any]:
    """Write and verify an image; return its figures.  *directory*: its `filesystem`."""
    if directory is not None:
        return _write_tar(order, stream, directory)
    with devices.opened(order.place) as device:
        if order.kind == "raw":
            return _write_raw(order, stream, device)
        if order.kind == "partclone":
            return _write_partclone(order, stream, device)
        if order.kind == "wim":
            words = ["wimapply", "-", str(order.index), device]
            with _unpacked(order, stream, words) as _:
                pass
            return {"verified": "stream"}
    raise KaError(Code.USAGE, f"no way to write an image of kind {order.kind!r}")


class _Feeder(threading.Thread):
    """Takes the stream's sum while it goes into a program."""

    def __init__(self, stream: IO[bytes], sink: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream, self._sink = stream, sink
        self.digest = ""

    def run(self) -> None:
        total = hashlib.sha256()
        open_sink = True
        while data := self._stream.read(BUFFER_SIZE):
            total.update(data)
            if open_sink:
                try:
                    self._sink.write(data)
                except BrokenPipeError:
                    open_sink = False  # its exit code says why; the sum is wanted all the same
        with contextlib.suppress(BrokenPipeError):
            self._sink.close()
        self.digest = total.hexdigest()


@contextlib.contextmanager
def _unpacked(
    order: WriteImage, stream: IO[bytes], consumer: Sequence[str] | None = None
) -> Iterator[IO[bytes] | None]:
    """Yield the unpacked stream, or give it to a program; check sum and exit codes at the end."""
    unpack = subprocess.Popen(
        _DECOMPRESSORS[order.compression], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert unpack.stdin is not None
    assert unpack.stdout is not None
    assert unpack.stderr is not None
    eater = None
    if consumer is not None:
        eater = subprocess.Popen(
            consumer, stdin=unpack.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        unpack.stdout.close()
    feeder = _Feeder(stream, unpack.stdin)
    feeder.start()
    try:
        yield None if eater is not None else unpack.stdout
        said = b""
        if eater is not None:
            said = eater.communicate()[1]
        complaint = unpack.stderr.read()
        feeder.join()
        code = unpack.wait()
        # Short or damaged on the way is the cause; what the programs say follows from it.
        if f"sha256:{feeder.digest}" != order.checksum:
            raise KaError(Code.PAYLOAD_CORRUPT, "the stream is not the image: its sum differs")
        if eater is not None and eater.returncode != 0:
            raise _program_failed(eater, said)
        if code != 0:
            raise _program_failed(unpack, complaint)
    finally:
        for process in filter(None, (unpack, eater)):
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        feeder.join(timeout=0.1)


def _program_failed(process: subprocess.Popen[bytes], said: bytes) -> KaError:
    assert isinstance(process.args, list)
    lines = said.decode(errors="replace").strip().splitlines()[-2:]
    text = " / ".join(lines)
    return KaError(Code.EIO, f"{process.args[0]} failed ({process.returncode}): {text}")


def _drop_cache(descriptor: int) -> None:
    """Let a file that was flushed be read from the disk."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- raw


def _write_raw(order: WriteImage, stream: IO[bytes], device: str) -> dict[str, Any]:
    written = hashlib.blake2b()
    size = 0
    limit = order.place.size or order.place.disk_size
    with open(device, "r+b", buffering=0) as disk:
        with _unpacked(order, stream) as unpacked:
            assert unpacked is not None
            while data := unpacked.read(BUFFER_SIZE):
                size += len(data)
                if size > limit:
                    raise KaError(Code.ENOSPC, f"the image is larger than the disk's {limit} bytes")
                _write_all(disk, data)
                written.update(data)
        devices.flush(disk.fileno(), device)
        _drop_cache(disk.fileno())
        disk.seek(0)
        there = hashlib.blake2b()
        left = size
        while left and (data := disk.read(min(left, BUFFER_SIZE))):
            there.update(data)
            left -= len(data)
    if there.digest() != written.digest():
        raise KaError(Code.EIO, f"{device}: what is read back is not what was written")
    return {"size": size, "verified": "read-back"}


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


# ---------------------------------------------------------------- partclone


def _write_partclone(order: WriteImage, stream: IO[bytes], device: str) -> dict[str, Any]:
    words = ["partclone.restore", "--source", "-", "--output", device, "--logfile", "/dev/null"]
    with _unpacked(order, stream) as unpacked:
        assert unpacked is not None
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as restore:
            assert restore.stdin is not None
            sent = _BodySum()
            pump = threading.Thread(target=sent.copy, args=(unpacked, restore.stdin), daemon=True)
            pump.start()
            assert restore.stderr is not None
            said = restore.stderr.read()
            pump.join()
        while unpacked.read(BUFFER_SIZE):
            pass  # it gave up; the stream's own sum comes first
    if restore.returncode != 0:
        raise _program_failed(restore, said)
    if order.filesystem == "ntfs":
        _copy_boot_sector(device)
    with open(device, "rb") as disk:
        devices.flush(disk.fileno(), device)
        _drop_cache(disk.fileno())
    name = f"partclone.{_partclone_kind(order.filesystem)}"
    words = [name, "--clone", "--source", device, "--output", "-", "--logfile", "/dev/null"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as again:
        assert again.stdout is not None
        there = _BodySum()
        there.copy(again.stdout, None)
    if again.returncode != 0:
        raise KaError(Code.EIO, f"{name} failed ({again.returncode}) to read the partition back")
    if there.digest() != sent.digest():
        raise KaError(Code.EIO, f"{device}: what is read back is not the image")
    return {"size": sent.size, "verified": "read-back"}


def _copy_boot_sector(device: str) -> None:
    """Put NTFS' spare boot sector into the partition's last one, which partclone leaves out."""
    with open(device, "r+b", buffering=0) as disk:
        head = disk.read(4096)
        sector_size = int.from_bytes(head[11:13], "little")
        disk.seek(-sector_size, os.SEEK_END)
        _write_all(disk, head[:sector_size])


def _partclone_kind(filesystem: str) -> str:
    if filesystem in ("ext4", "ntfs", "vfat", "xfs", "btrfs"):
        return filesystem
    raise KaError(Code.USAGE, "a partclone image needs its partition's format, to be read back")


class _BodySum:
    """Sum of an image without its head."""

    def __init__(self) -> None:
        self._sum = hashlib.blake2b()
        self.size = 0

    def digest(self) -> bytes:
        return self._sum.digest()

    def copy(self, source: IO[bytes], sink: IO[bytes] | None) -> None:
        while data := source.read(BUFFER_SIZE):
            self._sum.update(data[max(0, PARTCLONE_HEADER_SIZE - self.size) :])
            self.size += len(data)
            if sink is not None:
                try:
                    sink.write(data)
                except BrokenPipeError:
                    return
        if sink is not None:
            with contextlib.suppress(BrokenPipeError):
                sink.close()


# ---------------------------------------------------------------- tar


@dataclass(frozen=True, slots=True)
class _Member:
    size: int
    mode: int
    owner: tuple[int, int]
    digest: bytes


class _TarReader(threading.Thread):
    """Reads along while tar unpacks, to know what must be there."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.members: dict[str, _Member] = {}
        self.fault = ""

    def run(self) -> None:
        try:
            with tarfile.open(fileobj=self._stream, mode="r|") as archive:
                for info in archive:
                    name = os.path.normpath(info.name).lstrip("/")  # as tar unpacks it
                    if not info.isreg():
                        self.members.pop(name, None)
                        continue
                    content = archive.extractfile(info)
                    assert content is not None
                    digest = _digest(content)
                    owner = (info.uid, info.gid)
                    self.members[name] = _Member(info.size, info.mode & 0o7777, owner, digest)
        except (tarfile.TarError, OSError, EOFError) as error:
            self.fault = str(error)
        while self._stream.read(BUFFER_SIZE):
            pass  # what follows the archive's end; the writer must not wait


def _write_tar(order: WriteImage, stream: IO[bytes], directory: Path) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    reader = _TarReader(os.fdopen(read_end, "rb"))
    reader.start()
    words = [*_TAR, f"--directory={directory}"]
    size = 0
    with (
        devices.flushed(directory),
        os.fdopen(write_end, "wb") as copy,
        _unpacked(order, stream) as unpacked,
    ):
        assert unpacked is not None
        with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as tar:
            assert tar.stdin is not None
            assert tar.stderr is not None
            complaint: list[bytes] = []
            said = tar.stderr
            listen = threading.Thread(target=lambda: complaint.append(said.read()))
            listen.start()
            with contextlib.suppress(BrokenPipeError):
                while data := unpacked.read(BUFFER_SIZE):
                    size += len(data)
                    tar.stdin.write(data)
                    copy.write(data)
            with contextlib.suppress(BrokenPipeError):
                tar.stdin.close()
            listen.join()
        while unpacked.read(BUFFER_SIZE):
            pass  # tar gave up; the stream's own sum comes first
        copy.close()
        reader.join()
    if tar.returncode != 0:
        raise _program_failed(tar, b"".join(complaint))
    if reader.fault:
        raise KaError(Code.EIO, f"the archive cannot be read: {reader.fault}")
    for name, member in reader.members.items():
        _compare(directory / name, member)
    return {"size": size, "file_count": len(reader.members), "verified": "read-back"}


def _digest(file: IO[bytes]) -> bytes:
    total = hashlib.blake2b()
    while data := file.read(BUFFER_SIZE):
        total.update(data)
    return total.digest()


def _compare(path: Path, member: _Member) -> None:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            _drop_cache(file.fileno())
            digest = _digest(file)
    except OSError as error:
        raise KaError(Code.EIO, f"{path}: cannot be read back: {error.strerror}") from None
    there = _Member(
        status.st_size, stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid), digest
    )
    if there != member:
        raise KaError(Code.EIO, f"{path}: what is read back is not what the image holds")
