"""The command line of `karun reboot`."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

import click

from common.errors import Code, KaError
from karun.cli_where import split, where_options
from karun.hands import ProcessHands, words
from karun.lines import STDERR
from karun.nodes import Names
from karun.power import Policy
from karun.progress import StatusLine
from karun.rebooting import main
from karun.running import Where
from karun.terminal import TERMINAL

__all__ = ["reboot"]

LOGIN_S = 0.25
"""What a login costs a busy head: the last of a window is not out of time for the others' sake."""
DOWN_S = Policy().down_s


@click.command(epilog="Example: karun reboot -w node[1-200] --window 20")
@where_options
@click.option("--window", type=click.IntRange(min=1), metavar="N",
              help="Nodes at a time, until they are back.  [default: all]")
@click.option("--failures", "failures_max", type=click.IntRange(min=1), metavar="N",
              help="Begin no other after so many failures.  [default: as many as the window]")
@click.option("--soft", metavar="CMD", help="The order, run on the node.  [default: reboot]")
@click.option("--hard", metavar="CMD",
              help="Instead: switch the power, run here; %h is the node's name.")
@click.option("--timeout", "up_s", type=click.FloatRange(min=1), default=Policy().up_s,
              show_default=True, metavar="S", help="Seconds until a node must be back.")
@click.option("--probe", "probe_s", type=click.FloatRange(min=0.1), default=Policy().probe_s,
              show_default=True, metavar="S", help="Seconds between two looks at a node.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each node.")
@click.option("--yes", is_flag=True, help="Do not ask before.")  # fmt: skip
def reboot(
    window: int | None,
    failures_max: int | None,
    soft: str | None,
    hard: str | None,
    up_s: float,
    probe_s: float,
    as_json: bool,
    yes: bool,
    **options: Any,
) -> None:
    """Reboot many nodes, and see to it that they come back: only a new boot id counts.

    Exit code: 0 all nodes came back, 2 some, 1 none.
    """
    where, _rest = split(options)
    if soft and hard:
        raise KaError(Code.USAGE, "either --soft or --hard")
    if where.via in ("local", "netns"):
        raise KaError(Code.USAGE, f"--via {where.via} would reboot this machine")
    names = where.names()
    connector = where.connector(names)
    hands = ProcessHands(
        names,
        connector.argv,
        lined=connector.lined,
        soft=words(soft) if soft else ("reboot",),
        hard=words(hard) if hard else None,
    )
    policy = Policy(
        window=window or 0,
        failures_max=failures_max or 0,
        hard=bool(hard),
        ask_s=where.connect_s + LOGIN_S * min(window or len(names), len(names)),
        order_s=max(Policy().order_s, where.connect_s),
        down_s=min(DOWN_S, up_s),
        up_s=up_s,
        probe_s=probe_s,
    )
    if not yes:
        _ask(where, names)
    sys.exit(main(names, policy, hands, TERMINAL, status=_status(), as_json=as_json))


def _ask(where: Where, names: list[str]) -> None:
    if not sys.stdin.isatty():
        raise KaError(Code.USAGE, "nobody to ask whether to reboot: give --yes")
    folded = Names(names).fold(range(len(names)))
    click.confirm(f"Reboot {folded} ({len(names)}) by {where.via}?", abort=True, err=True)


def _status() -> StatusLine | None:
    if not TERMINAL.is_terminal(STDERR):
        return None
    columns = shutil.get_terminal_size().columns
    status = StatusLine(TERMINAL.draw, started=time.monotonic(), columns=columns)
    TERMINAL.before = status.clear
    return status
