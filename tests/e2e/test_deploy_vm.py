"""The whole way with blank virtual machines: network boot, broadcast, own disk, asked by ssh.

Real firmware, kaboot, the deployment environment of `mkenv`, a real Debian in an image on a mounted
nfsp, the broadcast engine between machines, GRUB from the disk.  One command on the head.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kadeploy.store import HistoryRow
from tests.support import cluster, deploy_image, leaks
from tests.support.deploy_image import Built
from tests.support.deploy_room import GIB, Machine, Room, room
from tests.support.loop_disk import lacking

_WHY = lacking("mmdebstrap", "cpio", "zstd", "mkfs.ext4", "ssh", "ssh-keygen", "tc")
pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.fuse,
    pytest.mark.skipif(_WHY is not None, reason=str(_WHY)),
]

RUN_S = 900.0
PARTITIONS = """
      - {name: bios, type: bios-boot, size: 1MiB}
      - {name: esp, type: esp, size: 64MiB, format: vfat, mount: /boot/efi}
      - {name: swap, type: swap, size: 64MiB}
"""
POST_INSTALL = """
    boot: {arguments: "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off"}
    post_install:
      [{builtin: hostname}, {builtin: hosts}, {builtin: network}, {builtin: fstab},
       {builtin: machine-id}, {builtin: ssh-keys}, {builtin: ssh-host-keys}]
"""
DEBIAN = f"""
name: debian
version: 1
disks:
  - name: system
    min_size: 1GiB
    partitions: {PARTITIONS}
      - {{name: root, format: ext4, mount: /}}
systems:
  - name: debian
    images: [{{file: system.tar.zst, kind: tar, compression: zstd, partition: root,
              checksum: "CHECKSUM"}}]
    {POST_INSTALL}
"""
RAW = f"""
name: raw
version: 1
disks:
  - name: system
    min_size: 1GiB
    partitions: {PARTITIONS}
      - {{name: root, mount: /}}
systems:
  - name: debian
    images: [{{file: system.raw.zst, kind: raw, compression: zstd, partition: root,
              checksum: "CHECKSUM"}}]
    {POST_INSTALL}
"""


@pytest.fixture(scope="module", name="built")
def _built(pytestconfig: pytest.Config) -> Built:
    return deploy_image.build(Path(pytestconfig.cache.mkdir("deploy")))


@pytest.fixture(scope="module", name="images")
def _images(built: Built) -> Iterator[Path]:
    """A directory of a mounted nfsp with the environments in it."""
    prefix = f"ka-{os.environ[leaks.TOKEN_VARIABLE]}-"
    with tempfile.TemporaryDirectory(prefix=prefix) as name, cluster.running(Path(name)) as nfsp:
        images = nfsp.mount / "images"
        images.mkdir()
        for name, text, image in (
            ("system.tar.zst", DEBIAN, built.system),
            ("system.raw.zst", RAW, built.raw),
        ):
            shutil.copy(image, images / name)
            text = text.replace("CHECKSUM", deploy_image.checksum(image))
            (images / name).with_suffix(".yaml").write_text(text)
        yield images


def test_deploy_vm_blank_machines_then_a_raw_image_over_them_then_what_was_missing(
    short_path: Path, built: Built, images: Path
) -> None:
    machines = [Machine(1), Machine(2), Machine(3, "uefi"), Machine(4, disk_size=GIB // 4)]
    with room(short_path, built.environment, machines) as of:
        of.configure()
        for name in ("system.tar.yaml", "system.raw.yaml"):
            of.kadeploy("env", "add", images / name)
        blank_machines(of)
        one_dies_one_is_slow_one_is_too_small(of, images)
        what_was_missing(of)


def blank_machines(of: Room) -> None:
    """One command, three machines without anything, one of them UEFI."""
    for one in of.machines[:3]:
        of.plug_in(one)
    of.kadeploy("run", "-w", "pc[1-3]", "debian")
    assert not failures(of)
    assert {one.implementation for one in of.history() if one.step == "send-0"} == {"broadcast"}
    check_deployed(of, of.machines[:3])
    assert of.kadeploy("run", "--missing", "-w", "pc[1-3]", "debian") == "all nodes have it\n"
    recorded = of.directory / "etc.tar.zst"
    said = of.kadeploy("record", "-w", "pc1", "/etc", recorded)
    assert deploy_image.checksum(recorded) in said
    words = ["tar", "--zstd", "-xOf", str(recorded), "./hostname"]
    assert subprocess.run(words, capture_output=True, check=True).stdout == b"pc1\n"


def one_dies_one_is_slow_one_is_too_small(of: Room, images: Path) -> None:
    """A raw image over what the machines have; the good one is ready in its time."""
    good, dying, slow, small = of.machines
    of.plug_in(small)
    took_s = max(one.took_ms for one in of.history() if one.step == "send-0") / 1000
    size = (images / "system.raw.zst").stat().st_size
    run = of.begin("-w", "pc[1-4]", "raw")
    of.until_done("prepare-disks", dying, slow)
    of.slow_down(slow, int(size / took_s / 10))
    before = of.sent_size(dying)
    of.lab.until(lambda: of.sent_size(dying) > before + size // 3, "the middle", RUN_S)
    of.unplug(dying)

    of.lab.until(lambda: of.status()[good.name] == "deployed", "the good one", RUN_S)
    assert of.status()[slow.name] != "deployed"
    of.slow_down(slow, None)
    assert run.wait(RUN_S) == 1, (of.directory / "run.log").read_text()
    assert of.status() == {"pc1": "deployed", "pc2": "failed", "pc3": "deployed", "pc4": "failed"}
    check_deployed(of, [good, slow])
    for one in (good, slow):
        assert deploy_image.RAW_UUID in of.ask(one, "cat /proc/cmdline")
    steps = {(one.node, one.step) for one in failures(of)}
    assert (dying.name, "send-0") in steps
    assert {step for name, step in steps if name == small.name} == {"check-disks"}
    said = of.kadeploy("status", status=1)
    assert "failed: pc4: check-disks: pc4: disk system refused: 1GiB are needed" in said


def what_was_missing(of: Room) -> None:
    """The failed ones come back, by kexec; the others are let alone.  A plan touches nothing."""
    with open(of.directory / "kadeploy.toml", "a") as file:
        file.write("kexec = true\n")
    good, dead, slow, small = of.machines
    boots = [of.ask(one, "cat /proc/sys/kernel/random/boot_id") for one in (good, slow)]
    of.plug_in(dead)
    of.swap(small, Machine(4))
    said = of.kadeploy(
        "run", "--missing", "--breakpoint", "prepare-disks", "-w", "pc[1-4]", "raw", status=1
    )
    assert "held: pc[2,4]" in said
    before = deploy_image.checksum(of.disk(dead))
    plan = of.kadeploy("plan", "-w", "pc[2,4]", "raw")
    assert "serial SN0002 (HOLDS DATA)" in plan
    assert "serial SN0004 (no data seen)" in plan
    assert deploy_image.checksum(of.disk(dead)) == before
    of.kadeploy("run", "--resume")
    check_deployed(of, of.machines)
    assert boots == [of.ask(one, "cat /proc/sys/kernel/random/boot_id") for one in (good, slow)]
    assert not failures(of)
    assert "kexec" in {one.implementation for one in of.history()}


def check_deployed(of: Room, machines: Sequence[Machine]) -> None:
    """Check that each runs a system of its own: name, keys, disk, firmware."""
    keys = set()
    for one in machines:
        assert of.ask(one, "hostname").strip() == one.name
        assert "/dev/vda4 / ext4" in of.ask(one, "cat /proc/mounts")
        assert of.ask(one, "test ! -e /etc/kadeploy-environment && cat /proc/swaps").count("vda3")
        firmware = "test -d /sys/firmware/efi && echo uefi || echo bios"
        assert of.ask(one, firmware).strip() == one.firmware
        keys.add(of.ask(one, "cat /etc/ssh/ssh_host_ed25519_key.pub").split()[1])
    assert len(keys) == len(machines)


def failures(of: Room) -> list[HistoryRow]:
    """Return the tries that failed, but for asking those that were off to reboot."""
    return [one for one in of.history() if not one.ok and one.implementation != "reboot-soft"]
