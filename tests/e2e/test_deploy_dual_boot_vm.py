"""Dual boot from one description: a UEFI machine is deployed, its firmware starts what it is told.

All is real but Windows: firmware, deployment environment, node's program, GRUB and Linux.  In
Windows' place is an EFI program where its boot manager would be, with a volume, a registry and a
boot store made without it.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from kadeploy import archive, descriptions
from kadeploy.disks import facts_from_json
from kadeploy.environment import MIB
from kadeploy.mkenv import INIT
from kadeploy.nodes import NodeDisk, Nodes, NodeSpec
from kadeploy.orders import Order, Place, to_json
from kadeploy.plan import NodePlan, make_plan
from tests.support import boot_image, deploy, deploy_image, firmware_vm, hives, ntfs
from tests.support.firmware_vm import Machine
from tests.support.loop_disk import checksum, loop_disk, partition, run

_WHY = firmware_vm.lacking()
pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(_WHY is not None, reason=str(_WHY)),
]

SERIAL = "KADUAL1"
DISK_SIZE = 288 * MIB
DEPLOY_S = 600.0
BOOT_S = 240.0
IN_WINDOWS = "ka-guest: in the place of Windows"
IN_LINUX = "ka-guest: Linux from its own disk"
OLD = {name: f"0000000{index}-BBBB-4000-8000-00000000000F" for index, name in
       enumerate(("disk", "esp", "windows", "recovery"))}  # fmt: skip
KEPT = "AAAAAAAA-0000-4000-8000-BBBBBBBBBBBB"
DESCRIPTION = """
name: classroom
version: 1
default: debian
disks:
  - name: system
    image_disk_id: {disk}
    partitions:
      - {{name: esp, type: esp, size: 64MiB, format: vfat, mount: /boot/efi, image_guid: {esp}}}
      - {{name: msr, type: msr, size: 16MiB}}
      - {{name: windows, type: windows, size: 48MiB, format: ntfs, guid: {kept},
         image_guid: {windows}}}
      - {{name: root, format: ext4, mount: /}}
systems:
  - name: debian
    images: [{{file: root.tar, kind: tar, partition: root, checksum: "{root_sum}"}}]
    boot: {{label: Debian, arguments: "console=ttyS0 panic=-1 quiet"}}
    post_install: [{{builtin: hostname}}, {{builtin: fstab}}]
  - name: windows
    os: windows
    root: windows
    images:
      - {{file: esp.tar, kind: tar, partition: esp, checksum: "{esp_sum}"}}
      - {{file: win.wim, kind: wim, partition: windows, checksum: "{wim_sum}"}}
    boot: {{loader: windows, label: Windows Boot Manager}}
    post_install:
      - builtin: unattend
      - builtin: setup-complete
      - builtin: drive-letters
      - builtin: computer-name
      - builtin: boot-store
"""

# Instead of waiting for orders by ssh, the environment finds them in its own memory.
RUNNER = """
cd /deploy
for order in order*; do
  echo "ka-answer: $(KADEPLOY_ROOT=/run/root python3 node.pyz do <$order)"
done
python3 next.py
sync
poweroff -f
"""
NEXT = """
import subprocess, sys
sys.path.insert(0, "node.pyz")
from kadeploy import bootentries
text = subprocess.run(["efibootmgr"], capture_output=True, text=True, check=True).stdout
print("ka-next:", *(line for line in text.splitlines() if line.startswith("BootNext")))
(entry,) = bootentries.entries_named(bootentries.parse_entries(text), "Windows Boot Manager")
subprocess.run(bootentries.next_entry_words(entry.number), check=True, stdout=subprocess.DEVNULL)
"""
LINUX_INIT = f"""#!/bin/sh
echo "{IN_LINUX}" >/dev/console
/bin/poweroff -f
"""


@pytest.fixture(scope="module", name="environment")
def _environment(pytestconfig: pytest.Config) -> Path:
    """The deployment environment, kept in pytest's cache: minutes to make."""
    return deploy_image.environment(Path(pytestconfig.cache.mkdir("deploy")))


@pytest.fixture(scope="module", name="images")
def _images(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("images")
    kernel = boot_image.unpack_kernel(Path(pytestconfig.cache.mkdir("boot")))
    (vmlinuz,) = (kernel / "boot").glob("vmlinuz-*")
    busybox = Path("/bin/busybox").read_bytes()
    initrd = boot_image.pack({"bin/busybox": busybox, "init": LINUX_INIT.encode()})
    store = hives.boot_store(directory / "BCD", **OLD)
    system = hives.system(directory / "SYSTEM", {"\\DosDevices\\C:": hives.mounted(OLD["windows"])})
    with loop_disk(directory / "golden", 40 * MIB) as device:
        ntfs.make_golden(device, directory)
        with ntfs.mounted(device, directory) as root:
            (root / "Windows/System32/config").mkdir()
            shutil.copyfile(system, root / "Windows/System32/config/SYSTEM")
        run("wimcapture", device, directory / "win.wim", "--pipable", "--compress=fast")
    return {
        "root.tar": tar({"vmlinuz": vmlinuz.read_bytes(), "initrd.img": initrd, "etc/name": b""}),
        "esp.tar": tar(
            {
                "EFI/Microsoft/Boot/bootmgfw.efi": stand_in(directory),
                "EFI/Microsoft/Boot/BCD": store.read_bytes(),
            }
        ),
        "win.wim": (directory / "win.wim").read_bytes(),
    }


def stand_in(directory: Path) -> bytes:
    """Make an EFI program that says who it is and switches off."""
    config = directory / "standin.cfg"
    config.write_text(f'echo "{IN_WINDOWS}"\nhalt\n')
    made = directory / "standin.efi"
    modules = "--install-modules=normal echo halt"
    words = ["grub-mkstandalone", "--format=x86_64-efi", modules, "--locales=", "--fonts="]
    run(*words, "--themes=", f"--output={made}", f"boot/grub/grub.cfg={config}")
    return made.read_bytes()


def tar(files: Mapping[str, bytes]) -> bytes:
    """Return an archive as one of an ESP is: everything is root's, with the modes that vfat has."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            packed.addfile(info, io.BytesIO(data))
    return made.getvalue()


def plan_for(directory: Path, images: Mapping[str, bytes]) -> NodePlan:
    sums = {f"{name[:-4]}_sum": checksum(data) for name, data in images.items()}
    sums["wim_sum"] = sums.pop("win_sum")
    text = DESCRIPTION.format(**OLD, kept=KEPT, **sums)
    environment = descriptions.parse_environment(text, directory / "env.yaml")
    facts = deploy.raw_facts(SERIAL, DISK_SIZE)
    said = json.dumps(facts).replace("/dev/sda", "/dev/vda")
    spec = NodeSpec("pc1", (NodeDisk("system", SERIAL),))
    return make_plan(
        environment,
        spec,
        Nodes((spec,)),
        facts_from_json(json.loads(said)),
        read=str,
        stored_sizes={},
    )


def initrd_for(
    directory: Path, environment: Path, plan: NodePlan, images: Mapping[str, bytes]
) -> Path:
    """Return the deployment environment with a plan's orders in it."""
    root = directory / "orders"
    (root / "deploy").mkdir(parents=True)
    streams: list[tuple[Order, bytes]] = [(order, b"") for order in plan.prepare]
    streams += [(job.order, images[job.image.file]) for job in plan.images]
    streams += [(order, b"") for order in plan.finish]
    for index, (order, stream) in enumerate(streams):
        line = json.dumps(to_json(order)).encode() + b"\n"
        (root / f"deploy/order{index:02}").write_bytes(line + stream)
    (root / "deploy/node.pyz").write_bytes(archive.build())
    (root / "deploy/next.py").write_text(NEXT)
    (root / "init").write_text(INIT.replace("/usr/sbin/sshd\n", RUNNER))
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in [root, *root.rglob("*")][1:])
    packed = subprocess.run(
        ["cpio", "--quiet", "--create", "--format=newc"],
        input=names.encode(), cwd=root, capture_output=True, check=True,
    ).stdout  # fmt: skip
    made = directory / "initrd"
    (base,) = environment.glob("initrd.*")
    with open(made, "wb") as file:
        file.write(base.read_bytes())
        file.write(gzip.compress(packed, compresslevel=1))
    return made


def place(plan: NodePlan, disk: str, serial: str, name: str) -> Place:
    (layout,) = plan.layouts
    one = layout.named(name)
    assert one is not None
    return Place(disk, serial, DISK_SIZE, one.number, one.start, one.size)


def test_deploy_dual_boot_in_a_vm_starts_what_the_firmware_is_told(
    tmp_path: Path, environment: Path, images: Mapping[str, bytes]
) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    with open(disk, "r+b") as file:
        file.truncate(DISK_SIZE)
    plan = plan_for(tmp_path, images)
    machine = Machine(tmp_path, disk, SERIAL)
    initrd = initrd_for(tmp_path, environment, plan, images)
    kernel = ["-kernel", environment / "vmlinuz", "-initrd", initrd]
    console = machine.run(
        *kernel, "-append", "console=ttyS0 quiet panic=-1", timeout_s=DEPLOY_S, memory_mib=1536
    )
    answers = [json.loads(one) for one in re.findall(r"ka-answer: (\{.*\})", console)]
    assert [one for one in answers if not one["ok"]] == []
    assert len(answers) == len(plan.prepare) + len(plan.images) + len(plan.finish)

    order = machine.boot_order()
    (layout,) = plan.layouts
    esp = layout.named("esp")
    assert esp is not None
    assert [(one.label, one.partition, one.path) for one in order[:2]] == [
        ("Debian", esp.part_uuid, "\\EFI\\debian\\grubx64.efi"),
        ("Windows Boot Manager", esp.part_uuid, "\\EFI\\Microsoft\\Boot\\bootmgfw.efi"),
    ]
    assert f"ka-next: BootNext: {order[0].number:04X}" in console  # the description's default
    assert machine.boot_next() == order[1].number  # what was chosen since
    looked_at(tmp_path, disk, plan)

    console = machine.run(timeout_s=BOOT_S)
    assert IN_WINDOWS in console
    assert IN_LINUX not in console
    assert machine.boot_next() is None
    console = machine.run(timeout_s=BOOT_S)
    assert IN_LINUX in console
    assert IN_WINDOWS not in console


def looked_at(directory: Path, disk: Path, plan: NodePlan) -> None:
    """Check what was deployed by means of others: mtools, ntfs-3g, regipy."""
    device = run("losetup", "--find", "--show", "--read-only", disk).strip()
    (layout,) = plan.layouts
    esp, windows = layout.named("esp"), layout.named("windows")
    assert esp is not None
    assert windows is not None
    try:
        store = directory / "BCD"
        with partition(place(plan, device, SERIAL, "esp")) as volume:
            run("mcopy", "-n", "-i", volume, "::EFI/Microsoft/Boot/BCD", store)
        assert windows.part_uuid == KEPT.lower()
        assert hives.values(store, f"Objects\\{hives.LOADER}\\Elements\\21000001") == {
            "Element": hives.device(KEPT, layout.disk_id)
        }
        assert hives.values(store, f"Objects\\{hives.BOOTMGR}\\Elements\\11000001") == {
            "Element": hives.device(esp.part_uuid, layout.disk_id)
        }
        with (
            partition(place(plan, device, SERIAL, "windows")) as volume,
            ntfs.mounted(volume, directory, "ro") as root,
        ):
            system = Path(
                shutil.copy(root / "Windows/System32/config/SYSTEM", directory / "SYSTEM")
            )
            assert b"<ComputerName>pc1<" in (root / "Windows/Panther/unattend.xml").read_bytes()
            assert (root / "Windows/Setup/Scripts/SetupComplete.cmd").is_file()
            assert (root / "Windows/copy.dll").stat().st_nlink == 3
        assert hives.values(system, "MountedDevices") == {"\\DosDevices\\C:": hives.mounted(KEPT)}
        name = "ControlSet002\\Control\\ComputerName\\ComputerName"
        assert hives.values(system, name) == {"ComputerName": "PC1"}
    finally:
        run("losetup", "--detach", device)
