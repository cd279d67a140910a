"""`kaboot check`: what would keep machines from booting, found before they try.

Changes nothing: it reads, writes a temporary file for `dnsmasq --test`, and asks the network who
gives out addresses.  A problem is something
that will not work; a remark is something that somebody may have meant.

Not here: mistakes in the inventory's own text, which is refused when it is read (inventory.py).
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kaboot import dhcp, probe
from kaboot.model import Inventory, Mode
from kaboot.stage import needed_loaders

__all__ = ["Finding", "check", "find_dnsmasq"]

TEST_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 5
_SIOCGIFADDR = 0x8915
_NFS_PORT = 2049
_UNPACKERS = ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x1f\x8b", "gzip"), (b"\xfd7zX", "xz"))
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line about the site; `problem` is false for a remark."""

    problem: bool
    text: str


def check(inventory: Inventory) -> list[Finding]:
    """Return what is wrong, problems first."""
    found = [
        *_files(inventory),
        *_diskless(inventory),
        *_programs(inventory),
        *_network(inventory),
        *_nodes(inventory),
        *_dnsmasq(inventory),
    ]
    return sorted(found, key=lambda finding: not finding.problem)


def find_dnsmasq() -> str | None:
    """Return the path of dnsmasq, which is in sbin."""
    return shutil.which("dnsmasq", path=_PATH)


def _files(inventory: Inventory) -> Iterator[Finding]:
    root = Path(inventory.site.files)
    if not root.is_dir():
        yield Finding(True, f"no directory {root} ('files' in [site])")
        return
    for profile in inventory.profiles.values():
        for name in filter(None, (profile.kernel, *profile.initrds, profile.program)):
            path = root / name
            if not path.is_file():
                yield Finding(True, f"profile {profile.name}: no file {path}")
            elif not path.resolve().is_relative_to(root.resolve()):
                yield Finding(True, f"profile {profile.name}: {path} leads out of {root}")
            elif not path.stat().st_mode & 0o004:
                yield Finding(True, f"profile {profile.name}: chmod a+r {path}, it is served")
            for parent in path.parents:
                if parent.is_dir() and not parent.stat().st_mode & 0o001:
                    yield Finding(True, f"profile {profile.name}: chmod a+x {parent}")


def _diskless(inventory: Inventory) -> Iterator[Finding]:
    """What a root on NFS needs: a module for it, a server, an export."""
    for profile in inventory.profiles.values():
        if not profile.nfsroot:
            continue
        initrds = [Path(inventory.site.files, name) for name in profile.initrds]
        if not any(_may_hold(path, b"/nfs.ko") for path in initrds if path.is_file()):
            yield Finding(
                True, f"profile {profile.name}: no NFS in its initrds: kaboot diskless makes one"
            )
        for export in profile.nfsroot:
            problem = _export_problem(*export.split(":", 1))
            if problem:
                yield Finding(True, f"profile {profile.name}: {problem}")


def _may_hold(initrd: Path, name: bytes) -> bool:
    """Tell whether a packed initramfs may hold a name; it may if it cannot be looked into."""
    with open(initrd, "rb", buffering=0) as file:
        head = file.read(4)
        unpacker = next((word for magic, word in _UNPACKERS if head.startswith(magic)), "")
        if shutil.which(unpacker) is None:
            return True
        file.seek(0)
        with subprocess.Popen([unpacker, "-dc"], stdin=file, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as process:  # fmt: skip
            assert process.stdout is not None
            rest = b""
            while data := process.stdout.read(1 << 20):
                if name in rest + data:
                    process.kill()
                    return True
                rest = data[-len(name) :]
    return False


def _export_problem(address: str, path: str) -> str:
    """Return why a path can probably not be mounted from a server, or nothing."""
    try:
        socket.create_connection((address, _NFS_PORT), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        return f"no NFS server answers at {address} ({error}): nfsp export, on that gateway"
    # A server of NFSv4 alone keeps no list, and who lacks the program cannot ask for it.
    try:
        listed = subprocess.run(
            ["showmount", "--exports", "--no-headers", address], capture_output=True, text=True,
            check=True, timeout=ANSWER_TIMEOUT_S, env={**os.environ, "PATH": _PATH},
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    exports = [line.split()[0] for line in listed.splitlines() if line.strip()]
    if any(Path(path).is_relative_to(export) for export in exports):
        return ""
    return f"{address} does not export {path}: nfsp export, on that gateway"


def _programs(inventory: Inventory) -> Iterator[Finding]:
    for name, place in needed_loaders(inventory).items():
        if not Path(place).is_file():
            yield Finding(True, f"no boot program {place} for {name} (or name it in [loaders])")


def _network(inventory: Inventory) -> Iterator[Finding]:
    site = inventory.site
    if site.interface not in (name for _, name in socket.if_nameindex()):
        yield Finding(True, f"no network interface {site.interface}")
        return
    address = _address_of(site.interface)
    if address != str(site.address):
        yield Finding(True, f"{site.interface} has the address {address}, not {site.address}")
    else:
        yield from _servers(inventory)


def _address_of(interface: str) -> str:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return "none"
    return socket.inet_ntoa(answer[20:24])


def _servers(inventory: Inventory) -> Iterator[Finding]:
    """Ask who gives out addresses, if that can be asked here."""
    site = inventory.site
    try:
        others = probe.ask(site.interface) - {site.address}
    except OSError as error:
        yield Finding(False, f"cannot ask for other DHCP servers: {error.strerror}")
        return
    names = ", ".join(str(server) for server in sorted(others))
    if site.mode is Mode.DHCP and others:
        yield Finding(
            True, f"another DHCP server answers here, {names}: end it, or mode = proxy or site"
        )
    elif site.mode is not Mode.DHCP and not others:
        yield Finding(True, f"no DHCP server answers here, and in mode {site.mode.value} one must")
    elif others:
        yield Finding(False, f"addresses are given by {names}")


def _nodes(inventory: Inventory) -> Iterator[Finding]:
    site = inventory.site
    try:
        pwd.getpwnam(site.user)
    except KeyError:
        yield Finding(True, f"no user {site.user} on this host ('user' in [site])")
    nameless = [node.name for node in inventory.nodes.values() if not node.macs]
    if nameless:
        shown = ", ".join(nameless[:4]) + (", ..." if len(nameless) > 4 else "")
        yield Finding(False, f"{len(nameless)} nodes have no MAC yet ({shown}): kaboot learn")
    if site.mode is Mode.DHCP:
        if site.pool is None:
            yield Finding(False, "no 'pool': unknown machines get no address, and none can learn")
        if site.router is None:
            yield Finding(False, "no 'router': machines will have no way out of their network")
        homeless = [n.name for n in inventory.nodes.values() if n.macs and n.address is None]
        if homeless and site.pool is None:
            yield Finding(True, f"{homeless[0]} has no address and there is no 'pool'")


def _dnsmasq(inventory: Inventory) -> Iterator[Finding]:
    program = find_dnsmasq()
    if program is None:
        yield Finding(True, "dnsmasq is not installed (Debian: dnsmasq-base)")
        return
    with tempfile.TemporaryDirectory(prefix="kaboot-") as name:
        config = Path(name, "dnsmasq.conf")
        hosts = Path(name, "hosts")
        hosts.write_text(dhcp.dnsmasq_hosts(inventory))
        text = dhcp.dnsmasq_conf(
            inventory, tftp_root=name, hosts=str(hosts), leases=f"{name}/leases"
        )
        config.write_text(text)
        result = subprocess.run(
            [program, "--test", f"--conf-file={config}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=TEST_TIMEOUT_S,
        )
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        yield Finding(True, f"dnsmasq refuses its configuration: {lines[-1] if lines else '?'}")
