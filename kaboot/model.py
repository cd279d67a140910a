"""The words of network boot: a site, its machines, what they can boot, and in which step they are.

Pure.  `inventory.py` makes these from a file; all others take them as arguments.

Invariants
  * a node's name, each MAC and each address occur once in an inventory;
  * all texts here have passed `words.py`, so renderers may put them into scripts;
  * a machine is what has a MAC; a node is what has a name.  Unknown machines are not nodes.

Not here: the state that changes (store.py) and what follows from it (steps.py).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from types import MappingProxyType
from typing import TypeVar

from common.errors import Code, KaError

__all__ = [
    "Arch",
    "Assignment",
    "Firmware",
    "Inventory",
    "Loader",
    "Loaders",
    "Machine",
    "Mode",
    "Node",
    "Profile",
    "Site",
    "Step",
]


T = TypeVar("T")


class Step(enum.Enum):
    """What a machine does at its next network boot."""

    INSTALL = "install"
    """Boot the deployment environment."""
    DEPLOYED = "deployed"
    """Boot the system that was just written, and say so when it is up."""
    LOCAL = "local"
    """Boot from its own disk."""
    RESCUE = "rescue"
    MENU = "menu"
    """Ask at the console."""
    DISCOVER = "discover"
    """Report what it is; touch nothing."""
    CUSTOM = "custom"
    """Boot a profile of the administrator's."""


class Firmware(enum.Enum):
    BIOS = "bios"
    UEFI = "uefi"
    ANY = "any"


class Arch(enum.Enum):
    X86_64 = "x86_64"
    ARM64 = "arm64"


class Loader(enum.Enum):
    """The program a UEFI machine gets first.  A BIOS machine always gets iPXE."""

    AUTO = "auto"
    """Of a node: as the site has it.  Of a site: iPXE beside a foreign server, else shim."""
    SHIM = "shim"
    """Debian's signed shim and GRUB: works with Secure Boot on and off.

    GRUB asks the DHCP server's `next-server` for its configuration, not the proxy: beside a foreign
    server that does not name kaboot there, it would end in a prompt.
    """
    IPXE = "ipxe"
    """Unsigned iPXE: with Secure Boot on, firmware refuses it and goes on to its next entry."""


class Mode(enum.Enum):
    """Who gives out addresses."""

    DHCP = "dhcp"
    """kaboot's dnsmasq."""
    PROXY = "proxy"
    """Another server, beside which kaboot's dnsmasq answers network boots only (proxyDHCP)."""
    SITE = "site"
    """Another server, which names kaboot itself; see `kaboot render --site`."""


@dataclass(frozen=True, slots=True)
class Loaders:
    """Where the first programs are on this host."""

    ipxe_bios: str = "/usr/lib/ipxe/undionly.kpxe"
    ipxe_x86_64: str = "/usr/lib/ipxe/snponly.efi"
    shim_x86_64: str = "/usr/lib/shim/shimx64.efi.signed"
    grub_x86_64: str = "/usr/lib/grub/x86_64-efi-signed/grubnetx64.efi.signed"
    ipxe_arm64: str = "/usr/lib/ipxe/snponly-arm64.efi"
    shim_arm64: str = "/usr/lib/shim/shimaa64.efi.signed"
    grub_arm64: str = "/usr/lib/grub/arm64-efi-signed/grubnetaa64.efi.signed"


@dataclass(frozen=True, slots=True)
class Site:
    """One network segment and the server in it."""

    address: IPv4Address
    network: IPv4Network
    interface: str
    files: str
    state: str
    mode: Mode = Mode.DHCP
    pool: tuple[IPv4Address, IPv4Address] | None = None
    router: IPv4Address | None = None
    dns: tuple[IPv4Address, ...] = ()
    domain: str = ""
    lease_s: int = 3600
    http_port: int = 8069
    user: str = "nobody"
    loader: Loader = Loader.AUTO
    unknown: Step = Step.DISCOVER
    boot_window: int = 0
    boot_hold_s: int = 120
    menu_timeout_s: int = 15
    loaders: Loaders = field(default_factory=Loaders)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.http_port}"

    @property
    def uefi_loader(self) -> Loader:
        """What UEFI machines get that have no wish of their own."""
        if self.loader is not Loader.AUTO:
            return self.loader
        return Loader.IPXE if self.mode is Mode.PROXY else Loader.SHIM


@dataclass(frozen=True, slots=True)
class Profile:
    """Something to boot: a kernel, or an EFI program.  Paths are below `Site.files`."""

    name: str
    title: str
    kernel: str = ""
    initrds: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    nfsroot: tuple[str, ...] = ()
    """Gateways' exports, `ADDRESS:/PATH`; nodes are spread over them."""
    nfs_options: str = "vers=3,nolock"
    program: str = ""
    menu: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with a name."""

    name: str
    macs: tuple[str, ...] = ()
    address: IPv4Address | None = None
    arch: Arch = Arch.X86_64
    firmware: Firmware = Firmware.ANY
    loader: Loader = Loader.AUTO
    rack: str = ""
    serial: str = ""
    arguments: tuple[str, ...] = ()
    step: Step = Step.LOCAL
    profile: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a node is to boot: a step, and for `custom` the profile's name."""

    step: Step
    profile: str = ""

    def __str__(self) -> str:
        return f"{self.step.value}:{self.profile}" if self.profile else self.step.value


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine told about itself when it asked for its script."""

    mac: str
    platform: str = ""
    arch: str = ""
    serial: str = ""
    product: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """A site with its nodes and profiles, by name."""

    site: Site
    nodes: Mapping[str, Node]
    profiles: Mapping[str, Profile]
    by_mac: Mapping[str, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, site: Site, nodes: tuple[Node, ...], profiles: tuple[Profile, ...]) -> Inventory:
        """Put an inventory together; raises USAGE if something occurs twice or cannot be."""
        by_name: dict[str, Node] = {}
        addresses: dict[IPv4Address, str] = {site.address: "the server"}
        serials: dict[str, str] = {}
        for node in nodes:
            _once(by_name, node.name, node, f"node {node.name} occurs twice")
            if node.address is not None:
                _inside(site, node)
                other = addresses.setdefault(node.address, node.name)
                if other != node.name:
                    raise KaError(
                        Code.USAGE, f"{node.address} is the address of {other} and {node.name}"
                    )
            if node.serial:
                other = serials.setdefault(node.serial, node.name)
                if other != node.name:
                    raise KaError(
                        Code.USAGE, f"{node.serial} is the serial of {other} and {node.name}"
                    )
        named: dict[str, Profile] = {}
        for profile in profiles:
            _once(named, profile.name, profile, f"profile {profile.name} occurs twice")
        made = cls(site, MappingProxyType(by_name), MappingProxyType(named), _macs(nodes))
        for node in nodes:
            made.check(Assignment(node.step, node.profile), node.name)
        made.check(Assignment(site.unknown), "unknown machines")
        return made

    def with_learned(self, learned: Mapping[str, str]) -> Inventory:
        """Return the inventory with machines named by learning: MAC to node name.

        What the file says goes before: a MAC that is in it, or a node that is not, is left out.
        """
        nodes = dict(self.nodes)
        for mac, name in learned.items():
            if mac not in self.by_mac and name in nodes:
                nodes[name] = replace(nodes[name], macs=(*nodes[name].macs, mac))
        return Inventory(
            self.site, MappingProxyType(nodes), self.profiles, _macs(tuple(nodes.values()))
        )

    def check(self, assignment: Assignment, whose: str) -> None:
        """Raise USAGE if what is assigned cannot be booted."""
        step, name = assignment.step, assignment.profile
        if step is Step.CUSTOM and not name:
            raise KaError(Code.USAGE, f"{whose}: custom needs a profile: custom:NAME")
        if step is not Step.CUSTOM and name:
            raise KaError(Code.USAGE, f"{whose}: only custom takes a profile, {step.value} none")
        wanted = name or (step.value if step in (Step.INSTALL, Step.RESCUE) else "")
        if wanted and wanted not in self.profiles:
            raise KaError(Code.USAGE, f"{whose}: no profile {wanted!r} in the inventory")


def _once(table: dict[str, T], key: str, value: T, complaint: str) -> None:
    if key in table:
        raise KaError(Code.USAGE, complaint)
    table[key] = value


def _inside(site: Site, node: Node) -> None:
    address, network = node.address, site.network
    assert address is not None
    if address not in network or address in (network.network_address, network.broadcast_address):
        raise KaError(Code.USAGE, f"{node.name}: {address} is not a host in {network}")
    if site.pool is not None and site.pool[0] <= address <= site.pool[1]:
        raise KaError(
            Code.USAGE, f"{node.name}: {address} is in the pool, which is for unknown machines"
        )


def _macs(nodes: tuple[Node, ...]) -> Mapping[str, Node]:
    found: dict[str, Node] = {}
    for node in nodes:
        for mac in node.macs:
            if mac in found:
                raise KaError(Code.USAGE, f"{mac} is the MAC of {found[mac].name} and {node.name}")
            found[mac] = node
    return MappingProxyType(found)
