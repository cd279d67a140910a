"""Mounting and unmounting: the process around `client.fuse`, its options and its files.

A mount started from DIR/cluster.toml keeps run/mount-NAME.pid (locked while it lives),
run/mount-NAME.path and log/mount-NAME.log beside it when it may write there, otherwise below
$XDG_RUNTIME_DIR or /tmp.  NAME is made of the mount point's path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common.config import parse_size
from common.errors import Code, KaError
from nfsp import status
from nfsp.client import fuse
from nfsp.client.volume import Volume
from nfsp.config import ClusterConfig, MountConfig, load_cluster
from nfsp.process import PidFile, spawn

__all__ = ["MountFiles", "MountOptions", "mount_in_background", "parse_options", "serve_mount"]

UNMOUNT_TIMEOUT_S = 300.0
"""Well beyond what a mount waits for servers by default: then it ends, and its log says what is
lost.  It writes for longer only where much is left and disks are slow, or with `timeout=inf`."""
LAZY_TIMEOUT_S = 30.0
"""What was detached may be in use for long: that is not waited for."""
UNMOUNT_NOTICE_S = 3.0
DETACH_TIMEOUT_S = 5.0
_KERNEL_OPTIONS = frozenset(
    ("ro", "rw", "dev", "nodev", "suid", "nosuid", "exec", "noexec", "sync", "dirsync")
)


@dataclasses.dataclass(frozen=True, slots=True)
class MountOptions:
    """What `-o` may say."""

    mount: MountConfig
    durable: bool
    """Metadata are on stable storage before an operation is answered (exports need it)."""
    kernel: tuple[str, ...]


def parse_options(texts: tuple[str, ...], defaults: MountConfig) -> MountOptions:
    """Return the options in `-o` arguments; raises KaError USAGE for one that is unknown."""
    durable = False
    kernel: list[str] = []
    changes: dict[str, object] = {}
    numbers = {"timeout": "timeout_s", "attr_timeout": "attr_timeout_s"}
    sizes = {"dirty": "dirty_size", "readahead": "readahead"}
    for option in filter(None, ",".join(texts).split(",")):
        name, equals, value = option.partition("=")
        try:
            if name in _KERNEL_OPTIONS and not equals:
                kernel.append(name)
            elif name == "durable" and not equals:
                durable = True
            elif name in numbers and equals:
                changes[numbers[name]] = float(value)
            elif name in sizes and equals:
                changes[sizes[name]] = parse_size(value)
            else:
                known = sorted({*numbers, *sizes, "durable"} | _KERNEL_OPTIONS)
                raise KaError(
                    Code.USAGE, f"unknown mount option {name!r}; there are: {', '.join(known)}"
                )
        except ValueError:
            raise KaError(Code.USAGE, f"mount option {name}: not a number: {value!r}") from None
    mount: MountConfig = dataclasses.replace(defaults, **changes)  # type: ignore[arg-type]
    mount = dataclasses.replace(defaults, **changes)  # type: ignore[arg-type]
    mount.validate()
    return MountOptions(mount, durable, tuple(kernel))


class MountFiles:
    """Where a mount's pid file and log are."""

    def __init__(self, config_path: Path, mountpoint: Path) -> None:
        text = str(mountpoint)
        sum_ = hashlib.blake2b(os.fsencode(text), digest_size=4).hexdigest()
        name = f"mount-{mountpoint.name or 'root'}-{sum_}"
        base = config_path.parent
        if not os.access(base / "run", os.W_OK) and not os.access(base, os.W_OK):
            folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
            base = Path(folder) / f"nfsp-{os.getuid()}"
        self.log = base / "log" / f"{name}.log"
        self._path = base / "run" / f"{name}.path"
        self.pid_file = PidFile(base / "run" / f"{name}.pid")
        self._mountpoint = text

    def note(self) -> None:
        """Write down which mount point the pid file is about."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(self._mountpoint)

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def resolve(mountpoint: str) -> Path:
    """Return the mount point's absolute path, without touching it: it may be dead."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    return Path(os.path.realpath(parent)) / name


def mount_in_background(config_path: Path, mountpoint: Path, options: tuple[str, ...]) -> int:
    """Start the mount's process; return its pid when the mount answers."""
    config, _key = load_cluster(config_path)
    parse_options(options, config.mount)
    fuse.check_mountpoint(str(mountpoint))
    files = MountFiles(config_path, mountpoint)
    arguments = ["-c", str(config_path), "mount", str(mountpoint), "--foreground"]
    for option in options:
        arguments += ["-o", option]
    return spawn(arguments, files.log)


async def serve_mount(
    config: ClusterConfig,
    key: bytes,
    mountpoint: Path,
    options: MountOptions,
    ready: Callable[[], None],
) -> None:
    """Mount, and serve until unmounted or cancelled."""
    fuse.check_mountpoint(str(mountpoint))
    async with Volume.open(
        config, key, mount=options.mount, mountpoint=str(mountpoint), durable=options.durable
    ) as volume:
        await fuse.mount(
            volume,
            str(mountpoint),
            source=config.cluster.name,
            attr_timeout_s=options.mount.attr_timeout_s,
            readahead=options.mount.readahead,
            options=options.kernel,
            ready=ready,
        )


def unmount(
    mountpoint: Path,
    *,
    config_path: Path | None = None,
    lazy: bool = False,
    timeout_s: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Unmount, and wait until the mount's process has written everything and ended.

    *say* hears of it when that takes long.  Raises KaError EBUSY while something uses the mount,
    USAGE if nothing of ours is mounted, TIMEOUT if that is not so after *timeout_s* (without it:
    UNMOUNT_TIMEOUT_S, LAZY_TIMEOUT_S when *lazy*).
    """
    if timeout_s is None:
        timeout_s = LAZY_TIMEOUT_S if lazy else UNMOUNT_TIMEOUT_S
    patience = _Patience(timeout_s, say)
    entry = _mount_entry(mountpoint)
    if entry is None:
        if _server_of(mountpoint, config_path) is None:
            raise KaError(Code.USAGE, f"nothing is mounted at {mountpoint}")
        # Somebody else has unmounted it.
        _wait_for_end(mountpoint, config_path, patience, lazy=lazy)
        return
    if not entry.startswith("fuse.nfsp"):
        raise KaError(Code.USAGE, f"{mountpoint} is a mount of {entry}, not of nfsp")
    code, said = _umount(mountpoint, patience, lazy=lazy)
    if code:
        busy = "busy" in said
        raise KaError(
            Code.EBUSY if busy else Code.INTERNAL,
            f"cannot unmount {mountpoint}: {said.splitlines()[-1] if said else code}"
            + ("; close what uses it (fuser -vm shows who), or use --lazy" if busy else ""),
        )
    _wait_for_end(mountpoint, config_path, patience, lazy=lazy)


def detach(mountpoint: Path) -> None:
    """Take a mount away from those who use it, without waiting for its process."""
    with contextlib.suppress(KaError):  # it waits for servers that hang: it does not come back
        _umount(mountpoint, _Patience(DETACH_TIMEOUT_S, lambda text: None), lazy=True)


def is_dead(mountpoint: Path) -> bool:
    """Whether a mount is there whose process has ended."""
    try:
        os.statvfs(mountpoint)  # unlike stat, never answered from the kernel's cache
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


class _Patience:
    """How long an unmount may take in all, and a word when that is long."""

    def __init__(self, timeout_s: float, say: Callable[[str], None]) -> None:
        self._timeout_s = timeout_s
        self._say = say
        self._began_s = time.monotonic()
        self._told = False

    def wait(self, is_over: Callable[[], bool], why: str) -> None:
        """Wait until something is over; raises KaError TIMEOUT."""
        while not is_over():
            waited_s = time.monotonic() - self._began_s
            if waited_s > self._timeout_s:
                raise KaError(Code.TIMEOUT, f"{why}; see its log")
            if waited_s > UNMOUNT_NOTICE_S and not self._told:
                self._told = True
                self._say(f"{why}: waiting (Ctrl-C: leave it)")
            time.sleep(0.02)


def _umount(mountpoint: Path, patience: _Patience, *, lazy: bool) -> tuple[int, str]:
    """Return umount's exit code and what it has said."""
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    command += (["-l"] if os.geteuid() == 0 else ["-z"]) if lazy else []
    process = subprocess.Popen(
        [*command, "--", str(mountpoint)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        why = f"not unmounted yet: {mountpoint} still has data to write"
        patience.wait(lambda: process.poll() is not None, why)
    except BaseException:
        process.kill()
        # The kernel may not let go of it before the mount has answered.
        threading.Thread(target=process.communicate, daemon=True).start()
        raise
    said, _ = process.communicate()
    return process.returncode, said.strip()


def _wait_for_end(
    mountpoint: Path, config_path: Path | None, patience: _Patience, *, lazy: bool
) -> None:
    pid = _server_of(mountpoint, config_path)
    if pid is not None:
        doing = "is still in use, or writes data" if lazy else "still writes data"
        patience.wait(lambda: not _is_ours(pid), f"unmounted, but process {pid} {doing}")


def _server_of(mountpoint: Path, config_path: Path | None) -> int | None:
    """Return the pid of the process that serves a mount point, if it can be found."""
    if config_path is not None:
        return MountFiles(config_path, mountpoint).pid_file.owner()
    wanted = os.fsencode(mountpoint)
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
                if b"mount" in words and wanted in words and b"--foreground" in words:
                    return int(name)
    return None


def _is_ours(pid: int) -> bool:
    try:
        return b"--foreground" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _mount_entry(mountpoint: Path) -> str | None:
    """Return the type of what is mounted at a path; reads /proc, never the path itself."""
    found = None
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            _source, where, kind, *_rest = line.split()
            where = where.encode().decode("unicode_escape").encode("latin-1").decode(
                "utf-8", "surrogateescape"
            )
            if where == str(mountpoint):
                found = kind
    return found


async def exportable(config: ClusterConfig, key: bytes, mountpoint: str) -> bytes:
    """Return the file system's UUID if what is mounted there may be exported.

    Raises KaError USAGE unless it is a durable mount of this cluster on this host.
    """
    found = await status.gather(config, key)
    host = socket.gethostname()
    for mds in found["mds"]:
        if "error" in mds:
            raise KaError(Code.UNREACHABLE, f"{mds['name']}: {mds['error']}")
        for session in mds["sessions"]:
            if session["mountpoint"] == mountpoint and session["host"] == host:
                if not session["durable"]:
                    raise KaError(
                        Code.USAGE,
                        f"{mountpoint} is not mounted with -o durable: NFS clients would lose "
                        "answered changes in a crash; mount it anew",
                    )
                fs_uuid: bytes = mds["fs_uuid"]
                return fs_uuid
    raise KaError(Code.USAGE, f"{mountpoint} is not a mount of this cluster on this host")
