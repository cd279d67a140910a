"""Descriptions and facts that the tests of deployment share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kadeploy import descriptions
from kadeploy.disks import Facts, facts_from_json
from kadeploy.environment import Environment
from kadeploy.nodes import NodeDisk, Nodes, NodeSpec, Variable

SUM = "sha256:" + "0" * 64
GIB = 1 << 30

LINUX = f"""
name: debian12
version: 3
disks:
  - name: system
    label: gpt
    min_size: 8GiB
    partitions:
      - {{name: bios, type: bios-boot, size: 1MiB}}
      - {{name: esp, type: esp, size: 256MiB, format: vfat, mount: /boot/efi}}
      - {{name: swap, type: swap, size: 1GiB}}
      - {{name: root, format: ext4, mount: /}}
systems:
  - name: debian
    images:
      - {{file: debian.tar.zst, kind: tar, compression: zstd, checksum: "{SUM}",
         partition: root, size: 2GiB}}
    boot: {{arguments: "console=ttyS0 quiet"}}
    post_install:
      - {{builtin: hostname}}
      - {{builtin: fstab}}
      - {{template: motd.j2, dest: /etc/motd}}
      - {{script: first.sh}}
"""

DUAL = f"""
name: classroom
version: 1
default: debian
disks:
  - name: system
    disk_id: 11111111-2222-3333-4444-555555555555
    partitions:
      - {{name: esp, type: esp, size: 256MiB, format: vfat, mount: /boot/efi}}
      - {{name: msr, type: msr, size: 16MiB}}
      - {{name: windows, type: windows, size: 40GiB, format: ntfs,
         guid: AAAAAAAA-0000-4000-8000-BBBBBBBBBBBB}}
      - {{name: root, format: ext4, mount: /}}
systems:
  - name: debian
    images:
      - {{file: debian.tar, kind: tar, checksum: "{SUM}", partition: root}}
  - name: windows
    os: windows
    images:
      - {{file: win.wim, kind: wim, checksum: "{SUM}", partition: windows}}
    boot: {{loader: windows, label: Windows}}
    post_install: [{{builtin: unattend}}, {{builtin: setup-complete}}]
"""


WHOLE = f"""
name: appliance
version: 1
disks: [{{name: system}}]
systems:
  - name: appliance
    images: [{{file: disk.img, kind: raw, disk: system, checksum: "{SUM}", grow: ext4}}]
    boot: {{loader: none}}
"""


def environment(text: str = LINUX) -> Environment:
    return descriptions.parse_environment(text, Path("env.yaml"))


def nodes(count: int = 1) -> Nodes:
    made = tuple(
        NodeSpec(
            f"pc{index}",
            disks=(NodeDisk("system", f"SN{index:04}"),),
            address=f"10.0.0.{index}/24",
            variables=(Variable("room", "E12"),),
        )
        for index in range(1, count + 1)
    )
    return Nodes(made, "lab.example", ("ssh-ed25519 AAAAC3Nz root@head",))


def raw_facts(
    serial: str = "SN0001", size: int = 64 * GIB, *, firmware: str = "uefi", sector: int = 512
) -> dict[str, Any]:
    """Return facts as a node sends them: one disk that holds an old ext4 partition."""
    return {
        "firmware": firmware,
        "memory_size": 4 * GIB,
        "lsblk": {
            "blockdevices": [
                {
                    "path": "/dev/sda",
                    "size": size,
                    "type": "disk",
                    "serial": serial,
                    "model": "QEMU HARDDISK",
                    "log-sec": sector,
                    "ro": False,
                    "fstype": None,
                    "label": None,
                    "uuid": None,
                    "mountpoints": [None],
                    "children": [
                        {
                            "path": "/dev/sda1",
                            "size": GIB,
                            "type": "part",
                            "fstype": "ext4",
                            "label": "old",
                            "mountpoints": [None],
                        }
                    ],
                },
                {"path": "/dev/sr0", "size": 0, "type": "rom"},
            ]
        },
        "sfdisk": {
            "/dev/sda": {
                "partitiontable": {
                    "label": "dos",
                    "id": "0x12345678",
                    "device": "/dev/sda",
                    "unit": "sectors",
                    "sectorsize": sector,
                    "partitions": [
                        {"node": "/dev/sda1", "start": 2048, "size": GIB // sector, "type": "83"}
                    ],
                }
            }
        },
    }


def facts(**changes: Any) -> Facts:
    return facts_from_json(raw_facts(**changes))


def read_template(name: str) -> str:
    return {
        "motd.j2": "Welcome to {{ node.fqdn }} in {{ vars.room }}\n",
        "first.sh": "#!/bin/sh\necho {{ node.name }} > /etc/first\n",
    }[name]
