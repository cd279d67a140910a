"""`nfsp export`: share a mount by the kernel's NFS server, safely.

Writes one file into exports.d and lets exportfs take it.  The options are not a matter of taste
(docs/nfs.md): `fsid` must be the file system's UUID on every gateway, or handles die with a
gateway; `no_subtree_check`, or renames break handles; `sync`, since an answered change must be
durable.  The mount must be `-o durable`, because knfsd never asks a FUSE file system to sync a
directory: that is refused rather than warned about.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

from common import nodeset
from common.errors import Code, KaError

__all__ = ["export_lines", "remove_export", "write_export"]

EXPORTS_DIR = Path("/etc/exports.d")
_CLIENTS = re.compile(r"[A-Za-z0-9_.:*?@/\[\]-]+")


def export_lines(path: str, clients: list[str], fs_uuid: bytes, *, options: str = "") -> str:
    """Return the exports file's text for a mount and its clients."""
    if any(c.isspace() or c in '"\\#' for c in path):
        raise KaError(Code.USAGE, f"this path cannot be exported: {path!r}")
    clients = [name for client in clients for name in _hosts(client)]
    for client in clients:
        if not _CLIENTS.fullmatch(client):
            raise KaError(Code.USAGE, f"not a host, network or netgroup: {client!r}")
    base = f"rw,sync,no_subtree_check,no_wdelay,fsid={uuid.UUID(bytes=fs_uuid)}"
    if options:
        base += f",{options}"
    return f"{path} " + " ".join(f"{client}({base})" for client in clients) + "\n"


def _hosts(client: str) -> list[str]:
    """Expand a node set (`node[1-20]`); networks, netgroups and patterns stay as they are."""
    is_node_set = "[" in client and not client.startswith(("[", "@")) and "*" not in client
    return nodeset.expand(client) if is_node_set else [client]


def _exports_file(path: str) -> Path:
    return EXPORTS_DIR / f"nfsp{path.replace('/', '-')}.exports"


def write_export(path: str, text: str) -> Path:
    """Install an exports file and make it take effect."""
    _require_tools()
    file = _exports_file(path)
    EXPORTS_DIR.mkdir(exist_ok=True)
    before = file.read_text() if file.exists() else None
    partial = file.with_suffix(".new")
    partial.write_text(text)
    os.replace(partial, file)
    failure = _exportfs()
    if failure is not None:
        if before is None:
            file.unlink()
        else:
            file.write_text(before)
        _exportfs()
        raise KaError(Code.INTERNAL, f"exportfs refused it: {failure}")
    return file


def remove_export(path: str) -> None:
    """Withdraw an export; raises USAGE if there is none."""
    _require_tools()
    file = _exports_file(path)
    if not file.exists():
        raise KaError(Code.USAGE, f"{path} is not exported by nfsp")
    file.unlink()
    failure = _exportfs()
    if failure is not None:
        raise KaError(Code.INTERNAL, f"exportfs: {failure}")


def warnings() -> list[str]:
    """Return what commonly goes wrong on this host, one line each."""
    lines = []
    leases = Path("/proc/sys/fs/leases-enable")
    if leases.exists() and leases.read_text().strip() != "0":
        lines.append(
            "fs.leases-enable is on: knfsd may grant delegations that other gateways "
            "do not see; set it to 0 (sysctl -w fs.leases-enable=0)"
        )
    if not Path("/proc/fs/nfsd/threads").exists():
        lines.append("the NFS server is not running (systemctl start nfs-server)")
    else:
        threads = Path("/proc/fs/nfsd/threads").read_text().strip()
        if threads == "0":
            lines.append("the NFS server has no threads (rpc.nfsd 64)")
    return lines


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise KaError(Code.EPERM, "only root can export")
    if shutil.which("exportfs") is None:
        raise KaError(Code.USAGE, "exportfs is missing: install the package nfs-kernel-server")


def _exportfs() -> str | None:
    """Apply all exports files; return the reason if exportfs refuses."""
    result = subprocess.run(["exportfs", "-ra"], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"
