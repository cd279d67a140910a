"""A whole cluster on one host: what `nfsp up` and `nfsp down` do.

DIR holds everything: cluster.toml, cluster.key, mds0/ and iod1/ ... (the stores), run/ (pid files,
sockets) and log/.  The daemons are the same that make a real cluster, one for each host; so is
cluster.toml.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import trio

from common.config import make_key
from common.errors import Code, KaError
from nfsp.config import load_cluster
from nfsp.mds.daemon import mkfs
from nfsp.process import PidFile, signals_held, spawn, stop

__all__ = ["OneHost"]

SOCKET_PATH_SIZE_MAX = 100
"""The kernel's limit for a unix socket's path is 108 bytes; longer ones are left out."""
IODS_MAX = 250
FORCE_TIMEOUT_S = 30.0
"""Who stops everything by force has a daemon that hangs, perhaps, and does not wait for minutes."""


class OneHost:
    """The cluster in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.config_path = self.directory / "cluster.toml"

    def create(self, iod_count: int) -> None:
        """Write cluster.toml and the key, and make the file system; keep what is there.

        cluster.toml gets its name when all is made: an interrupted attempt is taken up again.
        """
        if self.config_path.exists():
            return
        if not 1 <= iod_count <= IODS_MAX:
            raise KaError(Code.USAGE, f"--iods takes 1 to {IODS_MAX}")
        try:
            self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            key = self.directory / "cluster.key"
            if not key.exists():
                make_key(key)
            draft = self.directory / ".cluster.toml.new"
            is_begun = draft.exists() and (self.directory / "mds0").exists()
            if not is_begun:
                draft.write_text(self._describe(iod_count))
        except OSError as error:
            raise KaError(
                Code.USAGE, f"cannot write to {self.directory}: {error.strerror}"
            ) from None
        config, _key = load_cluster(draft)
        for mds in config.mds:
            with contextlib.suppress(FileNotFoundError):
                if not any(mds.data.iterdir()):
                    mds.data.rmdir()
            try:
                with signals_held():  # trio does not stand exceptions out of handlers
                    trio.run(partial(mkfs, config, mds, uid=os.getuid(), gid=os.getgid()))
            except KaError as error:
                if error.code is not Code.EEXIST or not is_begun:
                    raise
        draft.rename(self.config_path)

    def _describe(self, iod_count: int) -> str:
        run = self.directory / "run"
        lines = [
            "# A cluster on one host, written by `nfsp up`.  docs/operations.md lists every key.",
            "[cluster]",
            f'id = "{uuid.uuid4()}"',
            f'name = "{self.directory.name}"',
            'key_file = "cluster.key"',
        ]
        names = ["mds0", *(f"iod{number}" for number in range(1, iod_count + 1))]
        with _free_ports(len(names)) as ports:
            for name, port in zip(names, ports, strict=True):
                path = str(run / f"{name}.sock")
                lines += ["", f"[[{name[:3]}]]", f"id = {name[3:]}"]
                lines.append(f'address = "127.0.0.1:{port}"')
                if len(os.fsencode(path)) <= SOCKET_PATH_SIZE_MAX:
                    lines.append(f'socket = "{path}"')
                lines.append(f'data = "{name}"')
        return "\n".join(lines) + "\n"

    def running(self) -> set[str]:
        """Return what runs from this directory: names of daemons, and mount points."""
        daemons = {name for name in self._daemons() if self.pid_file(name).owner() is not None}
        return daemons | {str(mountpoint) for mountpoint, _ in self.mounts()}

    def start(self, say: Callable[[str], None]) -> None:
        """Start every daemon that is not running; raises KaError if one cannot."""
        for name in self._daemons():
            if self.pid_file(name).owner() is None:
                self.start_daemon(name[:3], int(name[3:]))
                say(f"{name} started")

    def start_daemon(self, kind: str, number: int) -> int:
        """Start one daemon; return its pid when it can be reached."""
        try:
            return spawn(
                ["-c", str(self.config_path), kind, str(number)],
                self.directory / "log" / f"{kind}{number}.log",
            )
        except KaError as error:
            raise KaError(error.code, f"{kind}{number}: {error.message}") from None

    def stop(
        self, say: Callable[[str], None], *, force: bool = False, but: Collection[str] = ()
    ) -> None:
        """Unmount and stop everything that runs from this directory, *but* what was `running`.

        Raises KaError EBUSY, with the daemons left running, while a mount is in use; *force* takes
        the mount away from its users.
        """
        from nfsp.mounting import detach, unmount

        for mountpoint, pid_file in self.mounts():
            if str(mountpoint) in but:
                continue
            try:
                unmount(mountpoint, timeout_s=FORCE_TIMEOUT_S if force else None, say=say)
                say(f"unmounted {mountpoint}")
            except KaError as error:
                if not force:
                    raise
                detach(mountpoint)
                pid = pid_file.owner()
                if pid is not None:
                    stop(pid, pid_file.owner)
                say(f"unmounted {mountpoint} by force: {error.message}")
        for name in reversed(self._daemons()):
            pid_file = self.pid_file(name)
            pid = pid_file.owner()
            if pid is not None and name not in but:
                gentle = stop(pid, pid_file.owner)
                say(f"{name} stopped{'' if gentle else ' by force'}")

    def mounts(self) -> list[tuple[Path, PidFile]]:
        """Return the mount points served from this directory, dead ones too."""
        from nfsp.mounting import is_dead

        found = []
        for path in sorted((self.directory / "run").glob("mount-*.path")):
            pid_file = PidFile(path.with_suffix(".pid"))
            with contextlib.suppress(OSError):
                mountpoint = Path(path.read_text())
                if pid_file.owner() is not None or is_dead(mountpoint):
                    found.append((mountpoint, pid_file))
        return found

    def pid_file(self, name: str) -> PidFile:
        return PidFile(self.directory / "run" / f"{name}.pid")

    def _daemons(self) -> list[str]:
        """Return their names, in the order in which they are started."""
        config, _key = load_cluster(self.config_path)
        return [f"iod{iod.id}" for iod in config.iod] + [f"mds{mds.id}" for mds in config.mds]


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    """Find TCP ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            ports.append(sock.getsockname()[1])
        yield ports
