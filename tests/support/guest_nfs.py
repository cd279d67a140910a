"""Inside a user-mode Linux guest: the kernel's NFS server, and mounts of it.

Owns the order in which the server's parts start, and nothing of what is exported: `nfsp export`
or the caller writes the exports.  Used by programs that tests/support/uml.py boots; run as one it
serves a memory file system to itself, which tells a broken guest from a broken nfsp.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["mount", "run", "start_server", "unmount"]

# Soft, so that a test that goes wrong ends; short attribute caching would hide nothing here.
CLIENT_OPTIONS = "soft,timeo=100,retrans=2,noresvport"
VERSION_OPTIONS = {"3": "vers=3,nolock,mountproto=tcp", "4.2": "vers=4.2"}
NFSD = Path("/proc/fs/nfsd")
LEASE_S = 10  # the kernel's minimum; the grace period after a start is as long


def run(*words: str | Path) -> str:
    """Run a program that must succeed, and return what it printed."""
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(done.args)}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def start_server() -> None:
    """Start rpcbind, mountd and nfsd; grace is over when this returns."""
    if not (NFSD / "threads").exists():
        run("mount", "-t", "nfsd", "nfsd", NFSD)
    for name in ("nfsv4leasetime", "nfsv4gracetime"):
        (NFSD / name).write_text(str(LEASE_S))
    run("rpcbind", "-w")
    run("exportfs", "-ra")
    run("rpc.nfsd", "--no-udp", "2")
    run("rpc.mountd")
    (NFSD / "v4_end_grace").write_text("Y")  # no client has anything to reclaim


def mount(path: str | Path, at: Path, version: str) -> None:
    """Mount the server's path with NFS version 3 or 4.2."""
    at.mkdir(exist_ok=True)
    options = f"{VERSION_OPTIONS[version]},{CLIENT_OPTIONS}"
    run("mount", "-t", "nfs", "-o", options, f"127.0.0.1:{path}", at)


def unmount(at: Path) -> None:
    run("umount", at)


def _smoke() -> None:
    work = Path(tempfile.gettempdir())
    exported = work / "exported"
    exported.mkdir()
    run("mount", "-t", "tmpfs", "exported", exported)
    Path("/etc/exports").write_text(f"{exported} *(rw,no_root_squash,insecure,fsid=0)\n")
    start_server()
    mount("/", work / "v4", "4.2")
    mount(exported, work / "v3", "3")
    written = os.urandom(100_000)
    (work / "v4" / "file").write_bytes(written)
    assert (work / "v3" / "file").read_bytes() == written
    assert (exported / "file").read_bytes() == written
    unmount(work / "v3")
    unmount(work / "v4")
    print("served over NFS", *VERSION_OPTIONS)


if __name__ == "__main__":
    sys.exit(_smoke())
