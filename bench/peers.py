"""The peers: GlusterFS and MooseFS, three data servers and one copy each, as Debian packs them.

Tuning is left as it is installed, for better or worse; two defaults are worth knowing when figures
are read.  MooseFS runs its daemons and its mount at nice -19, and its chunkservers do not fsync a
chunk before they close it (HDD_FSYNC_BEFORE_CLOSE = 0), so its fsync'd figures promise less than
those of the others.  Its files are kept in a trash for a day, which makes rm cheaper.

Where a program insists on a path (glusterd: /var/lib, /var/log, /run) the mount namespace of the
cell gives it another directory there; the machine's own is never touched.
"""

from __future__ import annotations

import subprocess
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from bench.facts import package_version
from bench.systems import ADDRESS, System, command, daemon, wait_until
from common.errors import Code, KaError

__all__ = ["Gluster", "MooseFs"]

_START_TIMEOUT_S = 30.0
_SERVER_COUNT = 3


class _Peer(System):
    """What the peers share: a client that runs in the foreground and is our child."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self._client: subprocess.Popen[bytes] | None = None
        self._client_log = state / "client.log"

    @abstractmethod
    def _client_command(self) -> list[str]:
        """Return the mount's command line."""

    def mount(self) -> None:
        client = daemon(self._client_command(), self._client_log)
        wait_until(
            self.root.is_mount, f"{self.name}'s mount",
            timeout_s=_START_TIMEOUT_S, processes=[client], log=self._client_log,
        )  # fmt: skip
        self._client = client

    def unmount(self) -> None:
        assert self._client is not None
        command("umount", str(self.root))
        self._client.wait(_START_TIMEOUT_S)
        self._client = None

    def client_pids(self) -> set[int]:
        return set() if self._client is None else {self._client.pid}


class Gluster(_Peer):
    """A volume distributed over three bricks."""

    name = "gluster"
    programs: ClassVar[Mapping[str, str]] = {
        "glusterd": "glusterfs-server",
        "gluster": "glusterfs-cli",
        "glusterfs": "glusterfs-client",
    }

    def start(self) -> None:
        logs = self.state / "log"
        for source, target in ((self.state / "lib", "/var/lib/glusterd"),
                               (logs, "/var/log/glusterfs")):  # fmt: skip
            source.mkdir()
            Path(target).mkdir(parents=True, exist_ok=True)
            command("mount", "--bind", str(source), target)
        command("mount", "-t", "tmpfs", "tmpfs", "/run")
        Path("/run/gluster").mkdir()
        log = logs / "glusterd.log"
        glusterd = daemon(["glusterd", "--no-daemon", f"--log-file={log}"], log)
        wait_until(
            _glusterd_answers, "glusterd",
            timeout_s=_START_TIMEOUT_S, processes=[glusterd], log=log,
        )  # fmt: skip
        bricks = [self.state / f"brick{number}" for number in range(_SERVER_COUNT)]
        for brick in bricks:
            brick.mkdir()
        # `force`: it would rather not have bricks on the root file system.
        names = [f"{ADDRESS}:{brick}" for brick in bricks]
        command("gluster", "--mode=script", "volume", "create", "bench", *names, "force")
        command("gluster", "--mode=script", "volume", "start", "bench")
        self.mount()

    def _client_command(self) -> list[str]:
        return [
            "glusterfs", "--no-daemon", f"--volfile-server={ADDRESS}", "--volfile-id=bench",
            f"--log-file={self._client_log}", str(self.root),
        ]  # fmt: skip

    def version(self) -> str:
        return f"glusterfs-server {package_version('glusterfs-server')}"


def _glusterd_answers() -> bool:
    try:
        command("gluster", "--mode=script", "volume", "info")
    except KaError as error:
        if error.code is Code.UNREACHABLE:
            return False
        raise
    return True


class MooseFs(_Peer):
    """A master and three chunkservers, goal 1."""

    name = "moosefs"
    programs: ClassVar[Mapping[str, str]] = {
        "mfsmaster": "moosefs-master",
        "mfschunkserver": "moosefs-chunkserver",
        "mfsmount": "moosefs-client",
    }

    _CHUNKSERVER_PORT_FIRST = 9425

    def start(self) -> None:
        # The master must listen first: a chunkserver it refuses comes back after seconds only.
        master, log = self._start_master()
        wait_until(
            lambda: "daemon initialized properly" in log.read_text(errors="replace"), "mfsmaster",
            timeout_s=_START_TIMEOUT_S, processes=[master], log=log,
        )  # fmt: skip
        servers = [self._start_chunkserver(number) for number in range(_SERVER_COUNT)]
        wait_until(
            lambda: log.read_text(errors="replace").count("register end") >= _SERVER_COUNT,
            "MooseFS chunkservers",
            timeout_s=_START_TIMEOUT_S, processes=[master, *servers], log=log,
        )  # fmt: skip
        self.mount()
        # The default is two copies; one is what the others are measured with.
        command("mfssetgoal", "1", str(self.root))

    def _start_master(self) -> tuple[subprocess.Popen[bytes], Path]:
        data = self.state / "master"
        data.mkdir()
        (data / "metadata.mfs").write_bytes(b"MFSM NEW")  # an empty file system, in their format
        exports = self.state / "exports.cfg"
        exports.write_text("* / rw,alldirs,admin,maproot=0:0\n")
        topology = self.state / "topology.cfg"
        topology.write_text("")
        configuration = _configuration(
            self.state / "master.cfg",
            DATA_PATH=data, EXPORTS_FILENAME=exports, TOPOLOGY_FILENAME=topology,
        )  # fmt: skip
        log = self.state / "master.log"
        return daemon(["mfsmaster", "-f", "-c", str(configuration), "start"], log), log

    def _start_chunkserver(self, number: int) -> subprocess.Popen[bytes]:
        base = self.state / f"chunkserver{number}"
        for name in ("data", "var"):
            (base / name).mkdir(parents=True)
        disks = base / "hdd.cfg"
        disks.write_text(f"{base / 'data'}\n")
        configuration = _configuration(
            base / "chunkserver.cfg",
            DATA_PATH=base / "var", HDD_CONF_FILENAME=disks, MASTER_HOST=ADDRESS,
            CSSERV_LISTEN_PORT=self._CHUNKSERVER_PORT_FIRST + number,
        )  # fmt: skip
        return daemon(
            ["mfschunkserver", "-f", "-c", str(configuration), "start"], base / "chunkserver.log"
        )

    def _client_command(self) -> list[str]:
        return ["mfsmount", "-f", "-H", ADDRESS, str(self.root)]

    def version(self) -> str:
        return f"moosefs-master {package_version('moosefs-master')}"


def _configuration(file: Path, **settings: object) -> Path:
    values = {"WORKING_USER": "root", "WORKING_GROUP": "root", **settings}
    file.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return file
