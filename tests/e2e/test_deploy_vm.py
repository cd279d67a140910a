"""The whole way with blank virtual machines: network boot, broadcast, own disk, asked by ssh.

Real firmware, kaboot, the deployment environment of `mkenv`, the broadcast engine between machines,
GRUB from the disk.  One command on the head: `kadeploy run`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kadeploy.mkenv import Request, make_environment, make_site
from tests.support import boot_lab, deploy_image
from tests.support.boot_lab import Lab, Vm

pytestmark = [pytest.mark.vm, pytest.mark.slow]

COUNT = 2
GIB = 1 << 30
RUN_S = 1500.0

INVENTORY = """
[site]
address = "10.78.0.1"
network = "10.78.0.0/24"
interface = "br0"
files = "files"
state = "state"

[[profile]]
name = "install"
kernel = "vmlinuz"
initrds = ["initrd.gz", "site.gz"]
arguments = ["console=ttyS0", "quiet", "panic=-1"]
"""
NODE = """
[[node]]
name = "pc{index}"
macs = ["52:54:00:00:00:0{index}"]
address = "10.78.0.1{index}"
firmware = "bios"
step = "install"
"""
ENVIRONMENT = """
name: small
version: 1
disks:
  - name: system
    partitions:
      - {{name: bios, type: bios-boot, size: 1MiB}}
      - {{name: swap, type: swap, size: 64MiB}}
      - {{name: root, format: ext4, mount: /}}
systems:
  - name: small
    images: [{{file: system.tar.zst, kind: tar, compression: zstd, partition: root,
              checksum: "{checksum}"}}]
    boot: {{arguments: "console=ttyS0 panic=-1"}}
    post_install:
      [{{builtin: hostname}}, {{builtin: fstab}}, {{builtin: ssh-keys}}, {{builtin: ssh-host-keys}}]
"""
SETTINGS = """
nodes = "nodes.yaml"
state = "kadeploy"
kaboot = "kaboot.toml"
listen = "10.78.0.1"

[ssh]
key = "{directory}/id"
known_hosts = "{directory}/files/known_hosts"

[workflow]
boot_timeout_ms = 400000
reboot_pause_ms = 0
"""


@pytest.fixture(scope="module", name="environment")
def _environment(pytestconfig: pytest.Config) -> Path:
    """The deployment environment, kept in pytest's cache: minutes to make."""
    directory = Path(pytestconfig.cache.mkdir("deploy"))
    if not (directory / "initrd.gz").exists():
        list(make_environment(Request(directory, ())))
    return directory


@pytest.fixture(name="lab")
def _lab(short_path: Path, environment: Path) -> Iterator[Lab]:
    short_path.chmod(0o755)
    files = short_path / "files"
    files.mkdir(mode=0o755)
    for name in ("vmlinuz", "initrd.gz"):
        shutil.copy(environment / name, files / name)
    key = short_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    list(make_site(files, [key.with_suffix(".pub").read_text().strip()]))
    with boot_lab.lab(short_path) as lab:
        yield lab


def kadeploy(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the head, which is in the room."""
    program = "from kadeploy.cli import main; main()"
    command = [sys.executable, "-c", program, "-c", str(lab.directory / "kadeploy.toml"), *words]
    return subprocess.run(
        lab.inside(command), capture_output=True, text=True, timeout=RUN_S, cwd=boot_lab.ROOT
    )


def prepare(lab: Lab, environment: Path) -> None:
    directory = lab.directory
    _, checksum = deploy_image.make_system(
        environment / "initrd.gz", environment / "vmlinuz", directory
    )
    (directory / "env.yaml").write_text(ENVIRONMENT.format(checksum=checksum))
    (directory / "kadeploy.toml").write_text(SETTINGS.format(directory=directory))
    public = (directory / "id.pub").read_text().strip()
    nodes = [
        {
            "name": f"pc{index}",
            "address": f"10.78.0.1{index}/24",
            "disks": [{"role": "system", "serial": f"SN{index}"}],
        }
        for index in range(1, COUNT + 1)
    ]
    # JSON is YAML.
    (directory / "nodes.yaml").write_text(json.dumps({"ssh_keys": [public], "nodes": nodes}))


def is_waiting(vm: Vm) -> bool:
    return "deployment environment is up" in vm.text()


def ask(lab: Lab, index: int, command: str) -> str:
    words = ["ssh", "-i", lab.directory / "id", "-o", "StrictHostKeyChecking=no", "-o",
             "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
             f"root@10.78.0.1{index}", command]  # fmt: skip
    done = subprocess.run(lab.inside(words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(boot_lab.lacking() is not None, reason=str(boot_lab.lacking()))
def test_deploy_of_blank_machines_by_one_command(lab: Lab, environment: Path) -> None:
    prepare(lab, environment)
    lab.serve(INVENTORY + "".join(NODE.format(index=index) for index in range(1, COUNT + 1)))
    for index in range(1, COUNT + 1):
        disk = lab.directory / f"disk{index}"
        with open(disk, "wb") as file:
            os.truncate(file.fileno(), 2 * GIB)
        drive = ["-drive", f"file={disk},if=none,id=d0,format=raw,cache=unsafe"]
        device = ["-device", f"virtio-blk-pci,drive=d0,serial=SN{index},bootindex=1"]
        lab.boot(f"pc{index}", f"52:54:00:00:00:0{index}", *drive, *device, "-action",
                 "reboot=reset", memory_mib=1536)  # fmt: skip
    for vm in lab.vms:
        lab.until(functools.partial(is_waiting, vm), vm.console.name, 400)
    added = kadeploy(lab, "env", "add", str(lab.directory / "env.yaml"))
    assert added.returncode == 0, added.stderr
    planned = kadeploy(lab, "plan", "-w", f"pc[1-{COUNT}]", "small")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "serial SN1 (no data seen)" in planned.stdout
    done = kadeploy(lab, "run", "-w", f"pc[1-{COUNT}]", "small")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{lab.state()}"
    print(done.stderr)
    keys = set()
    for index in range(1, COUNT + 1):
        assert ask(lab, index, "hostname").strip() == f"pc{index}"
        assert ask(lab, index, "test ! -e /etc/kadeploy-environment && cat /etc/fstab")
        keys.add(ask(lab, index, "cat /etc/ssh/ssh_host_ed25519_key.pub"))
    assert len(keys) == COUNT
    again = kadeploy(lab, "run", "--missing", "-w", f"pc[1-{COUNT}]", "small")
    assert again.stdout == "all nodes have it\n"
