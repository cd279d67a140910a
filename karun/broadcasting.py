"""A copy by broadcast: a process on each node, transfers between them, until everyone has had one.

The processes are a command of the run (karun/node_copy.py), so they die with it.  Each says where
it listens; a transfer begins when everyone has, or when for a while nobody new has: a host that
hangs delays nobody.  Who comes later has a transfer of its own, after that one.  With several
sources there is one transfer for each, one after the other.

Invariants
  * for each node there is one result: verified, or the reason why not;
  * the token of a transfer goes over the connections of the run only;
  * who has failed once takes part in nothing more.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from common.broadcast import chunkset
from common.broadcast.cost import Network
from common.broadcast.job import Job, encode_job
from common.broadcast.manifest import Algorithm
from common.broadcast.node import HopOptions
from common.broadcast.outcome import Entry, Summary, Verdict
from common.broadcast.planner import Choice, Request, make_plan
from common.broadcast.source import Source
from common.broadcast.transfer import Progress, new_job, run_source
from common.errors import KaError
from common.sockets import listen, parse_address
from karun import archive
from karun.agent import frames
from karun.agent.heavy import HEAVY
from karun.copied import Copied, CopyOptions, Step, racks_of
from karun.crew import Crew
from karun.feed import CHUNK_SIZE
from karun.lines import STDERR, Lines
from karun.node_copy import CONNECTION, INTERFACE, LOCAL, encode_job_frame
from karun.orders import Invocation
from karun.reasons import refusal
from karun.results import printable

if TYPE_CHECKING:
    from karun.copying import Item

__all__ = ["Broadcast"]

LINK_RATE = 125e6
"""What is planned with when nobody has said what the links can: 1 Gbit/s."""
QUIET_S = 1.5
"""When for so long, or for half the time that it took so far, nobody new has come, who is there
begins."""
AGAIN_S = 5.0
"""Until a node has a socket for the next source."""
END_S = 3.0
"""What the processes get to end by themselves."""
LINE_SIZE_MAX = 64 << 10
CROWD_COUNT = 8
"""Nodes for each core that one machine serves as quickly as machines of their own; with more, all
wait longer for each other."""
_PATIENCE = (
    "tick_s", "alive_s", "silence_s", "attach_s", "stall_s", "slow_s", "join_s", "avoid_s",
    "lost_grace_s", "quiet_s",
)  # fmt: skip
_REACH = {"local": LOCAL, "netns": INTERFACE}


class Broadcast:
    """One copy; also the sink of the command that its processes are."""

    def __init__(
        self,
        crew: Crew,
        destination: str,
        options: CopyOptions,
        on_progress: Callable[[Step], None] | None,
        on_output: Callable[[int, bytes], None] | None,
    ) -> None:
        self._crew = crew
        self._options = options
        self._on_progress = on_progress
        self._on_output = on_output
        reach = _REACH.get(crew.via, CONNECTION)
        self._is_local = reach == LOCAL
        self._words = [destination, reach, options.command]
        self._lines: dict[int, bytes] = {}
        self._addresses: dict[int, dict[str, Any]] = {}
        """Who has a socket open for the next transfer, and what else it has said."""
        self._done: set[int] = set()
        self._failures: dict[int, str] = {}
        self._notes: dict[int, str] = {}
        self._printed = Lines()
        self._refusals: dict[int, str] = {}
        """What sudo said where, in case that it was a refusal."""
        self._heavy: archive.Archive | None = None
        self._is_heavy_sent = False
        self._begun_s = self._news_s = trio.current_time()
        self._changed = trio.Event()

    async def send(self, items: Sequence[Item]) -> list[Copied]:
        """Bring all sources to all nodes; raises KaError when it is the sources that fail."""
        orders = self._crew.orders
        self._heavy = await trio.to_thread.run_sync(archive.build_heavy)
        place = archive.xxhash_place() if self._crew.onehost else ""
        words = ["relay", self._heavy.digest, place, *self._words]
        invocation = Invocation(words, fed=True, task=True, sudo=self._options.sudo)
        self._command = orders.command(invocation, self)
        self._command.done = self._notice
        try:
            while wave := await self._assembled():
                for index, item in enumerate(items):
                    if index:
                        wave = await self._again(wave)
                    if wave:
                        wave = await self._transfer(item, wave, into=len(items) > 1)
                self._done |= wave
            orders.end_input(self._command)
            with trio.move_on_after(END_S):
                while self._command.pending & self._done:
                    await self._news()
        finally:
            if self._command.pending and not orders.closed:
                orders.abandon(self._command)
        return [
            Copied(rank, node, self._failures.get(rank), self._notes.get(rank, ""))
            for rank, node in enumerate(self._crew.nodes)
        ]

    # ------------------------------------------------------------ who takes part

    async def _assembled(self) -> set[int]:
        """Return who is ready for a first transfer; empty when nobody will be any more."""
        while True:
            ready = self._addresses.keys() - self._done - self._failures.keys()
            awaited = self._command.pending - ready - self._done - self._failures.keys()
            if not awaited:
                return ready
            since_s = self._news_s - self._begun_s
            quiet_s = max(QUIET_S, since_s / 2) - (trio.current_time() - self._news_s)
            if ready and quiet_s <= 0:
                return ready
            with trio.move_on_after(quiet_s if ready else math.inf):
                await self._news()

    async def _again(self, wave: set[int]) -> set[int]:
        """Wait until those of the wave have a socket for the next source."""
        with trio.move_on_after(AGAIN_S):
            while wave - self._addresses.keys() - self._failures.keys():
                await self._news()
        for rank in wave - self._addresses.keys() - self._failures.keys():
            self._failures[rank] = "did not go on to the next source"
        return wave - self._failures.keys()

    async def _news(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()

    def _notice(self) -> None:
        self._changed.set()

    # ------------------------------------------------------------ one transfer

    async def _transfer(self, item: Item, wave: set[int], *, into: bool) -> set[int]:
        """Send one source to the nodes of a wave; return those that have verified it."""
        ranks = sorted(wave)
        facts = {rank: self._addresses.pop(rank) for rank in ranks}
        path = item.path if item.spool < 0 else os.dup(item.spool)
        source = Source(path)
        await trio.to_thread.run_sync(source.scan)
        choice = self._planned(source.size, ranks)
        own = self._own_address(facts[ranks[0]]["address"])
        sockets = listen(f"{_bracketed(_wildcard(own, is_local=self._is_local))}:0")
        try:
            port = sockets[0].getsockname()[1]
            addresses = [f"{_bracketed(own)}:{port}", *(facts[rank]["address"] for rank in ranks)]
            job = new_job(choice.shape, addresses, self._hop_options(len(ranks)))
            self._announce(job, ranks, item, into=into)
            all_summed = all(one["summed"] for one in facts.values())
            summary = await run_source(
                job,
                source,
                sockets=sockets,
                name=item.name or "standard input",
                chunk_size=choice.chunk_size,
                algorithm=Algorithm.XXH3 if all_summed else Algorithm.BLAKE2B,
                on_progress=functools.partial(self._told, item, source.size, len(ranks)),
            )
        finally:
            for sock in sockets:
                sock.close()
        return self._judged(summary, ranks)

    def _planned(self, size: int, ranks: Sequence[int]) -> Choice:
        options = self._options
        rate = options.link_rate or LINK_RATE
        up_rate = min(rate, options.rate_limit or rate)
        network = Network(up_rate=up_rate, down_rate=rate, uplink_rate=options.uplink_rate)
        request = Request(
            size=size,
            racks=racks_of(ranks, options.rack_size),
            network=network,
            kind=options.topology,
            shared_medium=options.shared_medium,
            fanout=options.fanout,
            chunk_size=options.chunk_size,
        )
        return make_plan(request).chosen

    def _hop_options(self, node_count: int) -> HopOptions:
        options = self._options
        found = HopOptions(
            expected_rate=options.link_rate,
            expected_uplink_rate=options.uplink_rate,
            rate_limit=options.rate_limit,
        )
        if self._crew.onehost:
            crowd = node_count / (CROWD_COUNT * (os.cpu_count() or 1))
            if crowd > 1:
                times = {name: getattr(found, name) * crowd for name in _PATIENCE}
                return dataclasses.replace(found, **times)
        return found

    def _announce(self, job: Job, ranks: list[int], item: Item, *, into: bool) -> None:
        encoded = encode_job(job)
        nodes = [self._crew.nodes[rank] for rank in ranks]
        frame = encode_job_frame(nodes, item.name, encoded, is_tree=item.is_tree, into=into)
        self._feed(frame)

    def _feed(self, data: bytes) -> None:
        """Say something to all processes.  It is not much, and nobody is waited for."""
        for at in range(0, len(data), CHUNK_SIZE):
            self._crew.orders.feed(self._command, data[at : at + CHUNK_SIZE])

    def _told(self, item: Item, size: int, node_count: int, progress: Progress) -> None:
        if self._on_progress is not None:
            others_count = max(0, progress.total_count - progress.have_count)
            share = others_count / progress.chunk_count if progress.chunk_count else node_count
            name = item.name or "standard input"
            total = min(node_count * size, round(share * size))
            done = progress.verified_count
            self._on_progress(Step(name, size, node_count, done, total, progress.sent_size))

    def _judged(self, summary: Summary, ranks: Sequence[int]) -> set[int]:
        for place, entry in summary.others.items():
            self._failures.setdefault(ranks[place - 1], _reason(entry))
        for place, note in summary.notes.items():
            if place:
                self._notes[ranks[place - 1]] = printable(note)
        return {ranks[place - 1] for place in chunkset.indexes(summary.verified) if place}

    # ------------------------------------------------------------ what the processes say (Sink)

    def output(self, rank: int, stream: int, data: bytes) -> None:
        if stream == STDERR:
            self._print(rank, self._heard_sudo(rank, data) if self._options.sudo else data)
            return
        *lines, rest = (self._lines.pop(rank, b"") + data).split(b"\n")
        if len(rest) <= LINE_SIZE_MAX:
            self._lines[rank] = rest
        for line in lines:
            self._heard(rank, line)
        self._news_s = trio.current_time()
        self._notice()

    def _print(self, rank: int, data: bytes) -> None:
        if data and self._on_output is not None:
            self._on_output(rank, data)

    def _heard_sudo(self, rank: int, data: bytes) -> bytes:
        """Keep what sudo says; return the whole lines that others have written."""
        others = []
        for line in self._printed.feed(rank, STDERR, data):
            words = refusal(line.decode("utf-8", "replace").rstrip("\n"))
            if words:
                self._refusals[rank] = printable(words)
            else:
                others.append(line)
        return b"".join(others)

    def _heard(self, rank: int, line: bytes) -> None:
        if line == b"need" and not self._is_heavy_sent:
            assert self._heavy is not None
            self._is_heavy_sent = True
            self._feed(frames.encode(HEAVY, 0, self._heavy.data))
        if line in (b"need", b"have"):
            return
        try:
            facts = json.loads(line)
            if "address" in facts:
                parse_address(facts["address"])
                facts = {"summed": False, **facts}
                self._addresses[rank] = facts
            elif "failed" in facts:
                self._failures[rank] = printable(str(facts["failed"]))
        except (ValueError, TypeError, KaError):
            self._failures[rank] = "its process said what it should not"

    def exited(self, rank: int, code: int, signal: int) -> None:
        how = f"was ended by signal {signal}" if signal else f"ended with {code}"
        if rank not in self._done and (code or signal or rank not in self._failures):
            self._failures.setdefault(rank, self._refusals.get(rank, f"its process {how}"))
        self._print(rank, self._printed.close(rank, STDERR))
        self._gone(rank)

    def failed(self, rank: int, _stage: str, reason: str) -> None:
        if rank not in self._done:
            self._failures[rank] = reason
        self._gone(rank)

    def _gone(self, rank: int) -> None:
        self._addresses.pop(rank, None)
        self._notice()

    # ------------------------------------------------------------ where this machine is

    def _own_address(self, node_address: str) -> str:
        """Return where nodes reach this machine: the address it would call them from."""
        if self._options.address:
            return self._options.address
        if self._is_local:
            return "127.0.0.1"
        host, port = parse_address(node_address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            found: str = probe.getsockname()[0]
        return found


def _wildcard(address: str, *, is_local: bool) -> str:
    if is_local:
        return address
    return "::" if ":" in address else "0.0.0.0"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reason(entry: Entry) -> str:
    if entry.verdict is Verdict.FAILED:
        return printable(entry.reason)
    return printable(f"lost during the copy: {entry.reason}")
