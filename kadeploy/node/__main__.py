"""The node's program: `python3 -m kadeploy.node facts` or `... do`, in the deployment environment.

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
from kadeploy.node import devices, images, system
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


def _answer(verb: str) -> dict[str, Any]:
    if verb == "facts":
        return {"facts": devices.facts()}
    if verb != "do":
        raise KaError(Code.USAGE, f"no verb {verb!r}: facts or do")
    line = sys.stdin.buffer.readline(ORDER_SIZE_MAX)
    try:
        content = json.loads(line)
    except ValueError as error:
        raise KaError(Code.PROTOCOL, f"not an order: {error}") from None
    root = Path(os.environ.get("KADEPLOY_ROOT", "/run/kadeploy/root"))
    return _do(from_json(content), root)


def main() -> None:
    try:
        said = {"ok": True, **_answer(sys.argv[1] if len(sys.argv) > 1 else "")}
    except KaError as error:
        said = {"ok": False, "error": str(error), "code": error.code.number}
    except OSError as error:
        said = {"ok": False, "error": str(error), "code": Code.EIO.number}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
