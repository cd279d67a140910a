"""Power: escalation, and drivers against implementations that are not ours."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import KaError
from kadeploy.nodes import NodeSpec, PowerDriver, PowerSpec
from kadeploy.power import PowerAction, reboot_steps
from kadeploy.power_drivers import power

IPMI = PowerSpec(PowerDriver.IPMI, "10.0.0.9")
WAKE = PowerSpec(PowerDriver.WAKE, "02:00:00:00:00:01")
PDU = PowerSpec(PowerDriver.COMMAND, command=("pdu", "{node}", "{action}"))


def actions(node: NodeSpec, level: str) -> list[tuple[str, str]]:
    return [
        (one.spec.driver.value if one.spec else "system", one.action.value)
        for one in reboot_steps(node, level)
    ]


def test_a_reboot_escalates_from_the_system_to_the_last_way() -> None:
    node = NodeSpec("pc1", power=(IPMI, PDU))
    assert actions(node, "soft") == [("system", "cycle")]
    assert actions(node, "hard") == [("ipmi", "cycle")]
    assert actions(node, "harder") == [("command", "off"), ("command", "on")]


def test_a_node_that_can_only_be_woken_is_woken_last() -> None:
    node = NodeSpec("pc1", power=(WAKE,))
    assert actions(node, "harder") == [("wake-on-lan", "on")]
    with pytest.raises(KaError, match="no way to cycle"):
        reboot_steps(node, "hard")


async def test_any_command_is_told_node_and_action(tmp_path: Path) -> None:
    spec = PowerSpec(PowerDriver.COMMAND, command=("echo", "{node}-{action}"))
    assert await power(spec, "pc1", PowerAction.ON) == ""
    spec = PowerSpec(PowerDriver.COMMAND, command=("echo", "on"))
    assert await power(spec, "pc1", PowerAction.STATUS) == "on"
    with pytest.raises(KaError, match="false failed"):
        await power(PowerSpec(PowerDriver.COMMAND, command=("false",)), "pc1", PowerAction.ON)


async def test_a_machine_is_woken_by_its_magic_packet() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        spec = PowerSpec(PowerDriver.WAKE, "02:00:00:00:00:01", sock.getsockname()[1], "127.0.0.1")
        await power(spec, "pc1", PowerAction.ON)
        sock.settimeout(5)
        assert sock.recv(200) == b"\xff" * 6 + bytes.fromhex("020000000001") * 16


async def test_a_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("secret")
    path.chmod(0o644)
    spec = PowerSpec(PowerDriver.IPMI, "127.0.0.1", 1, "admin", str(path))
    with pytest.raises(KaError, match="chmod 600") as caught:
        await power(spec, "pc1", PowerAction.STATUS)
    assert "secret" not in str(caught.value)


class _Redfish(http.server.BaseHTTPRequestHandler):
    """The two resources that are needed, as the Redfish schema has them."""

    state = "Off"
    seen: list[str]

    def do_GET(self) -> None:
        self._answer({"PowerState": type(self).state})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        kind = json.loads(self.rfile.read(length))["ResetType"]
        if not self.path.endswith("/Actions/ComputerSystem.Reset"):
            self.send_error(404)
            return
        type(self).state = "Off" if kind in ("ForceOff", "GracefulShutdown") else "On"
        self._answer({})

    def _answer(self, content: dict[str, str]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


async def test_redfish_switches_and_tells() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redfish) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/redfish/v1/Systems/1"
            spec = PowerSpec(PowerDriver.REDFISH, url)
            assert await power(spec, "pc1", PowerAction.STATUS) == "off"
            await power(spec, "pc1", PowerAction.ON)
            assert await power(spec, "pc1", PowerAction.STATUS) == "on"
            wrong = PowerSpec(PowerDriver.REDFISH, f"{url}/Wrong/Actions")
            await power(wrong, "pc1", PowerAction.OFF)
        finally:
            server.shutdown()


# ---------------------------------------------------------------- OpenIPMI's simulator

_LAN = """name "bmc"
set_working_mc 0x20
  startlan 1
    addr 127.0.0.1 {port}
    priv_limit admin
    allowed_auths_callback none md2 md5 straight
    allowed_auths_user none md2 md5 straight
    allowed_auths_operator none md2 md5 straight
    allowed_auths_admin none md2 md5 straight
    guid a123456789abcdefa123456789abcdef
  endlan
  chassis_control "{script}"
  user 1 true  ""        "secret" user  10 none md2 md5 straight
  user 2 true  "admin"   "secret" admin 10 none md2 md5 straight
"""
_EMU = "mc_setbmc 0x20\nmc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02\nmc_enable 0x20\n"
_CONTROL = """#!/bin/sh
# OpenIPMI asks `control get power`, and tells `control set power 1`.
state={state}
case "$1" in
  get) echo "power:$(cat $state)" ;;
  set) shift; while [ $# -gt 0 ]; do
         case $1 in power) echo "$2" >$state ;; reset) echo reset >>$state.log ;; esac
         shift 2
       done ;;
esac
"""


@pytest.fixture
def bmc(tmp_path: Path) -> Iterator[PowerSpec]:
    if shutil.which("ipmi_sim") is None:
        pytest.skip("not installed: openipmi")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    state, script, password = tmp_path / "power", tmp_path / "control", tmp_path / "password"
    state.write_text("0\n")
    script.write_text(_CONTROL.format(state=state))
    script.chmod(0o755)
    password.write_text("secret\n")
    password.chmod(0o600)
    (tmp_path / "lan.conf").write_text(_LAN.format(port=port, script=script))
    (tmp_path / "sim.emu").write_text(_EMU)
    words = ["ipmi_sim", "-c", str(tmp_path / "lan.conf"), "-f", str(tmp_path / "sim.emu")]
    words += ["-s", str(tmp_path), "-n"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield PowerSpec(PowerDriver.IPMI, "127.0.0.1", port, "admin", str(password))
    finally:
        process.kill()
        process.wait()


async def test_openipmis_machine_is_switched_on_and_off(bmc: PowerSpec) -> None:
    assert await power(bmc, "pc1", PowerAction.STATUS) == "off"
    await power(bmc, "pc1", PowerAction.ON)
    assert await power(bmc, "pc1", PowerAction.STATUS) == "on"
    await power(bmc, "pc1", PowerAction.OFF)
    assert await power(bmc, "pc1", PowerAction.STATUS) == "off"
