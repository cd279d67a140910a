"""The command line of `karun top`."""

from __future__ import annotations

import sys
from typing import Any

import click

from karun.cli_where import session_option, split_joined, where_options

__all__ = ["top"]


@click.command(epilog="Example: karun top -w node[1-200], or --once --json for a program")
@where_options
@session_option
@click.option("--interval", "interval_s", type=click.FloatRange(0.1, 3600), default=2.0,
              show_default=True, metavar="S", help="Seconds between two samples.")  # fmt: skip
@click.option("--once", is_flag=True, help="Print one table and end.")
@click.option("--sort", default="load", show_default=True, metavar="COLUMN",
              help="The highest of this column first.")  # fmt: skip
@click.option("--alarms", "only_alarms", is_flag=True, help="Only rows in which something is red.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each node and period.")
def top(**options: Any) -> None:
    """Show what many nodes are busy with; nodes that do the same share a row.

    `q` or Ctrl-C ends it.  In a pipe, a plain table each period.
    """
    from karun.watching import Watch, main  # loads what draws tables: a tenth of karun's start

    where, rest = split_joined(options)
    sys.exit(main(where, Watch(**rest)))
