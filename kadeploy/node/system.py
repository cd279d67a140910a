"""The new system on this node: partition tables, file systems, its own files, its boot loader.

Blocking; started as root in the deployment environment, one order at a time.  Files are put in
place by a child in a chroot: a symbolic link in an image leads inside the new system, wherever it
points to, never into the deployment environment.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import signal
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import Code, KaError
from kadeploy import bootentries
from kadeploy.node import devices, hives
from kadeploy.node.devices import run
from kadeploy.orders import Customize, Format, InstallBoot, NewFile, Partition, Start

__all__ = ["customize", "format_partition", "install_boot", "partition", "start"]

SCRIPT_PLACE = "/tmp/kadeploy-script"
FAT32_SIZE_MIN = 64 << 20


def partition(order: Partition) -> None:
    """Write a table; the kernel sees it afterwards."""
    place = order.place
    devices.check(place)
    run(["wipefs", "--all", "--quiet", place.disk])
    words = ["sfdisk", "--quiet", "--wipe=always", "--wipe-partitions=always", "--no-tell-kernel"]
    run([*words, place.disk], stdin=order.script.encode())
    devices.reread_table(place.disk)


def format_partition(order: Format) -> None:
    label = order.label
    makers = {
        "ext4": ["mkfs.ext4", "-q", "-F", "-L", label, "-U", order.uuid],
        "xfs": ["mkfs.xfs", "-q", "-f", "-L", label, "-m", f"uuid={order.uuid}"],
        "btrfs": ["mkfs.btrfs", "-q", "-f", "-L", label, "-U", order.uuid],
        "swap": ["mkswap", "-f", "-L", label, "-U", order.uuid],
        "ntfs": ["mkntfs", "-Q", "-F", "-q", "-L", label],
        "vfat": ["mkfs.vfat", "-n", label.upper(), "-i", order.uuid.replace("-", "")]
        + (["-F", "32"] if order.place.size >= FAT32_SIZE_MIN else []),
    }
    if order.filesystem not in makers:
        raise KaError(Code.USAGE, f"no way to make a file system {order.filesystem!r}")
    with devices.opened(order.place) as device:
        run([*makers[order.filesystem], device])


# ---------------------------------------------------------------- its own files


def customize(order: Customize, root: Path) -> None:
    with devices.mounted(order.mounts, root) as directory:
        _in_chroot(directory, lambda: _put_files(order))
        if order.scripts or order.ssh_host_keys:
            with _ready_for_programs(directory):
                if order.ssh_host_keys:
                    run(["chroot", str(directory), "ssh-keygen", "-A"])
                for script in order.scripts:
                    _run_script(directory, script)
        if order.hives:
            with tempfile.TemporaryDirectory(prefix="kadeploy-") as scratch:
                hives.edit_all(order.hives, functools.partial(_in_chroot, directory), Path(scratch))


def _put_files(order: Customize) -> None:
    for pattern in order.remove:
        for name in glob.glob(pattern, root_dir="/"):
            Path("/", name).unlink()
    for new in order.files:
        _put_file(new)


def _put_file(new: NewFile) -> None:
    path = Path(new.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # a link there is replaced, not followed
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(new.data)
        file.flush()
        os.fchmod(descriptor, new.mode)
        os.fsync(descriptor)


def _run_script(directory: Path, script: NewFile) -> None:
    place = NewFile(SCRIPT_PLACE, 0o700, script.content)
    _in_chroot(directory, lambda: _put_file(place))
    try:
        run(["chroot", str(directory), SCRIPT_PLACE])
    except KaError as error:
        raise KaError(Code.EIO, f"script {script.path}: {error.message}") from None
    finally:
        _in_chroot(directory, Path(SCRIPT_PLACE).unlink)


def _in_chroot(directory: Path, work: Callable[[], object]) -> None:
    """Do *work* in a child that sees the new system only; raises EIO with its last line."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read_end)
            os.chroot(directory)
            os.chdir("/")
            work()
            code = 0
        except BaseException as error:
            line = traceback.format_exception_only(error)[-1].strip()
            os.write(write_end, line[:1000].encode(errors="replace"))
        finally:
            os._exit(code)
    os.close(write_end)
    with open(read_end, "rb") as file:
        said = file.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise KaError(Code.EIO, f"in the new system: {said or f'ended with {status}'}")


@contextlib.contextmanager
def _ready_for_programs(directory: Path) -> Iterator[None]:
    """Give programs in the chroot what they expect."""
    with contextlib.ExitStack() as stack:
        for source, kind in (("proc", "proc"), ("sys", "sysfs"), ("dev", "")):
            point = directory / source
            point.mkdir(exist_ok=True)
            if kind:
                run(["mount", "-t", kind, kind, str(point)])
            else:
                run(["mount", "--rbind", "/dev", str(point)])
                run(["mount", "--make-rslave", str(point)])
            stack.callback(run, ["umount", "--recursive", str(point)])
        efi = directory / "sys/firmware/efi/efivars"
        if efi.exists():
            run(["mount", "-t", "efivarfs", "efivarfs", str(efi)])
        yield


# ---------------------------------------------------------------- boot


def install_boot(order: InstallBoot, root: Path) -> None:
    """Install GRUB if it is wanted, then the firmware's entry if it has such."""
    entry_path = order.efi_path
    if order.grub:
        with devices.mounted(order.mounts, root) as directory:
            _install_grub(order, directory)
        entry_path = bootentries.GRUB_EFI_PATH.format(name=_loader_id(order.title))
    if order.firmware == "uefi":
        _make_entry(order, entry_path)


def _loader_id(title: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in title).lower() or "ka"


def _install_grub(order: InstallBoot, directory: Path) -> None:
    holder, kernel = _located(order, directory, order.kernel)
    initrd = _located(order, directory, order.initrd)[1] if order.initrd else ""
    config = bootentries.grub_config(
        root=_filesystem_uuid(order, "/"),
        holder=_filesystem_uuid(order, holder),
        kernel=kernel,
        initrd=initrd,
        arguments=order.arguments,
        title=order.title,
    )
    files = [
        NewFile.of("/boot/grub/grub.cfg", config.encode()),
        NewFile.of(
            "/etc/default/grub.d/kadeploy.cfg", bootentries.default_grub(order.arguments).encode()
        ),
    ]

    def put() -> None:
        for new in files:
            _put_file(new)

    _in_chroot(directory, put)
    efi = any(one.path == "/boot/efi" for one in order.mounts)
    if order.firmware == "uefi" and not efi:
        raise KaError(Code.USAGE, "the esp is not mounted at /boot/efi in this system")
    target = "x86_64-efi" if order.firmware == "uefi" else "i386-pc"
    own = (directory / "usr/lib/grub" / target).is_dir() and (
        directory / "usr/sbin/grub-install"
    ).exists()
    base = Path("/") if own else directory
    words = bootentries.grub_install_words(
        order.firmware,
        root=str(base).rstrip("/"),
        esp=str(base / "boot/efi"),
        disk=order.disk.disk,
        name=_loader_id(order.title),
    )
    with _ready_for_programs(directory) if own else contextlib.nullcontext():
        prefix = ["chroot", str(directory)] if own else []
        run([*prefix, *words])
        if order.firmware == "uefi" and not (directory / "boot/efi/EFI/BOOT").exists():
            # For firmware that has lost its entries.
            run([*prefix, *words, "--removable"])


def _located(order: InstallBoot, directory: Path, path: str) -> tuple[str, str]:
    """Return the mount point that holds *path*, and the path in that file system."""
    found = (directory / path.lstrip("/")).resolve()
    if not found.is_relative_to(directory.resolve()) or not found.is_file():
        raise KaError(Code.USAGE, f"{path} is not in the new system")
    inside = Path("/") / found.relative_to(directory.resolve())
    points = [one.path for one in order.mounts if inside.is_relative_to(one.path)]
    point = max(points, key=len)
    return point, str(Path("/") / inside.relative_to(point))


def _filesystem_uuid(order: InstallBoot, point: str) -> str:
    mount = next(one for one in order.mounts if one.path == point)
    with devices.opened(mount.place) as device:
        return run(["blkid", "--probe", "--match-tag", "UUID", "--output", "value", device]).strip()


def _make_entry(order: InstallBoot, path: str) -> None:
    for old in bootentries.entries_named(
        bootentries.parse_entries(run(["efibootmgr"])), order.title
    ):
        run(bootentries.delete_entry_words(old.number))
    text = run(
        bootentries.create_entry_words(
            disk=order.disk.disk, esp_number=order.esp_number, label=order.title, path=path
        )
    )
    (made,) = bootentries.entries_named(bootentries.parse_entries(text), order.title)
    run(bootentries.order_words(bootentries.boot_order(text, made.number)))
    if order.boot_next:
        run(bootentries.next_entry_words(made.number))


def start(order: Start, root: Path) -> None:
    """Leave: a second from now, so that the answer still gets out."""
    last = ["reboot", "-f"]
    if order.how == "kexec":
        with devices.mounted(order.mounts, root) as directory:
            words = ["kexec", "--load", str(directory / order.kernel.lstrip("/"))]
            if order.initrd:
                words.append(f"--initrd={directory / order.initrd.lstrip('/')}")
            run([*words, f"--command-line={order.command_line}"])
        last = ["kexec", "--exec"]
    os.sync()
    subprocess.Popen(
        ["sh", "-c", 'sleep 1; exec "$@"', "sh", *last],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
