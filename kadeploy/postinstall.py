"""Post-install: what makes a copy of a system this node's own.

Pure: the environment's steps and a node in, files, removals, scripts and registry edits out.
Templates and what they may do: `builtin.py`.

Built-ins here: hostname, hosts, network (systemd-networkd), ssh-keys, ssh-host-keys, fstab,
machine-id.  Those for Windows are in `windows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.errors import Code, KaError
from kadeploy import windows
from kadeploy.builtin import Customization, Work, rendered
from kadeploy.environment import Filesystem, PartitionSpec, PartitionType, PostStep
from kadeploy.nodes import Nodes, NodeSpec
from kadeploy.orders import NewFile
from kadeploy.partitions import DiskLayout, Placed

__all__ = ["BUILTINS", "fstab", "render"]


def render(
    steps: Sequence[PostStep],
    node: NodeSpec,
    nodes: Nodes,
    layouts: Sequence[DiskLayout],
    *,
    environment: str,
    read: Callable[[str], str],
) -> Customization:
    """Return all that *steps* do on a node; *read* gives the text of a template or script.

    Raises USAGE for a fault in a template, with the template's name and line.
    """
    context = {
        "node": {
            "name": node.name,
            "fqdn": f"{node.name}.{nodes.domain}" if nodes.domain else node.name,
            "address": node.address,
            "gateway": node.gateway,
            "dns": list(node.dns),
            "mac": node.mac,
        },
        "domain": nodes.domain,
        "environment": environment,
        "vars": {one.name: one.value for one in node.variables},
        "ssh_keys": list(nodes.ssh_keys),
        "partitions": {
            one.spec.name: {"path": one.path, "partuuid": one.part_uuid, "size": one.size}
            for layout in layouts
            for one in layout.partitions
            if one.spec is not None
        },
    }
    work = Work(node, nodes, layouts, context)
    made = Customization()
    for step in steps:
        made = made.joined(_one(step, work, read))
    return made


def _one(step: PostStep, work: Work, read: Callable[[str], str]) -> Customization:
    if step.builtin is not None:
        if step.builtin not in BUILTINS:
            names = ", ".join(sorted(BUILTINS))
            raise KaError(Code.USAGE, f"no built-in {step.builtin!r}: there are {names}")
        return BUILTINS[step.builtin](work)
    if step.template is not None:
        assert step.dest is not None, "validated"
        text = rendered(step.template, read(step.template), work.context)
        dest = rendered(step.template, step.dest, work.context)
        return Customization(files=(NewFile.of(dest, text.encode(), int(step.mode, 8)),))
    assert step.script is not None, "validated"
    text = rendered(step.script, read(step.script), work.context)
    return Customization(scripts=(NewFile.of(step.script, text.encode(), 0o700),))


# ---------------------------------------------------------------- built-ins


def fstab(layouts: Sequence[DiskLayout]) -> str:
    """Return /etc/fstab: by file system UUID where we choose it, else by partition."""
    lines = ["# Written by kadeploy."]
    for layout in layouts:
        for one in layout.partitions:
            if one.spec is not None:
                lines += _fstab_line(one, one.spec)
    return "\n".join(lines) + "\n"


def _fstab_line(one: Placed, part: PartitionSpec) -> list[str]:
    # An image may bring a file system of its own, whose UUID only the image knows.
    source = f"PARTUUID={one.part_uuid}"
    if one.filesystem_uuid:
        source = f"UUID={one.filesystem_uuid}"
    if part.type is PartitionType.SWAP:
        return [f"{source} none swap sw 0 0"]
    if part.mount is None:
        return []
    kind = part.format.value if part.format is not None else "auto"
    if part.format is Filesystem.NTFS:
        kind = "ntfs-3g"
    check = 1 if part.mount == "/" else 2
    return [f"{source} {part.mount} {kind} {part.options} 0 {check}"]


def _hostname(work: Work) -> Customization:
    return Customization(files=(NewFile.of("/etc/hostname", f"{work.node.name}\n".encode()),))


def _hosts(work: Work) -> Customization:
    names = f"{work.node.name}.{work.nodes.domain} {work.node.name}"
    own = names if work.nodes.domain else work.node.name
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    address = work.node.address.partition("/")[0] or "127.0.1.1"
    lines.append(f"{address} {own}")
    return Customization(files=(NewFile.of("/etc/hosts", ("\n".join(lines) + "\n").encode()),))


def _network(work: Work) -> Customization:
    node = work.node
    match = f"MACAddress={node.mac}" if node.mac else "Type=ether"
    lines = ["# Written by kadeploy.", "[Match]", match, "", "[Network]"]
    if node.address:
        lines.append(f"Address={node.address}")
        lines += [f"Gateway={node.gateway}"] if node.gateway else []
        lines += [f"DNS={one}" for one in node.dns]
    else:
        lines.append("DHCP=yes")
    text = "\n".join(lines) + "\n"
    path = "/etc/systemd/network/10-kadeploy.network"
    wants = "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
    enable = f"""#!/bin/sh
set -e
mkdir -p {wants.rpartition("/")[0]}
ln -sf /lib/systemd/system/systemd-networkd.service {wants}
"""
    return Customization(
        files=(NewFile.of(path, text.encode()),),
        scripts=(NewFile.of("network", enable.encode(), 0o700),),
    )


def _ssh_keys(work: Work) -> Customization:
    if not work.nodes.ssh_keys:
        raise KaError(Code.USAGE, "built-in ssh-keys: the nodes file has no ssh_keys")
    text = "".join(f"{key}\n" for key in work.nodes.ssh_keys)
    return Customization(files=(NewFile.of("/root/.ssh/authorized_keys", text.encode(), 0o600),))


def _ssh_host_keys(_: Work) -> Customization:
    return Customization(remove=("etc/ssh/ssh_host_*_key*",), ssh_host_keys=True)


def _fstab(work: Work) -> Customization:
    return Customization(files=(NewFile.of("/etc/fstab", fstab(work.layouts).encode()),))


def _machine_id(_: Work) -> Customization:
    # Empty: systemd makes one at the first boot.
    return Customization(
        files=(NewFile.of("/etc/machine-id", b"", 0o444),), remove=("var/lib/dbus/machine-id",)
    )


BUILTINS: dict[str, Callable[[Work], Customization]] = {
    "fstab": _fstab,
    "hostname": _hostname,
    "hosts": _hosts,
    "machine-id": _machine_id,
    "network": _network,
    "ssh-host-keys": _ssh_host_keys,
    "ssh-keys": _ssh_keys,
    **windows.BUILTINS,
}
