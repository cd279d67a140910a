"""The node's program: `python3 -m kadeploy.node facts`, `... do`, `... receive ADDRESS`.

`do` reads orders from standard input, a line of JSON each; one that writes an image is the last,
and the image follows it.  The answer is one line of JSON on standard output, `{"ok": true, ...}` or
`{"ok": false, "error": ..., "code": ...}`, and the exit code is 0 in both cases: another one means
that there is no answer.

One program at a time works on a node.  The head begins an order again when it has lost sight of it,
so whoever begins ends what is still at work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import Code, KaError
from kadeploy.node import devices, fitting, images, receiver, system
from kadeploy.orders import (
    Customize,
    Fit,
    Format,
    InstallBoot,
    Order,
    Partition,
    WriteImage,
    from_json,
)

ORDER_SIZE_MAX = 64 << 20
END_S = 10.0
"""What processes that were killed have to be gone: the disk may be slow."""


def _do(order: Order, root: Path) -> dict[str, Any]:
    if isinstance(order, WriteImage):
        with images.filesystem(order, root) as directory:
            return images.write_image(order, sys.stdin.buffer, directory)
    if isinstance(order, Partition):
        system.partition(order)
    elif isinstance(order, Format):
        system.format_partition(order)
    elif isinstance(order, Fit):
        fitting.fit(order, root)
    elif isinstance(order, Customize):
        system.customize(order, root)
    elif isinstance(order, InstallBoot):
        system.install_boot(order, root)
    else:
        system.start(order, root)
    return {}


def _order(line: bytes) -> Order:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise KaError(Code.PROTOCOL, f"not an order: {error}") from None
    return from_json(content)


def _image(line: bytes) -> WriteImage:
    order = _order(line)
    if not isinstance(order, WriteImage):
        raise KaError(Code.PROTOCOL, "not an order to write an image")
    return order


def _answer(words: list[str]) -> dict[str, Any]:
    root = Path(os.environ.get("KADEPLOY_ROOT", "/run/kadeploy/root"))
    match words:
        case ["facts"]:
            return {"facts": devices.facts()}
        case ["do"]:
            _take_over(root.with_name("at-work"))
            answer = _do(_order(sys.stdin.buffer.readline(ORDER_SIZE_MAX)), root)
            while line := sys.stdin.buffer.readline(ORDER_SIZE_MAX):
                answer = _do(_order(line), root)
            return answer
        case ["receive", address]:
            _take_over(root.with_name("at-work"))
            return receiver.receive(_image(receiver.read_line()), address, root)
        case ["image", path, _]:  # started by a hop, in what `receive` has mounted
            order = _image(Path(path).read_bytes())
            directory = root if order.kind == "tar" else None
            return images.write_image(order, sys.stdin.buffer, directory)
    raise KaError(Code.USAGE, "facts, do, or receive ADDRESS")


def _take_over(record: Path) -> None:
    """End the program that is still at work, with all it has started; *record* says which."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    record.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError):
        other = int(record.read_text())
        # After a turn of the process numbers it may be our own, or somebody else's.
        if other != os.getpid() and any(b"kadeploy" in words for words in _at_work(other)):
            os.killpg(other, signal.SIGKILL)
            deadline_s = time.monotonic() + END_S
            while any(True for _ in _at_work(other)):
                if time.monotonic() > deadline_s:
                    raise KaError(Code.BUSY, "what was begun before does not end")
                time.sleep(0.05)
    record.write_text(str(os.getpid()))


def _at_work(group: int) -> Iterator[bytes]:
    """Yield the command of each process of a group that still runs, or waits for the disk."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if its_group == str(group) and state != "Z":
                yield path.with_name("cmdline").read_bytes()


def main() -> None:
    words = sys.argv[1:]
    try:
        said = {"ok": True, **_answer(words)}
    except KaError as error:
        said = {"ok": False, "error": str(error), "code": error.code.number}
    except OSError as error:
        said = {"ok": False, "error": str(error), "code": Code.EIO.number}
    if words[:1] == ["image"] and len(words) == 3:
        # Started by a hop, which wants an exit code; the answer goes to `receive`.
        Path(words[2]).write_text(json.dumps(said))
        sys.exit(0 if said["ok"] else 1)
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
