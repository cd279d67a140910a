"""The whole way with blank virtual machines: network boot, broadcast, own disk, asked by ssh.

Real firmware, kaboot, the deployment environment of `mkenv`, a real Debian in an image on a mounted
nfsp, the broadcast engine between machines, GRUB from the disk.  One command on the head.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import cluster, deploy_image, leaks
from tests.support.deploy_image import Built
from tests.support.deploy_room import Machine, Room, room

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.fuse]

ENVIRONMENT = """
name: debian
version: 1
disks:
  - name: system
    partitions:
      - {{name: bios, type: bios-boot, size: 1MiB}}
      - {{name: esp, type: esp, size: 64MiB, format: vfat, mount: /boot/efi}}
      - {{name: swap, type: swap, size: 64MiB}}
      - {{name: root, format: ext4, mount: /}}
systems:
  - name: debian
    images: [{{file: system.tar.zst, kind: tar, compression: zstd, partition: root,
              checksum: "{checksum}"}}]
    boot: {{arguments: "console=ttyS0 panic=-1"}}
    post_install:
      [{{builtin: hostname}}, {{builtin: hosts}}, {{builtin: network}}, {{builtin: fstab}},
       {{builtin: machine-id}}, {{builtin: ssh-keys}}, {{builtin: ssh-host-keys}}]
"""


@pytest.fixture(scope="module", name="built")
def _built(pytestconfig: pytest.Config) -> Built:
    return deploy_image.build(Path(pytestconfig.cache.mkdir("deploy")))


@pytest.fixture(scope="module", name="images")
def _images(built: Built) -> Iterator[Path]:
    """A directory of a mounted nfsp with the environment in it."""
    prefix = f"ka-{os.environ[leaks.TOKEN_VARIABLE]}-"
    with tempfile.TemporaryDirectory(prefix=prefix) as name, cluster.running(Path(name)) as nfsp:
        images = nfsp.mount / "debian"
        images.mkdir()
        shutil.copy(built.system, images / "system.tar.zst")
        text = ENVIRONMENT.format(checksum=deploy_image.checksum(built.system))
        (images / "env.yaml").write_text(text)
        yield images


def deployed(of: Room) -> None:
    """Check that every machine runs its own system: name, keys, file systems."""
    keys = set()
    for one in of.machines:
        assert of.ask(one, "hostname").strip() == one.name
        assert "/dev/vda4 / ext4" in of.ask(one, "cat /proc/mounts")
        assert of.ask(one, "test ! -e /etc/kadeploy-environment && swapon --show --noheadings")
        assert of.ask(one, "test -d /sys/firmware/efi && echo uefi || echo bios").strip() == (
            one.firmware
        )
        keys.add(of.ask(one, "cat /etc/ssh/ssh_host_ed25519_key.pub"))
    assert len(keys) == len(of.machines)


def test_deploy_vm_blank_machines_by_one_command(
    short_path: Path, built: Built, images: Path
) -> None:
    machines = [Machine(1)]
    with room(short_path, built.environment, machines) as head:
        head.configure()
        for one in machines:
            head.plug_in(one)
        head.kadeploy("env", "add", images / "env.yaml")
        head.kadeploy("run", "-w", "pc1", "debian")
        deployed(head)
