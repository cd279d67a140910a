"""One hop of a broadcast: `python3 -m kadeploy.node.hop ADDRESS SPOOL WRITER...`.

Prints where it listens, reads rank and job from standard input, takes part; exit code 0 when this
node has all of it and its writer ended well.  Then it feeds others for a while, and leaves: a slow
node must not keep it from going on.  Needs trio, msgpack and xxhash, which the deployment
environment has.
"""

from __future__ import annotations

import base64
import math
import sys

import trio

from common import log
from common.broadcast.job import decode_job
from common.broadcast.stream_sink import CommandSink
from common.broadcast.transfer import Progress, run_node
from common.errors import KaError
from common.sockets import listen
from kadeploy.node.receiver import read_line

LINGER_S = 10.0
"""Who gets the data from here is seldom further behind; if so, another holder feeds it."""


class _Sink(CommandSink):
    """Knows whether its command has verified everything."""

    verified = False

    def verify(self) -> list[int]:
        wrong = super().verify()
        self.verified = not wrong
        return wrong


def main() -> int:
    log.configure("warning")
    sockets = listen(f"{sys.argv[1]}:0")
    host, port = sockets[0].getsockname()[:2]
    print(f"{host}:{port}", flush=True)
    rank, _, word = read_line().partition(b" ")
    if not word:
        return 1
    job = decode_job(base64.b64decode(word))
    sink = _Sink(sys.argv[3:], sys.argv[2])

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
