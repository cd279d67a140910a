"""One sshd as many nodes: it answers on all of 127.0.0.0/8, so every address is a node.

Everything is in one directory that the caller owns: host key, user key, known hosts, and an
ssh_config for the clients.  Nothing of the machine's own ssh set-up is read or changed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

from common.errors import Code, KaError

__all__ = ["Sshd", "addresses"]

START_S = 10.0
_PRIVILEGE_SEPARATION = Path("/run/sshd")


def addresses(count: int) -> list[str]:
    """Return loopback addresses, each of which is a node."""
    return [f"127.1.{number // 250}.{number % 250 + 1}" for number in range(count)]


class Sshd:
    """A running sshd with its keys; a context manager."""

    def __init__(
        self, directory: Path, *, login_count_max: int = 1000, extra: str = "", path: str = ""
    ) -> None:
        """*path*: directories that commands are looked for first, as in PATH."""
        program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            raise KaError(Code.UNREACHABLE, "sshd is not installed (openssh-server)")
        self._program = program
        self.directory = directory
        self.config = directory / "ssh_config"
        self.key = directory / "user_key"
        self.host_key = directory / "host_key"
        self.known_hosts = directory / "known_hosts"
        self.port = _free_port()
        self.log = directory / "sshd.log"
        self._login_count_max = login_count_max
        self._extra = extra
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sshd:
        for path in (self.key, self.host_key):
            if not path.exists():
                command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
                subprocess.run(command, check=True)
        (self.directory / "authorized").write_text(self.key.with_suffix(".pub").read_text())
        public = self.host_key.with_suffix(".pub").read_text()
        self.known_hosts.write_text(f"[127.*]:{self.port} {public}")
        self.config.write_text(self.client_config())
        (self.directory / "sshd_config").write_text(self._server_config())
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-D", "-e", "-f", str(self.directory / "sshd_config")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._wait()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(START_S)

    def client_config(self, **replaced: str) -> str:
        """Return an ssh_config for these nodes, with some settings replaced."""
        settings = {
            "Port": str(self.port),
            "User": pwd.getpwuid(os.geteuid()).pw_name,
            "IdentityFile": str(self.key),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
        } | replaced
        return "Host *\n" + "".join(f"  {name} {value}\n" for name, value in settings.items())

    def _server_config(self) -> str:
        # SHLVL: a bash that sshd starts reads the account's ~/.bashrc unless it seems to be
        # nested.  Whatever that file costs, or does, is not what is looked at here.
        search = f" PATH={self._path}:/usr/bin:/bin" if self._path else ""
        return (
            f"Port {self.port}\nListenAddress 0.0.0.0\nHostKey {self.host_key}\nPidFile none\n"
            f"AuthorizedKeysFile {self.directory / 'authorized'}\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nPermitRootLogin yes\nLogLevel ERROR\n"
            f"SetEnv SHLVL=1{search}\nMaxStartups {self._login_count_max}\n{self._extra}\n"
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise KaError(Code.UNREACHABLE, f"sshd did not start: {self.log.read_text()[-300:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
