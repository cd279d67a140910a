"""Foreign management controllers on this host, each with a QEMU machine it has power over.

OpenIPMI's `ipmi_sim` runs the machine itself, and is its BMC from the inside too.  The Redfish
emulator of sushy-tools keeps a system whose power it reports by PUT: what it reports is done to the
machine here.  A machine has started when its firmware has said so on the debug port.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bcrypt

from kadeploy.nodes import PowerDriver, PowerSpec

__all__ = ["Machine", "ipmi_sim", "redfish_emulator"]

USER, PASSWORD = "admin", "not-to-be-seen"
START_S = 20.0
SYSTEM = "27946b59-9e44-4fa7-8e91-f3527a1ef094"
_LAN = """name "bmc"
set_working_mc 0x20
  startlan 1
    addr 127.0.0.1 {port}
    priv_limit admin
    allowed_auths_admin none md2 md5 straight
    guid a123456789abcdefa123456789abcdef
  endlan
  serial 15 127.0.0.1 {vm_port} codec VM
  startcmd "{command}"
  startnow false
  poweroff_wait 1
  kill_wait 2
  user 2 true "{user}" "{password}" admin 10 none md2 md5 straight
"""
_EMU = "mc_setbmc 0x20\nmc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02\nmc_enable 0x20\n"


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual machine that somebody else switches."""

    directory: Path

    def command(self) -> list[str]:
        said = f"file,id=said,path={self.directory / 'said'}"
        return [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-display", "none", "-nodefaults",
            "-pidfile", str(self.directory / "pid"),
            "-chardev", said, "-device", "isa-debugcon,iobase=0x402,chardev=said",
        ]  # fmt: skip

    @property
    def started(self) -> bool:
        path = self.directory / "said"
        return self.pid is not None and path.exists() and b"SeaBIOS" in path.read_bytes()

    @property
    def pid(self) -> int | None:
        """Its process, if it runs; QEMU removes the file when it ends."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.directory / "pid").read_text())
            os.kill(pid, 0)
            return pid
        return None

    def end(self) -> None:
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _password_file(directory: Path) -> str:
    path = directory / "password"
    path.write_text(f"{PASSWORD}\n")
    path.chmod(0o600)
    return str(path)


def _free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@contextlib.contextmanager
def ipmi_sim(directory: Path) -> Iterator[tuple[PowerSpec, Machine]]:
    """Run OpenIPMI's simulator of a BMC."""
    machine = Machine(directory)
    port = _free_port(socket.SOCK_DGRAM)
    vm_port = _free_port(socket.SOCK_STREAM)
    inside = f"socket,id=ipmi,host=127.0.0.1,port={vm_port},reconnect=1"
    command = shlex.join([
        *machine.command(), "-chardev", inside,
        "-device", "ipmi-bmc-extern,chardev=ipmi,id=bmc", "-device", "isa-ipmi-kcs,bmc=bmc",
    ])  # fmt: skip
    lan = _LAN.format(port=port, vm_port=vm_port, command=command, user=USER, password=PASSWORD)
    (directory / "lan.conf").write_text(lan)
    (directory / "sim.emu").write_text(_EMU)
    words = ["ipmi_sim", "-c", str(directory / "lan.conf"), "-f", str(directory / "sim.emu")]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [*words, "-s", str(directory), "-n"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield (
            PowerSpec(PowerDriver.IPMI, "127.0.0.1", port, USER, _password_file(directory)),
            machine,
        )
    finally:
        process.kill()
        process.wait()
        machine.end()


class _Switch(http.server.BaseHTTPRequestHandler):
    """Takes what the emulator reports, and does it to the machine."""

    machine: Machine
    process: subprocess.Popen[bytes] | None = None

    def do_PUT(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        if content["power_state"] == "On" and kind.process is None:
            kind.process = subprocess.Popen(self.machine.command())
        elif content["power_state"] == "Off" and kind.process is not None:
            kind.process.kill()
            kind.process.wait()
            kind.process = None
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def redfish_emulator(directory: Path) -> Iterator[tuple[PowerSpec, Machine]]:
    """Run the emulator of sushy-tools, with a user and a password."""
    machine = Machine(directory)
    switch = type("Switch", (_Switch,), {"machine": machine})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), switch)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = _free_port(socket.SOCK_STREAM)
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    (directory / "htpasswd").write_text(f"{USER}:{hashed}\n")
    settings = {
        "SUSHY_EMULATOR_AUTH_FILE": str(directory / "htpasswd"),
        "SUSHY_EMULATOR_STATE_DIR": str(directory),
        "SUSHY_EMULATOR_FEATURE_SET": "minimum",
        "EXTERNAL_NOTIFICATION_URL": f"http://127.0.0.1:{server.server_port}/",
        "SUSHY_EMULATOR_FAKE_SYSTEMS": [
            {
                "uuid": SYSTEM,
                "name": "pc1",
                "power_state": "Off",
                "external_notifier": True,
                "nics": [],
            }
        ],
    }
    (directory / "emulator.py").write_text(
        "".join(f"{key} = {value!r}\n" for key, value in settings.items())
    )
    program = shutil.which("sushy-emulator", path=str(Path(sys.executable).parent))
    assert program is not None
    words = [program, "--fake", "--config", str(directory / "emulator.py")]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [*words, "-i", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        _until_open(port, process)
        url = f"http://127.0.0.1:{port}/redfish/v1/Systems/{SYSTEM}"
        yield (
            PowerSpec(PowerDriver.REDFISH, url, user=USER, password_file=_password_file(directory)),
            machine,
        )
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()
        if switch.process is not None:
            switch.process.kill()
            switch.process.wait()


def _until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, "the emulator ended"
        assert time.monotonic() < deadline, "the emulator does not listen"
        time.sleep(0.1)
