"""Power drivers: IPMI, Redfish, wake-on-LAN, ssh, any command.  The only importer of pyghmi.

Every driver takes one action and returns the state it knows ("on", "off" or ""); raises KaError
with one line, whatever answers: a controller that talks nonsense costs its own node alone.
Libraries that block run in threads.  Passwords come from files that only their owner can read, and
go into no message.
"""

from __future__ import annotations

import base64
import functools
import http.client
import json
import os
import socket
import ssl
import stat
import struct
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import trio

from common.errors import Code, KaError
from kadeploy.nodes import PowerDriver, PowerSpec
from kadeploy.power import PowerAction

__all__ = ["power"]

CALL_S = 30.0
CALLS_MAX = 256
"""At once: each has a thread or a process."""
_limit: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("power calls")
IPMI_PORT = 623
WAKE_PORT = 9
PASSWORD_SIZE_MAX = 1024

_IPMI = {
    PowerAction.ON: "on",
    PowerAction.OFF: "off",
    PowerAction.CYCLE: "boot",
    PowerAction.SOFT_OFF: "shutdown",
}
_REDFISH = {
    PowerAction.ON: "On",
    PowerAction.OFF: "ForceOff",
    PowerAction.CYCLE: "ForceRestart",
    PowerAction.SOFT_OFF: "GracefulShutdown",
}


async def power(spec: PowerSpec, node: str, action: PowerAction) -> str:
    """Do one action; return the state after it as far as the driver tells."""
    async with _calls():
        with trio.move_on_after(CALL_S):
            if spec.driver is PowerDriver.COMMAND:
                return await _command(spec, node, action)
            if spec.driver is PowerDriver.SSH:
                return await _ssh(spec, action)
            call = {
                PowerDriver.IPMI: _ipmi,
                PowerDriver.REDFISH: _redfish,
                PowerDriver.WAKE: _wake,
            }[spec.driver]
            work = functools.partial(call, spec, action)
            # A thread of its own: those of all others may be waiting for dead controllers.
            own = trio.CapacityLimiter(1)
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=own)
    raise KaError(Code.TIMEOUT, f"{node}: {spec.driver.value} does not answer")


def _calls() -> trio.CapacityLimiter:
    """Return what bounds the calls of this process; who waits for a place loses no time by it."""
    try:
        return _limit.get()
    except LookupError:
        made = trio.CapacityLimiter(CALLS_MAX)
        _limit.set(made)
        return made


def _password(spec: PowerSpec) -> str:
    if not spec.password_file:
        return ""
    path = Path(spec.password_file)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
                raise KaError(Code.USAGE, f"{path}: others may read it: chmod 600 {path}")
            return file.read(PASSWORD_SIZE_MAX).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KaError(Code.USAGE, f"{path}: cannot read the password: {error}") from None


async def _run(words: list[str]) -> str:
    try:
        done = await trio.run_process(
            words, stdin=b"", capture_stdout=True, capture_stderr=True, check=False
        )
    except OSError as error:
        raise KaError(Code.USAGE, f"{words[0]}: {error.strerror}") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise KaError(Code.EIO, f"{words[0]} failed ({done.returncode}): {' '.join(said)}")
    return done.stdout.decode(errors="replace").strip()


async def _command(spec: PowerSpec, node: str, action: PowerAction) -> str:
    filled = {"{node}": node, "{action}": action.value}
    words = list(spec.command)
    for key, value in filled.items():
        words = [word.replace(key, value) for word in words]
    said = await _run(words)
    return said if said in ("on", "off") else ""


async def _ssh(spec: PowerSpec, action: PowerAction) -> str:
    command = {PowerAction.CYCLE: "reboot", PowerAction.SOFT_OFF: "poweroff"}.get(action)
    if command is None:
        raise KaError(Code.USAGE, f"ssh cannot do {action.value}")
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
    words += ["-p", str(spec.port)] if spec.port else []
    user = spec.user or "root"
    await _run([*words, f"{user}@{spec.address}", "--", f"(sleep 1; {command}) >/dev/null 2>&1 &"])
    return ""


def _wake(spec: PowerSpec, action: PowerAction) -> str:
    if action is not PowerAction.ON:
        raise KaError(Code.USAGE, f"wake-on-lan cannot do {action.value}")
    try:
        mac = bytes.fromhex(spec.address.replace(":", "").replace("-", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise KaError(Code.USAGE, f"wake-on-lan: not a MAC: {spec.address!r}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        # `user` has no meaning here; the broadcast address of another segment may stand in it.
        place = (spec.user or "<broadcast>", spec.port or WAKE_PORT)
        try:
            sock.sendto(b"\xff" * 6 + mac * 16, place)
        except OSError as error:
            message = f"wake-on-lan {spec.address}: {error.strerror}"
            raise KaError(Code.UNREACHABLE, message) from None
    return ""


def _ipmi(spec: PowerSpec, action: PowerAction) -> str:
    from pyghmi.exceptions import PyghmiException  # a second to load, for those who need it
    from pyghmi.ipmi.command import Command

    session = None
    try:
        # Bytes, and out again at the end: pyghmi 1.6 finds a session of its own only by the very
        # values it was given, which it keeps as bytes.  By text it does not find it, and hands the
        # next call one that waits for ever for a log-on that is long over.
        session = Command(
            bmc=spec.address,
            userid=spec.user.encode(),
            password=_password(spec).encode(),
            port=spec.port or IPMI_PORT,
            keepalive=False,
        )
        if action is PowerAction.STATUS:
            return str(session.get_power()["powerstate"])
        said = session.set_power(_IPMI[action], wait=False)
        return str(said.get("pendingpowerstate", said.get("powerstate", "")))
    # pyghmi unpacks what comes as if it were whole.
    except (PyghmiException, OSError, LookupError, TypeError, ValueError, struct.error) as error:
        raise KaError(Code.UNREACHABLE, f"ipmi {spec.address}: {error}") from None
    finally:
        if session is not None:
            session.ipmi_session.logout()


def _redfish(spec: PowerSpec, action: PowerAction) -> str:
    """`address` is the URL of the system: https://bmc/redfish/v1/Systems/1."""
    if action is PowerAction.STATUS:
        return str(_redfish_call(spec, spec.address).get("PowerState", "")).lower()
    url = f"{spec.address.rstrip('/')}/Actions/ComputerSystem.Reset"
    _redfish_call(spec, url, {"ResetType": _REDFISH[action]})
    return ""


def _redfish_call(
    spec: PowerSpec, url: str, content: dict[str, str] | None = None
) -> dict[str, Any]:
    if not url.startswith(("https://", "http://")):
        raise KaError(Code.USAGE, f"redfish: the address must be a URL: {url[:80]!r}")
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if spec.user:
        token = base64.b64encode(f"{spec.user}:{_password(spec)}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    context = ssl.create_default_context()
    if not spec.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(request, timeout=CALL_S, context=context) as answer:
            body = answer.read(1 << 20)
        found: object = json.loads(body) if body else {}
        if not isinstance(found, dict):
            raise ValueError("its answer is not an object")
        return found
    except urllib.error.HTTPError as error:
        with error:
            raise KaError(Code.EIO, f"redfish {url}: {error.code} {error.reason}") from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        said = " ".join(str(error).split())  # perhaps the controller's own words
        raise KaError(Code.UNREACHABLE, f"redfish {url}: {said}") from None
