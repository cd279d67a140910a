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
from kadeploy.store import HistoryRow, Store
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
initrds = ["initrd.img", "site.img"]
arguments = ["console=ttyS0", "quiet", "panic=-1", "no_timer_check", "mitigations=off"]
"""
"""The last two: a busy host is no broken timer, and emulation is slow enough."""
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
gather_ms = 240000
"""
BOOT_MS = 300_000
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

    def unplug(self, machine: Machine) -> None:
        """Let a machine die at once, as if its mains cable was pulled."""
        vm = self.vms.pop(machine.name)
        vm.process.kill()
        vm.process.wait()
        (self.directory / f"{machine.name}.power").unlink()

    def sent_size(self, machine: Machine) -> int:
        """Return the bytes that came to a machine since it was plugged in."""
        words = ["ip", "-s", "-j", "link", "show", self.vms[machine.name].tap]
        said = subprocess.run(self.lab.inside(words), check=True, capture_output=True).stdout
        return int(json.loads(said)[0]["stats64"]["tx"]["bytes"])

    def slow_down(self, machine: Machine, rate: int | None) -> None:
        """Let *rate* bytes a second come to a machine, or as many as can."""
        tap = self.vms[machine.name].tap
        words = ["tc", "qdisc", "del", "dev", tap, "root"]
        if rate is not None:
            words = ["tc", "qdisc", "add", "dev", tap, "root", "tbf", "rate", f"{rate * 8}bit",
                     "burst", "16kb", "latency", "300ms"]  # fmt: skip
        subprocess.run(self.lab.inside(words), check=True, capture_output=True)

    def _power(self, name: str) -> Path:
        return self.directory / f"{name}.power"

    def configure(self) -> None:
        """Write the head's configuration and its nodes file, and start kaboot."""
        inventory = INVENTORY.format(address=boot_lab.ADDRESS, network=NETWORK)
        for one in self.machines:
            inventory += INVENTORY_NODE.format(
                name=one.name, mac=one.mac, address=one.address, firmware=one.firmware
            )
        self.lab.serve(inventory)
        text = SETTINGS.format(address=boot_lab.ADDRESS, directory=self.directory, boot_ms=BOOT_MS)
        (self.directory / "kadeploy.toml").write_text(text)
        public = (self.directory / "id.pub").read_text().strip()
        nodes = {"ssh_keys": [public], "nodes": [self._node(one) for one in self.machines]}
        (self.directory / "nodes.yaml").write_text(json.dumps(nodes))  # JSON is YAML

    def swap(self, old: Machine, new: Machine) -> None:
        """Put another machine of that name in a machine's place."""
        self.unplug(old)
        self.machines = [new if one == old else one for one in self.machines]
        self.plug_in(new)

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

    def command(self, *words: str | Path) -> list[str | Path]:
        """Return the words of a kadeploy command; it belongs into the room."""
        program = "from kadeploy.cli import main; main()"
        return [sys.executable, "-c", program, "-c", self.directory / "kadeploy.toml", *words]

    def kadeploy(self, *words: str | Path, status: int = 0) -> str:
        """Run kadeploy; return what it printed; it must end with *status*."""
        command = self.lab.inside(self.command(*words))
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, cwd=ROOT)
        said = f"kadeploy {' '.join(map(str, words))}: {done.returncode}"
        print(f"{said}\n{done.stderr}")
        assert done.returncode == status, f"{said}\n{done.stdout}{done.stderr}\n{self.lab.state()}"
        return done.stdout

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """Start `kadeploy run`; return when the deployment is in the store."""
        with self._store() as store:
            before = len(store.deployments())

        def there() -> bool:
            with self._store() as store:
                return len(store.deployments()) > before

        process = self.lab.start(self.command("run", *words), "run.log")
        self.lab.until(there, "a deployment", 60)
        return process

    def history(self) -> list[HistoryRow]:
        """Return every try of every step of the last deployment."""
        with self._store() as store:
            return store.history(store.deployment().id)

    def status(self) -> dict[str, str]:
        """Return what has become of every node in the last deployment, so far."""
        with self._store() as store:
            return {one.name: one.status.value for one in store.nodes(store.deployment().id)}

    def until_done(self, step: str, *machines: Machine) -> None:
        """Wait until machines are through a step of the last deployment."""
        wanted = {(one.name, step, True) for one in machines}
        self.lab.until(
            lambda: wanted <= {(one.node, one.step, one.ok) for one in self.history()}, step, RUN_S
        )

    def _store(self) -> Store:
        return Store.open(self.directory / "kadeploy/kadeploy.db")

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
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(environment / name, files / name)
    key = directory / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    list(make_site(files, [key.with_suffix(".pub").read_text().strip()]))
    with boot_lab.lab(directory) as lab:
        yield Room(lab, machines)
