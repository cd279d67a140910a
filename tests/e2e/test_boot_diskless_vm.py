"""A machine without a disk: kaboot, a real kernel, its root on an NFS server in front of nfsp.

The server is nfs-ganesha on a mount of nfsp, downloaded and unpacked, not installed: this machine's
kernel need not have an NFS server.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import boot_image, boot_lab, cluster, leaks
from tests.support.boot_lab import Lab
from tests.support.loop_disk import lacking

_WHY = lacking("cpio", "zstd", "depmod")
pytestmark = [
    pytest.mark.vm,
    pytest.mark.fuse,
    pytest.mark.slow,
    pytest.mark.skipif(_WHY is not None, reason=str(_WHY)),
]

MAC = "52:54:00:00:00:01"
GANESHA = ("nfs-ganesha", "nfs-ganesha-vfs", "libntirpc4.3", "liburcu8", "libwbclient0",
           "libnfsidmap1")  # fmt: skip
INVENTORY = """
[site]
address = "{address}"
network = "10.78.0.0/24"
interface = "br0"
files = "files"
state = "state"
router = "{address}"
pool = "10.78.0.100-10.78.0.199"

[[profile]]
name = "diskless"
kernel = "debian/vmlinuz"
initrds = ["debian/initrd.img"]
arguments = ["console=ttyS0", "quiet", "panic=-1", "no_timer_check"]
nfsroot = ["{address}:{export}"]
nfs_options = "vers=4.2"

[[node]]
name = "pc1"
macs = ["{mac}"]
address = "10.78.0.11"
step = "custom:diskless"
"""
SERVER = """
NFS_CORE_PARAM {{
  Protocols = 4; Plugins_Dir = "{plugins}"; Enable_NLM = false; Enable_RQUOTA = false;
}}
NFSV4 {{ Graceless = true; RecoveryRoot = "{state}"; }}
EXPORT {{
  Export_Id = 1; Path = "{path}"; Pseudo = "{path}"; Access_Type = RO; Squash = No_Root_Squash;
  SecType = sys; Protocols = 4; FSAL {{ Name = VFS; }}
}}
LOG {{ Default_Log_Level = EVENT; }}
"""
# What the machine runs as its own init: it tells by console and report where it finds itself.
ROOT_INIT = """#!/bin/sh
export PATH=/bin
for word in $(cat /proc/cmdline); do
  case $word in ka.boot=*) boot=${word#ka.boot=} ;; BOOTIF=*) id=${word#BOOTIF=01-} ;; esac
done
echo written >/written && echo "ka-guest: $(cat /written) by $(hostname) $(cat /etc/hostname)"
grep -E ' (/|/run/kaboot/root) ' /proc/mounts | sed 's/^/ka-guest: mount /'
(echo refused >/run/kaboot/root/written) 2>/dev/null || echo "ka-guest: the export is read-only"
wget -q -O /dev/null "$boot/report/$id/up?detail=$(sha256sum </data | cut -c1-64)"
poweroff -f
"""


@pytest.fixture(scope="module", name="nfsp")
def _nfsp() -> Iterator[cluster.Cluster]:
    prefix = f"ka-{os.environ[leaks.TOKEN_VARIABLE]}-"
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as name,
        cluster.running(Path(name), options=("durable",)) as running,
    ):
        yield running


def make_root(root: Path, kernel: Path) -> bytes:
    """Make a small system with a kernel of Debian's in it; return what is in its file `data`."""
    for name in ("bin", "dev", "etc", "proc", "run", "sbin", "sys"):
        (root / name).mkdir(parents=True)
    shutil.copytree(kernel / "boot", root / "boot")
    shutil.copytree(kernel / "lib/modules", root / "lib/modules", symlinks=True)
    (version,) = (root / "lib/modules").iterdir()
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    subprocess.run(["depmod", "--basedir", root, version.name], check=True,
                   env={**os.environ, "PATH": path})  # fmt: skip
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in ("cat", "cut", "echo", "grep", "hostname", "poweroff", "sed", "sh", "sha256sum",
                   "wget"):  # fmt: skip
        (root / "bin" / applet).symlink_to("busybox")
    (root / "sbin/init").write_text(ROOT_INIT)
    (root / "sbin/init").chmod(0o755)
    data = os.urandom(3 << 20)
    (root / "data").write_bytes(data)
    return data


def kaboot(lab: Lab, *words: str | Path, status: int = 0) -> str:
    program = "from kaboot.cli import main; main()"
    command = [sys.executable, "-c", program, "-c", lab.config, *words]
    done = subprocess.run(lab.inside(command), capture_output=True, text=True, timeout=120,
                          cwd=boot_lab.ROOT)  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def serve_nfs(lab: Lab, ganesha: Path, path: Path) -> None:
    libraries = ganesha / "usr/lib/x86_64-linux-gnu"
    config = lab.directory / "ganesha.conf"
    state = lab.directory / "ganesha"
    state.mkdir()
    config.write_text(SERVER.format(plugins=libraries / "ganesha", state=state, path=path))
    lab.start(
        ["env", f"LD_LIBRARY_PATH={libraries}:{ganesha}/usr/lib/ganesha", ganesha /
         "usr/bin/ganesha.nfsd", "-F", "-f", config, "-L", lab.directory / "ganesha.log", "-p",
         lab.directory / "ganesha.pid"],
        "ganesha.out",
    )  # fmt: skip
    log = lab.directory / "ganesha.log"
    lab.until(
        lambda: log.exists() and "NFS SERVER INITIALIZED" in log.read_text(), "an NFS server", 60
    )


def test_boot_vm_without_a_disk_runs_from_nfsp_over_nfs_and_writes_into_its_own_memory(
    nfsp: cluster.Cluster, short_path: Path, pytestconfig: pytest.Config
) -> None:
    cache = Path(pytestconfig.cache.mkdir("boot"))
    root = nfsp.mount / "debian"
    data = make_root(root, boot_image.unpack_kernel(cache))
    short_path.chmod(0o755)
    with boot_lab.lab(short_path) as lab:
        lab.config.write_text(INVENTORY.format(address=boot_lab.ADDRESS, export=root, mac=MAC))
        (short_path / "files").mkdir(mode=0o755)
        kaboot(lab, "diskless", root, "debian")
        assert f"no NFS server answers at {boot_lab.ADDRESS}" in kaboot(lab, "check", status=1)
        serve_nfs(lab, boot_image.unpack(cache, *GANESHA), root)
        assert "NFS" not in kaboot(lab, "check")
        lab.serve(lab.config.read_text())
        vm = lab.boot("pc1", MAC)
        lab.until_stage("pc1", "report", f"up {hashlib.sha256(data).hexdigest()}")
        lab.until(lambda: vm.process.poll() is not None, "its end", 60)
        said = [line for line in vm.text().splitlines() if "ka-guest: " in line]
    assert any("written by pc1 pc1" in line for line in said)
    assert any("the export is read-only" in line for line in said)
    mounts = [line.split("mount ")[1] for line in said if "mount " in line]
    (layer,) = [line for line in mounts if line.split()[1] == "/"]
    (export,) = [line for line in mounts if line != layer]
    assert layer.startswith("root / overlay rw")
    assert export.startswith(f"{boot_lab.ADDRESS}:{root} /run/kaboot/root nfs4 ro")
    assert "vers=4.2" in export
    assert not (root / "written").exists()
    assert not (root / "etc/hostname").exists()
