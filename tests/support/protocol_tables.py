"""The tables of docs/protocol.md that come from the code.

`python -m tests.support.protocol_tables` writes them into the document anew.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

from common import session
from common.errors import Code
from common.framing import Kind
from common.messages import Catalogue
from nfsp import wire

__all__ = ["DOCUMENT", "TABLES", "between", "write"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


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


TABLES = {
    "kinds": _kinds(),
    "codes": _codes(),
    "handshake messages": _messages(session.MESSAGES),
    "mds messages": _messages(wire.MDS),
    "iod messages": _messages(wire.IOD),
}


def between(name: str) -> re.Pattern[str]:
    """Return a pattern whose group is what stands between the marks of a table."""
    return re.compile(f"<!-- {name} -->\n(.*?)<!-- end -->", re.DOTALL)


def write() -> None:
    """Put every table into the document."""
    text = DOCUMENT.read_text()
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table}<!-- end -->"
        text = between(name).sub(lambda _match, block=block: block, text)  # type: ignore[misc]
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    write()
