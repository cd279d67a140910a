"""A node's part in a broadcast: a hop of the broadcast engine that writes the image.

Standard input: the order, a line; then, when this node's address was printed, a line with its rank
and the job.  The hop is a process of its own; what it answers comes by a file.

A raw image that is not compressed goes chunk by chunk to its place on the disk.  So what is right
there already need not come: a broadcast that was cut off goes on, with no record but the disk.
Anything else the hop feeds to the image's writer, another process.  What has come is kept until the
broadcast is over then, for other nodes may need it: in the file system that is being filled, if it
is one; in memory otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import Code, KaError
from kadeploy.node import devices, images
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
    """Take part in one broadcast; return the answer of who wrote.  *root*: where to mount then."""
    program = os.path.abspath(sys.argv[0])
    environment = {**os.environ, "PYTHONPATH": program}
    with tempfile.TemporaryDirectory(prefix="kadeploy-") as name:
        answer_path = Path(name, "answer")
        words = [sys.executable, "-m", "kadeploy.node.hop", listen_on, str(answer_path)]
        with _sink(order, root, Path(name, "order"), answer_path) as sink:
            done = subprocess.run([*words, *sink], env=environment, stderr=subprocess.PIPE)
            answer: dict[str, Any] = {}
            with contextlib.suppress(OSError, ValueError):
                answer = json.loads(answer_path.read_text())
            if not answer.get("ok", True):
                raise KaError(Code.EIO, str(answer.get("error")))
            if done.returncode != 0 or not answer:
                lines = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
                raise KaError(Code.EIO, f"the broadcast failed here: {' '.join(lines)}")
    return answer


@contextlib.contextmanager
def _sink(
    order: WriteImage, root: Path, order_path: Path, answer_path: Path
) -> Iterator[Sequence[str]]:
    """Yield the words that tell the hop where the image goes."""
    if order.in_place:
        with devices.opened(order.place) as device:
            yield ["device", device, order.checksum.removeprefix("sha256:")]
        return
    with images.filesystem(order, root) as directory:
        order_path.write_text(json.dumps(to_json(order)))
        spool = directory or tempfile.gettempdir()
        program = os.path.abspath(sys.argv[0])
        writer = [sys.executable, program, "image", str(order_path), str(answer_path)]
        yield ["command", str(spool), *writer]
