"""The nfsp command line.  Decides nothing: it reads arguments, calls, and says what came of it.

Errors are one line on standard error; exit codes are those of `common.errors`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
import trio

from common import cli, log
from common.errors import Code, KaError
from common.signals import ending
from nfsp import check, mounting, status
from nfsp import export as nfs
from nfsp.config import load_cluster
from nfsp.iod.server import run_iod
from nfsp.mds import daemon
from nfsp.onehost import OneHost
from nfsp.process import PidFile, drop_privileges, run_until_signal

__all__ = ["main"]

CONFIG_DEFAULT = "/etc/nfsp/cluster.toml"

_ready_fd = click.option("--ready-fd", type=int, hidden=True)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: nfsp up /tmp/try --iods 3 --mount /mnt --daemon",
)
@click.version_option(package_name="ka", prog_name="nfsp")
@click.option(
    "-c",
    "--config",
    envvar="NFSP_CLUSTER",
    default=CONFIG_DEFAULT,
    show_default=True,
    help="The cluster's configuration ($NFSP_CLUSTER).",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="NFSP_LOG_LEVEL",
    help="What daemons and mounts log.",
)
@click.pass_context
def nfsp(context: click.Context, config: str, log_level: str) -> None:
    """A distributed, striped, POSIX file system."""
    log.configure(log_level)
    context.obj = Path(config).absolute()


def main() -> NoReturn:
    """Run the command line; every failure is one line and its exit code."""
    cli.run(nfsp, "nfsp")


# ---------------------------------------------------------------- one host


@nfsp.command(epilog="Example: nfsp up /tmp/try --iods 3 --mount /mnt")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--iods", default=3, show_default=True, help="Data servers, when DIRECTORY is new.")
@click.option("--mds", "mds_count", default=1, show_default=True, help="Metadata servers: 1.")
@click.option("--mount", "mountpoint", type=click.Path(), help="Mount it there too.")
@click.option("-o", "options", multiple=True, help="Mount options.")
@click.option("--daemon", "detach", is_flag=True, help="Return when everything is up.")
def up(
    directory: Path,
    iods: int,
    mds_count: int,
    mountpoint: str | None,
    options: tuple[str, ...],
    detach: bool,
) -> None:
    """Run a whole cluster on this host, with everything it needs below DIRECTORY."""
    if mds_count != 1:
        raise KaError(Code.USAGE, "one metadata server is supported: --mds 1")
    host = OneHost(directory)
    for number in ending():
        signal.signal(number, _interrupt)
    host.create(iods)
    before = host.running()
    is_up = False
    try:
        host.start(click.echo)
        if mountpoint is not None:
            where = mounting.resolve(mountpoint)
            mounting.mount_in_background(host.config_path, where, options)
            click.echo(f"mounted at {where}")
        if detach:
            click.echo(f"the cluster runs; `nfsp down {directory}` stops it")
            return
        is_up = True  # before it is said: Ctrl-C may follow at once
        click.echo(f"export NFSP_CLUSTER={host.config_path}")
        click.echo("the cluster runs; Ctrl-C stops it")
        _watch(host)
    except BaseException as error:
        if is_up and isinstance(error, KeyboardInterrupt):
            host.stop(click.echo, force=True)
            return
        # An interrupt may have come before anybody here knew of what it has started.
        host.stop(lambda line: None, force=True, but=before)
        raise


def _interrupt(number: int, frame: object) -> NoReturn:
    """End what we are doing; the clean-up that follows is not to be interrupted again."""
    for ignored in ending():
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt


def _watch(host: OneHost) -> None:
    """Wait for ever; say it when a daemon is gone."""
    config, _key = load_cluster(host.config_path)
    alive = {f"mds{mds.id}" for mds in config.mds} | {f"iod{iod.id}" for iod in config.iod}
    while True:
        for name in sorted(alive):
            if host.pid_file(name).owner() is None:
                click.echo(f"{name} has ended; see {host.directory}/log/{name}.log", err=True)
                alive.discard(name)
        time.sleep(1)


@nfsp.command(epilog="Example: nfsp down /tmp/try")
@click.argument("directory", type=click.Path(path_type=Path))
def down(directory: Path) -> None:
    """Unmount and stop what `nfsp up DIRECTORY` started; the data stay."""
    host = OneHost(directory)
    if not host.config_path.exists():
        raise KaError(Code.USAGE, f"no cluster in {directory}")
    host.stop(click.echo)


# ---------------------------------------------------------------- daemons


@nfsp.command(epilog="Example: nfsp -c cluster.toml mkfs")
@click.option("--owner", default="0:0", show_default=True, help="UID:GID of the root directory.")
@click.pass_obj
def mkfs(config_path: Path, owner: str) -> None:
    """Make an empty file system in the mds's data directory."""
    config, _key = load_cluster(config_path)
    uid, colon, gid = owner.partition(":")
    if not colon or not uid.isdigit() or not gid.isdigit():
        raise KaError(Code.USAGE, f"--owner takes UID:GID, not {owner!r}")
    for mds in config.mds:
        superblock = trio.run(
            partial(daemon.mkfs, config, mds, uid=int(uid), gid=int(gid))
        )
        click.echo(f"mds{mds.id}: file system {superblock.fs_uuid.hex()} made in {mds.data}")


def _pid_file(config_path: Path, name: str) -> PidFile:
    return PidFile(config_path.parent / "run" / f"{name}.pid")


@nfsp.command(name="mds", epilog="Example: nfsp -c cluster.toml mds 0")
@click.argument("number", type=int)
@_ready_fd
@click.pass_obj
def run_mds_command(config_path: Path, number: int, ready_fd: int | None) -> None:
    """Run metadata server NUMBER, in the foreground."""
    config, key = load_cluster(config_path)
    mds = config.mds_config(number)
    with _pid_file(config_path, f"mds{number}").held():
        drop_privileges(config.cluster.user)
        run_until_signal(
            lambda ready: daemon.run_mds(config, mds, key, ready=ready), ready_fd=ready_fd
        )


@nfsp.command(name="iod", epilog="Example: nfsp -c cluster.toml iod 1")
@click.argument("number", type=int)
@_ready_fd
@click.pass_obj
def run_iod_command(config_path: Path, number: int, ready_fd: int | None) -> None:
    """Run data server NUMBER, in the foreground."""
    config, key = load_cluster(config_path)
    iod = config.iod_config(number)
    with _pid_file(config_path, f"iod{number}").held():
        drop_privileges(config.cluster.user)
        run_until_signal(
            lambda ready: run_iod(config, iod, key, ready=ready), ready_fd=ready_fd
        )


# ---------------------------------------------------------------- mounts


@nfsp.command(epilog="Example: nfsp -c cluster.toml mount /mnt -o timeout=10")
@click.argument("mountpoint", type=click.Path())
@click.option(
    "-o",
    "options",
    multiple=True,
    help="timeout=S, attr_timeout=S, durable, dirty=SIZE, readahead=SIZE, ro, dev, suid, ...",
)
@click.option("--foreground", is_flag=True, help="Stay; log to standard error.")
@_ready_fd
@click.pass_obj
def mount(
    config_path: Path,
    mountpoint: str,
    options: tuple[str, ...],
    foreground: bool,
    ready_fd: int | None,
) -> None:
    """Mount the file system; return when it can be used."""
    where = mounting.resolve(mountpoint)
    if not foreground:
        mounting.mount_in_background(config_path, where, options)
        return
    config, key = load_cluster(config_path)
    parsed = mounting.parse_options(options, config.mount)
    files = mounting.MountFiles(config_path, where)
    with files.pid_file.held():
        files.note()
        try:
            run_until_signal(
                lambda ready: mounting.serve_mount(config, key, where, parsed, ready),
                ready_fd=ready_fd,
            )
        finally:
            files.forget()


@nfsp.command(epilog="Example: nfsp umount /mnt")
@click.argument("mountpoint", type=click.Path())
@click.option("--lazy", is_flag=True, help="Detach now, even if it is in use.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount; return when everything written is with the servers."""
    mounting.unmount(mounting.resolve(mountpoint), lazy=lazy, say=partial(click.echo, err=True))


# ---------------------------------------------------------------- care


@nfsp.command(name="status", epilog="Example: nfsp -c cluster.toml status --json")
@_json
@click.pass_obj
def status_command(config_path: Path, as_json: bool) -> None:
    """Show every daemon, the space and the mounts; exit 3 if a daemon is down."""
    config, key = load_cluster(config_path)
    found = trio.run(status.gather, config, key)
    click.echo(json.dumps(found, default=bytes.hex) if as_json else status.lay_out(found))
    if any("error" in one for one in found["mds"] + found["iod"]):
        sys.exit(Code.UNREACHABLE.exit_code)


@nfsp.command(epilog="Example: nfsp -c cluster.toml fsck --repair")
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@click.option("--verify", is_flag=True, help="Let every iod check the sums of all its data too.")
@_json
@click.pass_obj
def fsck(config_path: Path, repair: bool, verify: bool, as_json: bool) -> None:
    """Check metadata and data against each other, on line.

    Exits 0 if clean, 1 if there were leftovers of interrupted work, 5 if there was damage, 3 if
    something could not be checked.
    """
    config, key = load_cluster(config_path)
    report = trio.run(partial(check.run_fsck, config, key, repair=repair, verify=verify))
    click.echo(json.dumps(report.as_data()) if as_json else check.lay_out(report))
    sys.exit(report.exit_code)


@nfsp.command(epilog="Example: nfsp layout /mnt/data stripe_width=1 chunk_size=4194304")
@click.argument("path", type=click.Path(exists=True))
@click.argument("rule", nargs=-1)
def layout(path: str, rule: tuple[str, ...]) -> None:
    """Show where a file's bytes live, or set how new files below a directory are striped."""
    name = "user.nfsp.layout"
    try:
        if rule:
            os.setxattr(path, name, " ".join(rule).encode())
        click.echo(os.getxattr(path, name).decode())
    except OSError as error:
        raise KaError(Code.USAGE, f"{path}: {error.strerror}") from None


@nfsp.command(epilog="Example: nfsp export /mnt --to 10.0.0.0/24 --to login1")
@click.argument("path", type=click.Path())
@click.option("--to", "clients", multiple=True, help="A host, node[1-20], network or @netgroup.")
@click.option("--remove", is_flag=True, help="Withdraw the export.")
@click.option("--options", default="", help="More export options, e.g. no_root_squash.")
@click.option("--print", "print_only", is_flag=True, help="Only print the exports line.")
@click.pass_obj
def export(
    config_path: Path,
    path: str,
    clients: tuple[str, ...],
    remove: bool,
    options: str,
    print_only: bool,
) -> None:
    """Share the mount at PATH by the kernel's NFS server (v3 and v4.2)."""
    where = str(mounting.resolve(path))
    if remove:
        nfs.remove_export(where)
        return
    if not clients:
        raise KaError(Code.USAGE, "who may mount it? name them with --to")
    config, key = load_cluster(config_path)
    fs_uuid = trio.run(mounting.exportable, config, key, where)
    text = nfs.export_lines(where, list(clients), fs_uuid, options=options)
    if print_only:
        click.echo(text, nl=False)
        return
    file = nfs.write_export(where, text)
    click.echo(f"exported: {file}")
    for line in nfs.warnings():
        click.echo(f"note: {line}", err=True)
