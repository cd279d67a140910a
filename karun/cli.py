"""Command line of karun, which starts and controls processes on many nodes.

Owns nothing yet: karun is not built.  Whatever is asked of it is refused in one line, exit code 2;
only `--help` and `--version` answer.
"""

from __future__ import annotations

import click

__all__ = ["main"]


@click.command(context_settings={"ignore_unknown_options": True})
@click.version_option(package_name="ka", prog_name="karun")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(arguments: tuple[str, ...]) -> None:
    """Not built yet: karun starts and controls processes on many nodes."""
    click.echo("karun is not built yet; see README.md for what works", err=True)
    raise SystemExit(2)
