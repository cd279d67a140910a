"""The command line of `karun run`, with a session or without."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import click

from common.errors import Code, KaError
from karun import client, running
from karun.cli_where import require_no_launch, session_option, split, sudo_option, where_options
from karun.options import Options

__all__ = ["in_session", "run"]

_WORDS = "karun.words"


class _Run(click.Command):
    """A command that remembers its words, to hand them on as they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = list(args)
        return super().parse_args(ctx, args)


@click.command(
    cls=_Run,
    context_settings={"allow_interspersed_args": False},
    epilog="Example: karun run -w node[1-200] -x node7 -b -- uname -r",
)
@where_options
@session_option
@click.option("-u", "limit_s", type=click.FloatRange(min=0), default=0.0,
              help="Seconds that the command may take.  [default: for ever]")  # fmt: skip
@click.option("-b", "gather", is_flag=True, help="Gather: equal output once, with its nodes.")
@click.option("-B", "gather_all", is_flag=True, help="Gather standard error as well.")
@click.option("-L", "by_line", is_flag=True, help="In the order of nodes; with -b without headers.")
@click.option("-N", "no_label", is_flag=True, help="No node names before lines.")
@click.option("--diff", is_flag=True, help="Differences from the most common output only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each node.")
@click.option("--outdir", metavar="DIR", help="A file for each node's standard output.")
@click.option("--errdir", metavar="DIR", help="A file for each node's standard error.")
@click.option("-S", "highest", is_flag=True, help="Exit with the highest exit code of the nodes.")
@click.option("-n", "no_stdin", is_flag=True, help="Give the command no standard input.")
@click.option("-q", "quiet", is_flag=True, help="No lines on exit codes.")
@click.option("--cwd", default="", metavar="DIR", help="Run in this directory of the node.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Set in its environment.")
@sudo_option
@click.option("--pty", is_flag=True, help="Give the command a terminal.")
@click.option("--mpi", is_flag=True, help="It is an MPI program, built with MPICH or its family.")
@click.option("--ranks", type=click.IntRange(1, 4096), default=1, show_default=True, metavar="N",
              help="Of --mpi, on each node.")  # fmt: skip
@click.argument("command", nargs=-1, required=True)
def run(session: str | None, **options: Any) -> None:
    """Run a command on many nodes at once.

    Several words are the command and its arguments, and reach it as they are.  A single word with
    a blank in it is a line for the shell of the node.
    """
    if session is not None:
        sys.exit(client.main(session, click.get_current_context().meta[_WORDS]))
    where, rest = split(options)
    if rest["ranks"] > 1 and not rest["mpi"]:
        raise KaError(Code.USAGE, "--ranks is for --mpi")
    if rest["mpi"] and (rest["sudo"] or rest["pty"]):
        raise KaError(Code.USAGE, "--mpi goes with neither --sudo nor --pty")
    sys.exit(running.main(where, Options(**rest)))


def in_session(words: Sequence[str]) -> tuple[str | None, Options]:
    """Return nodes (None: all) and options of a command whose nodes are connected already.

    Raises KaError USAGE, also for an option that says how nodes are reached.
    """
    return _parsed(tuple(words))


@functools.lru_cache(16)  # few, for words may be long; to parse takes half a millisecond
def _parsed(words: tuple[str, ...]) -> tuple[str | None, Options]:
    try:
        context = run.make_context("karun run", list(words))
    except click.ClickException as error:
        line = f"{error.format_message()} See `karun run --help`."
        raise KaError(Code.USAGE, line) from None
    require_no_launch(context, ("mpi", "ranks"))
    where, rest = split(dict(context.params))
    del rest["session"]
    return ",".join(where.nodes) if where.nodes else None, Options(**rest)
