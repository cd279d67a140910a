"""What the machine is: the things without which a figure means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

__all__ = ["file_system_of", "gather", "package_version", "tcp_congestion_control"]


def gather(scratch: Path) -> dict[str, str]:
    """Return the facts of this machine, in the order they are printed."""
    load_1min = os.getloadavg()[0]
    return {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "stores on": file_system_of(scratch, Path("/proc/self/mountinfo").read_text()),
        "TCP congestion control": tcp_congestion_control(),
        "python": platform.python_version(),
        "load before": f"{load_1min:.2f} (average of the last minute)",
    }


def tcp_congestion_control() -> str:
    """Return what new connections of this network namespace use."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def file_system_of(path: Path, mountinfo: str) -> str:
    """Return type, device and options of the mount *path* is on, given /proc/self/mountinfo."""
    best, description = Path(""), "unknown"
    resolved = path.resolve()
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        fields = mount.split()
        if len(fields) < 6:
            continue
        point = Path(fields[4].replace("\\040", " "))
        # Of several mounts on one point the last listed is the visible one.
        if resolved.is_relative_to(point) and len(point.parts) >= len(best.parts):
            kind, device = source.split()[:2]
            best, description = point, f"{kind} ({device} on {point}, {fields[5]})"
    return description


def package_version(package: str) -> str:
    """Return a Debian package's installed version, or an empty text."""
    try:
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", package],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
