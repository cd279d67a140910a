"""What the tests deploy, and what they deploy it with: a small real Debian and the environment.

Both are built by mmdebstrap, two minutes each and mostly downloading, so they are built at once and
kept in pytest's cache, under a name that changes with what they are made of.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kadeploy import mkenv

__all__ = ["Built", "build", "checksum"]

SUITE = "bookworm"
RAW_UUID = "6b61726f-6f74-4000-8000-000000000001"
RAW_SIZE = "400M"
KERNEL = "linux-image-cloud-amd64"
PACKAGES = (
    "dbus", "e2fsprogs", "grub-efi-amd64-bin", "grub-pc-bin", "grub2-common", "initramfs-tools",
    KERNEL, "openssh-server", "systemd-sysv", "udev", "zstd",
)  # fmt: skip
# What is large and not missed: it would only be written and read back again and again.
EXCLUDED = (
    *mkenv.EXCLUDED,
    *(
        f"/lib/modules/*/kernel/{name}/*"
        for name in (
            "drivers/comedi",
            "drivers/hid",
            "drivers/infiniband",
            "drivers/md",
            "drivers/mtd",
            "drivers/net/ethernet",
            "drivers/nvme",
            "drivers/scsi",
            "drivers/target",
            "fs/btrfs",
            "fs/ceph",
            "fs/nfs",
            "fs/nfsd",
            "fs/smb",
            "fs/xfs",
            "net/bridge",
            "net/ceph",
            "net/netfilter",
            "net/openvswitch",
            "net/sched",
            "net/sunrpc",
        )
    ),
    "/usr/lib/x86_64-linux-gnu/gconv/*",
)


@dataclass(frozen=True, slots=True)
class Built:
    """Files to be deployed with; nobody writes into them."""

    environment: Path
    """A directory with `vmlinuz` and `initrd.img`."""
    system: Path
    """A tar.zst of a Debian."""
    raw: Path
    """A raw.zst of a file system with the same in it."""


def build(cache: Path) -> Built:
    """Return both, built if they are not in the cache."""
    source = Path(mkenv.__file__).read_bytes()
    libraries = "".join(f"{one} {importlib.metadata.version(one)}" for one in mkenv.LIBRARIES)
    environment = cache / f"environment-{_digest(source + libraries.encode())}"
    system = cache / f"debian-{_digest(repr((SUITE, PACKAGES, EXCLUDED)).encode())}.tar.zst"
    with ThreadPoolExecutor() as pool:
        for work in [pool.submit(_environment, environment), pool.submit(_system, system)]:
            work.result()
    raw = system.with_name(system.name.replace(".tar.", ".raw."))
    _raw(system, raw)
    return Built(environment, system, raw)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _environment(directory: Path) -> None:
    if directory.exists():
        return
    draft = directory.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    list(mkenv.make_environment(mkenv.Request(draft, (), suite=SUITE)))
    draft.rename(directory)


def _system(archive: Path) -> None:
    if archive.exists():
        return
    tar = archive.with_suffix(".part")
    words = ["mmdebstrap", "--variant=minbase", mkenv.MERGED_USR, "--format=tar"]
    words += [f"--include={','.join(PACKAGES)}"]
    words += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    done = subprocess.run([*words, SUITE, tar], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    subprocess.run(["zstd", "-q", "-T0", "--rm", tar, "-o", archive], check=True)


def _raw(system: Path, image: Path) -> None:
    if image.exists():
        return
    draft = image.with_suffix(".part")
    with tempfile.TemporaryDirectory() as tree:
        words = ["tar", "-xf", str(system), "-C", tree, "--zstd", "--numeric-owner"]
        subprocess.run(words, check=True)
        words = ["mkfs.ext4", "-q", "-F", "-U", RAW_UUID, "-d", tree, str(draft), RAW_SIZE]
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        subprocess.run(words, check=True, env={**os.environ, "PATH": path})
    subprocess.run(["zstd", "-q", "-T0", "--rm", draft, "-o", image], check=True)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
