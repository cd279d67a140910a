"""Command line of karun, which starts and controls processes on many nodes.

Decides nothing: it reads arguments, calls, and says what came of it.  Built so far: `run`,
`session`, `plan`.  `karun run --session` does not come by here (karun/entry.py).
Errors are one line on standard error; exit codes are those of `common.errors`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

import click

from common import nodeset
from common.broadcast.planner import make_plan
from common.broadcast.topology import Kind
from common.config import parse_size
from common.errors import Code, KaError
from karun import client, planning, running, sessions
from karun.client import DEFAULT
from karun.connectors import TREES, VIAS
from karun.options import Options

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: karun run -w node[1-225] -- uname -r",
)
@click.version_option(package_name="ka", prog_name="karun")
def karun() -> None:
    """Start and control processes on many nodes.

    Built so far: `run`, `session` and `plan`.  There is no `copy`, `gather`, `reboot` or `top` yet.
    """


def main() -> NoReturn:
    """Run the command line; every failure is one line and its exit code."""
    try:
        karun(standalone_mode=False, prog_name="karun")
    except KaError as error:
        click.echo(f"karun: {error}", err=True)
        sys.exit(error.code.exit_code)
    except click.exceptions.Abort:
        click.echo("karun: interrupted", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"karun: {error.format_message()}", err=True)
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    sys.exit(0)


def _where(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which nodes, and how they are reached."""
    options = (
        click.option("-w", "nodes", multiple=True, metavar="NODES",
                     help="Nodes: a node set, @group, ^file, -."),
        click.option("-x", "excluded", multiple=True, metavar="NODES", help="But not these."),
        click.option("-g", "groups", multiple=True, metavar="GROUP", help="The nodes of a group."),
        click.option("-a", "everyone", is_flag=True, help="All nodes that the groups know."),
        click.option("--hostfile", "hostfiles", multiple=True, metavar="FILE",
                     help="Nodes from a file."),
        click.option("--via", type=click.Choice(VIAS), default="ssh", show_default=True,
                     help="Connector."),
        click.option("--ssh-config", metavar="FILE", help="For ssh, instead of the user's own."),
        click.option("--no-fast-ssh", is_flag=True, help="Leave the order of key exchanges alone."),
        click.option("-l", "user", metavar="USER", help="Log in as this user."),
        click.option("-f", "fanout", type=click.IntRange(1, 4096), default=64, show_default=True,
                     help="Calls at a time, of one caller."),
        click.option("--tree", type=click.Choice(TREES), default=TREES[0], show_default=True,
                     help="Whether nodes call nodes."),
        click.option("-t", "connect_s", type=click.FloatRange(min=0.1), default=15.0,
                     show_default=True, help="Seconds until a node must have answered."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _split(options: dict[str, Any]) -> tuple[running.Where, dict[str, Any]]:
    names = {field.name for field in fields(running.Where)}
    where = running.Where(**{name: options.pop(name) for name in names})
    return where, options


@karun.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: karun run -w node[1-200] -x node7 -b -- uname -r",
)
@_where
@click.option("--session", metavar="NAME", help="On the nodes of a session; instead of the above.")
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
@click.option("--sudo", is_flag=True, help="Run as root: sudo -n, which asks for no password.")
@click.option("--pty", is_flag=True, help="Give the command a terminal.")
@click.argument("command", nargs=-1, required=True)
def run(session: str | None, **options: Any) -> None:
    """Run a command on many nodes at once.

    Several words are the command and its arguments, and reach it as they are.  A single word with
    a blank in it is a line for the shell of the node.
    """
    if session is not None:  # karun.entry takes these, unless there is something wrong with them
        raise KaError(Code.USAGE, "with --session: -w, options of output and of the command only")
    where, rest = _split(options)
    sys.exit(running.main(where, Options(**rest)))


@karun.group(epilog="Example: karun session start -w node[1-200], then karun run --session ...")
def session() -> None:
    """Keep nodes connected, so that commands on them take milliseconds."""


@session.command(epilog="Example: karun session start --name racks -w @racks")
@_where
@click.option("--name", default=DEFAULT, show_default=True, help="What it is called.")
def start(name: str, **options: Any) -> None:
    """Connect nodes and keep them."""
    where, _rest = _split(options)
    click.echo(sessions.start(name, where))


@session.command("list", epilog="Example: karun session list")
def list_() -> None:
    """Show the sessions of this user."""
    for line in sessions.describe():
        click.echo(line)


@session.command(epilog="Example: karun session stop racks")
@click.argument("name", default=DEFAULT)
def stop(name: str) -> None:
    """End a session, and every process of it on its nodes."""
    client.stop(name)


@karun.command(
    epilog="Example: karun plan -w node[1-200] --size 1GiB --rack-size 20 --uplink 1Gbit"
)
@click.option("-w", "nodes", required=True, metavar="NODES", help="Receivers: a node set.")
@click.option("--size", required=True, help="What is to be sent: 4GiB, 300MB, 1024.")
@click.option("--link", default="1Gbit", show_default=True, help="Rate of a node's link, each way.")
@click.option("--latency-ms", type=click.FloatRange(min=0), default=0.1, show_default=True)
@click.option(
    "--rack-size",
    type=click.IntRange(min=1),
    help="Nodes in each rack, in the order of the node set; the source is in the first.",
)
@click.option("--uplink", help="Rate of a rack's uplink, each way.  [default: not a limit]")
@click.option("--topology", type=click.Choice([kind.value for kind in Kind]), help="Use this one.")
@click.option("--fanout", type=click.IntRange(min=1), help="Of k-ary; the number of stripes.")
@click.option("--chunk-size", help="Use this one.")
@click.option("--multicast", is_flag=True, help="The network carries multicast to all nodes.")
@click.option("--shared-medium", is_flag=True, help="All nodes share one wire, as on a hub.")
@click.option("--tree", is_flag=True, help="Draw the tree, however many nodes there are.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(nodes: str, size: str, as_json: bool, tree: bool, **options: Any) -> None:
    """Show how data would be sent to many nodes, why so, and how long it would take."""
    names = nodeset.expand(nodes)
    request = planning.make_request(len(names), parse_size(size), **options)
    found = make_plan(request)
    if as_json:
        click.echo(json.dumps(planning.to_json(found, names, request.size, tree=tree)))
    else:
        for line in planning.describe(found, names, request.size, tree=tree):
            click.echo(line)
