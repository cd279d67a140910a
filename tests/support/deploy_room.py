"""A room of virtual machines for kadeploy: kaboot serves it, the head's commands run in it.

Position: boot_lab.py (network, firmware, kaboot) -> this (disks, power, nodes file, kadeploy).

Machines are switched off at first: QEMU holds their processor until the power command (which is
the nodes file's, `qemu_power.py`) lets it go.  Disks are sparse files, serial numbers are made of
the machine's number.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kadeploy.mkenv import make_site
from tests.support import boot_lab, qemu_power
from tests.support.boot_lab import ROOT, Lab, Vm

__all__ = ["GIB", "Machine", "Room", "room"]

GIB = 1 << 30
RUN_S = 900.0
NETWORK = boot_lab.ADDRESS.rpartition(".")[0]

INVENTORY = """
[site]
address = "{address}"
network = "{network}.0/24"
interface = "br0"
loader = "ipxe"
files = "files"
state = "state"

[[profile]]
name = "install"
kernel = "vmlinuz"
initrds = ["initrd.gz", "site.gz"]
arguments = ["console=ttyS0", "quiet", "panic=-1"]
"""
INVENTORY_NODE = """
[[node]]
name = "{name}"
macs = ["{mac}"]
address = "{address}"
firmware = "{firmware}"
"""
SETTINGS = """
nodes = "nodes.yaml"
state = "kadeploy"
kaboot = "kaboot.toml"
listen = "{address}"

[ssh]
key = "{directory}/id"
known_hosts = "{directory}/files/known_hosts"

[workflow]
boot_timeout_ms = {boot_ms}
reboot_pause_ms = 0
{workflow}
"""
BOOT_MS = 240_000
"""Two cores for all machines, none of them with KVM."""


@dataclass(frozen=True, slots=True)
class Machine:
    number: int
    firmware: str = "bios"
    disk_size: int = 2 * GIB

    @property
    def name(self) -> str:
        return f"pc{self.number}"

    @property
    def serial(self) -> str:
        return f"SN{self.number:04}"

    @property
    def mac(self) -> str:
        return f"52:54:00:00:01:{self.number:02x}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{10 + self.number}"


@dataclass(slots=True)
class Room:
    lab: Lab
    machines: Sequence[Machine]
    vms: dict[str, Vm] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.lab.directory

    def disk(self, machine: Machine) -> Path:
        return self.directory / f"{machine.name}.disk"

    def plug_in(self, machine: Machine) -> Vm:
        """Make a machine that can be switched on; its disk is kept if it has one."""
        name = machine.name
        with open(self.disk(machine), "ab") as file:
            os.truncate(file.fileno(), machine.disk_size)
        drive = f"file={self.disk(machine)},if=none,id=d0,format=raw,cache=unsafe,discard=unmap"
        options = self.lab.uefi(name) if machine.firmware == "uefi" else []
        vm = self.lab.boot(
            name, machine.mac, *options, "-S", "-action", "reboot=reset",
            "-qmp", f"unix:{self._power(name)},server=on,wait=off", "-drive", drive,
            "-device", f"virtio-blk-pci,drive=d0,serial={machine.serial},bootindex=1",
            "-object", "rng-builtin,id=r0", "-device", "virtio-rng-pci,rng=r0",
            memory_mib=1024,
        )  # fmt: skip
        self.vms[name] = vm
        return vm

    def _power(self, name: str) -> Path:
        return self.directory / f"{name}.power"

    def configure(self, *, workflow: str = "") -> None:
        """Write the head's configuration and its nodes file, and start kaboot."""
        inventory = INVENTORY.format(address=boot_lab.ADDRESS, network=NETWORK)
        for one in self.machines:
            inventory += INVENTORY_NODE.format(
                name=one.name, mac=one.mac, address=one.address, firmware=one.firmware
            )
        self.lab.serve(inventory)
        text = SETTINGS.format(
            address=boot_lab.ADDRESS, directory=self.directory, boot_ms=BOOT_MS, workflow=workflow
        )
        (self.directory / "kadeploy.toml").write_text(text)
        public = (self.directory / "id.pub").read_text().strip()
        nodes = {"ssh_keys": [public], "nodes": [self._node(one) for one in self.machines]}
        (self.directory / "nodes.yaml").write_text(json.dumps(nodes))  # JSON is YAML

    def _node(self, machine: Machine) -> dict[str, object]:
        socket = str(self._power(machine.name))
        button = [sys.executable, str(qemu_power.__file__), socket, "{action}"]
        return {
            "name": machine.name,
            "address": f"{machine.address}/24",
            "mac": machine.mac,
            "disks": [{"role": "system", "serial": machine.serial}],
            "power": [{"driver": "command", "command": button}],
        }

    def command(self, *words: str | Path) -> list[str]:
        """Return the words of a kadeploy command as it runs on the head, which is in the room."""
        program = "from kadeploy.cli import main; main()"
        config = self.directory / "kadeploy.toml"
        return self.lab.inside([sys.executable, "-c", program, "-c", config, *words])

    def kadeploy(self, *words: str | Path, status: int = 0) -> str:
        """Run kadeploy; return what it printed; it must end with *status*."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=RUN_S, cwd=ROOT
        )
        print(done.stderr)
        said = f"kadeploy {' '.join(map(str, words))}: {done.returncode}"
        assert done.returncode == status, f"{said}\n{done.stdout}{done.stderr}\n{self.lab.state()}"
        return done.stdout

    def history(self) -> list[dict[str, object]]:
        """Return every try of every step of the last deployment."""
        number = json.loads(self.kadeploy("history", "--json"))[0]["id"]
        tries: list[dict[str, object]] = json.loads(self.kadeploy("history", str(number), "--json"))
        return tries

    def ask(self, machine: Machine, command: str) -> str:
        """Run a command on a deployed machine, by ssh with the head's key."""
        words = ["ssh", "-i", str(self.directory / "id"), "-o", "StrictHostKeyChecking=no", "-o",
                 "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
                 f"root@{machine.address}", command]  # fmt: skip
        done = subprocess.run(self.lab.inside(words), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.lab.state()}"
        return done.stdout


@contextlib.contextmanager
def room(directory: Path, environment: Path, machines: Sequence[Machine]) -> Iterator[Room]:
    """Make a room; kaboot is not yet started, and no machine plugged in."""
    directory.chmod(0o755)  # kaboot becomes a user who must get at the files
    files = directory / "files"
    files.mkdir(mode=0o755)
    for name in ("vmlinuz", "initrd.gz"):
        shutil.copy(environment / name, files / name)
    key = directory / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    list(make_site(files, [key.with_suffix(".pub").read_text().strip()]))
    with boot_lab.lab(directory) as lab:
        yield Room(lab, machines)
