"""The table of karun/top.py drawn with colours, by rich.  The only importer of rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from karun.naming import Folding
from karun.top import COLUMNS, Row

__all__ = ["to_table"]


def to_table(
    rows: Iterable[Row], total: Sequence[str], names: Folding, *, title: str = ""
) -> Table:
    """Return what rich prints, or shows live: alarms in red, nodes without data below."""
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold")
    for column in COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_column("nodes", overflow="ellipsis", ratio=1)
    for row in rows:
        label = f"{names.fold(row.nodes)} ({len(row.nodes)})"
        if row.reason:
            empty = [Text("")] * len(COLUMNS)
            table.add_row(*empty, Text(f"{label}: {row.reason}", style="yellow"))
            continue
        marks = zip(row.cells, row.alarms, strict=True)
        cells = [Text(cell, style="bold red" if alarm else "") for cell, alarm in marks]
        table.add_row(*cells, Text(label))
    table.add_section()
    table.add_row(*map(Text, total), Text(f"all ({len(names)})"), style="bold")
    return table
