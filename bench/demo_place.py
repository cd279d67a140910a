"""The demo's place: a new directory with room, the `nfsp` command in it, and its clearing.

However the demo ends, `place` leaves nothing: the cluster is stopped as a user would stop it; then
whatever is still mounted below the directory is detached, whatever process still carries its mark
in the environment is killed, and the directory goes.  Signals that come meanwhile are ignored.
Only `kill -9` of the demo itself can leave something; `nfsp down DIR` then ends it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.config import format_size
from common.errors import Code, KaError

__all__ = ["DISK_SPARE_SIZE", "Place", "Share", "choose_base", "place"]

DISK_SPARE_SIZE = 512 << 20
"""Beside the data: journals, headers, small files' blocks, and what iods keep free (64 MiB)."""
MARK = "KA_DEMO_DIRECTORY"
COMMAND_TIMEOUT_S = 300.0
SWEEP_TIMEOUT_S = 20.0
LARGEST_COUNT = 3
_CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Share:
    """What one iod stores."""

    iod: int
    file_count: int
    size: int
    """Bytes allocated on the local disk."""
    largest: list[tuple[str, int]]
    """(name, bytes)"""


def choose_base(wanted: Path | None, needed: int) -> Path:
    """Return a directory that has room for *needed* bytes; raises KaError USAGE if none has."""
    candidates = [wanted] if wanted else [Path("/var/tmp"), Path(tempfile.gettempdir()), _CHECKOUT]
    told = []
    for base in dict.fromkeys(candidates):
        if not base.is_dir() or not os.access(base, os.W_OK | os.X_OK):
            told.append(f"{base} cannot be written")
            continue
        free = shutil.disk_usage(base).free
        if free >= needed:
            return base.resolve()
        told.append(f"{base} has {format_size(free)}")
    raise KaError(
        Code.USAGE,
        f"{format_size(needed)} of disk space are needed: {', '.join(told)}; "
        "name a place with --directory, or a smaller --size",
    )


class Place:
    """The demo's directory and the commands run there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster = directory / "cluster"
        self.mount = directory / "mnt"
        self.config = self.cluster / "cluster.toml"
        self.mount.mkdir()
        # The environment's own command, whatever PATH says, on the code of this checkout.
        self._command = Path(sys.executable).parent / "nfsp"
        path = os.pathsep.join(filter(None, (str(_CHECKOUT), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": path, MARK: str(directory)}
        if not os.access(self._command, os.X_OK):
            raise KaError(Code.USAGE, f"no {self._command}: run make setup")

    def nfsp(self, *arguments: str) -> str:
        """Run `nfsp ARGUMENTS` and return what it prints; raises KaError with its last line."""
        code, text = self.try_nfsp(*arguments)
        if code:
            line = text.splitlines()[-1] if text else f"nfsp {arguments[0]}: exit code {code}"
            raise KaError(Code.INTERNAL, line.removeprefix("nfsp: "))
        return text

    def try_nfsp(self, *arguments: str) -> tuple[int, str]:
        """Run `nfsp ARGUMENTS`; return its exit code and all it prints."""
        # Through a file: a daemon it leaves behind would hold a pipe open for ever.
        with open(os.memfd_create("output"), "w+b") as output:
            try:
                done = subprocess.run(
                    [self._command, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                    stderr=output, timeout=COMMAND_TIMEOUT_S, env=self._environment, check=False,
                    cwd=self.directory,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise KaError(
                    Code.TIMEOUT, f"nfsp {arguments[0]}: no end after {COMMAND_TIMEOUT_S:.0f} s"
                ) from None
            output.seek(0)
            return done.returncode, output.read().decode(errors="replace").strip()

    def share(self, iod: int) -> Share:
        """Return what an iod stores, counted on its own disk."""
        data = self.cluster / f"iod{iod}" / "data"
        found: list[tuple[int, str, int]] = []
        for text, _, names in os.walk(data):
            for name in names:
                path = Path(text, name)
                status = path.stat()
                found.append((status.st_blocks * 512, str(path.relative_to(data)), status.st_size))
        largest = [(name, size) for _, name, size in sorted(found, reverse=True)[:LARGEST_COUNT]]
        return Share(iod, len(found), sum(one[0] for one in found), largest)

    def chunk_file(self, iod: int, ino: int, column: int) -> tuple[str, int] | None:
        """Return name and allocated bytes of one chunk file of an iod."""
        data = self.cluster / f"iod{iod}" / "data"
        for path in data.glob(f"*/*/{ino:x}.{column}"):
            return str(path.relative_to(self.cluster)), path.stat().st_blocks * 512
        return None

    def drop_caches(self) -> None:
        """Make the kernel forget what it has of the stores: all it has, if we are root."""
        os.sync()
        if os.geteuid() == 0:
            with contextlib.suppress(OSError):  # a container's /proc may be read-only
                Path("/proc/sys/vm/drop_caches").write_text("3")
                return
        for text, _, names in os.walk(self.cluster):
            for name in names:
                with contextlib.suppress(OSError):
                    _forget_pages(Path(text, name))


def _forget_pages(path: Path) -> None:
    if path.is_file():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


# ---------------------------------------------------------------- clearing


@contextmanager
def place(base: Path, *, say: Callable[[str], None]) -> Iterator[Place]:
    """Make the directory; clear it away, with all that runs there, however the block ends."""
    directory = Path(tempfile.mkdtemp(prefix="ka-demo-", dir=base))
    where: Place | None = None
    try:
        where = Place(directory)
        yield where
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # whoever read our output may be gone
            say("tearing down")
        _clear(where, directory)


def _clear(where: Place | None, directory: Path) -> None:
    if where is not None and where.config.exists():
        with contextlib.suppress(KaError):  # what it could not end is ended below
            where.try_nfsp("down", str(where.cluster))
    deadline = time.monotonic() + SWEEP_TIMEOUT_S
    while True:
        mounts, pids = mounts_below(directory), marked(directory)
        if not mounts and not pids:
            break
        if time.monotonic() > deadline:
            raise KaError(Code.INTERNAL, f"still in use: {directory}: {mounts} {pids}")
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for point in mounts:
            _detach(point)
        time.sleep(0.05)
    shutil.rmtree(directory)


def mounts_below(directory: Path) -> list[Path]:
    """Return the mount points below a directory, deepest first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        text = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
        if Path(text).is_relative_to(directory):
            points.append(Path(text))
    return sorted(points, key=lambda point: len(point.parts), reverse=True)


def marked(directory: Path) -> list[int]:
    """Return the living processes, this one apart, that were started from *directory*."""
    mark = f"{MARK}={directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # another user's, or gone
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _detach(point: Path) -> None:
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, str(point)], check=False, capture_output=True, timeout=30)
