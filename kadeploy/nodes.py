"""Nodes as kadeploy sees them: which disk plays which role, who they are, how they get power.

Pure.  Made by `descriptions.py` from the nodes file.

Invariants
  * a node's disks are told by serial number, never by a device name: names change from boot to
    boot, and the wrong one costs somebody's data;
  * a serial occurs once in the whole file: copied lines are the usual way to wipe a disk;
  * passwords are in files of their own, never here.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface

from common.errors import Code, KaError

__all__ = ["NodeDisk", "NodeSpec", "Nodes", "PowerDriver", "PowerSpec", "Variable"]

_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9-]+|")
_KEY = re.compile(r"[!-~]+ [A-Za-z0-9+/=]+( [ -~]*)?")


class PowerDriver(enum.Enum):
    IPMI = "ipmi"
    REDFISH = "redfish"
    WAKE = "wake-on-lan"
    SSH = "ssh"
    COMMAND = "command"


@dataclass(frozen=True, slots=True)
class PowerSpec:
    driver: PowerDriver
    address: str = ""
    """Host of the BMC; URL of a Redfish system; MAC to wake; host for ssh."""
    port: int = 0
    user: str = ""
    password_file: str = ""
    command: tuple[str, ...] = ()
    """Words; `{node}` and `{action}` (on, off, cycle, soft-off, status) are filled in."""
    verify_tls: bool = True

    def validate(self) -> None:
        if self.driver is PowerDriver.COMMAND and not self.command:
            raise ValueError("power: the command driver needs a command")
        if self.driver is not PowerDriver.COMMAND and not self.address:
            raise ValueError(f"power: {self.driver.value} needs an address")
        if not 0 <= self.port < 65536:
            raise ValueError(f"power: not a port: {self.port}")


@dataclass(frozen=True, slots=True)
class NodeDisk:
    role: str
    serial: str

    def validate(self) -> None:
        if not self.serial.strip() or not self.serial.isprintable():
            raise ValueError(f"disk {self.role}: not a serial number: {self.serial!r}")


@dataclass(frozen=True, slots=True)
class Variable:
    """Something of this node for your templates."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class NodeSpec:
    name: str
    disks: tuple[NodeDisk, ...] = ()
    address: str = ""
    """With prefix: 10.0.0.11/24; empty: by DHCP."""
    gateway: str = ""
    dns: tuple[str, ...] = ()
    mac: str = ""
    power: tuple[PowerSpec, ...] = ()
    """Ways to power it, mildest first."""
    variables: tuple[Variable, ...] = ()

    def validate(self) -> None:
        if not _HOST.fullmatch(self.name):
            raise ValueError(f"not a host name: {self.name[:80]!r}")
        try:
            if self.address:
                if "/" not in self.address:
                    raise ValueError("write it with its prefix: 10.0.0.11/24")
                ip_interface(self.address)
            for one in (*([self.gateway] if self.gateway else []), *self.dns):
                ip_address(one)
        except ValueError as error:
            raise ValueError(f"node {self.name}: {error}") from None
        if self.mac and not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", self.mac):
            raise ValueError(f"node {self.name}: not a MAC (02:00:00:00:00:01): {self.mac!r}")
        roles = [disk.role for disk in self.disks]
        if len(set(roles)) != len(roles):
            raise ValueError(f"node {self.name}: a disk role is there twice")

    def serial_of(self, role: str) -> str | None:
        return next((disk.serial for disk in self.disks if disk.role == role), None)


@dataclass(frozen=True, slots=True)
class Nodes:
    nodes: tuple[NodeSpec, ...]
    domain: str = ""
    ssh_keys: tuple[str, ...] = ()
    """Public keys for root of every deployed system."""

    def validate(self) -> None:
        names: set[str] = set()
        serials: dict[str, str] = {}
        for node in self.nodes:
            if node.name in names:
                raise ValueError(f"node {node.name!r} is there twice")
            names.add(node.name)
            for disk in node.disks:
                if disk.serial in serials:
                    raise ValueError(
                        f"serial {disk.serial!r} is both {serials[disk.serial]}'s and {node.name}'s"
                    )
                serials[disk.serial] = node.name
        if not _DOMAIN.fullmatch(self.domain):
            raise ValueError(f"not a domain: {self.domain!r}")
        for key in self.ssh_keys:
            if not _KEY.fullmatch(key):
                raise ValueError(f"not a public key: {key[:40]!r}")

    def get(self, name: str) -> NodeSpec:
        """Return a node by name; raises USAGE."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KaError(Code.USAGE, f"no node {name!r} in the nodes file")
