"""A room in a network namespace: a bridge, kaboot on it, and virtual machines that boot over it.

Owns namespaces, processes and their ends.  Nothing leaves the namespaces, so a DHCP server in here
troubles nobody.  Machines are QEMU without KVM: half a minute for a boot.

A second namespace, on the same bridge, is for a DHCP server that is not ours.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kaboot import Control, Event

__all__ = ["ADDRESS", "FOREIGN", "FOREIGN_MAC", "ROOT", "Lab", "Vm", "lab", "lacking"]

ROOT = Path(__file__).parents[2]
ADDRESS = "10.78.0.1"
FOREIGN = "10.78.0.2"
FOREIGN_MAC = "52:54:00:00:00:f0"
TOOLS = ("qemu-system-x86_64", "dnsmasq", "ip", "nsenter", "busybox", "setpriv", "apt-get")
FILES = (
    "/usr/share/OVMF/OVMF_CODE_4M.ms.fd",
    "/usr/lib/ipxe/undionly.kpxe",
    "/usr/lib/shim/shimx64.efi.signed",
    "/usr/lib/grub/x86_64-efi-signed/grubnetx64.efi.signed",
    "/dev/net/tun",
)
OVMF = Path("/usr/share/OVMF")
START_TIMEOUT_S = 20.0


def lacking() -> str | None:
    """Return what keeps virtual machines from running here."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    absent += [file for file in FILES if not Path(file).exists()]
    return f"not there: {', '.join(absent)}" if absent else None


@dataclass(slots=True)
class Vm:
    """A running machine; its serial console is a file."""

    process: subprocess.Popen[bytes]
    console: Path
    tap: str
    """Its cable's end in the room."""

    def text(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""


@dataclass(slots=True)
class Lab:
    """The room; `directory` holds the inventory, the files and the state."""

    directory: Path
    namespace: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    vms: list[Vm] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.directory / "kaboot.toml"

    def inside(self, command: Sequence[str | Path], *, foreign: bool = False) -> list[str]:
        """Return the command as it is run in the room, or on the foreign server."""
        name = f"{self.namespace}f" if foreign else self.namespace
        return ["nsenter", f"--net=/run/netns/{name}", "--", *map(str, command)]

    def start(
        self,
        command: Sequence[str | Path],
        log: str,
        *,
        foreign: bool = False,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a program in the room; it is ended with it."""
        with open(self.directory / log, "ab") as file:
            process = subprocess.Popen(
                self.inside(command, foreign=foreign),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=pass_fds,
                cwd=ROOT,
            )
        self.processes.append(process)
        return process

    def serve(self, inventory: str) -> subprocess.Popen[bytes]:
        """Write the inventory and start kaboot on it; return when it serves."""
        self.config.write_text(inventory)
        reader, writer = os.pipe()
        try:
            command = [sys.executable, "-c", "from kaboot.cli import main; main()"]
            command += ["-c", str(self.config), "serve", "--ready-fd", str(writer)]
            process = self.start(command, "serve.log", pass_fds=(writer,))
            os.close(writer)
            writer = -1
            word = os.read(reader, 16)  # ends at the latest when the process does
            assert word, f"kaboot did not start:\n{self.log()}"
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        return process

    def log(self) -> str:
        path = self.directory / "serve.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def control(self) -> Control:
        return Control.open(self.config)

    def foreign_dhcp(self) -> None:
        """Start a DHCP server that is not ours, busybox's; it knows nothing of booting."""
        config = self.directory / "foreign.conf"
        config.write_text(
            "start 10.78.0.50\nend 10.78.0.60\ninterface eth0\noption subnet 255.255.255.0\n"
            f"lease_file {self.directory}/foreign.leases\npidfile {self.directory}/foreign.pid\n"
        )
        self.start(["busybox", "udhcpd", "-f", config], "foreign.log", foreign=True)

    def boot(self, name: str, mac: str, *options: str, memory_mib: int = 512) -> Vm:
        """Switch a machine on."""
        tap = f"tap{len(self.vms)}"
        console = self.directory / f"{name}.console"
        console.unlink(missing_ok=True)
        for words in (["tuntap", "add", tap, "mode", "tap"], ["link", "set", tap, "master", "br0",
                      "up"]):  # fmt: skip
            subprocess.run(self.inside(["ip", *words]), check=True, timeout=10)
        card = f"virtio-net-pci,netdev=n0,mac={mac},bootindex=0"
        if "uefi" in options:  # OVMF's own network stack, not the card's ROM
            card += ",romfile="
        command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1",
            "-m", str(memory_mib), "-display", "none", "-no-reboot", "-monitor", "none",
            "-serial", f"file:{console}",
            "-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no", "-device", card,
            *(option for option in options if option != "uefi"),
        ]  # fmt: skip
        vm = Vm(self.start(command, f"{name}.qemu"), console, tap)
        self.vms.append(vm)
        return vm

    def uefi(self, name: str, *, secure: bool = False) -> list[str]:
        """Return the options that give a machine OVMF, with Microsoft's keys in it if secure."""
        keys = ".ms" if secure else ""
        variables = self.directory / f"{name}.vars"
        shutil.copy(OVMF / f"OVMF_VARS_4M{keys}.fd", variables)
        options = [
            "uefi", "-machine", f"q35,smm={'on' if secure else 'off'}",
            "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={OVMF}/OVMF_CODE_4M{keys}.fd",
            "-drive", f"if=pflash,format=raw,unit=1,file={variables}",
        ]  # fmt: skip
        # What keeps variables from all but the firmware also makes writing them slow.
        return options + ["-global", "driver=cfi.pflash01,property=secure,value=on"] * secure

    def ask_dhcp(self, arch: int, *options: str) -> dict[str, str]:
        """Be a PXE client of a kind, on the foreign server; return what it was told.

        Keys are udhcpc's, such as ip and siaddr; and program, wherever in the packet it stood.
        """
        told = self.directory / "told"
        told.unlink(missing_ok=True)
        script = self.directory / "told.sh"
        script.write_text(f'#!/bin/sh\n[ "$1" != bound ] || env >{told}\n')
        script.chmod(0o755)
        kind = "HTTPClient" if arch in (16, 19) else "PXEClient"
        command = ["busybox", "udhcpc", "-i", "eth0", "-f", "-n", "-q", "-t", "5", "-T", "1"]
        command += ["-s", str(script), "-O", "bootfile", "-V", f"{kind}:Arch:{arch:05}:UNDI:003000"]
        command += ["-x", f"0x5d:{arch:04x}", *options]
        run = subprocess.run(
            self.inside(command, foreign=True), check=False, capture_output=True, timeout=30
        )
        assert told.exists(), f"no answer: {run.stderr.decode()}\n{self.state()}"
        facts = dict(line.split("=", 1) for line in told.read_text().splitlines() if "=" in line)
        facts["program"] = facts.get("bootfile") or facts["boot_file"]
        return facts

    def until(self, fact: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for a fact; fail with all that is known when it does not come true."""
        deadline = time.monotonic() + timeout_s
        while not fact():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not after {timeout_s:.0f} s\n{self.state()}")
            time.sleep(0.1)

    def until_stage(self, who: str, stage: str, text: str = "", timeout_s: float = 300.0) -> Event:
        """Wait for an event of a node or MAC; return it."""
        found: list[Event] = []

        def there() -> bool:
            with self.control() as control:
                events = control.events(node=who)
            found[:] = [e for e in events if e.stage == stage and text in e.detail]
            return bool(found)

        self.until(there, f"{who}: {stage} {text}", timeout_s)
        return found[0]

    def state(self) -> str:
        """Return consoles and log, for the message of a failed test."""
        parts = [f"--- kaboot\n{self.log()[-6000:]}"]
        parts += [f"--- {vm.console.name}\n{vm.text()[-3000:]}" for vm in self.vms]
        return "\n".join(parts)

    def end(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def lab(directory: Path) -> Iterator[Lab]:
    """Make a room; all of it is gone afterwards."""
    # Not by process: what a killed run left behind must not be in the way of a later one.
    room = Lab(directory, f"kab{uuid.uuid4().hex[:8]}")
    foreign = f"{room.namespace}f"
    try:
        for name in (room.namespace, foreign):
            _ip("netns", "add", name)
        for words in (
            "link set lo up",
            "link add br0 type bridge forward_delay 0",
            f"addr add {ADDRESS}/24 dev br0",
            "link set br0 up",
            f"link add toforeign type veth peer name eth0 netns {foreign}",
            "link set toforeign master br0 up",
        ):
            _ip("-n", room.namespace, *words.split())
        for words in (
            "link set lo up",
            f"link set eth0 address {FOREIGN_MAC}",
            f"addr add {FOREIGN}/24 dev eth0",
            "link set eth0 up",
        ):
            _ip("-n", foreign, *words.split())
        yield room
    finally:
        room.end()
        for name in (room.namespace, foreign):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True)
