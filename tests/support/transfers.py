"""Transfers for tests: all hops in the test's own loop, or each in a process of its own.

In both, chunks travel over real sockets on loopback.  `Party` takes a node's faults as arguments;
`Processes` lets a test kill, stop and start them.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bench.netlab import NetLab
from common.broadcast.job import Job, encode_job
from common.broadcast.manifest import Algorithm
from common.broadcast.node import HopOptions
from common.broadcast.outcome import Summary
from common.broadcast.sink import FileSink
from common.broadcast.source import Source
from common.broadcast.store import Sink
from common.broadcast.topology import Kind, Shape
from common.broadcast.transfer import new_job, run_node, run_source
from common.errors import KaError
from common.sockets import listen

__all__ = ["CHUNK_SIZE", "Party", "Processes", "damaging", "file_sinks", "random_file", "shape"]

CHUNK_SIZE = 64 * 1024


def shape(kind: Kind, count: int) -> Shape:
    """Return a shape for *count* receivers in one rack."""
    return Shape(kind, (count,), fanout=2)


def random_file(path: Path, size: int, seed: int = 1) -> bytes:
    """Write a file that no compression helps with; return its content."""
    data = random.Random(seed).randbytes(size)
    path.write_bytes(data)
    return data


class Party:
    """A source and its nodes in this process."""

    def __init__(self, shape: Shape, options: HopOptions | None = None) -> None:
        count = shape.receiver_count + 1
        self.sockets = [listen("127.0.0.1:0") for _ in range(count)]
        addresses = [f"127.0.0.1:{one[0].getsockname()[1]}" for one in self.sockets]
        self.job = new_job(shape, addresses, options)
        self.jobs = dict.fromkeys(range(count), self.job)
        """What each rank believes."""
        self.results: dict[int, Summary | KaError] = {}

    async def run(
        self,
        source: Path | Source,
        sinks: dict[int, Sink],
        *,
        chunk_size: int = CHUNK_SIZE,
        **more: Any,
    ) -> Summary:
        """Transfer; ranks without a sink are never started.  All results are in `results`."""
        what = source if isinstance(source, Source) else Source(str(source))
        what.scan()
        try:
            async with trio.open_nursery() as nursery:
                for rank, sink in sinks.items():
                    nursery.start_soon(self._node, rank, sink)
                return await run_source(
                    self.jobs[0],
                    what,
                    sockets=self.sockets[0],
                    name="test",
                    chunk_size=chunk_size,
                    **more,
                )
        finally:
            self.close()

    async def _node(self, rank: int, sink: Sink) -> None:
        try:
            result = await run_node(self.jobs[rank], rank, sink, sockets=self.sockets[rank])
        except KaError as error:
            self.results[rank] = error
        else:
            self.results[rank] = result

    def close(self) -> None:
        for sockets in self.sockets:
            for sock in sockets:
                sock.close()

    def calls_through(self, rank: int, peer: int, address: str) -> None:
        """Let *rank* reach *peer* at another address."""
        addresses = list(self.jobs[rank].addresses)
        addresses[peer] = address
        self.jobs[rank] = replace(self.jobs[rank], addresses=tuple(addresses))


@asynccontextmanager
async def damaging(target: str, every: int) -> AsyncIterator[str]:
    """Run a proxy that flips a bit in each *every* bytes it passes on from the target."""

    async def pump(source: trio.SocketStream, sink: trio.SocketStream, flips: bool) -> None:
        left = every
        try:
            while data := bytearray(await source.receive_some(1 << 16)):
                while flips and left <= len(data):
                    data[left - 1] ^= 1
                    left += every
                left -= len(data)
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def serve(near: trio.SocketStream) -> None:
        host, _, port = target.rpartition(":")
        try:
            far = await trio.open_tcp_stream(host, int(port))
        except OSError:
            await near.aclose()
            return
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(pump, near, far, False)
            await pump(far, near, True)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


class _Process:
    def __init__(self, interpreter: Sequence[str], arguments: Sequence[str]) -> None:
        self._popen = subprocess.Popen(
            [*interpreter, *arguments, "--progress"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._line()
        self.have_count = 0
        self.report: dict[str, Any] = {}

    def _line(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()

    def begin(self, job: Job) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(base64.b64encode(encode_job(job)).decode() + "\n")
        self._popen.stdin.flush()

    def wait_for(self, have_count: int) -> None:
        """Return once it has at least so many chunks."""
        while self.have_count < have_count:
            line = self._line()
            assert line.isdigit(), f"ended too early: {line}"
            self.have_count = int(line)

    def send_signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        """Return the exit code; what it reported is in `report`."""
        output = self._popen.communicate()[0]
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if lines:
            self.report = json.loads(lines[-1])
        return self._popen.returncode

    def end(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.communicate()


class Processes:
    """A source and its nodes, each a process; a context manager that ends them all."""

    def __init__(
        self,
        shape: Shape,
        source: Path,
        target: Callable[[int], Path],
        options: HopOptions,
        *,
        interpreter: Sequence[str] = (sys.executable, "-m", "common.broadcast"),
        algorithm: Algorithm = Algorithm.XXH3,
        lab: NetLab | None = None,
    ) -> None:
        """*interpreter*: what runs `common.broadcast` with arguments; *lab*: where."""
        self._target = target
        self._interpreter = interpreter
        self._lab = lab
        arguments = ["source", "--from", str(source), "--chunk-size", str(CHUNK_SIZE)]
        self.source = self._start(0, [*arguments, "--algorithm", algorithm.name])
        self.nodes = {
            rank: self._start(rank, self._node_arguments(rank))
            for rank in range(1, shape.receiver_count + 1)
        }
        addresses = [self.source.address, *(node.address for node in self.nodes.values())]
        self.job = new_job(shape, addresses, options)
        for process in (self.source, *self.nodes.values()):
            process.begin(self.job)

    def _start(self, rank: int, arguments: list[str]) -> _Process:
        if self._lab is None:
            return _Process(self._interpreter, arguments)
        listen = ["--listen", f"{self._lab.address(rank)}:0"]
        return _Process(self._lab.inside(rank, *self._interpreter), [*arguments, *listen])

    def _node_arguments(self, rank: int) -> list[str]:
        return ["node", "--rank", str(rank), "--to", os.fspath(self._target(rank))]

    def start_again(self, rank: int) -> None:
        """Start a node's process anew, at the same address."""
        address = self.nodes[rank].address
        more = ["--restarted", "--listen", address]
        self.nodes[rank].end()
        self.nodes[rank] = self._start(rank, [*self._node_arguments(rank), *more])
        self.nodes[rank].begin(self.job)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in (self.source, *self.nodes.values()):
            process.end()


def file_sinks(directory: Path, count: int) -> dict[int, Sink]:
    return {rank: FileSink(str(directory / f"out{rank}")) for rank in range(1, count + 1)}
