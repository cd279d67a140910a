"""A connector for hosts without an ssh client, or with passwords: paramiko as a process.

    python -m karun.ssh [--user USER] [--config FILE] [--timeout S] HOST COMMAND

Runs COMMAND on HOST and joins its standard input, output and error to this process's own, as the
ssh program does; so to the rest of karun it is a connector like the others.  Host keys must be
known (known_hosts of the user, or UserKnownHostsFile of the configuration).  A password comes from
the environment (KARUN_PASSWORD), where only this user and root can read it; keys and the user's
ssh agent are tried first.  What goes wrong is said in OpenSSH's words, which karun.reasons knows.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

import paramiko

__all__ = ["main"]

BLOCK_SIZE = 64 << 10
EXIT_FAILED = 255


def main() -> int:
    """Run the command; return its exit code, 255 if there was none."""
    parser = argparse.ArgumentParser(prog="python -m karun.ssh")
    parser.add_argument("--user")
    parser.add_argument("--config")
    parser.add_argument("--timeout", type=float, default=15.0)
    parser.add_argument("host")
    parser.add_argument("command")
    options = parser.parse_args()
    client = paramiko.SSHClient()
    try:
        _connect(client, options)
        transport = client.get_transport()
        assert transport is not None
        channel = transport.open_session()
        channel.exec_command(options.command)
        _join(channel)
        return int(channel.recv_exit_status())
    except paramiko.BadHostKeyException:
        return _failed("REMOTE HOST IDENTIFICATION HAS CHANGED")
    except paramiko.AuthenticationException:
        return _failed("Permission denied")
    except (paramiko.SSHException, OSError) as error:
        return _failed(_words(error))
    finally:
        client.close()


def _connect(client: paramiko.SSHClient, options: argparse.Namespace) -> None:
    config: dict[str, Any] = {}
    path = Path(options.config or "~/.ssh/config").expanduser()
    if path.is_file():
        config = dict(paramiko.SSHConfig.from_path(str(path)).lookup(options.host))
    known = config.get("userknownhostsfile", "~/.ssh/known_hosts").split()
    for file in map(Path.expanduser, map(Path, known)):
        if file.is_file():
            client.load_host_keys(str(file))
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    client.connect(
        config.get("hostname", options.host),
        port=int(config.get("port", 22)),
        username=options.user or config.get("user"),
        password=os.environ.get("KARUN_PASSWORD"),
        key_filename=[str(Path(name).expanduser()) for name in config.get("identityfile", [])],
        timeout=options.timeout,
        banner_timeout=options.timeout,
        auth_timeout=options.timeout,
    )


def _join(channel: paramiko.Channel) -> None:
    """Pass bytes on in both directions until the command has closed its output."""
    sources: list[Any] = [channel, 0]
    while True:
        ready = select.select(sources, [], [])[0]
        if 0 in ready:
            data = os.read(0, BLOCK_SIZE)
            if data:
                channel.sendall(data)
            else:
                channel.shutdown_write()
                sources.remove(0)
        if channel not in ready:
            continue
        while channel.recv_stderr_ready():
            _write(2, channel.recv_stderr(BLOCK_SIZE))
        if channel.recv_ready() or channel.eof_received:
            data = channel.recv(BLOCK_SIZE)
            if not data:
                return
            _write(1, data)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _words(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "Could not resolve hostname"
    if isinstance(error, TimeoutError):
        return "Connection timed out"
    text = str(error)
    if "not found in known_hosts" in text:
        return "Host key verification failed"
    if "Unable to connect" in text:
        return "Connection refused"
    return text or type(error).__name__


def _failed(line: str) -> int:
    print(line, file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
