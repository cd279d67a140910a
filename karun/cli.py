"""Command line of karun, which starts and controls processes on many nodes.

Decides nothing: it reads arguments, calls, and says what came of it.
Errors are one line on standard error; exit codes are those of `common.errors`.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

import click

from common import cli, nodeset
from common.broadcast.planner import make_plan
from common.broadcast.topology import Kind
from common.config import parse_size
from common.errors import Code, KaError
from karun import moving, planning, sessions
from karun.cli_reboot import reboot
from karun.cli_run import run
from karun.cli_shell import shell
from karun.cli_top import top
from karun.cli_where import session_option, split, split_joined, sudo_option, where_options
from karun.client import DEFAULT
from karun.copied import CopyOptions

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: karun run -w node[1-225] -- uname -r",
)
@click.version_option(package_name="ka", prog_name="karun")
def karun() -> None:
    """Start and control processes on many nodes."""


for command in (reboot, run, shell, top):
    karun.add_command(command)


def main() -> NoReturn:
    """Run the command line; every failure is one line and its exit code."""
    cli.run(karun, "karun")


@karun.command(epilog="Example: karun copy -w node[1-200] image.tar /var/tmp/")
@where_options
@session_option
@sudo_option
@click.option("--command", default="", metavar="LINE",
              help="Feed it to this line for the node's shell, instead of a destination.")
@click.option("--topology", type=click.Choice([kind.value for kind in Kind]),
              help="Use this one.  [default: planned]")
@click.option("--multicast", is_flag=True, help="The same as --topology multicast.")
@click.option("--shared-medium", is_flag=True, help="All nodes share one wire or radio cell.")
@click.option("--fanout", "tree_fanout", type=click.IntRange(min=1),
              help="Of k-ary; the number of stripes.")
@click.option("--link", help="Rate of a node's link, each way; slower nodes are told of.")
@click.option("--rate", help="What a node may send: 500Mbit, 60MB/s.")
@click.option("--rack-size", type=click.IntRange(min=1),
              help="Nodes in each rack, in the order of the node set.")
@click.option("--uplink", help="Rate of a rack's uplink, each way.")
@click.option("--chunk-size", help="Use this one.  [default: planned]")
@click.option("--address", default="", metavar="HOST", help="Where nodes reach this machine.")
@click.option("--late", "late_s", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS",
              help="Call nodes again for so long that cannot be reached, as while they boot.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each node.")
@click.option("-q", "quiet", is_flag=True, help="Nothing but what went wrong.")
@click.argument("paths", nargs=-1, required=True, metavar="SRC... DEST")
def copy(paths: tuple[str, ...], command: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Copy files or directories to many nodes, verified there.

    `-` is standard input.  DEST is what it is to `cp`, on the node, or a block device; `%h` in it
    is the node's name.  Times, permissions and, for root, owners are kept.  What a node has
    already does not travel.  Exit code: 0 all nodes, 2 some, 1 none.
    """
    where, rest = split_joined(options)
    if len(paths) < 2 and not command:
        raise KaError(Code.USAGE, "need a source and a destination")
    *sources, destination = (*paths, "") if command else paths
    form = moving.Form(as_json=as_json, quiet=quiet)
    sys.exit(moving.copy(where, sources, destination, _copy_options(command, **rest), form))


def _copy_options(
    command: str,
    topology: str | None,
    multicast: bool,
    shared_medium: bool,
    tree_fanout: int | None,
    link: str | None,
    rate: str | None,
    rack_size: int | None,
    uplink: str | None,
    chunk_size: str | None,
    address: str,
    sudo: bool,
) -> CopyOptions:
    return CopyOptions(
        topology=planning.kind_of(topology, multicast),
        shared_medium=shared_medium,
        fanout=tree_fanout,
        chunk_size=parse_size(chunk_size) if chunk_size else None,
        link_rate=planning.parse_rate(link) if link else 0.0,
        rate_limit=planning.parse_rate(rate) if rate else 0.0,
        rack_size=rack_size,
        uplink_rate=planning.parse_rate(uplink) if uplink else 0.0,
        address=address,
        command=command,
        sudo=sudo,
    )


@karun.command(epilog="Example: karun gather -w node[1-200] /var/log/syslog logs")
@where_options
@session_option
@sudo_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each node.")
@click.option("-q", "quiet", is_flag=True, help="Nothing but what went wrong.")
@click.argument("source", metavar="SRC")
@click.argument("directory", metavar="DIR")
def gather(
    source: str, directory: str, as_json: bool, quiet: bool, sudo: bool, **options: Any
) -> None:
    """Bring a file or directory of every node here, as DIR/<node>.

    `%h` in SRC is the node's name.  Exit code: 0 all nodes, 2 some, 1 none.
    """
    where, _rest = split_joined(options)
    form = moving.Form(as_json=as_json, quiet=quiet)
    sys.exit(moving.gather(where, source, directory, form, sudo=sudo))


@karun.group(epilog="Example: karun session start -w node[1-200], then karun run --session ...")
def session() -> None:
    """Keep nodes connected, so that commands on them take milliseconds."""


@session.command(epilog="Example: karun session start --name racks -w @racks")
@where_options
@click.option("--name", default=DEFAULT, show_default=True, help="What it is called.")
@click.option("--direct", is_flag=True,
              help="Once called, nodes go over to TCP: quicker than ssh, but not encrypted.")
def start(name: str, **options: Any) -> None:
    """Connect nodes and keep them."""
    where, _rest = split(options)
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
    sessions.stop(name)


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
@click.option("--multicast", is_flag=True, help="The same as --topology multicast.")
@click.option("--shared-medium", is_flag=True, help="All nodes share one wire or radio cell.")
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
