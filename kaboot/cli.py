"""Command line of kaboot, which decides what each machine boots over the network.

Decides nothing itself: it reads arguments, calls, and says what came of it.  Errors are one line on
standard error; exit codes are those of `common.errors`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import NoReturn

import click

from common import cli, log, nodeset
from kaboot import check as checks
from kaboot import dhcp, diskless, scripts, server, stage, views, words
from kaboot import inventory as inventory_file
from kaboot.control import Control
from kaboot.steps import Action

__all__ = ["main"]

LEARN_POLL_S = 0.5

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_EXAMPLE = "Example: kaboot set pc[1-8] install"


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXAMPLE,
)
@click.version_option(package_name="ka", prog_name="kaboot")
@click.option(
    "-c",
    "--config",
    envvar="KABOOT_CONFIG",
    default=inventory_file.CONFIG_DEFAULT,
    show_default=True,
    help="The inventory ($KABOOT_CONFIG).",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="KABOOT_LOG_LEVEL",
    help="What the server logs.",
)
@click.pass_context
def kaboot(context: click.Context, config: str, log_level: str) -> None:
    """Decide what each machine boots over the network."""
    log.configure(log_level)
    context.obj = Path(config).absolute()


def main() -> NoReturn:
    """Run the command line; every failure is one line and its exit code."""
    cli.run(kaboot, "kaboot")


@kaboot.command("serve", epilog="Example: kaboot -c /etc/kaboot/kaboot.toml serve")
@click.option("--ready-fd", type=int, hidden=True)
@click.pass_obj
def serve_site(config: Path, ready_fd: int | None) -> None:
    """Serve the site: DHCP and TFTP by dnsmasq, scripts and files by HTTP; until SIGTERM.

    Run it as root: it becomes the user named in the inventory before it answers anybody.
    """
    server.serve(config, ready_fd=ready_fd)


@kaboot.command("set", epilog="Example: kaboot set pc[1-8] install; kaboot set pc3 custom:memtest")
@click.argument("nodes")
@click.argument("step")
@click.pass_obj
def set_step(config: Path, nodes: str, step: str) -> None:
    """Set what NODES boot next: install, deployed, local, rescue, menu, discover, custom:PROFILE.

    It takes effect at their next boot; nothing is rebooted.
    """
    names = nodeset.expand(nodes)
    with Control.open(config) as control:
        assignment = control.assign(names, step)
    click.echo(f"{nodeset.fold(names)}: {assignment}")


@kaboot.command(epilog="Example: kaboot show pc[1-8]; kaboot show --events pc3")
@click.argument("nodes", required=False)
@click.option("--events", is_flag=True, help="Show boot stages instead, oldest first.")
@click.option("-n", "--count", type=click.IntRange(1, 100_000), default=50, show_default=True,
              help="How many events, the last ones.")  # fmt: skip
@_json
@click.pass_obj
def show(config: Path, nodes: str | None, events: bool, count: int, as_json: bool) -> None:
    """Show nodes and their steps, and machines that are not in the inventory."""
    with Control.open(config) as control:
        names = [control.node(name).name for name in nodeset.expand(nodes)] if nodes else None
        if events:
            found = [
                event for name in names or [""] for event in control.events(node=name, count=count)
            ]
            found = sorted(found, key=lambda event: event.id)[-count:]
            if as_json:
                click.echo(json.dumps([views.event_json(event) for event in found]))
            else:
                _lines(views.event_lines(found))
            return
        listed = [row for row in control.nodes() if names is None or row.node.name in names]
        unknown = control.unknown() if names is None else []
        learning = control.learning()
    if as_json:
        content = {
            "nodes": [views.node_json(status) for status in listed],
            "unknown": [views.machine_json(row) for row in unknown],
            "learning": learning,
        }
        click.echo(json.dumps(content))
        return
    now_ns = time.time_ns()
    _lines(views.node_lines(listed, now_ns))
    if unknown:
        click.echo()
        _lines(views.machine_lines(unknown, now_ns))
    if learning:
        click.echo(f"\nlearning: the next machine is {learning[0]} ({len(learning)} to go)")


@kaboot.command(epilog="Example: kaboot render pc3; kaboot render --site isc")
@click.argument("node", required=False)
@click.option("--grub", is_flag=True, help="The node's GRUB configuration, not its iPXE script.")
@click.option("--dnsmasq", is_flag=True, help="The configuration of kaboot's own dnsmasq.")
@click.option("--site", type=click.Choice(dhcp.SITE_SERVERS), help="Lines for the site's server.")
@click.pass_obj
def render(config: Path, node: str | None, grub: bool, dnsmasq: bool, site: str | None) -> None:
    """Print what NODE would be told now, or what a DHCP server is."""
    if sum((node is not None, dnsmasq, site is not None)) != 1:
        raise click.UsageError("name a node, or --dnsmasq, or --site")
    with Control.open(config) as control:
        inventory = control.inventory
        if site is not None:
            click.echo(dhcp.site_lines(inventory, site), nl=False)
        elif dnsmasq:
            state = Path(inventory.site.state)
            text = dhcp.dnsmasq_conf(
                inventory,
                tftp_root=str(stage.tftp_root(inventory)),
                hosts=str(state / "hosts"),
                leases=str(state / "leases"),
            )
            click.echo(f"{text}\n# {state / 'hosts'}:\n{dhcp.dnsmasq_hosts(inventory)}", nl=False)
        elif node is not None:
            assignment, action = control.action(node)
            _script(control, f"{node}: {assignment}", action, grub=grub)


def _script(control: Control, comment: str, action: Action, *, grub: bool) -> None:
    write = scripts.to_grub if grub else scripts.to_ipxe
    click.echo(write(control.inventory, comment, action), nl=False)


@kaboot.command(epilog="Example: kaboot check")
@_json
@click.pass_obj
def check(config: Path, as_json: bool) -> None:
    """Find what would keep machines from booting; exit code 1 if there is something."""
    with Control.open(config) as control:
        found = checks.check(control.inventory)
    if as_json:
        content = [{"problem": finding.problem, "text": finding.text} for finding in found]
        click.echo(json.dumps(content))
    else:
        _lines([f"{'problem' if f.problem else 'remark'}: {f.text}" for f in found] or ["all well"])
    if any(finding.problem for finding in found):
        sys.exit(1)


@kaboot.command(epilog="Example: kaboot learn pc[1-8], then switch them on one after the other")
@click.argument("nodes", required=False)
@click.option("--seen", is_flag=True, help="Name machines already seen, in their order; then end.")
@click.option("--no-wait", is_flag=True, help="Do not wait until all have appeared.")
@click.option("--stop", is_flag=True, help="Give out no more names.")
@click.pass_obj
def learn(config: Path, nodes: str | None, seen: bool, no_wait: bool, stop: bool) -> None:
    """Give the names NODES to unknown machines in the order they are switched on.

    The nodes must be in the inventory, without MACs.  A running `kaboot serve` does the naming.
    """
    if stop == (nodes is not None):
        raise click.UsageError("name nodes, or --stop")
    names = nodeset.expand(nodes or "")
    with Control.open(config) as control:
        if stop:
            control.stop_learning()
        elif seen:
            for name, mac in control.learn_seen(names).items():
                click.echo(f"{name}  {mac}")
        else:
            control.start_learning(names)
            if not no_wait:
                _follow_learning(control, names)


def _follow_learning(control: Control, names: list[str]) -> None:
    """Print names as they are given out; what is interrupted gives out no more."""
    click.echo(f"switch on {names[0]} now, then the others in turn", err=True)
    told: set[str] = set()
    try:
        while len(told) < len(names):
            given = {
                node.name: node.macs[0] for node in control.inventory.nodes.values() if node.macs
            }
            for name in names:
                if name in given and name not in told:
                    told.add(name)
                    click.echo(f"{name}  {given[name]}")
            if len(told) < len(names):
                time.sleep(LEARN_POLL_S)
    except BaseException:
        control.stop_learning()
        raise


@kaboot.command(epilog="Example: kaboot forget pc3; kaboot forget 52:54:00:12:34:56")
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def forget(config: Path, names: tuple[str, ...]) -> None:
    """Undo learning, by node or MAC: the machine is unknown again."""
    with Control.open(config) as control:
        for mac in control.forget(names):
            click.echo(f"forgot {mac}")


@kaboot.command("diskless", epilog="Example: kaboot diskless /srv/nfsp/debian debian")
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("name")
@click.pass_obj
def make_diskless(config: Path, root: Path, name: str) -> None:
    """Make what boots the system in ROOT from an NFS server: a kernel and an initramfs.

    They are put into the directory NAME below `files`, as a profile with `nfsroot` names them.
    """
    files = Path(inventory_file.load(config).site.files)
    for line in diskless.make_diskless(root, files / words.check_path(name, "NAME")):
        click.echo(line)


def _lines(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)
