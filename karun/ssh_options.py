"""Which ssh options karun adds to the user's own, and why.

OpenSSH's default key exchange (sntrup761x25519, safe from quantum computers to come) costs the
client some 70 ms of CPU for each login, a third of the whole; plain curve25519 costs almost
nothing.  With hundreds of logins from one head that is the time of the run.  So curve25519 goes
first, unless the user's configuration has its own opinion on key exchange, or `--no-fast-ssh` says
not to.  Nothing is taken away: a server without curve25519 gets the others.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["fast_key_exchange"]

_FAST = "curve25519-sha256"
_OPTION = "kexalgorithms"
_SYSTEM = Path("/etc/ssh")


def fast_key_exchange(config: str | None, node: str) -> list[str]:
    """Return the option that puts the quick key exchange first; nothing if it is not for us."""
    if any(_mentions(path) for path in _files(config)):
        return []
    offered = _effective(["-F", config] if config else [], node).get(_OPTION, "").split(",")
    if _FAST not in offered or offered[0] == _FAST:
        return []
    # What is set by files that are included from elsewhere differs from what ssh would do alone.
    if offered != _effective(["-F", "none"], node).get(_OPTION, "").split(","):
        return []
    rest = [name for name in offered if name != _FAST]
    return [f"KexAlgorithms={','.join([_FAST, *rest])}"]


def _files(config: str | None) -> list[Path]:
    if config:
        return [Path(config)]
    user = Path("~/.ssh").expanduser()
    files = [user / "config", _SYSTEM / "ssh_config"]
    for directory in (user / "config.d", _SYSTEM / "ssh_config.d"):
        if directory.is_dir():
            files += sorted(directory.iterdir())
    return files


def _mentions(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip().lower().startswith(_OPTION) for line in lines)


def _effective(options: list[str], node: str) -> dict[str, str]:
    """Return what `ssh -G` says would hold for *node*."""
    try:
        done = subprocess.run(
            ["ssh", *options, "-G", "--", node], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.partition(" ") for line in done.stdout.splitlines())
    return {name.lower(): value for name, _, value in pairs}
