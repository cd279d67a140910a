"""An initramfs from a tree of files: the same bytes for the same tree.

Blocking; needs cpio and zstd.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from common.errors import Code, KaError

__all__ = ["EPOCH", "pack"]

EPOCH = 1_700_000_000
"""Time of everything in it."""
PACKER = ("zstd", "-q", "-9", "-T0", "-c")
"""The same bytes with any number of threads."""


def pack(root: Path, target: Path) -> None:
    """Write a tree as a compressed initramfs that everybody may read; raises EIO."""
    names = []
    for directory, below, files in os.walk(root):
        for name in (*below, *files):
            path = Path(directory, name)
            os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
            names.append(os.fsencode(path.relative_to(root)))
    words = ["cpio", "--quiet", "--null", "--create", "--format=newc", "--reproducible",
             "--owner=+0:+0"]  # fmt: skip
    with tempfile.TemporaryFile() as listing:
        listing.write(b"\0".join(sorted(names)) + b"\0")
        listing.seek(0)
        with (
            open(target, "wb") as file,
            subprocess.Popen(words, cwd=root, stdin=listing, stdout=subprocess.PIPE) as cpio,
            subprocess.Popen(PACKER, stdin=cpio.stdout, stdout=file) as packer,
        ):
            assert cpio.stdout is not None
            cpio.stdout.close()
    for process in (cpio, packer):
        if process.returncode != 0:
            raise KaError(Code.EIO, f"cpio or zstd failed ({process.returncode})")
    target.chmod(0o644)
