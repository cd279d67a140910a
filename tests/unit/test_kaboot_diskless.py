"""What a node without a disk loads, and what `kaboot check` says of its root."""

from __future__ import annotations

import gzip
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from common import initramfs
from common.errors import Code, KaError
from kaboot import check, diskless
from tests.support.boot_site import write_site
from tests.support.loop_disk import lacking

_WHY = lacking("busybox", "cpio", "depmod", "zstd")
needs_tools = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))
SITE = """
[site]
address = "127.0.0.1"
network = "127.0.0.0/8"
interface = "absent0"
files = "files"
state = "state"

[[profile]]
name = "diskless"
kernel = "vmlinuz"
initrds = ["initrd"]
nfsroot = ["127.0.0.1:/srv/debian"]
"""
MODULES_DEP = """kernel/fs/nfs/nfsv4.ko: kernel/fs/nfs/nfs.ko kernel/net/sunrpc/sunrpc.ko
kernel/fs/nfs/nfs.ko: kernel/net/sunrpc/sunrpc.ko
kernel/net/sunrpc/sunrpc.ko:
kernel/fs/xfs/xfs.ko: kernel/lib/libcrc32c.ko
kernel/lib/libcrc32c.ko:
kernel/drivers/net/ethernet/intel/e1000/e1000.ko.xz:
kernel/drivers/net/wireless/ath/ath9k.ko: kernel/net/mac80211.ko
kernel/net/mac80211.ko:
"""


def test_modules_for_nfs_and_cards_come_with_what_they_need_and_no_others() -> None:
    assert diskless.needed_modules(MODULES_DEP) == [
        "kernel/drivers/net/ethernet/intel/e1000/e1000.ko.xz",
        "kernel/fs/nfs/nfs.ko",
        "kernel/fs/nfs/nfsv4.ko",
        "kernel/net/sunrpc/sunrpc.ko",
    ]


@needs_tools
def test_a_root_without_a_kernel_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(KaError, match="no /boot/vmlinuz-") as caught:
        list(diskless.make_diskless(tmp_path, tmp_path / "out"))
    assert caught.value.code is Code.USAGE


@needs_tools
def test_what_leads_out_of_the_root_is_not_served(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "lib/modules/6.1.0").mkdir(parents=True)
    (root / "lib/modules/6.1.0/modules.dep").write_text(MODULES_DEP)
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.1.0").symlink_to("/etc/hostname")
    with pytest.raises(KaError, match="leads out of"):
        list(diskless.make_diskless(root, tmp_path / "out"))


@needs_tools
def test_what_machines_load_stays_as_it_was_when_the_new_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    modules = root / "lib/modules/6.1.0"
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text("kernel/fs/nfs/nfs.ko:\n")
    (modules / "kernel/fs/nfs").mkdir(parents=True)
    shutil.copy("/bin/true", modules / "kernel/fs/nfs/nfs.ko")
    for name in ("modules.order", "modules.builtin"):
        (modules / name).touch()
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.1.0").write_bytes(b"new")
    assert len(list(diskless.make_diskless(root, out))) == 2
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {"initrd.img", "vmlinuz"}
    monkeypatch.setattr(initramfs, "PACKER", ("false",))  # as on a full disk
    (root / "boot/vmlinuz-6.1.0").write_bytes(b"newer")
    with pytest.raises(KaError, match="zstd failed"):
        list(diskless.make_diskless(root, out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_init_of_a_diskless_node_is_a_script_that_a_shell_can_read() -> None:
    subprocess.run(["sh", "-n"], input=diskless.INIT.encode(), check=True)


def findings(directory: Path, initrd: bytes) -> str:
    path, made = write_site(directory, SITE)
    (path.parent / "files").mkdir(exist_ok=True)
    (path.parent / "files/initrd").write_bytes(initrd)
    return "\n".join(one.text for one in check.check(made))


def test_an_initramfs_without_nfs_is_found_and_one_with_it_is_not(tmp_path: Path) -> None:
    with_nfs = gzip.compress(b"lib/modules/6.1.0/kernel/fs/nfs/nfs.ko")
    assert "no NFS in its initrds" in findings(tmp_path, gzip.compress(b"lib/modules/ext4.ko"))
    assert "no NFS in its initrds" not in findings(tmp_path, with_nfs)


def test_a_root_whose_server_does_not_answer_is_found(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 2049)) == 0:
            pytest.skip("an NFS server runs here")
    assert "no NFS server answers at 127.0.0.1" in findings(tmp_path, b"")
