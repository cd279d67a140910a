"""A whole cluster in real processes that a test may kill, pause, damage and start again.

The same daemons as everybody's, started as `nfsp up` starts them, with a configuration that suits
tests: small chunks (files are striped early), a small journal, sessions that end soon.  Tests talk
to it by `Volume` or through a mount; neither is made here.

Everything blocks: from an async test, call it by `trio.to_thread.run_sync`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import trio

from common.config import make_key
from nfsp import check, status
from nfsp.config import ClusterConfig, load_cluster
from nfsp.fsck.findings import Report
from nfsp.mds.daemon import mkfs
from nfsp.onehost import OneHost

__all__ = ["CHUNK_SIZE", "Cluster", "nfsp", "wait_until"]

CHUNK_SIZE = 64 * 1024
WAIT_S = 30.0


class Cluster:
    """One mds and some iods below a directory."""

    def __init__(
        self,
        directory: Path,
        *,
        iods: int = 3,
        session_ttl_s: float = 60.0,
        timeout_s: float = 30.0,
        data: Mapping[str, Path] | None = None,
        reserve: int = 1 << 20,
    ) -> None:
        """Make the cluster, all daemons down.  *data*: daemons that store elsewhere."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.host = OneHost(directory)
        self.names = [f"iod{number}" for number in range(1, iods + 1)] + ["mds0"]
        places = {name: str((data or {}).get(name, name)) for name in self.names}
        self.key_path = directory / "cluster.key"
        make_key(self.key_path)
        lines = [
            "[cluster]", f'id = "{uuid.uuid4()}"', 'key_file = "cluster.key"',
            f"chunk_size = {CHUNK_SIZE}", "[mount]", f"timeout_s = {timeout_s}",
        ]  # fmt: skip
        with ExitStack() as stack:
            for name in self.names:
                sock = stack.enter_context(socket.socket())
                sock.bind(("127.0.0.1", 0))
                lines += [
                    f"[[{name[:3]}]]", f"id = {name[3:]}",
                    f'address = "127.0.0.1:{sock.getsockname()[1]}"',
                    f'socket = "{directory}/run/{name}.sock"', f'data = "{places[name]}"',
                ]  # fmt: skip
                if name == "mds0":
                    lines += [f"session_ttl_s = {session_ttl_s}", 'journal_size = "1MiB"']
                else:
                    lines += [f"reserve = {reserve}"]
        self.config_path.write_text("\n".join(lines) + "\n")
        trio.run(partial(mkfs, self.config, self.config.mds[0], uid=os.getuid(), gid=os.getgid()))

    @property
    def config_path(self) -> Path:
        return self.host.config_path

    @property
    def config(self) -> ClusterConfig:
        return load_cluster(self.config_path)[0]

    @property
    def key(self) -> bytes:
        return load_cluster(self.config_path)[1]

    # ------------------------------------------------------------ daemons

    def start(self, *names: str) -> None:
        """Start these daemons (all, if none is named) where they are not running."""
        for name in names or self.names:
            if self.pid(name) is None:
                self.host.start_daemon(name[:3], int(name[3:]))

    def pid(self, name: str) -> int | None:
        return self.host.pid_file(name).owner()

    def signal(self, number: int, *names: str) -> None:
        for name in names or self.names:
            pid = self.pid(name)
            assert pid is not None, f"{name} is not running"
            os.kill(pid, number)

    def kill(self, *names: str) -> None:
        """kill -9, all of them before the first is waited for."""
        pids = [pid for name in names or self.names if (pid := self.pid(name)) is not None]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def restart(self, *names: str) -> None:
        self.kill(*names)
        self.start(*names)

    def stop(self) -> None:
        """Stop what runs, in peace; a daemon that must be forced is an error."""
        said: list[str] = []
        self.host.stop(said.append)
        for name in self.names:
            assert self.pid(name) is None
        assert not [line for line in said if "force" in line], said

    def log(self, name: str) -> str:
        path = self.directory / "log" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # ------------------------------------------------------------ care

    def fsck(self, *, repair: bool = False, verify: bool = False) -> Report:
        return trio.run(
            partial(check.run_fsck, self.config, self.key, repair=repair, verify=verify)
        )

    def sessions(self) -> int:
        """How many sessions the mds knows."""
        found = trio.run(status.gather, self.config, self.key)
        return len(found["mds"][0].get("sessions", "?"))

    def chunk_files(self, name: str) -> list[Path]:
        """The chunk files of an iod, wherever its configuration puts them."""
        place = self.config.iod_config(int(name[3:])).data
        return sorted(path for path in (place / "data").rglob("*.*") if path.is_file())


def wait_until(condition: Callable[[], object], what: str, *, limit_s: float = WAIT_S) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {limit_s:.0f} s: {what}"
        time.sleep(0.02)


def nfsp(
    *arguments: object, limit_s: float = 60.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "nfsp", *map(str, arguments)],
        capture_output=True, text=True, timeout=limit_s, check=False,
        env=None if env is None else {**os.environ, **env},
    )  # fmt: skip
