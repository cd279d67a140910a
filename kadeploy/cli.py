"""Command line of kadeploy, which clones operating systems onto disks.

Decides nothing itself: it reads arguments, calls, and says what came of it.  Errors are one line on
standard error; exit codes are those of `common.errors`, and of `run` and `status` 0 when all nodes
are deployed, 1 when some are not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
import trio

from common import cli, log, nodeset
from common.descriptors import raise_descriptor_limit
from common.errors import Code, KaError
from kadeploy import (
    cli_web,
    descriptions,
    imagecheck,
    planview,
    power_drivers,
    recording,
    running,
    settings,
    views,
)
from kadeploy.deploying import Target, plan_for
from kadeploy.disks import facts_from_json
from kadeploy.links import SshLink
from kadeploy.mkenv import Request as EnvironmentRequest
from kadeploy.mkenv import make_environment
from kadeploy.plan import NodePlan, make_plan
from kadeploy.power import PowerAction, first_able
from kadeploy.running import Request
from kadeploy.settings import Settings
from kadeploy.store import EnvironmentRow, Store
from kadeploy.workflow import NodeState, Status, StepRecord

__all__ = ["main"]

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_nodes = click.option("-w", "nodes", required=True, metavar="NODES", help="A node set: pc[1-8].")
_version = click.option("--version", "version", type=int, help="Of the environment; else the last.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: kadeploy run -w pc[1-8] debian12",
)
@click.version_option(package_name="ka", prog_name="kadeploy")
@click.option(
    "-c",
    "--config",
    envvar="KADEPLOY_CONFIG",
    default=settings.CONFIG_DEFAULT,
    show_default=True,
    help="The configuration ($KADEPLOY_CONFIG).",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    envvar="KADEPLOY_LOG_LEVEL",
)
@click.pass_context
def kadeploy(context: click.Context, config: str, log_level: str) -> None:
    """Clone operating systems onto the disks of many nodes."""
    log.configure(log_level)
    context.obj = Path(config)


kadeploy.add_command(cli_web.serve)
kadeploy.add_command(cli_web.token)


def main() -> NoReturn:
    """Run the command line; every failure is one line and its exit code."""
    raise_descriptor_limit()  # a call to a node takes four, a broadcast's node three
    cli.run(kadeploy, "kadeploy")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _print(content: object, lines: Iterator[str] | Sequence[str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(content))
    else:
        for line in lines:
            click.echo(line)


# ---------------------------------------------------------------- environments


@kadeploy.group("env", epilog="Example: kadeploy env add debian12/env.yaml")
def env() -> None:
    """Look after environments: what can be deployed."""


@env.command("check", epilog="Example: kadeploy env check debian12/env.yaml")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--sums", is_flag=True, help="Read the images and compare their checksums.")
def env_check(path: Path, sums: bool) -> None:
    """Read a description and say what is wrong with it."""
    environment = descriptions.read_environment(path)
    for image in environment.images():
        imagecheck.check_image(path.parent, image, sums=sums)
    click.echo(f"{path}: {environment.name} version {environment.version} is good")
    for image in environment.images():
        if image.begins_again:
            click.echo(
                f"note: {image.file} is compressed: if it is cut off it is sent from the beginning;"
                " with compression none only what a disk lacks is sent"
            )


@env.command("add", epilog="Example: kadeploy env add debian12/env.yaml")
@click.argument("path", type=click.Path(path_type=Path))
@click.pass_obj
def env_add(config: Path, path: Path) -> None:
    """Record a description; its images and templates stay where they are."""
    text = descriptions.read_text(path)
    environment = descriptions.parse_environment(text, path)
    for image in environment.images():
        imagecheck.check_image(path.parent, image, sums=False)
    with Store.open(settings.load(config).store) as store:
        store.add_environment(
            environment.name, environment.version, path.absolute(), text, _now_ms()
        )
    click.echo(f"{environment.name} version {environment.version} added")


@env.command("list", epilog="Example: kadeploy env list --json")
@_json
@click.pass_obj
def env_list(config: Path, as_json: bool) -> None:
    """List all environments."""
    with Store.open(settings.load(config).store) as store:
        rows = store.environments()
    _print(
        [{key: value for key, value in asdict(row).items() if key != "text"} for row in rows],
        [f"{row.name} {row.version} {row.path}" for row in rows],
        as_json,
    )


@env.command("show", epilog="Example: kadeploy env show debian12")
@click.argument("name")
@_version
@click.pass_obj
def env_show(config: Path, name: str, version: int | None) -> None:
    """Print a description as it was added."""
    with Store.open(settings.load(config).store) as store:
        click.echo(store.environment(name, version).text, nl=False)


# ---------------------------------------------------------------- plan


@kadeploy.command("plan", epilog="Example: kadeploy plan -w pc[1-8] debian12")
@_nodes
@click.argument("environment")
@_version
@click.option(
    "--facts",
    type=click.Path(path_type=Path),
    help="What a node answered, instead of asking it: a file made by the node's program.",
)
@_json
@click.pass_obj
def plan(
    config: Path,
    nodes: str,
    environment: str,
    version: int | None,
    facts: Path | None,
    as_json: bool,
) -> None:
    """Show what a deployment would do to nodes.  Touches nothing.

    ENVIRONMENT is a name that was added, or the path of a description (with a slash).
    """
    found = settings.load(config)
    if "/" in environment:
        path = Path(environment).absolute()
        text = descriptions.read_text(path)
        row = EnvironmentRow("", 0, str(path), text, "", 0)
    else:
        with Store.open(found.store) as store:
            row = store.environment(environment, version)
    target = running.target_of(found, row, "as planned")
    content = None if facts is None else descriptions.read_facts(facts)
    plans, faults = trio.run(_plans, target, found, nodeset.expand(nodes), content)
    said = [planview.to_dict(one) for one in plans]
    said += [{"node": name, "error": fault} for name, fault in faults.items()]
    lines = [line for one in plans for line in planview.describe(one)]
    _print(said, [*lines, *(f"{name}: {fault}" for name, fault in faults.items())], as_json)
    if faults:
        raise click.exceptions.Exit(1)


async def _plans(
    target: Target, found: Settings, names: Sequence[str], facts: dict[str, Any] | None
) -> tuple[list[NodePlan], dict[str, str]]:
    plans: dict[str, NodePlan] = {}
    faults: dict[str, str] = {}

    async def one(name: str) -> None:
        try:
            spec = target.nodes.get(name)
            if facts is not None:
                plans[name] = make_plan(
                    target.environment,
                    spec,
                    target.nodes,
                    facts_from_json(facts.get("facts", facts)),
                    read=target.read,
                    stored_sizes=target.stored_sizes(),
                    token=target.token,
                )
            else:
                address = spec.address.partition("/")[0] or name
                # It may run any system: the deployment environment's host key is not asked for.
                options = replace(found.ssh, known_hosts=None)
                plans[name] = await plan_for(target, spec, SshLink(address, options))
        except KaError as error:
            faults[name] = str(error)

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(one, name)
    return [plans[name] for name in names if name in plans], faults


# ---------------------------------------------------------------- run


@kadeploy.command("run", epilog="Example: kadeploy run -w pc[1-8] debian12; kadeploy run --resume")
@click.option("-w", "nodes", metavar="NODES", help="A node set: pc[1-8].")
@click.argument("environment", required=False)
@_version
@click.option("--missing", is_flag=True, help="Leave out nodes that have it already.")
@click.option("--breakpoint", "breakpoints", multiple=True, metavar="STEP", help="Hold nodes here.")
@click.option("--resume", is_flag=True, help="Go on with the last deployment, held nodes too.")
@_json
@click.pass_obj
def run(
    config: Path,
    nodes: str | None,
    environment: str | None,
    version: int | None,
    missing: bool,
    breakpoints: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Deploy an environment on nodes.  Their disks named in it are OVERWRITTEN.

    A run that was killed goes on with --resume.
    """
    found = settings.load(config)
    begun = trio.Event()

    def tell(_: Sequence[NodeState], records: Sequence[StepRecord]) -> None:
        for one in records:
            click.echo(views.record_line(one), err=True)

    with Store.open(found.store) as store:
        number: int | None
        if resume:
            if any((nodes, environment, version, missing, breakpoints)):
                raise KaError(
                    Code.USAGE, "--resume goes on with the last deployment as it was begun: alone"
                )
            number = store.deployment().id
        elif nodes is None or environment is None:
            raise KaError(Code.USAGE, "run needs -w NODES and ENVIRONMENT, or --resume")
        else:
            names = nodeset.expand(nodes)
            request = Request(environment, names, version, missing, breakpoints)
            number = running.begin(store, found, request, _now_ms())
        if number is None:
            click.echo("all nodes have it")
            return
        on_change = None if as_json else tell
        work = partial(
            running.carry_out, store, found, number, release=True, on_begun=begun.set,
            on_change=on_change,
        )  # fmt: skip
        try:
            states = trio.run(work)
        except KaError:
            if not resume and not begun.is_set():
                store.withdraw(number)  # as the server does
            raise
    _print(
        {"deployment": number, "nodes": views.node_dicts(states)},
        views.verdict_lines(number, states),
        as_json,
    )
    if any(node.status is not Status.DEPLOYED for node in states):
        raise click.exceptions.Exit(1)


@kadeploy.command("cancel", epilog="Example: kadeploy cancel 12 -w pc[3-4]")
@click.argument("number", type=int, required=False)
@click.option("-w", "nodes", metavar="NODES", help="These nodes only.  [default: all]")
@click.pass_obj
def cancel(config: Path, number: int | None, nodes: str | None) -> None:
    """Give up nodes of a deployment; of the last one if no NUMBER is given."""
    with Store.open(settings.load(config).store) as store:
        row = store.deployment(number)
        every = [node.name for node in store.nodes(row.id)]
        names = every if nodes is None else nodeset.expand(nodes)
        running.cancel(store, row.id, names, "cancelled", _now_ms())
    click.echo(f"deployment {row.id}: {nodeset.fold(names)} given up")


# ---------------------------------------------------------------- what was and is


@kadeploy.command("status", epilog="Example: kadeploy status; kadeploy status 12 --json")
@click.argument("number", type=int, required=False)
@_json
@click.pass_obj
def status(config: Path, number: int | None, as_json: bool) -> None:
    """Show where the nodes of a deployment are; the last one's if no NUMBER is given."""
    with Store.open(settings.load(config).store) as store:
        row = store.deployment(number)
        states = store.nodes(row.id)
    content = {**asdict(row), "nodes": views.node_dicts(states)}
    _print(content, views.verdict_lines(row.id, states), as_json)
    if any(node.status is not Status.DEPLOYED for node in states):
        raise click.exceptions.Exit(1)


@kadeploy.command("history", epilog="Example: kadeploy history; kadeploy history 12 -w pc3")
@click.argument("number", type=int, required=False)
@click.option("-w", "node", metavar="NODE", help="Of this node only; with NUMBER.")
@_json
@click.pass_obj
def history(config: Path, number: int | None, node: str | None, as_json: bool) -> None:
    """List deployments; with NUMBER, every try of every step."""
    with Store.open(settings.load(config).store) as store:
        if number is None:
            if node is not None:
                raise KaError(Code.USAGE, "-w NODE goes with NUMBER: see `kadeploy history`")
            rows = store.deployments()
            _print([asdict(row) for row in rows], [views.deployment_line(one) for one in rows],
                   as_json)  # fmt: skip
            return
        row = store.deployment(number)
        if node is not None and node not in {one.name for one in store.nodes(row.id)}:
            raise KaError(Code.USAGE, f"no node {node[:80]!r} in deployment {number}")
        tries = store.history(row.id, node)
    _print([asdict(one) for one in tries], [views.try_line(one) for one in tries], as_json)


# ---------------------------------------------------------------- power


@kadeploy.command("power", epilog="Example: kadeploy power -w pc[1-8] status")
@_nodes
@click.argument("action", type=click.Choice([one.value for one in PowerAction]))
@_json
@click.pass_obj
def power(config: Path, nodes: str, action: str, as_json: bool) -> None:
    """Switch nodes on or off, or ask how they are."""
    known = descriptions.read_nodes(settings.load(config).nodes)
    said = trio.run(_power, [known.get(name) for name in nodeset.expand(nodes)], action)
    _print(said, [f"{name}: {text}" for name, text in said.items()], as_json)
    if any(text.startswith("failed") for text in said.values()):
        raise click.exceptions.Exit(1)


async def _power(specs: Sequence[Any], action: str) -> dict[str, str]:
    said: dict[str, str] = {}

    async def one(spec: Any) -> None:
        wanted = PowerAction(action)
        try:
            way = first_able(spec.power, wanted)
            said[spec.name] = await power_drivers.power(way, spec.name, wanted) or "done"
        except KaError as error:
            said[spec.name] = f"failed: {error}"

    async with trio.open_nursery() as nursery:
        for spec in specs:
            nursery.start_soon(one, spec)
    return {spec.name: said[spec.name] for spec in specs}


# ---------------------------------------------------------------- making things


@kadeploy.command("mkenv", epilog="Example: kadeploy mkenv /srv/kaboot/deploy --key ~/.ssh/id.pub")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path),
              help="A public key that may enter as root.")  # fmt: skip
@click.option("--suite", default="bookworm", show_default=True)
@click.option("--mirror", help="Of Debian packages.  [default: this machine's]")
@click.option("--package", "packages", multiple=True, help="One more Debian package.")
@click.option("--kernel", default="linux-image-cloud-amd64", show_default=True,
              help="The kernel's package.")  # fmt: skip
def mkenv(
    directory: Path,
    keys: tuple[Path, ...],
    suite: str,
    mirror: str | None,
    packages: tuple[str, ...],
    kernel: str,
) -> None:
    """Make the deployment environment: vmlinuz, initrd.img and its host key, in DIRECTORY."""
    texts = tuple(descriptions.read_text(path).strip() for path in keys)
    request = EnvironmentRequest(directory, texts, suite, mirror, packages, kernel)
    for line in make_environment(request):
        click.echo(line)


@kadeploy.command("record", epilog="Example: kadeploy record -w pc1 / root.tar.zst")
@click.option("-w", "node", metavar="NODE", help="A node by ssh.  [default: this machine]")
@click.option("--kind", type=click.Choice(recording.KINDS), default="tar", show_default=True)
@click.option(
    "--compression", type=click.Choice(list(recording.COMPRESSIONS)), default="zstd",
    show_default=True, help="none: zeros become holes.",
)  # fmt: skip
@click.option("--filesystem", default="ext4", show_default=True, help="Of a partclone image.")
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.pass_obj
def record(
    config: Path,
    node: str | None,
    kind: str,
    compression: str,
    filesystem: str,
    source: str,
    destination: Path,
) -> None:
    """Capture SOURCE, a directory or a device, as an image."""
    prefix: list[str] = []
    if node is not None:
        found = settings.load(config)
        spec = descriptions.read_nodes(found.nodes).get(node)
        options = replace(found.ssh, known_hosts=None)
        prefix = options.words(spec.address.partition("/")[0] or node, environment=False)
    captured = recording.record(
        kind,
        source,
        destination,
        compression=compression,
        filesystem=filesystem,
        prefix=prefix,
    )
    for line in captured:
        click.echo(line)
