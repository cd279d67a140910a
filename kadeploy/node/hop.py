"""One hop of a broadcast: `python3 -m kadeploy.node.hop ADDRESS ANSWER device PATH SHA256`, or
`... ADDRESS ANSWER command SPOOL WRITER...`.

Prints where it listens, reads rank and job from standard input, takes part; exit code 0 when this
node has all of it and has verified it.  Then it feeds others for a while, and leaves: a slow node
must not keep it from going on.  What it answers goes into the file ANSWER; a writer writes its own.
Needs trio, msgpack and xxhash, which the deployment environment has.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from pathlib import Path

import trio

from common import log
from common.broadcast.job import decode_job
from common.broadcast.stream_sink import CommandSink, DeviceSink
from common.broadcast.transfer import Progress, run_node
from common.errors import KaError
from common.sockets import listen
from kadeploy.node.receiver import read_line

LINGER_S = 10.0
"""Who gets the data from here is seldom further behind; if so, another holder feeds it."""


class _Command(CommandSink):
    """Knows whether its command has verified everything."""

    verified = False

    def verify(self) -> list[int]:
        wrong = super().verify()
        self.verified = not wrong
        return wrong


class _Device(DeviceSink):
    """Says how much was there before, when it has verified everything."""

    verified = False

    def __init__(self, path: str, sha256: str, answer: Path) -> None:
        super().__init__(path, sha256)
        self._answer = answer

    def verify(self) -> list[int]:
        wrong = super().verify()
        if not wrong:
            said = {
                "ok": True,
                "size": self.size,
                "content_size": self.content_size,
                "there_size": self.there_size,
                "verified": "read-back",
            }
            self._answer.write_text(json.dumps(said))
            self.verified = True
        return wrong


def _sink(words: list[str]) -> _Command | _Device:
    answer, kind, place, *rest = words
    return _Device(place, rest[0], Path(answer)) if kind == "device" else _Command(rest, place)


def main() -> int:
    log.configure("warning")
    sockets = listen(f"{sys.argv[1]}:0")
    host, port = sockets[0].getsockname()[:2]
    print(f"{host}:{port}", flush=True)
    rank, _, word = read_line().partition(b" ")
    if not word:
        return 1
    job = decode_job(base64.b64decode(word))
    sink = _sink(sys.argv[2:])

    async def take_part() -> int:
        with trio.CancelScope() as scope:

            def on_progress(_: Progress) -> None:
                if sink.verified and scope.deadline == math.inf:
                    scope.deadline = trio.current_time() + LINGER_S

            summary = await run_node(job, int(rank), sink, sockets=sockets, on_progress=on_progress)
            for entry in summary.others.values():
                print(entry.reason, file=sys.stderr)
            return summary.exit_code
        return 0

    try:
        return trio.run(take_part)
    except KaError as error:
        print(error, file=sys.stderr)
        return 0 if sink.verified else error.code.exit_code


if __name__ == "__main__":
    sys.exit(main())
