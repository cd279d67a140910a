"""The options of the command line that say which nodes, and how they are reached."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from common.errors import Code, KaError
from karun.connectors import TREES, VIAS, WINDOWS
from karun.running import InSession, Where

__all__ = [
    "require_no_launch", "session_option", "split", "split_joined", "sudo_option", "where_options",
]  # fmt: skip

session_option = click.option(
    "--session", metavar="NAME", help="On the nodes of a session (karun session start); all, or -w."
)
sudo_option = click.option(
    "--sudo", is_flag=True, help="On the nodes as root: sudo -n, which asks for no password."
)
_FOR_A_LAUNCH = frozenset(Where.__dataclass_fields__) - {"nodes"}


def where_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which nodes, and how they are reached."""
    options = (
        click.option("-w", "nodes", multiple=True, metavar="NODES",
                     help="Nodes: a node set, @group, ^file, -."),
        click.option("-x", "excluded", multiple=True, metavar="NODES", help="But not these."),
        click.option("-g", "groups", multiple=True, metavar="GROUP", help="The nodes of a group."),
        click.option("-a", "everyone", is_flag=True, help="All nodes that the groups know."),
        click.option("--hostfile", "hostfiles", multiple=True, metavar="FILE",
                     help="Nodes from a file."),
        click.option("--via", type=click.Choice((*VIAS, WINDOWS)), default="ssh", show_default=True,
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


def split(options: dict[str, Any]) -> tuple[Where, dict[str, Any]]:
    """Return where a command goes, and its own options."""
    names = {field.name for field in fields(Where)}
    where = Where(**{name: options.pop(name) for name in names & options.keys()})
    return where, options


def split_joined(options: dict[str, Any]) -> tuple[Where | InSession, dict[str, Any]]:
    """Return where a command goes, perhaps to a session, and its own options."""
    session = options.pop("session")
    where, rest = split(options)
    if session is None:
        return where, rest
    require_no_launch(click.get_current_context())
    return InSession(session, where.nodes), rest


def require_no_launch(context: click.Context, others: Collection[str] = ()) -> None:
    """Raise KaError USAGE for an option that says how nodes are launched, or one of *others*."""
    for param in context.command.params:
        is_said = context.get_parameter_source(param.name or "") is not ParameterSource.DEFAULT
        if is_said and param.name in {*_FOR_A_LAUNCH, *others}:
            line = f"{param.opts[0]} does not go with --session (of its nodes -w chooses some)"
            raise KaError(Code.USAGE, line)
