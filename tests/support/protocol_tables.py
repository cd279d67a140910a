"""The tables of docs/protocol.md and docs/broadcast.md that come from the code.

`python -m tests.support.protocol_tables` writes them into the documents anew.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from pathlib import Path
from typing import Any, get_type_hints

from common import session
from common.broadcast import wire as hops
from common.broadcast.node import HopOptions
from common.errors import Code
from common.framing import Kind
from common.messages import Catalogue
from nfsp import wire

__all__ = ["BROADCAST", "PROTOCOL", "TABLES", "between", "write"]

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
BROADCAST = PROTOCOL.with_name("broadcast.md")


def _messages(catalogue: Catalogue) -> str:
    rows = ["| number | message | fields | meaning |", "|---|---|---|---|"]
    for number, cls in sorted(catalogue.classes().items()):
        rows.append(f"| {number} | `{cls.__name__}` | {_fields(cls)} | {_meaning(cls)} |")
    return "\n".join(rows) + "\n"


def _fields(cls: Any) -> str:
    hints = get_type_hints(cls)
    fields = []
    for name in cls._fields:
        kind = "list" if hints[name] not in (int, bytes, str, bool) else hints[name].__name__
        default = f" = {cls._field_defaults[name]}" if name in cls._field_defaults else ""
        fields.append(f"`{name}`: {kind}{default}")
    return ", ".join(fields) or "-"


def _meaning(cls: Any) -> str:
    """Return the docstring's first paragraph, if the class has one of its own."""
    text = inspect.cleandoc(cls.__doc__ or "")
    if text.startswith(f"{cls.__name__}("):  # made by NamedTuple
        return ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _kinds() -> str:
    rows = ["| number | kind |", "|---|---|"]
    rows += [f"| {kind.value} | {kind.name} |" for kind in Kind]
    return "\n".join(rows) + "\n"


def _codes() -> str:
    rows = ["| number | code | errno | repeatable | meaning |", "|---|---|---|---|---|"]
    for code in Code:
        if not 2000 <= code.number < 3000:  # those are POSIX errnos, plus 2000
            repeatable = "yes" if code.retryable else "no"
            rows.append(
                f"| {code.number} | {code.name} | {code.errno} | {repeatable} "
                f"| {code.value.meaning} |"
            )
    return "\n".join(rows) + "\n"


def _options() -> str:
    """Return a table of the fields, each with the text that follows it in the source."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(HopOptions)).body
        if isinstance(node, ast.ClassDef)
    )
    texts = {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for one in dataclasses.fields(HopOptions):
        rows.append(f"| `{one.name}` | {one.default} | {texts[one.name]} |")
    return "\n".join(rows) + "\n"


TABLES = {
    "kinds": (PROTOCOL, _kinds()),
    "codes": (PROTOCOL, _codes()),
    "handshake messages": (PROTOCOL, _messages(session.MESSAGES)),
    "mds messages": (PROTOCOL, _messages(wire.MDS)),
    "iod messages": (PROTOCOL, _messages(wire.IOD)),
    "hop messages": (BROADCAST, _messages(hops.HOP)),
    "hop options": (BROADCAST, _options()),
}


def between(name: str) -> re.Pattern[str]:
    """Return a pattern whose group is what stands between the marks of a table."""
    return re.compile(f"<!-- {name} -->\n(.*?)<!-- end -->", re.DOTALL)


def write() -> None:
    """Put every table into its document."""
    for name, (document, table) in TABLES.items():
        before, _, rest = document.read_text().partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition("<!-- end -->")
        document.write_text(f"{before}<!-- {name} -->\n{table}<!-- end -->{after}")


if __name__ == "__main__":
    write()
