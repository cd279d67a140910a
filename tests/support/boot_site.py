"""A small site for tests of network boot: its inventory file, and the inventory made from it."""

from __future__ import annotations

from pathlib import Path

from kaboot import inventory
from kaboot.model import Inventory

__all__ = ["INVENTORY", "write_site"]

INVENTORY = """
[site]
address = "10.78.0.1"
network = "10.78.0.0/24"
interface = "br0"
pool = "10.78.0.100-10.78.0.199"
router = "10.78.0.254"
dns = ["10.78.0.253", "10.78.0.252"]
domain = "room12.example"
files = "files"
state = "state"

[[profile]]
name = "install"
title = "Deployment environment"
kernel = "deploy/vmlinuz"
initrds = ["deploy/base.gz", "deploy/agent.gz"]
arguments = ["console=ttyS0", "quiet"]
menu = false

[[profile]]
name = "rescue"
title = "Rescue system"
kernel = "rescue/vmlinuz"
initrds = ["rescue/initrd.gz"]

[[profile]]
name = "diskless"
kernel = "debian/vmlinuz"
initrds = ["debian/initrd.img"]
arguments = ["ro", "boot=nfs"]
nfsroot = ["10.78.0.5:/mnt/debian", "10.78.0.6:/mnt/debian"]

[[profile]]
name = "memtest"
title = "Memory test"
program = "memtest/mt86+x64.efi"

[[node]]
name = "pc1"
macs = ["52:54:00:00:00:01", "52-54-00-00-01-01"]
address = "10.78.0.11"
firmware = "bios"
rack = "a"
arguments = ["mitigations=off"]

[[node]]
name = "pc2"
macs = ["52:54:00:00:00:02"]
address = "10.78.0.12"
loader = "ipxe"
step = "custom:diskless"

[[node]]
name = "pc3"
serial = "CZC1234567"
address = "10.78.0.13"

[[group]]
nodes = "pc[4-8]"
first_address = "10.78.0.14"
step = "install"
"""


def write_site(directory: Path, text: str = INVENTORY) -> tuple[Path, Inventory]:
    """Write the inventory file into a directory and read it."""
    path = directory / "kaboot.toml"
    path.write_text(text)
    return path, inventory.load(path)
