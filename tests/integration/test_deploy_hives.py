"""Registry edits by the node's program under Debian's Python, read again by another's code.

regipy reads hives in Python and has nothing of hivex; `ntfscat` takes SYSTEM out of the volume.
The ESP is ext4 here: not every kernel has vfat (test_deploy_dual_boot_vm.py has a real one).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import Code
from kadeploy import descriptions
from kadeploy.disks import facts_from_json
from kadeploy.environment import MIB
from kadeploy.nodes import NodeDisk, Nodes, NodeSpec
from kadeploy.orders import Place
from kadeploy.plan import NodePlan, make_plan
from tests.support import hives, ntfs
from tests.support.loop_disk import PATH, Node, lacking, loop_disk, partition, run

DEBIAN_PYTHON = "/usr/bin/python3"


def _lacking() -> str | None:
    if why := lacking("losetup", "mkntfs", "lowntfs-3g", "ntfscat", "hivexregedit"):
        return why
    done = subprocess.run([DEBIAN_PYTHON, "-c", "import hivex"], capture_output=True)
    return "not installed: python3-hivex" if done.returncode else None


_WHY = _lacking()
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

OLD = {name: f"0000000{index}-AAAA-4000-8000-00000000000F" for index, name in
       enumerate(("disk", "esp", "windows", "recovery", "stranger"))}  # fmt: skip
DESCRIPTION = """
name: windows
version: 1
disks:
  - name: system
    image_disk_id: {disk}
    partitions:
      - {{name: esp, type: esp, size: 16MiB, format: ext4, image_guid: {esp}}}
      - {{name: msr, type: msr, size: 16MiB}}
      - {{name: windows, type: windows, size: 24MiB, format: ntfs, image_guid: {windows}}}
      - {{name: recovery, type: recovery, format: ntfs, image_guid: {recovery}}}
systems:
  - name: windows
    os: windows
    root: windows
    images: [{{file: image, kind: wim, partition: windows, checksum: "sha256:{zeros}"}}]
    boot: {{loader: windows}}
    post_install:
      - builtin: boot-store
      - builtin: drive-letters
      - builtin: computer-name
""".format(**OLD, zeros="0" * 64)


@dataclass(frozen=True)
class Deployed:
    """A disk with a golden machine's hives on it, and the node that it is in."""

    directory: Path
    node: Node
    plan: NodePlan

    def place(self, name: str) -> Place:
        (layout,) = self.plan.layouts
        one = layout.named(name)
        assert one is not None
        disk = layout.disk
        return Place(disk.path, disk.serial, disk.size, one.number, one.start, one.size)

    def guid(self, name: str) -> str:
        (layout,) = self.plan.layouts
        one = layout.named(name)
        return layout.disk_id if one is None else one.part_uuid

    @contextmanager
    def esp(self) -> Iterator[Path]:
        point = self.directory / "esp"
        point.mkdir(exist_ok=True)
        with partition(self.place("esp"), read_only=False) as device:
            run("mount", device, point)
            try:
                yield point
            finally:
                run("umount", point)

    def fetch_store(self) -> Path:
        with self.esp() as root:
            return Path(shutil.copy(root / BOOT_STORE, self.directory / "BCD.copy"))

    def fetch_system(self) -> Path:
        """Return a copy of SYSTEM, taken out without a driver."""
        copy = self.directory / "SYSTEM.copy"
        with partition(self.place("windows")) as device:
            environment = {**os.environ, "PATH": PATH}
            words = ["ntfscat", device, SYSTEM]
            done = subprocess.run(words, capture_output=True, check=True, env=environment)
        copy.write_bytes(done.stdout)
        return copy

    def replace_system(self, content: bytes) -> None:
        with (
            partition(self.place("windows"), read_only=False) as device,
            ntfs.mounted(device, self.directory) as root,
        ):
            (root / SYSTEM).write_bytes(content)


SYSTEM = "WINDOWS/system32/config/SYSTEM"
BOOT_STORE = "EFI/Microsoft/Boot/BCD"
ACL = "system.ntfs_acl"
DESCRIPTOR = ntfs.descriptor((0x1F01FF, "S-1-5-18"))


@contextmanager
def deployed(directory: Path) -> Iterator[Deployed]:
    path = directory / "disk"
    node = Node(directory, DEBIAN_PYTHON)
    with loop_disk(path, 112 * MIB):
        environment = descriptions.parse_environment(DESCRIPTION, directory / "env.yaml")
        spec = NodeSpec("pc1", (NodeDisk("system", str(path)),))
        facts = facts_from_json(node.ask("facts")["facts"])
        plan = make_plan(environment, spec, Nodes((spec,)), facts, read=str, stored_sizes={})
        made = Deployed(directory, node, plan)
        node.do_all(plan.prepare)
        golden = {name: guid for name, guid in OLD.items() if name != "stranger"}
        with made.esp() as root:
            (root / BOOT_STORE).parent.mkdir(parents=True)
            hives.boot_store(root / BOOT_STORE, **golden)
        letters = {
            "\\DosDevices\\C:": hives.mounted(OLD["windows"]),
            "\\DosDevices\\E:": hives.mounted(OLD["stranger"]),
            "\\??\\Volume{7d6d3f8b-0000-0000-0000-000000000000}": "a stick".encode("utf-16-le"),
        }
        content = hives.system(directory / "SYSTEM", letters).read_bytes()
        with (
            partition(made.place("windows"), read_only=False) as device,
            ntfs.mounted(device, directory) as root,
        ):
            (root / SYSTEM).parent.mkdir(parents=True)
            (root / SYSTEM).write_bytes(content)
            os.setxattr(root / SYSTEM, ACL, DESCRIPTOR)
        yield made


def device_of(store: Path, entry: str, element: str) -> object:
    return hives.values(store, f"Objects\\{entry}\\Elements\\{element}")["Element"]


def test_deploy_edits_make_boot_store_and_registry_name_this_node(tmp_path: Path) -> None:
    with deployed(tmp_path) as made:
        before = made.fetch_store()
        kept = device_of(before, hives.LOADER, "12000002")
        for _ in range(2):  # an order may be carried out again
            made.node.do_all(made.plan.finish)
            store, system = made.fetch_store(), made.fetch_system()
            disk = made.guid("disk")
            windows = hives.device(made.guid("windows"), disk)
            assert device_of(store, hives.BOOTMGR, "11000001") == (
                hives.device(made.guid("esp"), disk)
            )
            assert device_of(store, hives.LOADER, "11000001") == windows
            assert device_of(store, hives.LOADER, "21000001") == windows
            assert device_of(store, hives.LOADER, "12000002") == kept
            assert device_of(store, hives.RECOVERY, "11000001") == (
                hives.ramdisk(made.guid("recovery"), disk, hives.WINRE)
            )
            assert hives.values(system, "MountedDevices") == {
                "\\DosDevices\\C:": hives.mounted(made.guid("windows"))
            }
            name = "Control\\ComputerName\\ComputerName"
            assert hives.values(system, f"ControlSet002\\{name}") == {"ComputerName": "PC1"}
            assert hives.values(system, f"ControlSet001\\{name}") == {"ComputerName": "GOLDEN"}
            assert hives.values(system, "ControlSet002\\Services\\Tcpip\\Parameters") == {
                "Hostname": "pc1",
                "NV Hostname": "pc1",
                "Domain": "kept.example",
            }
            for hive in (store, system):
                text = run("hivexregedit", "--export", hive, "\\")
                assert text.startswith("Windows Registry Editor")
        table = json.loads(run("sfdisk", "--json", made.plan.layouts[0].disk.path))
        assert table["partitiontable"]["id"].lower() == made.guid("disk").lower()
        with (
            partition(made.place("windows")) as device,
            ntfs.mounted(device, tmp_path, "ro") as root,
        ):
            assert os.getxattr(root / SYSTEM, ACL) == DESCRIPTOR
            assert [one.name for one in (root / SYSTEM).parent.iterdir()] == ["SYSTEM"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda hive: hive[:4] + b"\x09" + hive[5:], "was not closed"),
        (lambda hive: b"no hive", "is not a registry hive"),
        (lambda hive: hive[:4200], "hivex"),
    ],
)
def test_deploy_refuses_a_hive_that_is_open_or_broken_and_leaves_it(
    tmp_path: Path, content: object, why: str
) -> None:
    assert callable(content)
    with deployed(tmp_path) as made:
        broken = content(made.fetch_system().read_bytes())
        made.replace_system(broken)
        answers = [made.node.do(order) for order in made.plan.finish]
        (failed,) = [one for one in answers if not one["ok"]]
        assert why in failed["error"]
        assert made.fetch_system().read_bytes() == broken


def test_deploy_refuses_a_boot_store_of_another_disk(tmp_path: Path) -> None:
    with deployed(tmp_path) as made:
        other = dict.fromkeys(("disk", "esp", "windows", "recovery"), OLD["stranger"])
        with made.esp() as root:
            (root / BOOT_STORE).unlink()
            hives.boot_store(root / BOOT_STORE, **other)
        answer = made.node.do(made.plan.finish[-1])
        assert answer["code"] == Code.USAGE.number, answer
        assert "names none of the image's partitions" in answer["error"]


def test_deploy_without_hivex_says_what_is_missing(tmp_path: Path) -> None:
    with deployed(tmp_path) as made:
        bare = Node(tmp_path, DEBIAN_PYTHON)
        bare.environment["PYTHONPATH"] = str(tmp_path)
        (tmp_path / "hivex.py").write_text("raise ImportError")
        answer = bare.do(made.plan.finish[0])
        assert "python3-hivex is not installed" in answer["error"]
