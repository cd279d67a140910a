"""A lab of network namespaces with shaped links: one per node, joined by bridges, one per rack.

Links are shaped in both directions with a token bucket (tc tbf); racks are joined by an uplink that
may be slower.  Everything is named after this process and taken down at the end; nothing of the
machine's own network is touched, and nothing leaves the namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

from bench.systems import command
from common.errors import Code, KaError

__all__ = ["NetLab"]

BURST_SIZE = 128 * 1024
"""Above the largest segment that a virtual link carries at once (64 KiB)."""
QUEUE_MS = 50


class NetLab:
    """Namespaces 0 .. n with addresses 10.77.0.1 and up; a context manager."""

    def __init__(
        self,
        racks: Sequence[int],
        *,
        rate_mbit: float,
        uplink_mbit: float = 0.0,
    ) -> None:
        """*racks*: how many namespaces are in each, the first namespace being the source's.

        Rates of 0 leave a link as quick as it is.
        """
        self._racks = tuple(racks)
        self._rate_mbit = rate_mbit
        self._uplink_mbit = uplink_mbit
        self._prefix = f"kb{os.getpid() % 100000}"
        self.count = sum(racks)

    def name(self, node: int) -> str:
        return f"{self._prefix}n{node}"

    def address(self, node: int) -> str:
        return f"10.77.{(node + 1) // 250}.{(node + 1) % 250}"

    def inside(self, node: int, *arguments: str) -> list[str]:
        """Return the command line that runs a command in a node's namespace."""
        return ["ip", "netns", "exec", self.name(node), *arguments]

    def uplink_sizes(self) -> list[int]:
        """Return the bytes that have entered each rack but the first over its uplink."""
        return [_sent_size(self._core, f"up{rack}") for rack in range(1, len(self._racks))]

    def sent_size(self, node: int) -> int:
        """Return the bytes that have left a node by its link."""
        return _sent_size(self.name(node), "eth0")

    def cut(self, node: int) -> None:
        """Take a node's link down: neither it nor anybody else is told."""
        self._in_core("ip", "link", "set", f"p{node}", "down")

    def throttle(self, node: int, rate_mbit: float) -> None:
        """Give a node's link another rate, both ways; it must be shaped already."""
        self._shape(self._core, f"p{node}", rate_mbit, "change")
        self._shape(self.name(node), "eth0", rate_mbit, "change")

    @property
    def _core(self) -> str:
        return f"{self._prefix}c"

    def __enter__(self) -> NetLab:
        for program, package in (("ip", "iproute2"), ("tc", "iproute2")):
            if not shutil.which(program):
                raise KaError(Code.USAGE, f"{program} is missing (Debian package {package})")
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _build(self) -> None:
        command("ip", "netns", "add", self._core)
        for rack in range(len(self._racks)):
            self._in_core("ip", "link", "add", f"br{rack}", "type", "bridge", "forward_delay", "0")
            self._in_core("ip", "link", "set", f"br{rack}", "up")
            if rack:
                self._join(rack)
        rack_of = [rack for rack, size in enumerate(self._racks) for _ in range(size)]
        for node, rack in enumerate(rack_of):
            self._add(node, rack)

    def _join(self, rack: int) -> None:
        """Connect a rack's bridge to the first one."""
        up, down = f"up{rack}", f"down{rack}"
        self._in_core("ip", "link", "add", up, "type", "veth", "peer", "name", down)
        self._in_core("ip", "link", "set", up, "master", "br0", "up")
        self._in_core("ip", "link", "set", down, "master", f"br{rack}", "up")
        for device in (up, down):
            self._shape(self._core, device, self._uplink_mbit or self._rate_mbit)

    def _add(self, node: int, rack: int) -> None:
        name, port = self.name(node), f"p{node}"
        command("ip", "netns", "add", name)
        command("ip", "link", "add", "eth0", "netns", name, "type", "veth",
                "peer", "name", port, "netns", self._core)  # fmt: skip
        self._in_core("ip", "link", "set", port, "master", f"br{rack}", "up")
        self._shape(self._core, port, self._rate_mbit)
        self._shape(name, "eth0", self._rate_mbit)
        inside = (
            ("ip", "link", "set", "lo", "up"),
            ("ip", "address", "add", f"{self.address(node)}/16", "broadcast", "+", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
            ("ip", "route", "add", "224.0.0.0/4", "dev", "eth0"),
        )
        for arguments in inside:
            command(*self.inside(node, *arguments))

    def _shape(self, namespace: str, device: str, rate_mbit: float, verb: str = "add") -> None:
        if rate_mbit:
            command("ip", "netns", "exec", namespace,
                    "tc", "qdisc", verb, "dev", device, "root", "tbf", "rate", f"{rate_mbit}mbit",
                    "burst", str(BURST_SIZE), "latency", f"{QUEUE_MS}ms")  # fmt: skip

    def _in_core(self, *arguments: str) -> None:
        command("ip", "netns", "exec", self._core, *arguments)

    def _remove(self) -> None:
        listed = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True, check=False
        ).stdout.split()
        for name in [one for one in listed if one.startswith(self._prefix)]:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _sent_size(namespace: str, device: str) -> int:
    path = f"/sys/class/net/{device}/statistics/tx_bytes"
    shown = subprocess.run(
        ["ip", "netns", "exec", namespace, "cat", path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(shown.stdout)
