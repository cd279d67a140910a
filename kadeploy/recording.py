"""Recording: a directory or a device becomes an image file.

The image appears under its name when it is whole, with its checksum as `env.yaml` wants it.  A tar
of a running system leaves out what is mounted below it, what is of this boot alone, and itself.

Blocking.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from common.errors import Code, KaError
from common.sizes import format_size

__all__ = ["COMPRESSIONS", "KINDS", "record"]

KINDS = ("tar", "raw", "partclone")
COMPRESSIONS = {"zstd": ("zstd", "-q", "-T0", "-c"), "none": ("cat",)}
COPY_SIZE = 1 << 20
ZEROS = bytes(1 << 16)
"""So many together, and whole multiples, become a hole of the image."""
_TAR = (
    "tar", "--create", "--one-file-system", "--numeric-owner", "--xattrs", "--xattrs-include=*",
    "--acls", "--sparse", "--sort=name", "--exclude=./tmp/*", "--exclude=./var/tmp/*",
    "--exclude=./run/*", "--exclude=./var/cache/apt/archives/*.deb", "--exclude=./swapfile",
)  # fmt: skip


def command(kind: str, source: str, filesystem: str, own: Sequence[Path] = ()) -> list[str]:
    """Return the words that write an image of *source* to standard output.

    *own*: files of ours, which are no part of it.
    """
    if kind == "tar":
        place = Path(source).resolve()
        found = [one.resolve() for one in own]
        inside = [one.relative_to(place) for one in found if one.is_relative_to(place)]
        without = [f"--exclude=./{one}" for one in inside]
        return [*_TAR, "--anchored", "--no-wildcards", *without, f"--directory={source}", "."]
    if kind == "raw":
        return ["cat", source]
    name = f"partclone.{filesystem}"
    return [name, "--clone", "--source", source, "--output", "-", "--logfile", "/dev/null"]


def record(
    kind: str,
    source: str,
    destination: Path,
    *,
    compression: str,
    filesystem: str,
    prefix: Sequence[str] = (),
) -> Iterator[str]:
    """Capture an image, by *prefix* on another machine; yield what was made."""
    if not source.startswith("/"):
        raise KaError(Code.USAGE, f"not an absolute path: {source}")
    if destination.exists() and not destination.is_file():
        raise KaError(Code.USAGE, f"{destination} is there, and is not a file")
    draft = destination.with_name(f".{destination.name}.part")
    if prefix:
        words = [*prefix, shlex.join(command(kind, source, filesystem))]
    else:
        words = command(kind, source, filesystem, (destination, draft))
    digest = hashlib.sha256()
    size = 0
    try:
        with (
            open(draft, "wb") as file,
            tempfile.TemporaryFile() as errors,  # partclone says more than a pipe holds
            subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=-1, stderr=errors) as reader,
            subprocess.Popen(COMPRESSIONS[compression], stdin=reader.stdout, stdout=-1) as packer,
        ):
            assert reader.stdout is not None
            assert packer.stdout is not None
            reader.stdout.close()
            while data := packer.stdout.read(COPY_SIZE):
                digest.update(data)
                size += len(data)
                _write(file, data)
            file.truncate(size)  # it may end with a hole
            reader.wait()
            packer.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            file.flush()
            os.fsync(file.fileno())
        # GNU tar's 1: a file changed while it was read, as they do on a running system.
        if packer.returncode != 0 or reader.returncode not in ((0, 1) if kind == "tar" else (0,)):
            why = " ".join(said) or f"ended with {reader.returncode}"
            raise KaError(Code.EIO, f"{source}: cannot be recorded: {why}")
        os.replace(draft, destination)
    finally:
        draft.unlink(missing_ok=True)
    yield f"{destination}: {format_size(size)}"
    note = "  # of a whole disk: disk: DISK" if kind == "raw" else ""
    yield (
        f"- {{file: {destination.name}, kind: {kind}, compression: {compression},"
        f' checksum: "sha256:{digest.hexdigest()}", partition: PARTITION}}{note}'
    )


def _write(file: IO[bytes], data: bytes) -> None:
    """Write data, leaving out what are only zeros."""
    for at in range(0, len(data), len(ZEROS)):
        piece = data[at : at + len(ZEROS)]
        if piece == ZEROS:
            file.seek(len(piece), os.SEEK_CUR)
        else:
            file.write(piece)
