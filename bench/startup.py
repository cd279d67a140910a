"""How long an mds takes to start, and what memory it needs, by the number of files.

`python -m bench.startup --files 1000 --files 1000000` makes a store with so many files by the
file system's own operations (without clients: a million creates over the wire would take long),
starts `nfsp mds` on it several times and prints, for each size, the seconds from start to ready
and the memory afterwards.  Start-up must not grow with the number of files, and neither must
memory: the mds keeps no table of them.
"""

from __future__ import annotations

import argparse
import shutil
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["main"]

_MAKE = """
import sys, trio
from pathlib import Path
from nfsp import wire
from nfsp.config import load_cluster
from nfsp.mds import create
from nfsp.mds.daemon import open_engine
from nfsp.mds.placement import Placement
from nfsp.mds.view import Context
from nfsp.model import ClusterMap, Superblock
from nfsp import keys

async def main(path, count):
    config, _key = load_cluster(Path(path))
    engine = open_engine(config.mds[0])
    rule = Superblock.decode(engine.get(keys.SUPERBLOCK)).layout
    placement = Placement(rule, ClusterMap.decode(engine.get(keys.CLUSTER_MAP)))
    context = Context(0, 1, lambda ino: False, lambda ino: False, placement)
    parent = 1
    for number in range(count):
        if number % 1000 == 0:
            parent = 1
        mode = 0o40755 if number % 1000 == 0 else 0o100644
        message = wire.Create(
            0, 0, parent, b"%d" % number, mode, 0, 0, 0, 0, b"", False, True
        )
        outcome = create.create(engine, message, context)
        engine.apply(outcome.writes, epoch=engine.epoch)
        if number % 1000 == 0:
            from nfsp.model import Inode
            parent = Inode.decode(outcome.reply.inode).ino
        if number % 10_000 == 9_999:
            await engine.checkpoint()
    await engine.checkpoint()
    engine.close()

trio.run(main, sys.argv[1], int(sys.argv[2]))
"""


def _memory_mib(pid: int) -> float:
    """Return the private memory of a process: what it keeps for itself, not the page cache."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Dirty:", "Swap:")):
            total += int(line.split()[1])
    return total / 1024


def _start(directory: Path) -> tuple[float, float]:
    """Start the mds alone; return the seconds until it is ready and its memory in MiB."""
    command = [sys.executable, "-c", "import os, sys; from nfsp.cli import main; main()"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "-c", str(directory / "cluster.toml"), "mds", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "mds.started" in line:
            break
    seconds = time.perf_counter() - started
    memory = _memory_mib(process.pid)
    process.terminate()
    process.communicate()
    return seconds, memory


def main() -> None:
    """Print one line for each number of files."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("--files", type=int, action="append")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    print(f"{'files':>10} {'store MiB':>10} {'start s':>8} {'memory MiB':>11}")
    for count in options.files or [1000, 1_000_000]:
        directory = Path(tempfile.mkdtemp(prefix="ka-startup-", dir=options.scratch))
        try:
            nfsp = Path(sys.executable).with_name("nfsp")
            subprocess.run([nfsp, "up", directory, "--daemon"], check=True, capture_output=True)
            subprocess.run([nfsp, "down", directory], check=True, capture_output=True)
            subprocess.run(
                [sys.executable, "-c", _MAKE, directory / "cluster.toml", str(count)], check=True
            )
            runs = [_start(directory) for _ in range(options.runs)]
            size = sum(
                path.stat().st_blocks * 512
                for path in (directory / "mds0").rglob("*")
                if stat.S_ISREG(path.stat().st_mode)
            )
            seconds = statistics.median(run[0] for run in runs)
            memory = statistics.median(run[1] for run in runs)
            print(f"{count:>10} {size / 2**20:>10.0f} {seconds:>8.2f} {memory:>11.1f}", flush=True)
        finally:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
