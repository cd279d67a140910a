"""The state machine of a node: what it is to boot, and what a report from it changes.

Pure.  Two decisions live here and nowhere else:
  * `after`: (step, report) -> step.  install -> deployed when the image is written, deployed ->
    local when the written system is up.  Nothing else moves a node but an administrator; a report
    that does not fit changes nothing, so a repeated or late one is harmless.
  * `decide`: an assignment and an inventory -> what the machine is told to do.

An unknown machine is told something that touches no disk: its site's default.

Not here: how it is written down for a boot program (scripts.py), and whether it must wait
(gate.py).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from common.errors import Code, KaError
from kaboot.model import Assignment, Inventory, Node, Profile, Step
from kaboot.words import check_label

__all__ = [
    "Action",
    "Kernel",
    "Local",
    "Menu",
    "MenuEntry",
    "Program",
    "Report",
    "Wait",
    "after",
    "decide",
    "parse_assignment",
]

NOTICE_PAUSE_S = 10
"""How long an unknown machine shows what it is, before it goes on to its disk."""


class Report(enum.Enum):
    """What the system that was booted says."""

    HELLO = "hello"
    """The deployment, rescue or discovery environment runs."""
    INSTALLED = "installed"
    """The image is on the disk, verified."""
    FAILED = "failed"
    UP = "up"
    """The system on the disk, or the diskless one, is up."""


_AFTER: dict[tuple[Step, Report], Step] = {
    (Step.INSTALL, Report.INSTALLED): Step.DEPLOYED,
    (Step.DEPLOYED, Report.UP): Step.LOCAL,
}


@dataclass(frozen=True, slots=True)
class Local:
    """Boot from the disk; with a notice, show it first."""

    notice: str = ""
    pause_s: int = 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """Boot a Linux kernel; paths below the served directory."""

    kernel: str
    initrds: tuple[str, ...]
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """Start a boot program (EFI, or for BIOS what iPXE can chain)."""

    path: str


@dataclass(frozen=True, slots=True)
class MenuEntry:
    key: str
    title: str
    action: Local | Kernel | Program


@dataclass(frozen=True, slots=True)
class Menu:
    """Let somebody choose; the first entry is taken after the time-out."""

    title: str
    entries: tuple[MenuEntry, ...]
    timeout_s: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again later: too many machines boot at this moment."""

    delay_s: int
    reason: str


Action = Local | Kernel | Program | Menu | Wait


def after(step: Step, report: Report) -> Step:
    """Return the step of a node after a report; most reports change nothing."""
    return _AFTER.get((step, report), step)


def parse_assignment(text: str) -> Assignment:
    """Return what `install` or `custom:memtest` assigns; raises USAGE."""
    word, colon, profile = text.partition(":")
    try:
        step = Step(word)
    except ValueError:
        steps = ", ".join(step.value for step in Step)
        raise KaError(Code.USAGE, f"no step {word[:40]!r}: there are {steps}:PROFILE") from None
    if colon:
        profile = check_label(profile, "a profile's name")
    if (step is Step.CUSTOM) != bool(profile):
        wanted = "custom:PROFILE" if step is Step.CUSTOM else f"plain {step.value}"
        raise KaError(Code.USAGE, f"not a step: {text[:80]!r}; write {wanted}")
    return Assignment(step, profile)


def decide(
    inventory: Inventory, mac: str, node: Node | None, assignment: Assignment
) -> Local | Kernel | Program | Menu:
    """Return what a machine is to boot under an assignment; an empty MAC is any stranger's."""
    step = assignment.step
    if step is Step.LOCAL:
        return Local()
    if step is Step.MENU:
        return _menu(inventory, mac, node)
    name = assignment.profile if step is Step.CUSTOM else step.value
    profile = inventory.profiles.get(name)
    if profile is not None:
        return _boot(inventory, mac, node, profile)
    if step is Step.DISCOVER:
        who = node.name if node is not None else "not in the inventory"
        return Local(f"kaboot {inventory.site.address}: {mac} {who}", NOTICE_PAUSE_S)
    # `deployed` without a profile of its own, or a profile taken out of the file since it was
    # assigned: the disk is what can do no harm.
    return Local()


def _menu(inventory: Inventory, mac: str, node: Node | None) -> Menu:
    entries = [MenuEntry("local", "Boot from the disk", Local())]
    entries += [
        MenuEntry(profile.name, profile.title, _boot(inventory, mac, node, profile))
        for profile in inventory.profiles.values()
        if profile.menu
    ]
    title = f"kaboot: {node.name if node is not None else mac}"
    return Menu(title, tuple(entries), inventory.site.menu_timeout_s)


def _boot(inventory: Inventory, mac: str, node: Node | None, profile: Profile) -> Kernel | Program:
    if profile.program:
        return Program(profile.program)
    arguments = [*profile.arguments, *_nfsroot(inventory, node, profile)]
    arguments += node.arguments if node is not None else ()
    # Who the machine is and where it reports to: what an initramfs of ours needs, and no more.
    if mac:
        arguments.append(f"BOOTIF=01-{mac.replace(':', '-')}")
    if node is not None:
        arguments.append(f"ka.node={node.name}")
    arguments.append(f"ka.boot={inventory.site.url}")
    return Kernel(profile.kernel, profile.initrds, tuple(arguments))


def _nfsroot(inventory: Inventory, node: Node | None, profile: Profile) -> list[str]:
    """The arguments of a root on NFS; nodes take turns with the gateways, each always the same."""
    if not profile.nfsroot:
        return []
    names = list(inventory.nodes)
    turn = names.index(node.name) if node is not None else 0
    export = profile.nfsroot[turn % len(profile.nfsroot)]
    options = f",{profile.nfs_options}" if profile.nfs_options else ""
    return ["root=/dev/nfs", f"nfsroot={export}{options}", "ip=dhcp"]
