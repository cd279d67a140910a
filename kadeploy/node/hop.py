"""One hop of a broadcast: `python3 -m kadeploy.node.hop ADDRESS SPOOL WRITER...`.

Prints where it listens, reads rank and job from standard input, takes part; exit code 0 when this
node has all of it and its writer ended well.  Needs trio, msgpack and xxhash, which the deployment
environment has.
"""

from __future__ import annotations

import base64
import sys

import trio

from common import log
from common.broadcast.job import decode_job
from common.broadcast.stream_sink import CommandSink
from common.broadcast.transfer import run_node
from common.errors import KaError
from common.sockets import listen
from kadeploy.node.receiver import read_line


def main() -> int:
    log.configure("warning")
    sockets = listen(f"{sys.argv[1]}:0")
    host, port = sockets[0].getsockname()[:2]
    print(f"{host}:{port}", flush=True)
    rank, _, word = read_line().partition(b" ")
    if not word:
        return 1
    job = decode_job(base64.b64decode(word))

    async def take_part() -> int:
        sink = CommandSink(sys.argv[3:], sys.argv[2])
        summary = await run_node(job, int(rank), sink, sockets=sockets)
        for entry in summary.others.values():
            print(entry.reason, file=sys.stderr)
        return summary.exit_code

    try:
        return trio.run(take_part)
    except KaError as error:
        print(error, file=sys.stderr)
        return error.code.exit_code


if __name__ == "__main__":
    sys.exit(main())
