"""Command line of kaboot, which decides what each machine boots over the network.

Owns nothing yet: kaboot is not built.  Whatever is asked of it is refused in one line, exit code 2;
only `--help` and `--version` answer.
"""

from __future__ import annotations

import click

__all__ = ["main"]


@click.command(context_settings={"ignore_unknown_options": True})
@click.version_option(package_name="ka", prog_name="kaboot")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(arguments: tuple[str, ...]) -> None:
    """Not built yet: kaboot decides what each machine boots over the network."""
    click.echo("kaboot is not built yet; see README.md for what works", err=True)
    raise SystemExit(2)
