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
from tests.support.alone import alone

__all__ = ["Built", "build", "checksum", "environment"]

SUITE = "bookworm"
RAW_UUID = "6b61726f-6f74-4000-8000-000000000001"
RAW_SIZE = "320M"
KERNEL = "linux-image-cloud-amd64"
PACKAGES = (
    "dbus", "e2fsprogs", "grub-efi-amd64-bin", "grub-pc-bin", "grub2-common", "initramfs-tools",
    KERNEL, "openssh-server", "systemd-sysv", "udev", "zstd",
)  # fmt: skip
REMOVED = (
    "/usr/bin/apt*", "/usr/bin/grub-*", "/usr/bin/perl*", "/usr/lib/apt", "/usr/share/perl5",
    "/usr/lib/x86_64-linux-gnu/libapt-p*", "/usr/lib/x86_64-linux-gnu/perl-base", "/var/lib/apt",
    "/var/lib/dpkg/info",
)  # fmt: skip
"""Needed while packages are set up, and by nothing afterwards."""
# What is large and not missed: it would only be written and read back again and again.
EXCLUDED = (
    *mkenv.EXCLUDED,
    *(
        f"/lib/modules/*/kernel/{name}/*"
        for name in (
            "arch/x86/kvm",
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
            "net/sctp",
            "net/sunrpc",
            "net/tipc",
        )
    ),
    "/usr/lib/grub/*/monolithic/*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",
    "/usr/share/bash-completion/*",
    "/usr/share/bug/*",
    "/usr/share/lintian/*",
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
    ingredients = repr((SUITE, PACKAGES, EXCLUDED, REMOVED, RAW_SIZE))
    system = cache / f"debian-{_digest(ingredients.encode())}.tar.zst"
    with ThreadPoolExecutor() as pool:
        made = pool.submit(environment, cache)
        pool.submit(_system, system).result()
    raw = system.with_name(system.name.replace(".tar.", ".raw."))
    _raw(system, raw)
    return Built(made.result(), system, raw)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def environment(cache: Path) -> Path:
    """Return a directory with the deployment environment, which nobody may enter."""
    source = Path(mkenv.__file__).read_bytes()
    libraries = "".join(f"{one} {importlib.metadata.version(one)}" for one in mkenv.LIBRARIES)
    directory = cache / f"environment-{_digest(source + libraries.encode())}"
    with alone(cache):
        if not directory.exists():
            draft = directory.with_suffix(".part")
            shutil.rmtree(draft, ignore_errors=True)
            list(mkenv.make_environment(mkenv.Request(draft, (), suite=SUITE)))
            draft.rename(directory)
    return directory


def _system(archive: Path) -> None:
    if archive.exists():
        return
    tar = archive.with_suffix(".part")
    words = ["mmdebstrap", "--variant=minbase", mkenv.MERGED_USR, "--format=tar"]
    words += [f"--include={','.join(PACKAGES)}"]
    words += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    words += [f'--customize-hook=rm -r "$1"{pattern}' for pattern in REMOVED]
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
