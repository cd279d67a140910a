"""`python -m bench slow`: what one node at a twentieth of its rate costs the others.

Real processes in network namespaces with shaped links.  Each kind of broadcast is run without a
fault, and then once for each node that is to be slow: its link, both ways, drops to `SLOW_SHARE`
while the copy is under way.  What counts is when the last of the *other* nodes has everything.
Their copies are compared byte by byte.
"""

from __future__ import annotations

import argparse
import base64
import filecmp
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench.cell import require_root
from bench.model import parse_size
from bench.netlab import NetLab
from common.broadcast.cost import Network
from common.broadcast.job import encode_job
from common.broadcast.node import HopOptions
from common.broadcast.planner import Request, make_plan
from common.broadcast.topology import Kind
from common.broadcast.transfer import new_job
from common.errors import Code, KaError

__all__ = ["main"]

SLOW_SHARE = 0.05
KINDS = (Kind.CHAIN, Kind.BINARY, Kind.STRIPES)
PATIENCE = 2.2
"""How many times as long as the link needs a copy may take."""
MARGIN_S = 8.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    given = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        require_root()
        kinds = [kind for kind in KINDS if kind.value in given.kinds.split(",")]
        if not kinds:
            raise KaError(Code.USAGE, f"kinds are: {', '.join(kind.value for kind in KINDS)}")
        slow_nodes = [int(name) for name in given.slow.split(",")]
        if any(not 1 <= node <= given.nodes for node in slow_nodes):
            raise KaError(Code.USAGE, f"nodes are 1 to {given.nodes}")
        size = parse_size(given.size)
        with tempfile.TemporaryDirectory(dir=given.scratch, prefix="ka-bench-slow-") as name:
            source = Path(name) / "source"
            source.write_bytes(os.urandom(size))
            for kind in kinds:
                base_s = _Copy(source, given, kind, 0).run()
                print(f"{kind.value:<8} no node slow   {base_s:6.2f} s", flush=True)
                for node in slow_nodes:
                    took_s = _Copy(source, given, kind, node).run()
                    print(
                        f"{kind.value:<8} node {node} slow    {took_s:6.2f} s"
                        f"   {100 * (took_s / base_s - 1):+5.1f} %",
                        flush=True,
                    )
    except (KaError, ValueError) as error:
        print(f"bench slow: {error}")
        return error.code.exit_code if isinstance(error, KaError) else 2
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench slow",
        description="Broadcast over shaped links while one node's link falls to a twentieth.",
        epilog="example: python -m bench slow --kinds stripes --slow 1,5 --after 6",
    )
    kinds = ",".join(kind.value for kind in KINDS)
    parser.add_argument("--kinds", default=kinds, help="default: %(default)s")
    parser.add_argument("--slow", default="1,2,5", metavar="NODE,...",
                        help="each in turn; default: %(default)s")  # fmt: skip
    parser.add_argument("--after", type=float, default=3.0, metavar="S",
                        help="when its link falls; default: %(default)s")  # fmt: skip
    parser.add_argument("--nodes", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", default="256MiB", help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=200.0, metavar="MBIT",
                        help="of links, each way; default: %(default)s")  # fmt: skip
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), metavar="DIR",
                        help="room for a copy per node; default: %(default)s")  # fmt: skip
    return parser.parse_args(arguments)


class _Copy:
    """One broadcast, with one slow node or (0) none."""

    def __init__(self, source: Path, given: argparse.Namespace, kind: Kind, slow: int) -> None:
        self._source, self._given, self._slow = source, given, slow
        size = source.stat().st_size
        rate = given.rate * 1e6 / 8
        network = Network(up_rate=rate, down_rate=rate)
        self._plan = make_plan(Request(size, (given.nodes,), network, kind=kind, fanout=2)).chosen
        self._chunk_count = -(-size // self._plan.chunk_size)
        self._limit_s = PATIENCE * size / rate + MARGIN_S
        self._options = HopOptions(expected_rate=rate, deadline_s=self._limit_s - MARGIN_S / 2)
        self._whole_s: dict[int, float] = {}
        """When a node had every chunk."""

    def run(self) -> float:
        """Return how long it took until every healthy node had everything."""
        healthy = [node for node in range(1, self._given.nodes + 1) if node != self._slow]
        with (
            tempfile.TemporaryDirectory(dir=self._source.parent) as name,
            NetLab((self._given.nodes + 1,), rate_mbit=self._given.rate) as lab,
        ):
            directory = Path(name)
            processes = [self._start(lab, node, directory) for node in range(lab.count)]
            try:
                self._broadcast(lab, processes, healthy)
            finally:
                for process in processes:
                    process.kill()
                    process.communicate()
            late = [node for node in healthy if node not in self._whole_s]
            if late:
                raise KaError(Code.TIMEOUT, f"not whole after {self._limit_s:.0f} s: nodes {late}")
            for node in healthy:
                if not filecmp.cmp(self._source, directory / str(node), shallow=False):
                    raise KaError(Code.CHUNK_CORRUPT, f"node {node} has other bytes")
        return max(self._whole_s[node] for node in healthy)

    def _start(self, lab: NetLab, node: int, directory: Path) -> subprocess.Popen[str]:
        source = ["source", "--from", str(self._source), "--chunk-size", str(self._plan.chunk_size)]
        sink = ["node", "--rank", str(node), "--to", str(directory / str(node)), "--progress"]
        words = [*(sink if node else source), "--listen", f"{lab.address(node)}:0"]
        return subprocess.Popen(
            lab.inside(node, sys.executable, "-m", "common.broadcast", *words),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _broadcast(
        self, lab: NetLab, processes: Sequence[subprocess.Popen[str]], healthy: Sequence[int]
    ) -> None:
        addresses = [_line(process) for process in processes]
        job = new_job(self._plan.shape, addresses, self._options)
        text = base64.b64encode(encode_job(job)).decode() + "\n"
        begun_s = time.monotonic()
        watchers = [
            threading.Thread(target=self._watch, args=(node, process, begun_s))
            for node, process in enumerate(processes)
        ]
        for process, watcher in zip(processes, watchers, strict=True):
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.flush()
            watcher.start()
        if self._slow:
            time.sleep(self._given.after)
            lab.throttle(self._slow, self._given.rate * SLOW_SHARE)
        for node in healthy:
            watchers[node].join(max(0.0, begun_s + self._limit_s - time.monotonic()))

    def _watch(self, node: int, process: subprocess.Popen[str], begun_s: float) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == str(self._chunk_count):
                self._whole_s[node] = time.monotonic() - begun_s


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise KaError(Code.INTERNAL, "a node did not start")
    return line
