"""What deployed test machines run: a small system with a kernel, sshd and nothing else.

Made of the deployment environment's own files, so that nothing more is downloaded: it has the same
programs, another first process, and not the file by which the environment is known.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.support import boot_image

__all__ = ["make_system"]

MODULES = (
    *boot_image.MODULES,
    "drivers/block/virtio_blk.ko",
    "lib/crc16.ko",
    "crypto/crc32c_generic.ko",
    "lib/libcrc32c.ko",
    "fs/mbcache.ko",
    "fs/jbd2/jbd2.ko",
    "fs/ext4/ext4.ko",
)
UNWANTED = ("usr/lib/grub", "usr/lib/python3*", "usr/share", "usr/lib/modules/*/kernel/sound",
            "usr/lib/modules/*/kernel/drivers/net/ethernet", "usr/lib/x86_64-linux-gnu/perl*",
            "usr/bin/wim*", "init", "etc/kadeploy-environment")  # fmt: skip

EARLY = """#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in %(modules)s; do [ ! -f /modules/$module ] || insmod /modules/$module; done
for word in $(cat /proc/cmdline); do
  case $word in root=*) root=${word#root=} ;; esac
done
mkdir -p /new
mount -t ext4 $(findfs $root) /new
exec switch_root /new /sbin/init
"""
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /run; mount -t devpts devpts /dev/pts; mount -t tmpfs run /run
mkdir -p /run/sshd; hostname $(cat /etc/hostname)
ip link set lo up; ip link set eth0 up
busybox udhcpc -i eth0 -s /etc/udhcpc -n -q -t 10
/usr/sbin/sshd
echo "deployed: $(hostname) is up"
while :; do sleep 3600 & wait $!; done
"""


def make_system(initrd: Path, kernel: Path, directory: Path) -> tuple[Path, str]:
    """Return a tar.zst of the system, and its checksum."""
    root = directory / "root"
    root.mkdir()
    with gzip.open(initrd) as packed:
        unpack = subprocess.Popen(["cpio", "-idm", "--quiet"], cwd=root, stdin=subprocess.PIPE)
        with unpack:
            assert unpack.stdin is not None
            shutil.copyfileobj(packed, unpack.stdin, 1 << 20)
    assert unpack.returncode == 0
    for pattern in UNWANTED:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / "boot").mkdir(exist_ok=True)
    (root / "srv").mkdir(exist_ok=True)
    shutil.copy(kernel, root / "boot/vmlinuz")
    (root / "boot/initrd.img").write_bytes(_early(root))
    for link, target in (("vmlinuz", "boot/vmlinuz"), ("initrd.img", "boot/initrd.img")):
        (root / link).symlink_to(target)
    init = root / "usr/sbin/init"
    init.unlink(missing_ok=True)
    init.write_text(INIT)
    init.chmod(0o755)
    archive = directory / "system.tar.zst"
    words = ["tar", "--create", "--numeric-owner", "--xattrs", f"--directory={root}", "--zstd",
             f"--file={archive}", "."]  # fmt: skip
    subprocess.run(words, check=True)
    shutil.rmtree(root)
    return archive, f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}"


def _early(root: Path) -> bytes:
    (tree,) = (root / "usr/lib/modules").iterdir()
    files = {"bin/busybox": Path("/bin/busybox").read_bytes()}
    for name in MODULES:
        if (tree / "kernel" / name).exists():
            files[f"modules/{Path(name).name}"] = (tree / "kernel" / name).read_bytes()
    files["init"] = (EARLY % {"modules": " ".join(Path(name).name for name in MODULES)}).encode()
    return boot_image.pack(files)
