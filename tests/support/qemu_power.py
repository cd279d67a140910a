"""The power button of a virtual machine: `qemu_power.py SOCKET on|off|cycle|status`.

For kadeploy's `command` driver.  A machine is switched off when its processor stands still;
switching on resets it first.  It speaks QEMU's own protocol (QMP), over the machine's socket.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

COMMANDS = {
    "on": ("system_reset", "cont"),
    "off": ("stop",),
    "soft-off": ("stop",),
    "cycle": ("system_reset", "cont"),
    "status": ("query-status",),
}
TIMEOUT_S = 10


def say(stream: Any, command: str) -> dict[str, Any]:
    stream.write(json.dumps({"execute": command}).encode() + b"\n")
    stream.flush()
    while line := stream.readline():
        answer: dict[str, Any] = json.loads(line)
        if "event" not in answer:
            assert "return" in answer, answer
            return answer
    raise ConnectionError("the machine has gone")


def main(path: str, action: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        with sock.makefile("rwb") as stream:
            stream.readline()  # its greeting
            said = [say(stream, one) for one in ("qmp_capabilities", *COMMANDS[action])]
    if action == "status":
        print("on" if said[-1]["return"]["running"] else "off")


if __name__ == "__main__":
    main(*sys.argv[1:])
