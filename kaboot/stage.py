"""Staging: what firmware and dnsmasq read, put into the state directory.

    STATE/tftp/           boot programs; grub/grub.cfg and grub/node/MAC.cfg; files -> Site.files
    STATE/dnsmasq.conf    read when dnsmasq starts
    STATE/hosts           read again on SIGHUP
    STATE/leases          dnsmasq's own

GRUB's configurations are files because GRUB fetches by TFTP: `GrubFiles` keeps them as they should
be, while iPXE's scripts are made when they are asked for.

Boot programs are copied: dnsmasq, without root, must be able to read them, and an upgrade of a
package in mid-boot must not mix two versions.  A file is replaced whole, and only if it differs.

Not here: what is in the files (dhcp.py, scripts.py), starting dnsmasq (dnsmasq.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kaboot import dhcp, scripts
from kaboot.model import Arch, Inventory

__all__ = ["GrubFiles", "Staged", "needed_loaders", "owned", "stage", "stage_dhcp", "tftp_root"]


@dataclass(frozen=True, slots=True)
class Staged:
    """What has changed, and which boot programs are missing on this host."""

    config: Path
    config_changed: bool
    hosts_changed: bool
    missing: tuple[str, ...] = ()


def owned(inventory: Inventory) -> list[Path]:
    """Return what the server must be able to write: this module's files, the store and the lock."""
    state = Path(inventory.site.state)
    return [state, *(path for path in state.iterdir() if path.is_file()), *_tree(state / "tftp")]


def _tree(directory: Path) -> Iterator[Path]:
    """A directory and all in it; what links lead to is somebody else's."""
    yield directory
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _tree(path)
        else:
            yield path


def tftp_root(inventory: Inventory) -> Path:
    return Path(inventory.site.state) / "tftp"


def stage(inventory: Inventory) -> Staged:
    """Write everything; raises OSError."""
    root = tftp_root(inventory)
    (root / "grub").mkdir(mode=0o755, parents=True, exist_ok=True)
    needed = needed_loaders(inventory)
    missing: list[str] = []
    for name, field in dhcp.TFTP_FILES.items():
        source = Path(getattr(inventory.site.loaders, field))
        try:
            _put(root / name, source.read_bytes())
        except FileNotFoundError:
            if name in needed:
                missing.append(str(source))
    _put(root / "grub/grub.cfg", scripts.entry_grub(inventory).encode())
    _link(root / "files", inventory.site.files)
    staged = stage_dhcp(inventory)
    return Staged(staged.config, staged.config_changed, staged.hosts_changed, tuple(missing))


def stage_dhcp(inventory: Inventory) -> Staged:
    """Write dnsmasq's files only; raises OSError."""
    state = Path(inventory.site.state)
    config = dhcp.dnsmasq_conf(
        inventory,
        tftp_root=str(tftp_root(inventory)),
        hosts=str(state / "hosts"),
        leases=str(state / "leases"),
    )
    return Staged(
        state / "dnsmasq.conf",
        config_changed=_put(state / "dnsmasq.conf", config.encode()),
        hosts_changed=_put(state / "hosts", dhcp.dnsmasq_hosts(inventory).encode()),
    )


def needed_loaders(inventory: Inventory) -> dict[str, str]:
    """Return the boot programs this site cannot do without: name to place on this host."""
    arches = {node.arch for node in inventory.nodes.values()} | {Arch.X86_64}
    loaders = inventory.site.loaders
    return {
        name: getattr(loaders, field)
        for name, field in dhcp.TFTP_FILES.items()
        if ("arm64" in field or "aa64" in name) <= (Arch.ARM64 in arches)
    }


class GrubFiles:
    """The configurations of single machines; one caller at a time."""

    def __init__(self, inventory: Inventory) -> None:
        self._directory = tftp_root(inventory) / "grub/node"
        self._directory.mkdir(mode=0o755, exist_ok=True)
        self._known: dict[str, str] = {}
        for path in self._directory.iterdir():  # of an earlier server
            path.unlink()

    def put(self, texts: Mapping[str, str]) -> None:
        """Make files have these texts."""
        for name, text in texts.items():
            if self._known.get(name) != text:
                _put(self._directory / name, text.encode(), durable=False)
                self._known[name] = text

    def keep(self, names: Iterable[str]) -> None:
        """Remove all other files."""
        for name in set(self._known) - set(names):
            (self._directory / name).unlink(missing_ok=True)
            del self._known[name]


def _link(path: Path, target: str) -> None:
    """Make a symbolic link point there."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    os.replace(draft, path)


def _put(path: Path, content: bytes, *, durable: bool = True) -> bool:
    """Make a file have this content; return whether it had another."""
    try:
        if path.read_bytes() == content:
            return False
    except FileNotFoundError:
        pass
    draft = path.with_name(f".{path.name}.new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o644)
        file.write(content)
        file.flush()
        if durable:
            os.fsync(fd)
    os.replace(draft, path)
    return True
