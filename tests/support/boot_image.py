"""What test machines boot: Debian's cloud kernel, and an initramfs that reports and switches off.

Packages are downloaded and unpacked, not installed: the kernel would become this machine's own.
They are kept in pytest's cache directory.  The kernel is Debian's signed one, which the Secure Boot
test is about.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import tempfile
from pathlib import Path

from tests.support.alone import alone

__all__ = ["make_initrd", "pack", "unpack", "unpack_kernel"]

META_PACKAGE = "linux-image-cloud-amd64"
MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
)
"""In the order in which they need each other."""

# What a deployment environment does at its start, in small: find the card, get an address, report.
INIT = """#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in %(modules)s; do insmod /modules/$module; done
for word in $(cat /proc/cmdline); do
  case $word in
    BOOTIF=*) mac=${word#BOOTIF=01-} ;;
    ka.boot=*) boot=${word#ka.boot=} ;;
    ka.report=*) reports="$reports ${word#ka.report=}" ;;
    ka.stay) stay=yes ;;
  esac
done
ip link set lo up; ip link set eth0 up
udhcpc -i eth0 -s /udhcpc -n -q -t 10 -T 1 >/dev/null 2>&1
dmesg | grep -qi 'secure boot enabled' && echo "ka-guest: secure boot"
for report in hello $reports; do
  wget -q -O - "$boot/report/$mac/$report?detail=kernel%%20$(uname -r)" && echo "ka-guest: $report"
done
echo "ka-guest: done"
[ -z "$stay" ] || sleep 600
poweroff -f
"""
UDHCPC = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/${mask:-24} dev $interface
"""


def unpack_kernel(cache: Path) -> Path:
    """Return the directory of an unpacked kernel package, downloaded if need be."""
    kept = sorted(cache.glob("linux-image-*"))
    if kept:
        return kept[-1]
    depends = subprocess.run(
        ["apt-cache", "depends", META_PACKAGE], capture_output=True, text=True, check=True
    )
    match = re.search(r"Depends: (linux-image-\S+)", depends.stdout)
    assert match is not None, f"{META_PACKAGE} depends on no kernel: {depends.stdout}"
    return unpack(cache, match[1])


def unpack(cache: Path, *packages: str) -> Path:
    """Return a directory with Debian packages unpacked, downloaded if need be.

    What is unpacked starts no service, and is gone with the directory.
    """
    directory = cache / packages[0]
    with alone(cache):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=cache) as name:
                _download(Path(name), *packages)
                os.rename(Path(name) / "tree", directory)
    return directory


def _download(place: Path, *packages: str) -> None:
    """Unpack packages into `place`/tree."""
    command = ["apt-get", "-q", "-y", "-o", "APT::Sandbox::User=root", "download", *packages]
    subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=300)
    for package in place.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, place / "tree"], check=True, timeout=120)


def make_initrd(kernel: Path) -> bytes:
    """Return a gzipped initramfs for a kernel unpacked there."""
    (tree,) = (kernel / "lib/modules").iterdir()
    files = {"bin/busybox": Path("/bin/busybox").read_bytes()}
    for name in MODULES:
        files[f"modules/{Path(name).name}"] = (tree / "kernel" / name).read_bytes()
    modules = " ".join(Path(name).name for name in MODULES)
    files["init"] = (INIT % {"modules": modules}).encode()
    files["udhcpc"] = UDHCPC.encode()
    return pack(files)


def pack(files: dict[str, bytes]) -> bytes:
    """Return a gzipped initramfs of programs and texts, with busybox under all its names."""
    links = {f"bin/{applet}": "busybox" for applet in _applets()}
    return gzip.compress(_cpio(files, links), compresslevel=1, mtime=0)


def _applets() -> list[str]:
    listed = subprocess.run(
        ["/bin/busybox", "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    return [name for name in listed if name != "busybox"]


def _cpio(files: dict[str, bytes], links: dict[str, str]) -> bytes:
    """An archive in the "newc" format, which the kernel unpacks."""
    directories = sorted({str(Path(name).parent) for name in [*files, *links]} - {"."})
    entries = [(name, 0o040755, b"") for name in [*directories, "proc", "sys", "dev"]]
    entries += [(name, 0o100755, data) for name, data in files.items()]
    entries += [(name, 0o120777, os.fsencode(target)) for name, target in links.items()]
    archive = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % number for number in numbers)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
