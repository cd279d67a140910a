"""Making the deployment environment: a kernel, and a root in memory with all that a node needs.

Three files come out.  `vmlinuz` and `initrd.img` follow from packages and this version alone:
file times are fixed, names sorted, no key in them; the same input gives the same bytes.  `site.img`
holds what is this site's: who may enter, and the host key by which the head knows the environment
(`known_hosts`).  A boot loader appends it to the other.

What travels over the network to be booted can be read there, the host key included: it keeps out
mistakes, not somebody who listens.  Nothing in it opens any other door.

Blocking; needs root, mmdebstrap, cpio and zstd.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import initramfs
from common.errors import Code, KaError
from common.sizes import format_size
from kadeploy.links import MARKER

__all__ = [
    "PACKAGES",
    "UNWANTED",
    "Request",
    "make_environment",
    "make_site",
    "pack_root",
    "remove",
]

PACKAGES = (
    "busybox", "btrfs-progs", "dosfstools", "e2fsprogs", "efibootmgr", "fdisk",
    "grub-efi-amd64-bin", "grub-pc-bin", "grub2-common", "iproute2", "kexec-tools", "kmod",
    "libpython3-stdlib", "ntfs-3g", "openssh-server", "partclone", "python3-hivex",
    "python3-minimal", "udev", "wimtools", "xfsprogs", "xz-utils",
    "zstd",
)  # fmt: skip
LIBRARIES = ("attrs", "idna", "msgpack", "outcome", "sniffio", "sortedcontainers", "trio", "xxhash")
"""What a broadcast's hop needs; taken from the head's own Python."""
EXCLUDED = (
    "/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*",
    "/usr/share/zoneinfo/*", "/lib/udev/hwdb.d/*",
)  # fmt: skip
"""What is large and nobody in the environment asks for: every machine loads it at every start."""
_NO_DRIVERS = (
    "arch/x86/kvm", "drivers/bluetooth", "drivers/comedi", "drivers/gpu", "drivers/iio",
    "drivers/isdn", "drivers/media", "drivers/net/wireless", "drivers/staging", "drivers/target",
    "fs/ceph", "fs/gfs2", "fs/nfs", "fs/nfsd", "fs/ocfs2", "fs/smb", "net/batman-adv",
    "net/bluetooth", "net/bridge", "net/ceph", "net/mac80211", "net/netfilter", "net/openvswitch",
    "net/sched", "net/sctp", "net/sunrpc", "net/tipc", "net/wireless", "sound",
)  # fmt: skip
UNWANTED = (
    *(f"usr/lib/modules/*/kernel/{name}" for name in _NO_DRIVERS),
    "usr/lib/grub/*/monolithic",
    "var/lib/dpkg/info",
)
"""What packages bring that has no part in writing disks: it would fill every machine's memory."""
MERGED_USR = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
"""From the start: else a package does it, and brings all of Perl with it."""
HOST_KEY = "etc/ssh/ssh_host_ed25519_key"
_PUBLIC_KEY = re.compile(r"(?:^|\s)(?:ssh|ecdsa|sk)-[a-z0-9@.-]+ AAAA[A-Za-z0-9+/=]+(?:\s|$)")

# The kernel is unpacked, not installed: its scripts would make an initramfs that nobody wants.  A
# meta-package names the kernel that it stands for; a versioned one names none.
KERNEL_HOOK = """#!/bin/sh
set -e
mkdir "$1/tmp/kernel"
cd "$1/tmp/kernel"
depends=$(chroot "$1" apt-cache depends {package})
name=$(echo "$depends" | sed -n 's/.*Depends: \\(linux-image-[0-9]\\)/\\1/p')
fetch="apt-get -q -y -o APT::Sandbox::User=root download ${{name:-{package}}}"
chroot "$1" sh -c "cd /tmp/kernel && $fetch"
dpkg -x ./*.deb unpacked
mkdir -p "$1/boot" "$1/usr/lib/modules"
cp -a unpacked/lib/modules/. "$1/usr/lib/modules/"
cp unpacked/boot/vmlinuz-* "$1/boot/"
rm -r "$1/tmp/kernel"
"""

INIT = """#!/bin/sh
# The deployment environment's first process: drivers, network, sshd; then it waits for orders.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /run /tmp; mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=755 run /run; mkdir -p /run/sshd
mount -t tmpfs -o mode=1777,size=80% tmp /tmp  # a broadcast is spooled here
[ ! -d /sys/firmware/efi ] || mount -t efivarfs efivarfs /sys/firmware/efi/efivars
/lib/systemd/systemd-udevd --daemon
udevadm trigger --type=subsystems --action=add
udevadm trigger --type=devices --action=add
udevadm settle --timeout=30
for module in loop ext4 vfat nls_cp437 nls_ascii; do modprobe -q $module; done
for word in $(cat /proc/cmdline); do
  case $word in
    BOOTIF=*) mac=${word#BOOTIF=01-} ;;
    ka.boot=*) boot=${word#ka.boot=} ;;
  esac
done
ip link set lo up
for card in /sys/class/net/*; do
  name=${card##*/}
  [ "$name" = lo ] || { ip link set "$name" up; busybox udhcpc -i "$name" -s /etc/udhcpc -b -t 20; }
done
/usr/sbin/sshd
echo "kadeploy: deployment environment is up"
[ -z "$boot" ] || busybox wget -q -O /dev/null "$boot/report/$mac/hello?detail=kadeploy" || true
while :; do sleep 3600 & wait $!; done
"""
UDHCPC = """#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr replace $ip/${mask:-24} dev $interface
[ -z "$router" ] || ip route replace default via $router
"""
SSHD = """HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
"""


@dataclass(frozen=True, slots=True)
class Request:
    directory: Path
    keys: tuple[str, ...]
    """Public keys that may enter as root."""
    suite: str = "bookworm"
    mirror: str | None = None
    packages: tuple[str, ...] = ()
    kernel: str = "linux-image-cloud-amd64"


def make_environment(request: Request) -> Iterator[str]:
    """Make everything in the request's directory; yield what was made.  Raises KaError."""
    for key in request.keys:
        _require_public(key)
    for program in ("mmdebstrap", "cpio", "ssh-keygen", "zstd"):
        if shutil.which(program) is None:
            raise KaError(Code.USAGE, f"{program} is not installed")
    if os.geteuid() != 0:
        raise KaError(Code.USAGE, "mkenv needs root")
    request.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kadeploy-") as name:
        root = Path(name, "root")
        hook = Path(name, "kernel")
        _write(hook, KERNEL_HOOK.format(package=request.kernel), 0o755)
        _run(_bootstrap_words(request, root, hook))
        yield from pack_root(root, request.directory)
    yield from make_site(request.directory, request.keys)


def _require_public(text: str) -> None:
    """Raise USAGE unless this is what sshd takes from a file of public keys.

    A private key, which lies beside it, would be served to anybody.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines or not all(_PUBLIC_KEY.search(line) for line in lines):
        raise KaError(Code.USAGE, "--key: not a public key of OpenSSH (ssh-ed25519 AAAA...)")


def _bootstrap_words(request: Request, root: Path, hook: Path) -> list[str]:
    packages = ",".join([*PACKAGES, *request.packages])
    words = ["mmdebstrap", "--variant=minbase", MERGED_USR, f"--include={packages}"]
    words += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    words += [f"--customize-hook={hook}", request.suite, str(root)]
    return words + ([request.mirror] if request.mirror else [])


def pack_root(root: Path, directory: Path) -> Iterator[str]:
    """Make `vmlinuz` and `initrd.img` of a root with a kernel in it; yield what was made."""
    (kernel,) = sorted((root / "boot").glob("vmlinuz-*"))
    version = kernel.name.removeprefix("vmlinuz-")
    shutil.copyfile(kernel, directory / "vmlinuz")
    remove(root, UNWANTED)
    _run(["depmod", "--basedir", str(root), version])
    _write(root / "init", INIT, 0o755)
    _write(root / "etc/udhcpc", UDHCPC, 0o755)
    _write(root / "etc/ssh/sshd_config", SSHD, 0o644)
    _write(root / MARKER.lstrip("/"), f"kadeploy {importlib.metadata.version('ka')}\n", 0o644)
    _write(root / "etc/hostname", "deployment\n", 0o644)
    for name in ("reboot", "poweroff"):
        link = root / "usr/sbin" / name
        link.unlink(missing_ok=True)
        link.symlink_to("/usr/bin/busybox")  # there is no systemd to do it
    _copy_libraries(root)
    remove(root, ("etc/ssh/ssh_host_*", "boot/*", "var/log/*", "var/cache/apt/*", "tmp/*",
                  "var/lib/apt/lists/*", "var/cache/ldconfig/*", "etc/machine-id"))  # fmt: skip
    _compile(root)
    initramfs.pack(root, directory / "initrd.img")
    yield f"{directory / 'vmlinuz'}: {version}"
    yield f"{directory / 'initrd.img'}: {format_size((directory / 'initrd.img').stat().st_size)}"


def remove(root: Path, patterns: Sequence[str]) -> None:
    """Remove what matches a pattern below a root, directories whole."""
    for pattern in patterns:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _compile(root: Path) -> None:
    """Compile all Python beforehand: a node would do it at each start of a program anew."""
    for cache in root.rglob("__pycache__"):
        shutil.rmtree(cache)
    words = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    _run([*words, "-s", str(root), *map(str, (root / "usr/lib").glob("python3*"))])


def _copy_libraries(root: Path) -> None:
    """Copy what the broadcast needs; refuse a Python that could not load it."""
    (python,) = (root / "usr/lib").glob("python3.[0-9]*")
    own = f"python3.{sys.version_info.minor}"
    if python.name != own:
        raise KaError(Code.USAGE, f"the suite has {python.name}, this is {own}: use it on both")
    target = root / "usr/lib/python3/dist-packages"
    for name in LIBRARIES:
        for file in importlib.metadata.files(name) or []:
            path = Path(str(file))
            if ".." in path.parts or "tests" in path.parts or "_tests" in path.parts:
                continue
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".pyc":
                shutil.copyfile(str(file.locate()), place)


def make_site(directory: Path, keys: Sequence[str]) -> Iterator[str]:
    """Make `site.img` and `known_hosts`; a host key that is there is kept."""
    key = directory / "host_key"
    if not key.exists():
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "kadeploy", "-f", str(key)])
    public = key.with_suffix(".pub").read_text().split()
    (directory / "known_hosts").write_text(f"kadeploy-environment {public[0]} {public[1]}\n")
    with tempfile.TemporaryDirectory(prefix="kadeploy-") as name:
        root = Path(name)
        root.chmod(0o755)
        _write(root / HOST_KEY, key.read_text(), 0o600)
        _write(root / "root/.ssh/authorized_keys", "".join(f"{one}\n" for one in keys), 0o600)
        (root / "root").chmod(0o700)
        (root / "root/.ssh").chmod(0o700)
        initramfs.pack(root, directory / "site.img")
    yield f"{directory / 'site.img'}: {len(keys)} keys may enter"
    yield f"{directory / 'known_hosts'}: for the configuration's ssh.known_hosts"


def _write(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _run(words: Sequence[str]) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(initramfs.EPOCH)}
    done = subprocess.run(words, capture_output=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise KaError(Code.EIO, f"{words[0]} failed ({done.returncode}): {' / '.join(lines)}")
