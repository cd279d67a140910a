"""What is tried in the guest of test_nfs_uml.py: a cluster, its export, clients of two versions.

Run as a program inside a guest, with the directory of a stopped cluster as its argument: it copies
the cluster into memory, starts it, exports it, mounts it over NFS, tries each scenario and prints
one line of JSON with the outcome of each: null, or how it failed.

System calls are slow here: the big directory comes ready-made with the cluster.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.support import guest_nfs
from tests.support.cluster import Cluster, nfsp

__all__ = ["BIG_COUNT", "BIG_NAME", "MARK", "SCENARIOS"]

BIG_NAME = "big"
BIG_COUNT = 20_000
FILE_COUNT = 1_000
MARK = "outcomes: "
WAIT_S = 60.0


class Lab:
    """The cluster, and where its NFS mounts are."""

    def __init__(self, seed: Path) -> None:
        work = Path(tempfile.gettempdir())
        # Version 4 walks to an export from the server's root, which here is of a kind that cannot
        # be exported; so give it another.  Servers with an ordinary root need nothing.
        Path("/etc/exports").write_text(f"{work} 127.0.0.1(ro,fsid=0,insecure)\n")
        directory = work / "c"
        guest_nfs.run("cp", "-a", "--sparse=always", seed, directory)
        config = directory / "cluster.toml"
        config.write_text(config.read_text().replace(str(seed), str(directory)))
        self.cluster = Cluster(directory, work / "m")
        self.cluster.mount.mkdir()
        self.v3 = work / "v3"
        self.v4 = work / "v4"

    def mount_clients(self) -> None:
        guest_nfs.mount(self.cluster.mount, self.v3, "3")
        guest_nfs.mount(f"/{self.cluster.mount.name}", self.v4, "4.2")


def mount_without_durable_is_refused(lab: Lab) -> None:
    nfsp("up", lab.cluster.directory, "--daemon", "--mount", lab.cluster.mount)
    refused = lab.cluster.nfsp("export", lab.cluster.mount, "--to", "127.0.0.1", status=None)
    assert refused.returncode == 2, refused
    assert "not mounted with -o durable" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    nfsp("umount", lab.cluster.mount)
    elsewhere = lab.cluster.nfsp("export", "/tmp", "--to", "127.0.0.1", status=None)
    assert elsewhere.returncode == 2, elsewhere


def durable_mount_is_exported_for_both_versions(lab: Lab) -> None:
    lab.cluster.nfsp("mount", lab.cluster.mount, "-o", "durable")
    guest_nfs.start_server()
    lab.cluster.nfsp(
        "export", lab.cluster.mount, "--to", "127.0.0.1", "--options", "no_root_squash,insecure"
    )
    assert str(lab.cluster.mount) in guest_nfs.run("exportfs", "-s")
    lab.mount_clients()


def tree_copied_in_over_v4_equals_the_native_mount_over_v3(lab: Lab) -> None:
    source = Path(tempfile.gettempdir()) / "source"
    _make_tree(source)
    guest_nfs.run("cp", "-a", source, lab.v4 / "tree")
    expected = _describe(source)
    assert len(expected) > FILE_COUNT
    assert _describe(lab.cluster.mount / "tree") == expected
    assert _describe(lab.v3 / "tree") == expected


def _make_tree(root: Path) -> None:
    start_ns = 1_600_000_000_123_456_789
    for number in range(FILE_COUNT):
        directory = root / f"d{number % 20}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"file {number}"
        file.write_bytes(number.to_bytes(4) * (number * 7 % 3000))
        file.chmod(0o400 + number % 0o200)
        os.utime(file, ns=(start_ns, start_ns + number))
    (root / "large").write_bytes(os.urandom(3_000_000))
    (root / "link").symlink_to("d1/e1")
    os.link(root / "large", root / "d2" / "same")


def _describe(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for directory, _names, files in os.walk(root):
        for path in (Path(directory), *(Path(directory, name) for name in files)):
            status = path.lstat()
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = (path.read_bytes(), status.st_mtime_ns, status.st_nlink)
            elif path.is_symlink():
                content = os.readlink(path)
            found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, content)
    return found


def file_created_read_only_is_written_by_its_creator(lab: Lab) -> None:
    for client in (lab.v3, lab.v4):
        path = client / f"read-only-{client.name}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o444)
        os.write(fd, b"object")
        os.close(fd)
        assert (lab.cluster.mount / path.name).read_bytes() == b"object"


def big_directory_lists_complete_while_entries_come_and_go(lab: Lab) -> None:
    there = {str(number) for number in range(BIG_COUNT)}
    for client in (lab.v3, lab.v4):
        changes = _Changes(lab.cluster.mount / BIG_NAME, prefix=f"passing-{client.name}-")
        with changes:
            names = os.listdir(client / BIG_NAME)
        assert changes.count > 10, "nothing changed meanwhile"
        twice = [name for name, count in Counter(names).items() if count > 1]
        assert not twice, f"{client.name}: listed twice: {twice[:5]}"
        missing = there - set(names)
        assert not missing, f"{client.name}: {len(missing)} missing: {sorted(missing)[:5]}"
        odd = [name for name in set(names) - there if not name.startswith("passing-")]
        assert not odd


class _Changes:
    """Makes entries and removes them, each name once, until told to stop."""

    def __init__(self, directory: Path, *, prefix: str) -> None:
        self.count = 0
        self._directory = directory
        self._prefix = prefix
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            os.mkdir(self._directory / f"{self._prefix}{self.count}")
            if self.count >= 3:
                os.rmdir(self._directory / f"{self._prefix}{self.count - 3}")
            self.count += 1


def held_files_survive_a_restart_of_the_mds(lab: Lab) -> None:
    with _Held(lab) as held:
        _end(lab.cluster.pid("mds0"))
        nfsp("up", lab.cluster.directory, "--daemon")
        held.use()


def held_files_survive_a_restart_of_the_mount(lab: Lab) -> None:
    """As docs/nfs.md says: stop the NFS server, restart the mount, start the server."""
    with _Held(lab) as held:
        guest_nfs.run("rpc.nfsd", "0")
        guest_nfs.run("exportfs", "-f")
        nfsp("umount", lab.cluster.mount)
        lab.cluster.nfsp("mount", lab.cluster.mount, "-o", "durable")
        guest_nfs.run("exportfs", "-ra")
        guest_nfs.run("rpc.nfsd", "--no-udp", "2")
        held.use()


def held_files_survive_the_death_of_the_mount(lab: Lab) -> None:
    with _Held(lab) as held:
        _end(lab.cluster.mount_pid(lab.cluster.mount))
        guest_nfs.run("rpc.nfsd", "0")
        nfsp("umount", "--lazy", lab.cluster.mount)
        lab.cluster.nfsp("mount", lab.cluster.mount, "-o", "durable")
        guest_nfs.run("exportfs", "-ra")
        guest_nfs.run("rpc.nfsd", "--no-udp", "2")
        held.use()


class _Held:
    """Files and a directory that NFS clients have open: used before, and again by `use`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._fds: list[int] = []

    def __enter__(self) -> _Held:
        for client in (self._lab.v3, self._lab.v4):
            path = client / f"held-{client.name}"
            fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
            os.write(fd, b"before ")
            os.fsync(fd)
            self._fds += [fd, os.open(client / "tree" / "d3", os.O_RDONLY)]
        return self

    def use(self) -> None:
        for file, directory in zip(self._fds[::2], self._fds[1::2], strict=True):
            os.write(file, b"after")
            os.fsync(file)
            assert os.fstat(file).st_size == 12
            assert os.listdir(directory)
            os.close(os.open("e0", os.O_RDONLY, dir_fd=directory))
        for client in (self._lab.v3, self._lab.v4):
            native = self._lab.cluster.mount / f"held-{client.name}"
            assert native.read_bytes() == b"before after"

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + WAIT_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s, f"process {pid} does not end"
        time.sleep(0.05)


def export_is_withdrawn(lab: Lab) -> None:
    for client in (lab.v3, lab.v4):
        guest_nfs.unmount(client)
    lab.cluster.nfsp("export", "--remove", lab.cluster.mount)
    assert str(lab.cluster.mount) not in guest_nfs.run("exportfs", "-s")
    try:
        guest_nfs.mount(lab.cluster.mount, lab.v3, "3")
    except AssertionError:
        pass
    else:
        raise AssertionError("mounted what is no longer exported")
    again = lab.cluster.nfsp("export", "--remove", lab.cluster.mount, status=None)
    assert again.returncode == 2, again


def everything_is_clean_afterwards(lab: Lab) -> None:
    guest_nfs.run("rpc.nfsd", "0")
    guest_nfs.run("exportfs", "-f")
    nfsp("umount", lab.cluster.mount)
    lab.cluster.check()
    nfsp("down", lab.cluster.directory)


SCENARIOS: tuple[Callable[[Lab], None], ...] = (
    mount_without_durable_is_refused,
    durable_mount_is_exported_for_both_versions,
    tree_copied_in_over_v4_equals_the_native_mount_over_v3,
    file_created_read_only_is_written_by_its_creator,
    big_directory_lists_complete_while_entries_come_and_go,
    held_files_survive_a_restart_of_the_mds,
    held_files_survive_a_restart_of_the_mount,
    held_files_survive_the_death_of_the_mount,
    export_is_withdrawn,
    everything_is_clean_afterwards,
)


def main(seed: str) -> None:
    outcomes: dict[str, str | None] = {}
    started_s = time.monotonic()
    lab = Lab(Path(seed))
    for scenario in SCENARIOS:
        try:
            scenario(lab)
            outcomes[scenario.__name__] = None
        except Exception:
            outcomes[scenario.__name__] = traceback.format_exc()
        print(f"{time.monotonic() - started_s:6.1f} s {scenario.__name__}", flush=True)
    print(MARK + json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
