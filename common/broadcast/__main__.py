"""One process of a transfer, for tests, measurements and scripts: `python -m common.broadcast`.

    source --from PATH           node --rank N --to PATH

It listens and prints its address, reads the job as one line of base64 from standard input, takes
part, and prints what became of it as one line of JSON; with `--progress` also, before, how many of
its chunks it has, one number a line, whenever that has changed.  A source that reads `-` takes the
rest of standard input.  The exit code is the summary's: 0 all, 2 some, 1 none.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import sys
import time
from typing import Any

import trio

from common import log
from common.broadcast import chunkset
from common.broadcast.job import Job, decode_job
from common.broadcast.manifest import Algorithm
from common.broadcast.outcome import Summary
from common.broadcast.sink import FileSink
from common.broadcast.source import Source, spool_command, spool_stream
from common.broadcast.store import Sink
from common.broadcast.stream_sink import CommandSink, DeviceSink
from common.broadcast.transfer import Progress, run_node, run_source
from common.errors import KaError
from common.sockets import listen


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m common.broadcast")
    roles = parser.add_subparsers(dest="role", required=True)
    source = roles.add_parser("source")
    what = source.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="path")
    what.add_argument("--command", nargs=argparse.REMAINDER)
    source.add_argument("--chunk-size", type=int, default=256 * 1024)
    source.add_argument("--algorithm", choices=[one.name for one in Algorithm], default="XXH3")
    node = roles.add_parser("node")
    node.add_argument("--rank", type=int, required=True)
    node.add_argument("--restarted", action="store_true")
    where = node.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", dest="path")
    where.add_argument("--device")
    where.add_argument("--command", nargs=argparse.REMAINDER)
    for role in (source, node):
        role.add_argument("--listen", default="127.0.0.1:0")
        role.add_argument("--progress", action="store_true")
        role.add_argument("--log", default="warning", help="what goes to standard error")
    return parser.parse_args()


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.command:
        return Source(spool_command(arguments.command))
    if arguments.path == "-":
        return Source(spool_stream(0))
    return Source(arguments.path)


def _sink(arguments: argparse.Namespace) -> Sink:
    if arguments.device:
        return DeviceSink(arguments.device)
    if arguments.command:
        return CommandSink(arguments.command)
    return FileSink(arguments.path)


def _read_job() -> Job:
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"\n", b""):  # what follows may be data
        line += byte
    return decode_job(base64.b64decode(line))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Observer:
    """What is worth telling of the process's own progress."""

    def __init__(self, *, prints: bool) -> None:
        self.sent_size = 0
        self.stall_s = 0.0
        """The longest time between two new chunks."""
        self._prints = prints
        self._have_count = -1
        self._news_s = 0.0

    def tell(self, progress: Progress) -> None:
        self.sent_size = progress.sent_size
        if progress.have_count == self._have_count:
            return
        now = time.monotonic()
        if self._have_count > 0:
            self.stall_s = max(self.stall_s, now - self._news_s)
        self._have_count, self._news_s = progress.have_count, now
        if self._prints:
            print(progress.have_count, flush=True)


def _report(summary: Summary, observer: _Observer, started_s: float, started_cpu_s: float) -> None:
    facts: dict[str, Any] = {
        "verified": list(chunkset.indexes(summary.verified)),
        "others": {rank: entry.reason for rank, entry in summary.others.items()},
        "notes": summary.notes,
        "sent_size": observer.sent_size,
        "stall_s": observer.stall_s,
        "seconds": time.monotonic() - started_s,
        "cpu_s": _cpu_s() - started_cpu_s,
    }
    print(json.dumps(facts), flush=True)


def main() -> int:
    arguments = _arguments()
    log.configure(arguments.log)
    sockets = listen(arguments.listen)
    host, port = sockets[0].getsockname()[:2]
    print(f"{host}:{port}", flush=True)
    job = _read_job()
    started_s, started_cpu_s = time.monotonic(), _cpu_s()
    observer = _Observer(prints=arguments.progress)

    async def take_part() -> Summary:
        if arguments.role == "node":
            return await run_node(
                job,
                arguments.rank,
                _sink(arguments),
                sockets=sockets,
                restarted=arguments.restarted,
                on_progress=observer.tell,
            )
        source = _source(arguments)
        source.scan()
        return await run_source(
            job,
            source,
            sockets=sockets,
            name=os.path.basename(arguments.path or "stream"),
            chunk_size=arguments.chunk_size,
            algorithm=Algorithm[arguments.algorithm],
            on_progress=observer.tell,
        )

    try:
        summary = trio.run(take_part)
    except KaError as error:
        print(f"{arguments.role}: {error}", file=sys.stderr)
        return error.code.exit_code
    _report(summary, observer, started_s, started_cpu_s)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
