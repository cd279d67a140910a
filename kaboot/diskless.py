"""Booting without a disk: a kernel, and an initramfs that mounts the root from an NFS server.

The kernel and its modules are those of the root itself, so they fit what is in it; it needs no
initramfs tools.  The initramfs is busybox and `INIT`: drivers for network cards, an address, the
mount, and over it a layer in the node's memory that takes what is written.  It ends in no prompt:
what cannot be had is tried again, and reported to kaboot.

Blocking; needs busybox (linked statically), kmod, cpio and zstd, no root.
"""

from __future__ import annotations

import fnmatch
import lzma
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import initramfs
from common.errors import Code, KaError
from common.sizes import format_size

__all__ = ["INIT", "make_diskless", "needed_modules"]

BUSYBOX = Path("/bin/busybox")
PATHS = "/usr/bin:/bin:/usr/sbin:/sbin"
MODULES = ("kernel/fs/nfs/*", "kernel/fs/overlayfs/*", "kernel/net/packet/*",
           "kernel/drivers/net/*", "kernel/drivers/virtio/*", "kernel/drivers/hv/*")  # fmt: skip
"""Wanted, with all that they need: NFS, the layer over it, and cards."""
NOT_MODULES = ("kernel/drivers/net/wireless/*", "kernel/drivers/net/wwan/*")
APPLETS = ("cat", "find", "hostname", "ip", "mkdir", "modprobe", "mount", "sh", "sleep", "sort",
           "switch_root", "tr", "udhcpc", "wget", "xargs")  # fmt: skip
_PT_INTERP = 3
_SUFFIXES = (".ko", ".ko.xz")

INIT = """#!/bin/sh
# A node without a disk: its network card, the root from an NFS server, then what is init there.
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
layer=50% init=/sbin/init
for word in $(cat /proc/cmdline); do
  case $word in
    BOOTIF=*) id=${word#BOOTIF=01-} ;;
    init=*) init=${word#init=} ;;
    ka.boot=*) boot=${word#ka.boot=} ;;
    ka.layer=*) layer=${word#ka.layer=} ;;
    ka.node=*) node=${word#ka.node=} ;;
    nfsroot=*) nfsroot=${word#nfsroot=} ;;
  esac
done
say() { echo "kaboot: $*" >/dev/console; }
report() {
  [ -z "$boot" ] || wget -q -T 10 -O /dev/null "$boot/report/$id/$1?detail=$2" 2>/dev/null
}
for bus in 1 2 3; do  # a bus's driver finds more
  find /sys/devices -name modalias | xargs cat | sort -u | xargs modprobe -a -q 2>/dev/null
done
modprobe -a -q af_packet nfs nfsv3 nfsv4 overlay
ip link set lo up
mac=$(echo "$id" | tr - :)
until [ -n "$card" ]; do
  for path in /sys/class/net/*; do
    [ "$(cat $path/address)" != "$mac" ] || card=${path##*/}
  done
  [ -n "$card" ] || { say "no network card $mac: is its driver in the root's kernel?"; sleep 10; }
done
ip link set "$card" up
until udhcpc -q -n -t 10 -T 1 -i "$card" -s /udhcpc >/dev/null 2>&1; do
  say "no address for $card, again"
done
mkdir -p /lower /upper /new
where=${nfsroot%%,*} options=${nfsroot#"$where"}
[ "$layer" = no ] && target=/new mode=rw || target=/lower mode=ro
until mount -t nfs -o "$mode$options" "$where" "$target"; do
  say "cannot mount $where ($mode$options), again in 10 s"
  [ -n "$told" ] || report failed "cannot%20mount%20$where"
  told=yes
  sleep 10
done
if [ "$layer" != no ]; then
  mount -t tmpfs -o "mode=755,size=$layer" layer /upper
  mkdir /upper/data /upper/work
  mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /new
  [ -z "$node" ] || echo "$node" >/new/etc/hostname
fi
[ -z "$node" ] || hostname "$node"
until [ -x "/new$init" ] || [ -L "/new$init" ]; do
  say "no $init on $where"
  [ -n "$told" ] || report failed "no%20$init%20on%20$where"
  told=yes
  sleep 10
done
report hello "root%20on%20$where"
mount -t tmpfs -o mode=755 run /new/run
if [ "$layer" != no ]; then
  mkdir -p /new/run/kaboot/root /new/run/kaboot/layer
  mount -o move /lower /new/run/kaboot/root
  mount -o move /upper /new/run/kaboot/layer
fi
for point in dev sys proc; do mount -o move "/$point" "/new/$point"; done
exec switch_root /new "$init"
"""
UDHCPC = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr replace $ip/${mask:-24} dev $interface
[ -z "$router" ] || ip route replace default via ${router%% *}
[ -z "$dns" ] || for one in $dns; do echo "nameserver $one"; done >/etc/resolv.conf
"""


def make_diskless(root: Path, directory: Path) -> Iterator[str]:
    """Make `vmlinuz` and `initrd.img` of a root directory; yield what was made.  Raises KaError."""
    for program in ("cpio", "depmod", "zstd"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:{PATHS}") is None:
            raise KaError(Code.USAGE, f"{program} is not installed")
    if not BUSYBOX.exists() or _has_interpreter(BUSYBOX.read_bytes()[:4096]):
        raise KaError(Code.USAGE, f"{BUSYBOX} is not static (Debian: busybox-static)")
    kernel, version = _kernel(root)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=directory) as name:
        tree, draft = Path(name, "tree"), Path(name)
        source = _inside(root, root / "lib/modules" / version)
        count = _copy_modules(source, tree / "lib/modules" / version)
        _run(["depmod", "--basedir", str(tree), version])
        for place in ("bin", "dev", "etc", "proc", "sys"):
            (tree / place).mkdir()
        shutil.copy(BUSYBOX, tree / "bin/busybox")
        for applet in APPLETS:
            (tree / "bin" / applet).symlink_to("busybox")
        for path, text in ((tree / "init", INIT), (tree / "udhcpc", UDHCPC)):
            path.write_text(text)
            path.chmod(0o755)
        tree.chmod(0o755)
        initramfs.pack(tree, draft / "initrd.img")
        shutil.copyfile(kernel, draft / "vmlinuz")
        (draft / "vmlinuz").chmod(0o644)
        for made in ("initrd.img", "vmlinuz"):  # machines may be loading those that were there
            (draft / made).replace(directory / made)
    size = format_size((directory / "initrd.img").stat().st_size)
    yield f"{directory / 'vmlinuz'}: {version}"
    yield f"{directory / 'initrd.img'}: {size}, {count} modules"


def needed_modules(modules_dep: str) -> list[str]:
    """Return the modules that a diskless node may need, from the text of a `modules.dep`."""
    needs = {}
    for line in modules_dep.splitlines():
        name, _, rest = line.partition(":")
        needs[name] = rest.split()
    wanted = [name for name in needs if _matches(name, MODULES) and not _matches(name, NOT_MODULES)]
    # The file names all that a module needs, also by way of others.
    return sorted({one for name in wanted for one in (name, *needs[name])})


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _kernel(root: Path) -> tuple[Path, str]:
    """Return the root's newest kernel that has modules, and its version."""
    found = [
        (path.stat().st_mtime, path, path.name.removeprefix("vmlinuz-"))
        for path in (root / "boot").glob("vmlinuz-*")
        if (root / "lib/modules" / path.name.removeprefix("vmlinuz-") / "modules.dep").exists()
    ]
    if not found:
        raise KaError(Code.USAGE, f"{root} has no /boot/vmlinuz-* with modules: install a kernel")
    _, path, version = max(found)
    return _inside(root, path), version


def _inside(root: Path, path: Path) -> Path:
    """Return a path of the root, its links followed; what it leads to will be served to anybody."""
    found = path.resolve()
    if not found.is_relative_to(root.resolve()):
        raise KaError(Code.USAGE, f"{path} leads out of {root}")
    return found


def _copy_modules(source: Path, target: Path) -> int:
    names = needed_modules((source / "modules.dep").read_text())
    if not any("/nfs.ko" in name for name in names):
        raise KaError(Code.USAGE, f"the kernel in {source} has no module nfs")
    for name in names:
        if not name.endswith(_SUFFIXES):
            raise KaError(Code.USAGE, f"{source / name}: no way to unpack it")
        path = target / name.removesuffix(".xz")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = _inside(source, source / name).read_bytes()
        path.write_bytes(lzma.decompress(data) if name.endswith(".xz") else data)
    for name in ("modules.order", "modules.builtin"):
        shutil.copyfile(source / name, target / name)
    return len(names)


def _has_interpreter(head: bytes) -> bool:
    """Tell whether a 64-bit program needs a loader, and so libraries."""
    offset, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
    kinds = [struct.unpack_from("<I", head, offset + size * index)[0] for index in range(count)]
    return _PT_INTERP in kinds


def _run(words: list[str]) -> None:
    path = f"{os.environ.get('PATH', '')}:{PATHS}"
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()[-1:]
        raise KaError(Code.EIO, f"{words[0]} failed ({done.returncode}): {' '.join(lines)}")
