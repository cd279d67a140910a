"""The inventory file: TOML in, an `Inventory` out, or one line that says what is wrong.

Owns the shape of the file; docs/kaboot.md documents it, and a test compares the two.  Unknown keys
are refused by common.config.  Here it is also read again when it has changed: by its content, not
by its time, since editors and clocks are what they are.

Not here: what machines learned their names from power-on order are called (store.py).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import astuple, dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TypeVar

from common import config, nodeset
from common.errors import Code, KaError
from kaboot import model
from kaboot.steps import parse_assignment
from kaboot.words import (
    check_argument,
    check_interface,
    check_label,
    check_path,
    check_title,
    parse_mac,
    printable,
)

__all__ = ["CONFIG_DEFAULT", "GroupTable", "NodeTable", "ProfileTable", "SiteTable", "load", "mark"]

CONFIG_DEFAULT = "/etc/kaboot/kaboot.toml"
FILES_DEFAULT = "/srv/kaboot"
STATE_DEFAULT = "/var/lib/kaboot"
LEASE_S_MIN = 120
"""dnsmasq's own limit."""
WINDOW_MAX = 10_000
SERIAL_SIZE_MAX = 64

E = TypeVar("E", model.Mode, model.Firmware, model.Arch, model.Loader, model.Step)

_NFSROOT = re.compile(r"([0-9.]{7,15}):(/[A-Za-z0-9_.+~@/-]*)", re.ASCII)
_ABSOLUTE = re.compile(r"(?:/[A-Za-z0-9_.+~@-]+)+", re.ASCII)
_OPTIONS = re.compile(r"[A-Za-z0-9_.=,:-]*", re.ASCII)
_OTHERWISE = re.compile(r"[0-9]+[smhdw]?|ignore|infinite", re.ASCII)
"""What dnsmasq takes for something else where it expects a machine's name."""


@dataclass(frozen=True, slots=True)
class SiteTable:
    """`[site]`."""

    address: str
    network: str
    interface: str
    files: Path = Path(FILES_DEFAULT)
    state: Path = Path(STATE_DEFAULT)
    mode: str = "dhcp"
    pool: str = ""
    router: str = ""
    dns: tuple[str, ...] = ()
    domain: str = ""
    lease_s: int = 3600
    http_port: int = 8069
    user: str = "nobody"
    loader: str = "auto"
    unknown: str = "discover"
    boot_window: int = 0
    boot_hold_s: int = 120
    menu_timeout_s: int = 15

    def validate(self) -> None:
        self.made(model.Loaders())

    def made(self, loaders: model.Loaders) -> model.Site:
        address, network = _address(self.address, "address"), _network(self.network)
        if address not in network:
            raise KaError(Code.USAGE, f"address {address} is not in network {network}")
        _between("lease_s", self.lease_s, LEASE_S_MIN, 10**7)
        _between("http_port", self.http_port, 1, 65535)
        _between("boot_window", self.boot_window, 0, WINDOW_MAX)
        _between("boot_hold_s", self.boot_hold_s, 1, 86400)
        _between("menu_timeout_s", self.menu_timeout_s, 1, 3600)
        _plain_path(self.state, "state")
        unknown = _choice(model.Step, self.unknown, "unknown")
        if unknown not in (model.Step.LOCAL, model.Step.MENU, model.Step.DISCOVER):
            raise KaError(
                Code.USAGE,
                f"'unknown' is local, menu or discover, not {unknown.value}: strangers are not"
                " installed",
            )
        return model.Site(
            address=address,
            network=network,
            interface=check_interface(self.interface),
            files=str(self.files),
            state=str(self.state),
            mode=_choice(model.Mode, self.mode, "mode"),
            pool=_pool(self.pool, network) if self.pool else None,
            router=_address(self.router, "router") if self.router else None,
            dns=tuple(_address(text, "dns") for text in self.dns),
            domain=_domain(self.domain) if self.domain else "",
            lease_s=self.lease_s,
            http_port=self.http_port,
            user=check_label(self.user.lstrip("_"), "a user") and self.user,
            loader=_choice(model.Loader, self.loader, "loader"),
            unknown=unknown,
            boot_window=self.boot_window,
            boot_hold_s=self.boot_hold_s,
            menu_timeout_s=self.menu_timeout_s,
            loaders=loaders,
        )


@dataclass(frozen=True, slots=True)
class ProfileTable:
    """`[[profile]]`: something to boot."""

    name: str
    title: str = ""
    kernel: str = ""
    initrds: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    nfsroot: tuple[str, ...] = ()
    nfs_options: str = "vers=3,nolock"
    program: str = ""
    menu: bool = True

    def validate(self) -> None:
        self.made()

    def made(self) -> model.Profile:
        name = check_label(self.name, "a profile's name")
        if name in (model.Step.LOCAL.value, model.Step.MENU.value, model.Step.CUSTOM.value):
            raise KaError(Code.USAGE, f"a profile cannot be called {name!r}, which is a step")
        if bool(self.kernel) == bool(self.program):
            raise KaError(Code.USAGE, f"profile {name}: either a kernel or a program")
        if self.program and (self.initrds or self.arguments or self.nfsroot):
            raise KaError(Code.USAGE, f"profile {name}: a program takes no arguments or initrds")
        for export in self.nfsroot:
            match = _NFSROOT.fullmatch(export)
            if match is None:
                raise KaError(
                    Code.USAGE,
                    f"profile {name}: not an NFS root: {export[:80]!r} (such as"
                    " 10.0.0.5:/mnt/debian; an address: there is no name service that early)",
                )
            _address(match[1], "nfsroot")
        if _OPTIONS.fullmatch(self.nfs_options) is None:
            raise KaError(Code.USAGE, f"profile {name}: not NFS options: {self.nfs_options[:80]!r}")
        return model.Profile(
            name=name,
            title=check_title(self.title or name),
            kernel=check_path(self.kernel, "kernel") if self.kernel else "",
            initrds=tuple(check_path(path, "initrds") for path in self.initrds),
            arguments=tuple(check_argument(word) for word in self.arguments),
            nfsroot=self.nfsroot,
            nfs_options=self.nfs_options,
            program=check_path(self.program, "program") if self.program else "",
            menu=self.menu,
        )


@dataclass(frozen=True, slots=True)
class NodeTable:
    """`[[node]]`: one machine."""

    name: str
    macs: tuple[str, ...] = ()
    address: str = ""
    arch: str = "x86_64"
    firmware: str = "any"
    loader: str = "auto"
    rack: str = ""
    serial: str = ""
    arguments: tuple[str, ...] = ()
    step: str = "local"

    def validate(self) -> None:
        self.made()

    def made(self) -> model.Node:
        name = check_label(self.name, "a node's name")
        if _OTHERWISE.fullmatch(name):
            raise KaError(
                Code.USAGE,
                f"not a node's name: {name!r} (in its file of hosts dnsmasq takes it for a time"
                " or an order)",
            )
        macs = tuple(parse_mac(text) for text in self.macs)
        if len(set(macs)) < len(macs):
            raise KaError(Code.USAGE, f"node {name}: a MAC occurs twice")
        if self.serial and printable(self.serial, SERIAL_SIZE_MAX) != self.serial:
            raise KaError(Code.USAGE, f"node {name}: not a serial number: {self.serial[:80]!r}")
        assignment = parse_assignment(self.step)
        return model.Node(
            name=name,
            macs=macs,
            address=_address(self.address, "address") if self.address else None,
            arch=_choice(model.Arch, self.arch, "arch"),
            firmware=_choice(model.Firmware, self.firmware, "firmware"),
            loader=_choice(model.Loader, self.loader, "loader"),
            rack=check_label(self.rack, "a rack") if self.rack else "",
            serial=self.serial,
            arguments=tuple(check_argument(word) for word in self.arguments),
            step=assignment.step,
            profile=assignment.profile,
        )


@dataclass(frozen=True, slots=True)
class GroupTable:
    """`[[group]]`: many machines alike, whose MACs are to be learned."""

    nodes: str
    first_address: str = ""
    arch: str = "x86_64"
    firmware: str = "any"
    loader: str = "auto"
    rack: str = ""
    arguments: tuple[str, ...] = ()
    step: str = "local"

    def validate(self) -> None:
        self.made()

    def made(self) -> tuple[model.Node, ...]:
        names = nodeset.expand(self.nodes)
        if not names:
            raise KaError(Code.USAGE, "'nodes' is empty")
        first = _address(self.first_address, "first_address") if self.first_address else None
        if first is not None and int(first) + len(names) > 2**32:
            raise KaError(Code.USAGE, f"first_address {first} leaves no room for {self.nodes}")
        return tuple(
            NodeTable(
                name,
                address="" if first is None else str(first + index),
                arch=self.arch,
                firmware=self.firmware,
                loader=self.loader,
                rack=self.rack,
                arguments=self.arguments,
                step=self.step,
            ).made()
            for index, name in enumerate(names)
        )


@dataclass(frozen=True, slots=True)
class InventoryFile:
    """The whole file."""

    site: SiteTable
    loaders: model.Loaders = field(default_factory=model.Loaders)
    profile: tuple[ProfileTable, ...] = ()
    node: tuple[NodeTable, ...] = ()
    group: tuple[GroupTable, ...] = ()

    def validate(self) -> None:
        self.made()

    def made(self) -> model.Inventory:
        nodes = [table.made() for table in self.node]
        for table in self.group:
            nodes += table.made()
        profiles = tuple(table.made() for table in self.profile)
        return model.Inventory.of(self.site.made(self.loaders), tuple(nodes), profiles)


def load(path: Path) -> model.Inventory:
    """Return the inventory in a file; raises KaError USAGE, one line."""
    made = config.load(path, InventoryFile).made()
    directory = path.absolute().parent
    places = (str(directory / place) for place in astuple(made.site.loaders))
    return replace(made, site=replace(made.site, loaders=model.Loaders(*places)))


def mark(path: Path) -> str:
    """Return what changes when the file's content does; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _choice(kind: type[E], text: str, key: str) -> E:
    try:
        return kind(text)
    except ValueError:
        words = ", ".join(member.value for member in kind)
        raise KaError(Code.USAGE, f"{key!r} is one of {words}, not {text[:40]!r}") from None


def _address(text: str, key: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise KaError(Code.USAGE, f"{key!r}: not an IPv4 address: {text[:40]!r}") from None


def _network(text: str) -> IPv4Network:
    try:
        network = IPv4Network(text)
    except ValueError:
        raise KaError(
            Code.USAGE, f"'network': not a network: {text[:40]!r} (such as 10.0.0.0/24)"
        ) from None
    _between("the prefix of 'network'", network.prefixlen, 8, 30)
    return network


def _pool(text: str, network: IPv4Network) -> tuple[IPv4Address, IPv4Address]:
    low, _, high = text.partition("-")
    first, last = _address(low.strip(), "pool"), _address(high.strip(), "pool")
    if first > last or first not in network or last not in network:
        raise KaError(Code.USAGE, f"'pool' {text!r} is not a range of {network}")
    return first, last


def _domain(text: str) -> str:
    return ".".join(check_label(part, "a domain") for part in text.split("."))


def _between(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise KaError(Code.USAGE, f"{key} is {value}; it must be {low} to {high}")


def _plain_path(path: Path, key: str) -> None:
    # dnsmasq's configuration has no quoting for it.
    if _ABSOLUTE.fullmatch(str(path)) is None:
        raise KaError(Code.USAGE, f"{key!r}: this path has characters dnsmasq cannot take: {path}")
