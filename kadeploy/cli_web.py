"""Commands of kadeploy's REST API: `serve`, and the tokens of those who may use it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from kadeploy import settings
from kadeploy.rights import ALL_NODES, Right
from kadeploy.tokens import Tokens

__all__ = ["serve", "token"]

DAY_MS = 24 * 3600 * 1000
DAYS_MAX = 36_500
"""A time that no reader of the file takes would make all tokens void."""


@click.command("serve", epilog="Example: kadeploy --log-level info serve")
@click.option("--ready-fd", type=int, hidden=True)
@click.pass_obj
def serve(config: Path, ready_fd: int | None) -> None:
    """Serve the REST API and the page, and carry out what is begun there."""
    from kadeploy.serve import serve as serve_api  # takes its time to load; for this command only

    serve_api(settings.load(config), ready_fd=ready_fd)


@click.group("token", epilog="Example: kadeploy token add alice --nodes pc[1-8] --rights deploy")
def token() -> None:
    """Say who may use the REST API and the page, and for which nodes."""


@token.command("add", epilog="Example: kadeploy token add alice --nodes pc[1-8] --rights deploy")
@click.argument("user")
@click.option("--nodes", required=True, help=f"A node set; {ALL_NODES} for all.")
@click.option("--rights", required=True, help="view, or deploy, which includes it.")
@click.option("--days", type=click.IntRange(1, DAYS_MAX),
              help="How long it is valid.  [default: for ever]")  # fmt: skip
@click.pass_obj
def token_add(config: Path, user: str, nodes: str, rights: str, days: int | None) -> None:
    """Make a token for USER and print it, this once."""
    words = [word.strip() for word in rights.split(",")]
    known = {right.value: right for right in Right}
    for word in words:
        if word not in known:
            raise click.BadParameter(f"no right {word!r}: {', '.join(known)}")
    now_ms = time.time_ns() // 1_000_000
    expires_ms = 0 if days is None else now_ms + days * DAY_MS
    tokens = Tokens(settings.load(config).tokens)
    click.echo(tokens.add(user, nodes, [known[word] for word in words], now_ms, expires_ms))


@token.command("list", epilog="Example: kadeploy token list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def token_list(config: Path, as_json: bool) -> None:
    """List who has tokens; the tokens themselves are not kept."""
    known = Tokens(settings.load(config).tokens).known()
    for one in known if not as_json else ():
        rights = ",".join(right.value for right in one.rights)
        click.echo(f"{one.id} {one.user} {one.nodes} {rights}")
    if as_json:
        click.echo(json.dumps([one.public() for one in known]))


@token.command("revoke", epilog="Example: kadeploy token revoke 1f00ba42")
@click.argument("number", metavar="ID")
@click.pass_obj
def token_revoke(config: Path, number: str) -> None:
    """Make a token void, at once."""
    gone = Tokens(settings.load(config).tokens).revoke(number)
    click.echo(f"{gone.id} of {gone.user} is void")
