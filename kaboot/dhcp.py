"""DHCP: the configuration of kaboot's dnsmasq, and the lines a site's own server needs.

Pure.  Which program a machine gets first is decided here, once, as a table of rules over the
client architecture (DHCP option 93: RFC 4578 and IANA's list), whatever server it is written
for:

  iPXE asks            -> the entry script, by HTTP
  BIOS                 -> iPXE (undionly), by TFTP
  UEFI                 -> Debian's signed shim, which loads its signed GRUB, or iPXE (snponly), by
                          TFTP: as site and node have it (`loader`)
  UEFI, HTTP boot      -> iPXE (snponly), by HTTP

DHCP cannot tell whether Secure Boot is on, so UEFI machines get what works with both, unless a
foreign server stands in the way (`Loader` says why).  HTTP boot is the other exception: the GRUB
that Debian signs cannot go on by HTTP.  With Secure Boot on, firmware refuses iPXE and goes on to
its next entry, PXE.

Beside a foreign server (proxy) dnsmasq gives no addresses: it answers PXE clients with the boot
program.  Firmware that ignores such split offers, and HTTP boot, need the site's server to say it:
`site_lines`.

Invariant: all that comes from an inventory has passed words.py, and needs no escaping here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from kaboot.model import Inventory, Loader, Mode, Node, Site

__all__ = ["SITE_SERVERS", "TFTP_FILES", "dnsmasq_conf", "dnsmasq_hosts", "site_lines"]

IPXE_OPTION = 175
"""The DHCP option by which iPXE makes itself known (iPXE's encapsulated options)."""

_NO_PXE_DHCP = 176
"""Of iPXE's encapsulated options: 1 to take no proxy's offer."""

_OTHER = "other-loader"
"""The tag of nodes that get the loader which is not the site's."""

TFTP_FILES = {
    "undionly.kpxe": "ipxe_bios",
    "snponly.efi": "ipxe_x86_64",
    "shimx64.efi": "shim_x86_64",
    "grubx64.efi": "grub_x86_64",
    "snponly-arm64.efi": "ipxe_arm64",
    "shimaa64.efi": "shim_arm64",
    "grubaa64.efi": "grub_arm64",
}
"""Names of boot programs, and where `Loaders` has them.  shim asks for `grubx64.efi` by itself."""


@dataclass(frozen=True, slots=True)
class _Client:
    """A kind of firmware: its numbers in DHCP option 93, its tag, and what it gets first."""

    tag: str
    numbers: tuple[int, ...]
    program: str
    ipxe: str
    http: bool = False
    pxe_names: tuple[str, ...] = ()
    """What dnsmasq calls it in `pxe-service`."""


# fmt: off
_CLIENTS = (
    _Client("bios", (0,), "undionly.kpxe", "undionly.kpxe", pxe_names=("x86PC",)),
    _Client("x64", (7, 9), "shimx64.efi", "snponly.efi", pxe_names=("X86-64_EFI", "BC_EFI")),
    _Client("aa64", (11,), "shimaa64.efi", "snponly-arm64.efi", pxe_names=("ARM64_EFI",)),
    _Client("x64-http", (16,), "snponly.efi", "snponly.efi", http=True),
    _Client("aa64-http", (19,), "snponly-arm64.efi", "snponly-arm64.efi", http=True),
)
# fmt: on


# ---------------------------------------------------------------- our dnsmasq


def dnsmasq_conf(inventory: Inventory, *, tftp_root: str, hosts: str, leases: str) -> str:
    """Return the configuration file of kaboot's own dnsmasq.

    `hosts` is the file of `dnsmasq_hosts`, which it reads again on SIGHUP.
    """
    site = inventory.site
    lines = [
        "# written by kaboot; a change here is lost",
        "port=0",
        f"interface={site.interface}",
        "except-interface=lo",
        # Binds to the interface alone: another dnsmasq on this host is left in peace.
        "bind-interfaces",
        "enable-tftp",
        f"tftp-root={tftp_root}",
        "log-dhcp",
    ]
    if site.mode is Mode.SITE:
        return _text(lines)
    lines += [f"dhcp-hostsfile={hosts}", f"dhcp-leasefile={leases}"]
    lines += _addresses(site) if site.mode is Mode.DHCP else _proxy(site)
    lines += _matches()
    lines += _boots(site) if site.mode is Mode.DHCP else _proxy_boots(site)
    return _text(lines)


def _addresses(site: Site) -> list[str]:
    mask, lease = site.network.netmask, f"{site.lease_s}s"
    # Addresses of nodes come from the hosts file; `static` allows them without a pool.
    lines = [f"dhcp-range={site.network.network_address},static,{mask},{lease}"]
    if site.pool is not None:
        lines.append(f"dhcp-range={site.pool[0]},{site.pool[1]},{mask},{lease}")
    lines += ["dhcp-authoritative", f"dhcp-option=option:router,{site.router or ''}".rstrip(",")]
    servers = ",".join(str(server) for server in site.dns)
    lines.append(f"dhcp-option=option:dns-server,{servers}".rstrip(","))
    if site.domain:
        lines.append(f"domain={site.domain}")
    return lines


def _proxy(site: Site) -> list[str]:
    return [f"dhcp-range={site.network.network_address},proxy,{site.network.netmask}"]


def _matches() -> list[str]:
    lines = [f"dhcp-match=set:ipxe,{IPXE_OPTION}", "dhcp-userclass=set:ipxe,iPXE"]
    for client in _CLIENTS:
        lines += [
            f"dhcp-match=set:{client.tag},option:client-arch,{number}" for number in client.numbers
        ]
    return lines


def _boots(site: Site) -> list[str]:
    lines = [
        f"dhcp-boot=tag:ipxe,{site.url}/boot.ipxe",
        # All is said here: iPXE need not wait some seconds for a proxy's offer.
        f"dhcp-option=tag:ipxe,encap:{IPXE_OPTION},{_NO_PXE_DHCP},1b",
    ]
    for client in _CLIENTS:
        for tag, program in _choices(site, client):
            first = f"tag:!ipxe,tag:{client.tag}{tag}"
            where = _where(site, client, program)
            lines.append(
                f"dhcp-boot={first},{where}" + ("" if client.http else f",,{site.address}")
            )
        if client.http:
            # The firmware takes an offer for HTTP boot only if it says so itself.
            lines.append(f"dhcp-option-force=tag:{client.tag},option:vendor-class,HTTPClient")
    return lines


def _choices(site: Site, client: _Client) -> list[tuple[str, str]]:
    """Tags and programs: what a kind of client gets, and what nodes that wish for the other do."""
    if client.program == client.ipxe:
        return [("", client.program)]
    programs = [client.program, client.ipxe]
    if site.uefi_loader is Loader.IPXE:
        programs.reverse()
    return [(f",tag:!{_OTHER}", programs[0]), (f",tag:{_OTHER}", programs[1])]


def _proxy_boots(site: Site) -> list[str]:
    lines = [f"dhcp-boot=tag:ipxe,{site.url}/boot.ipxe,,{site.address}"]
    for client in _CLIENTS:
        for name in client.pxe_names:
            for tag, program in _choices(site, client):
                lines.append(f"pxe-service=tag:!ipxe{tag},{name},kaboot,{program},{site.address}")
    return lines


def dnsmasq_hosts(inventory: Inventory) -> str:
    """Return the file of known machines: MACs, tags, address, name."""
    lines = []
    for node in inventory.nodes.values():
        if not node.macs:
            continue
        other = node.loader not in (Loader.AUTO, inventory.site.uefi_loader)
        tags = ["set:known"] + ([f"set:{_OTHER}"] if other else [])
        address = [str(node.address)] if node.address is not None else []
        lines.append(",".join([*node.macs, *tags, *address, node.name]))
    return _text(lines)


# ---------------------------------------------------------------- the site's server


SITE_SERVERS = ("isc", "kea", "dnsmasq")


def site_lines(inventory: Inventory, server: str) -> str:
    """Return what to put into the configuration of a site's own DHCP server.

    A server with these lines names kaboot itself, whatever was kaboot's part before.
    """
    inventory = replace(inventory, site=replace(inventory.site, mode=Mode.SITE))
    return {"isc": _isc, "kea": _kea, "dnsmasq": _site_dnsmasq}[server](inventory)


def _isc(inventory: Inventory) -> str:
    site = inventory.site
    lines = [
        "# For dhcpd.conf of ISC DHCP, outside of any subnet.",
        "option kaboot-arch code 93 = unsigned integer 16;",
        f"option kaboot-ipxe code {IPXE_OPTION} = string;",
        'class "kaboot" {',
        '  match if substring(option vendor-class-identifier, 0, 9) = "PXEClient"',
        '        or substring(option vendor-class-identifier, 0, 10) = "HTTPClient";',
        f"  next-server {site.address};",
        '  if exists kaboot-ipxe or option user-class = "iPXE" {',
        f'    filename "{site.url}/boot.ipxe";',
    ]
    for client in _CLIENTS:
        for number in client.numbers:
            lines.append(f"  }} elsif option kaboot-arch = 00:{number:02x} {{")
            if client.http:
                lines.append('    option vendor-class-identifier "HTTPClient";')
            program = _choices(site, client)[0][1]
            lines.append(f'    filename "{_where(site, client, program)}";')
    lines += ["  }", "}"]
    for node in _reserved(inventory):
        for index, mac in enumerate(node.macs):
            name = node.name if index == 0 else f"{node.name}-{index + 1}"
            lines.append(
                f"host {name} {{ hardware ethernet {mac}; fixed-address {node.address};"
                f' option host-name "{node.name}"; }}'
            )
    return _text(lines)


def _kea(inventory: Inventory) -> str:
    site = inventory.site
    known = f"option[{IPXE_OPTION}].exists or option[77].hex == 'iPXE'"
    classes: list[dict[str, object]] = [
        {
            "name": "kaboot-ipxe",
            "test": known,
            "next-server": str(site.address),
            "boot-file-name": f"{site.url}/boot.ipxe",
        }
    ]
    for client in _CLIENTS:
        numbers = " or ".join(f"option[93].hex == 0x{number:04x}" for number in client.numbers)
        entry: dict[str, object] = {
            "name": f"kaboot-{client.tag}",
            "test": f"not member('kaboot-ipxe') and ({numbers})",
            "next-server": str(site.address),
            "boot-file-name": _where(site, client, _choices(site, client)[0][1]),
        }
        if client.http:
            option = {"name": "vendor-class-identifier", "data": "HTTPClient", "always-send": True}
            entry["option-data"] = [option]
        classes.append(entry)
    reservations = [
        {"hw-address": mac, "ip-address": str(node.address), "hostname": node.name}
        for node in _reserved(inventory)
        # Kea takes an address once only: it goes to the node's first card.
        for mac in node.macs[:1]
    ]
    config = {"client-classes": classes, "reservations": reservations}
    return (
        '// For "Dhcp4" of kea-dhcp4.conf; "reservations" may also stand in the subnet.\n'
        + json.dumps({"Dhcp4": config}, indent=2)
        + "\n"
    )


def _site_dnsmasq(inventory: Inventory) -> str:
    lines = ["# For dnsmasq.conf.", *_matches(), *_boots(inventory.site)]
    lines += [f"dhcp-host={line}" for line in dnsmasq_hosts(inventory).splitlines()]
    return _text(lines)


def _where(site: Site, client: _Client, program: str) -> str:
    return f"{site.url}/loader/{program}" if client.http else program


def _reserved(inventory: Inventory) -> list[Node]:
    return [node for node in inventory.nodes.values() if node.macs and node.address is not None]


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
