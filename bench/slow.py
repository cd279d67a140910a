"""`python -m bench slow`: what one node at a twentieth of its rate costs the others.

Real processes in network namespaces with shaped links.  Each kind of broadcast is run without a
fault, and then once for each node that is to be slow: its link, both ways, drops to `SLOW_SHARE`
while the copy is under way.  What counts is when the last of the *other* nodes has everything.
Their copies are compared byte by byte.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.cell import require_root
from bench.copysystems import Broadcast, Run, Setting
from bench.model import parse_size
from bench.netlab import NetLab
from common.broadcast.cost import Network
from common.broadcast.node import HopOptions
from common.broadcast.planner import Request, make_plan
from common.broadcast.topology import Kind
from common.errors import Code, KaError

__all__ = ["main"]

SLOW_SHARE = 0.05
PROGRESS = "--progress"
KINDS = (Kind.CHAIN, Kind.BINARY, Kind.STRIPES)
PATIENCE = 2.2
"""How many times as long as the link needs a copy may take."""
MARGIN_S = 8.0
START_S = 60.0
"""In which all processes have started."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    given = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        require_root()
        kinds = [kind for kind in KINDS if kind.value in given.kinds.split(",")]
        if not kinds:
            raise KaError(Code.USAGE, f"kinds are: {', '.join(kind.value for kind in KINDS)}")
        slow_nodes = [int(name) if name.isdecimal() else 0 for name in given.slow.split(",")]
        if given.nodes < 2 or any(not 1 <= node <= given.nodes for node in slow_nodes):
            raise KaError(Code.USAGE, f"--slow: nodes are 1 to {given.nodes}, of two or more")
        size = parse_size(given.size)
        if given.rate <= 0 or size <= 0 or given.after < 0:
            raise KaError(Code.USAGE, "rate and size are above 0, and no time is below")
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
    except KaError as error:
        print(f"bench slow: {error}")
        return error.code.exit_code
    except OSError as error:  # the scratch directory: not there, full
        print(f"bench slow: {error}")
        return 1
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
        self._last_line = b"%d" % -(-size // self._plan.chunk_size)
        """What a node says when it has every chunk."""
        self._limit_s = PATIENCE * size / rate + MARGIN_S
        self._options = HopOptions(expected_rate=rate, deadline_s=self._limit_s - MARGIN_S / 2)
        self._whole_s: dict[int, float] = {}
        """When a node had every chunk, since the beginning."""

    def run(self) -> float:
        """Return how long it took until every healthy node had everything; raises KaError."""
        rate = self._given.rate
        with (
            tempfile.TemporaryDirectory(dir=self._source.parent) as name,
            NetLab((self._given.nodes + 1,), rate_mbit=rate) as lab,
        ):
            setting = Setting(lab, self._source, Path(name), (self._given.nodes,), rate, 0.0)
            for node in setting.nodes:
                setting.target(node).parent.mkdir()
            run = Run(Path(name) / "ka.log", timeout_s=self._limit_s + START_S)
            try:
                self._broadcast(setting, Broadcast(run, setting, self._plan.chunk_size, PROGRESS))
            finally:
                run.end()
            healthy = [node for node in setting.nodes if node != self._slow]
            late = [node for node in healthy if node not in self._whole_s]
            if late:
                raise KaError(Code.TIMEOUT, f"not whole after {self._limit_s:.0f} s: nodes {late}")
            for node in healthy:
                if not filecmp.cmp(self._source, setting.target(node), shallow=False):
                    raise KaError(Code.CHUNK_CORRUPT, f"node {node} has other bytes")
        return max(self._whole_s[node] for node in healthy)

    def _broadcast(self, setting: Setting, broadcast: Broadcast) -> None:
        began_s = broadcast.begin(self._plan.shape, self._options)
        with selectors.DefaultSelector() as selector:
            for node in setting.nodes:
                stream = broadcast.processes[node].stdout
                assert stream is not None
                if node != self._slow:
                    selector.register(stream, selectors.EVENT_READ, (node, [b""]))
            if self._slow:
                self._follow(selector, began_s, self._given.after)
                if not selector.get_map():
                    raise KaError(Code.USAGE, f"all was over before {self._given.after:g} s")
                setting.lab.throttle(self._slow, self._given.rate * SLOW_SHARE)
            self._follow(selector, began_s, self._limit_s)

    def _follow(
        self, selector: selectors.BaseSelector, began_s: float, until_s: float
    ) -> None:
        """Note who has everything, until *until_s* after the beginning or all have ended."""
        while selector.get_map():
            left_s = began_s + until_s - time.monotonic()
            if left_s <= 0:
                return
            for key, _events in selector.select(left_s):
                node, unended = key.data
                data = os.read(key.fd, 1 << 16)
                *lines, unended[0] = (unended[0] + data).split(b"\n")
                if self._last_line in lines:
                    self._whole_s[node] = time.monotonic() - began_s
                if not data:
                    selector.unregister(key.fileobj)
