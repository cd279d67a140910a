"""Connectors: how nodes are reached, from the user's options to a command.  Pure.

A connector is an `argv` template (`%h`: the node) whose process speaks for the node's agent on its
standard input and output.  Adding one is adding a function here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import Code, KaError
from karun.agent.setup import ALWAYS, AUTO, NEVER

__all__ = [
    "TREES", "VIAS", "WINDOWS", "Connector", "local", "make", "netns", "paramiko", "rsh", "ssh",
]  # fmt: skip

_PYTHON = "/usr/bin/python3"
"""Tried first: on a PATH the first python3 is often a shim, a shell script that costs more than
the whole agent.  Where it is missing or too old, the names on the PATH are tried."""
TREES = (AUTO, ALWAYS, NEVER)
VIAS = ("ssh", "paramiko", "rsh", "local", "netns")
WINDOWS = "windows"
"""Ssh to Windows nodes, where no agent runs: not a connector (karun/windows_nodes.py)."""


@dataclass(frozen=True, slots=True)
class Connector:
    """How to call a node."""

    via: str
    argv: tuple[str, ...]
    lined: bool
    """Whether a shell on the node reads the remote command, as one line."""
    python: str
    onehost: bool
    """Whether all nodes are this machine: a tree over them makes nothing quicker."""


def make(
    via: str,
    *,
    python: str,
    with_libraries: str = "",
    user: str | None = None,
    ssh_config: str | None = None,
    ssh_options: Sequence[str] = (),
    connect_s: float = 10.0,
    key_exchange: Sequence[str] = (),
) -> Connector:
    """Return the connector for `--via`; raises KaError USAGE.

    *python*: this interpreter; *with_libraries*: the same with what is installed for it.
    """
    if via == "local":
        return local(python)
    if via == "netns":
        return netns(python)
    if via == "rsh":
        return rsh(user)
    if via == "ssh":
        return ssh(user, ssh_config, [*key_exchange, *ssh_options], connect_s)
    if via == "paramiko":
        return paramiko(with_libraries or python, user, ssh_config, connect_s)
    raise KaError(Code.USAGE, f"no connector {via!r}; there are {', '.join(VIAS)}")


def ssh(
    user: str | None, config: str | None, options: Sequence[str], connect_s: float
) -> Connector:
    """OpenSSH's client: no questions, no terminal, no X11."""
    argv = ["ssh", "-T", "-x", "-oBatchMode=yes", f"-oConnectTimeout={max(1, round(connect_s))}"]
    if config:
        argv += ["-F", config]
    if user:
        argv += ["-l", user]
    argv += [f"-o{option}" for option in options]
    return Connector("ssh", (*argv, "--", "%h"), lined=True, python=_PYTHON, onehost=False)


def rsh(user: str | None) -> Connector:
    """The remote shell of old: for networks that are trusted altogether."""
    argv = ("rsh", *(("-l", user) if user else ()), "%h")
    return Connector("rsh", argv, lined=True, python=_PYTHON, onehost=False)


def local(python: str) -> Connector:
    """Processes on this machine, as many as there are names."""
    return Connector("local", (), lined=False, python=python, onehost=True)


def netns(python: str) -> Connector:
    """A network namespace of this machine for each name."""
    argv = ("ip", "netns", "exec", "%h")
    return Connector("netns", argv, lined=False, python=python, onehost=True)


def paramiko(python: str, user: str | None, config: str | None, connect_s: float) -> Connector:
    """SSH without a client installed, or with passwords (karun/ssh.py)."""
    argv = [python, "-m", "karun.ssh", "--timeout", str(connect_s)]
    if user:
        argv += ["--user", user]
    if config:
        argv += ["--config", config]
    return Connector("paramiko", (*argv, "%h"), lined=True, python=_PYTHON, onehost=False)
