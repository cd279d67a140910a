"""`python -m bench copy`: one file to many nodes over shaped links, Ka beside its peers.

Prints, for each way, the time for one node and for all, their ratio, the share of the link that
the copy used, and processor seconds per gigabyte and node.  Every copy is compared byte by byte.
All ways take turns in the same run; a way that fails is reported and the others go on.

The flat copy sends everything once for each node over one link; its file is smaller
(`FLAT_SHARE`), or it would take minutes, and its figures are scaled up.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import packages
from bench.cell import require_root
from bench.copysystems import WAYS, Copied, Flat, KaCopy, Setting, Way
from bench.model import parse_size
from bench.netlab import NetLab
from common.errors import Code, KaError

__all__ = ["main"]

FLAT_SHARE = 16
PATTERN_SIZE = 1 << 24


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    given = _parse(arguments)
    # What was set up is taken down also when it is ended by a signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = [way for way in WAYS if way.name in given.ways.split(",")]
    failed = False
    rows: list[dict[str, object]] = []
    try:
        require_root()
        if not chosen:
            raise KaError(Code.USAGE, f"ways are: {', '.join(way.name for way in WAYS)}")
        for way in chosen:
            packages.ensure(way.programs, may_install=not given.no_install)
        size = parse_size(given.size)
        with tempfile.TemporaryDirectory(dir=given.scratch, prefix="ka-bench-copy-") as name:
            for number in range(given.runs):
                for way in random.sample(chosen, len(chosen)):
                    row = _measure(way(), Path(name), given, size, number)
                    failed = failed or "error" in row
                    rows.append(row)
                    print(_told(row), flush=True)
            if given.racks:
                print(_two_racks(Path(name), given, size), flush=True)
    except KaError as error:
        print(f"bench copy: {error}")
        return error.code.exit_code
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench copy",
        description="Send one file to many nodes over shaped links, with Ka and with its peers.",
        epilog="example: python -m bench copy --nodes 24 --size 64MiB --ways ka,nc+tee",
    )
    names = ",".join(way.name for way in WAYS)
    parser.add_argument("--ways", default=names, help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--size", default="256MiB", help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=200.0, metavar="MBIT",
                        help="of every link, each way; default: %(default)s")  # fmt: skip
    parser.add_argument("--runs", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--racks", action="store_true",
                        help="also: two racks, a four times slower uplink between")  # fmt: skip
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), metavar="DIR",
                        help="room for a copy per node; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--no-install", action="store_true",
                        help="do not install the peers' Debian packages")  # fmt: skip
    return parser.parse_args(arguments)


def _measure(
    way: Way, base: Path, given: argparse.Namespace, size: int, number: int
) -> dict[str, object]:
    row: dict[str, object] = {"way": way.name, "run": number, "nodes": given.nodes, "size": size}
    share = FLAT_SHARE if isinstance(way, Flat) else 1
    try:
        one = _copy(way, base, (1,), given.rate, 0.0, size // share)[0]
        all_ = _copy(way, base, (given.nodes,), given.rate, 0.0, size // share)[0]
    except KaError as error:
        row["error"] = str(error)
        return row
    ideal_s = size * 8e-6 / given.rate
    row |= {
        "one_s": one.seconds * share,
        "all_s": all_.seconds * share,
        "ratio": all_.seconds / one.seconds,
        "link_share": ideal_s / (all_.seconds * share),
        "cpu_s_per_gb_and_node": all_.cpu_s * share * 1e9 / size / given.nodes,
        "remark": all_.remark,
    }
    return row


def _told(row: dict[str, object]) -> str:
    if "error" in row:
        return f"{row['way']:<11} failed: {row['error']}"
    return (
        f"{row['way']:<11} 1 node {row['one_s']:7.2f} s"
        f"   {row['nodes']} nodes {row['all_s']:7.2f} s"
        f"   ratio {row['ratio']:5.2f}   link {100 * float(str(row['link_share'])):5.1f} %"
        f"   cpu {row['cpu_s_per_gb_and_node']:5.2f} s/GB/node   {row['remark']}"
    )


def _two_racks(base: Path, given: argparse.Namespace, size: int) -> str:
    half, slow = given.nodes // 2, given.rate / 4
    racks, size = (half, given.nodes - half), size // 4
    copied, crossed = _copy(KaCopy(), base, racks, given.rate, slow, size)
    return (
        f"two racks of {racks[0]} and {racks[1]}, uplink {slow:g} Mbit/s: {copied.seconds:.2f} s, "
        f"the file crossed it {crossed[0] / size:.2f} times ({copied.remark})"
    )


def _copy(
    way: Way,
    base: Path,
    racks: tuple[int, ...],
    rate_mbit: float,
    uplink_mbit: float,
    size: int,
) -> tuple[Copied, list[int]]:
    """Copy in a lab of its own; return the result and what has crossed uplinks."""
    source, directory = base / "source", base / "copies"
    _make_file(source, size)
    directory.mkdir()
    try:
        sizes = (racks[0] + 1, *racks[1:])
        with NetLab(sizes, rate_mbit=rate_mbit, uplink_mbit=uplink_mbit) as lab:
            setting = Setting(lab, source, directory, racks, rate_mbit, uplink_mbit)
            for node in setting.nodes:
                setting.target(node).parent.mkdir()
            before = lab.uplink_sizes()
            copied = way.copy(setting)
            crossed = [b - a for a, b in zip(before, lab.uplink_sizes(), strict=True)]
            for node in setting.nodes:
                if not filecmp.cmp(source, setting.target(node), shallow=False):
                    raise KaError(Code.CHUNK_CORRUPT, f"{way.name}: node {node} has other bytes")
        return copied, crossed
    finally:
        shutil.rmtree(directory)


def _make_file(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size == size:
        return
    pattern = os.urandom(PATTERN_SIZE)
    with path.open("wb") as file:
        for at in range(0, size, PATTERN_SIZE):
            # No two parts are equal, or one that was mixed up would not be noticed.
            part = at.to_bytes(8, "big") + pattern[8:]
            file.write(part[: size - at])
