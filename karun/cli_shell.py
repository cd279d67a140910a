"""The command line of `karun shell`."""

from __future__ import annotations

import sys
from typing import Any

import click

from karun.cli_where import session_option, split_joined, where_options
from karun.shell import main

__all__ = ["shell"]


@click.command(epilog="Example: karun shell -w node[1-200], then a command a line; :help")
@where_options
@session_option
def shell(**options: Any) -> None:
    """Type commands for many nodes, which stay connected between them."""
    where, _rest = split_joined(options)
    sys.exit(main(where))
