"""The table of karun/top.py drawn with colours, by rich.  The only importer of rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from karun.naming import Folding
from karun.top import COLUMNS, Row

__all__ = ["Screen", "to_table"]

OTHER_ROWS = 6
"""Title, heading, total, and what stands between them."""


class Screen:
    """The terminal, given back as it was; a context manager."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = Live(console=self._console, screen=True, auto_refresh=False)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def show(
        self, rows: Sequence[Row], total: Sequence[str], names: Folding, *, title: str
    ) -> None:
        """Draw the table, as many rows as there is room for."""
        room = max(1, self._console.height - OTHER_ROWS)
        table = to_table(rows[:room], total, names, title=title)
        if len(rows) > room:
            table.caption = f"{len(rows) - room} more rows"
        self._live.update(table, refresh=True)


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
