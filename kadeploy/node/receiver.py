"""A node's part in a broadcast: a hop of the broadcast engine that feeds the image's writer.

Standard input: the order, a line; then, when this node's address was printed, a line with its rank
and the job.  The hop is a process of its own, and so is the writer, which it starts: what the
writer answers comes by a file.

What has come is kept until the broadcast is over, for other nodes may need it: in the file system
that is being filled, if it is one; in memory otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.errors import Code, KaError
from kadeploy.node import images
from kadeploy.orders import WriteImage, to_json

__all__ = ["read_line", "receive"]

LINE_SIZE_MAX = 64 << 20


def read_line() -> bytes:
    """Return a line of standard input, and take nothing of what follows."""
    line = bytearray()
    while len(line) < LINE_SIZE_MAX and (byte := os.read(0, 1)) not in (b"\n", b""):
        line += byte
    return bytes(line)


def receive(order: WriteImage, listen_on: str, root: Path) -> dict[str, Any]:
    """Take part in one broadcast; return the writer's answer.  *root*: where to mount meanwhile."""
    program = os.path.abspath(sys.argv[0])
    environment = {**os.environ, "PYTHONPATH": program}
    with (
        tempfile.TemporaryDirectory(prefix="kadeploy-") as name,
        images.filesystem(order, root) as directory,
    ):
        order_path, answer_path = Path(name, "order"), Path(name, "answer")
        order_path.write_text(json.dumps(to_json(order)))
        writer = [sys.executable, program, "image", str(order_path), str(answer_path)]
        spool = directory or tempfile.gettempdir()
        words = [sys.executable, "-m", "kadeploy.node.hop", listen_on, str(spool), *writer]
        done = subprocess.run(words, env=environment, stderr=subprocess.PIPE)
        answer: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads(answer_path.read_text())
        if not answer.get("ok", True):
            raise KaError(Code.EIO, str(answer.get("error")))
        if done.returncode != 0 or not answer:
            lines = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise KaError(Code.EIO, f"the broadcast failed here: {' '.join(lines)}")
    return answer
