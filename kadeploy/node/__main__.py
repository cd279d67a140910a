"""The node's program: `python3 -m kadeploy.node facts`, `... do`, `... receive ADDRESS`.

`do` reads one order, a line of JSON, from standard input; an image follows it there.  The answer is
one line of JSON on standard output, `{"ok": true, ...}` or `{"ok": false, "error": ..., "code":
...}`, and the exit code is 0 in both cases: another one means that there is no answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from common.errors import Code, KaError
from kadeploy.node import devices, images, receiver, system
from kadeploy.orders import Customize, Format, InstallBoot, Order, Partition, WriteImage, from_json

ORDER_SIZE_MAX = 64 << 20


def _do(order: Order, root: Path) -> dict[str, Any]:
    if isinstance(order, WriteImage):
        return images.write_image(order, sys.stdin.buffer, root)
    if isinstance(order, Partition):
        system.partition(order)
    elif isinstance(order, Format):
        system.format_partition(order)
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


def _answer(words: list[str]) -> dict[str, Any]:
    root = Path(os.environ.get("KADEPLOY_ROOT", "/run/kadeploy/root"))
    match words:
        case ["facts"]:
            return {"facts": devices.facts()}
        case ["do"]:
            return _do(_order(sys.stdin.buffer.readline(ORDER_SIZE_MAX)), root)
        case ["receive", address]:
            return receiver.receive(_order(receiver.read_line()), address)
        case ["image", order, _]:
            return _do(_order(Path(order).read_bytes()), root)
    raise KaError(Code.USAGE, "facts, do, or receive ADDRESS")


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
