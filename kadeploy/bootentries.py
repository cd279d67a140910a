"""How a deployed disk starts: GRUB's configuration, and the firmware's boot entries.

Pure; needs nothing but Python, for the node's program uses it too.

A dual boot is a choice of the firmware's: each system has an entry of its own, and `BootNext` picks
one for the next start.  GRUB never chain-loads Windows: under Secure Boot, shim 16 and Windows do
not go together that way.

Not here: running any of it (node/boot.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "EfiEntry",
    "boot_order",
    "create_entry_words",
    "default_grub",
    "delete_entry_words",
    "entries_named",
    "grub_config",
    "grub_install_words",
    "next_entry_words",
    "order_words",
    "parse_entries",
]

GRUB_EFI_PATH = "\\EFI\\{name}\\grubx64.efi"
_ENTRY = re.compile(r"Boot([0-9A-F]{4})(\*?) ([^\t]*)(?:\t.*)?")


def grub_config(
    *, root: str, holder: str, kernel: str, initrd: str, arguments: str, title: str
) -> str:
    """Return grub.cfg.

    *root*, *holder*: UUIDs of the root file system and of the one that holds the kernel, in which
    *kernel* and *initrd* are paths.
    """
    lines = [
        "# Written by kadeploy.",
        "set timeout=3",
        "set default=0",
        "serial --unit=0 --speed=115200",
        "terminal_input console serial",
        "terminal_output console serial",
        f"search --no-floppy --fs-uuid --set=root {holder}",
        f"menuentry '{title}' {{",
        f"  linux {kernel} root=UUID={root} ro {arguments}".rstrip(),
    ]
    if initrd:
        lines.append(f"  initrd {initrd}")
    return "\n".join([*lines, "}", ""])


def default_grub(arguments: str) -> str:
    """Return /etc/default/grub.d/kadeploy.cfg: a later `update-grub` keeps the arguments."""
    return f'# Written by kadeploy.\nGRUB_CMDLINE_LINUX="{arguments}"\n'


def grub_install_words(firmware: str, *, root: str, esp: str, disk: str, name: str) -> list[str]:
    """Return the `grub-install` command; *root*, *esp*: where those are mounted."""
    if firmware == "bios":
        return [
            "grub-install",
            "--target=i386-pc",
            f"--boot-directory={root}/boot",
            "--recheck",
            disk,
        ]
    return [
        "grub-install",
        "--target=x86_64-efi",
        f"--boot-directory={root}/boot",
        f"--efi-directory={esp}",
        f"--bootloader-id={name}",
        "--no-nvram",  # entries are made here, by name, so that a second run makes no second one
        "--recheck",
    ]


@dataclass(frozen=True, slots=True)
class EfiEntry:
    number: str
    """Four hex digits."""
    active: bool
    label: str


def parse_entries(text: str) -> list[EfiEntry]:
    """Return the boot entries in what `efibootmgr` prints."""
    found = (_ENTRY.fullmatch(line) for line in text.splitlines())
    return [EfiEntry(one[1], bool(one[2]), one[3].strip()) for one in found if one is not None]


def entries_named(entries: Sequence[EfiEntry], label: str) -> list[EfiEntry]:
    return [entry for entry in entries if entry.label == label]


def create_entry_words(*, disk: str, esp_number: int, label: str, path: str) -> list[str]:
    """Return the command that adds an entry; where in the order is `order_words`' matter."""
    return [
        "efibootmgr",
        "--create-only",
        "--disk",
        disk,
        "--part",
        str(esp_number),
        "--label",
        label,
        "--loader",
        path,
    ]


def delete_entry_words(number: str) -> list[str]:
    return ["efibootmgr", "--bootnum", number, "--delete-bootnum"]


def boot_order(text: str, new: str) -> list[str]:
    """Return the order with an entry right behind the one that this machine was started by.

    So a machine that asks the network first goes on doing so, and the disk comes next.
    """
    order = re.search(r"^BootOrder: ([0-9A-F,]+)$", text, re.MULTILINE)
    current = re.search(r"^BootCurrent: ([0-9A-F]{4})$", text, re.MULTILINE)
    rest = [one for one in (order[1].split(",") if order else []) if one != new]
    at = rest.index(current[1]) + 1 if current and current[1] in rest else 0
    return [*rest[:at], new, *rest[at:]]


def order_words(order: Sequence[str]) -> list[str]:
    return ["efibootmgr", "--bootorder", ",".join(order)]


def next_entry_words(number: str) -> list[str]:
    """Return the command that boots an entry once, at the next start."""
    return ["efibootmgr", "--bootnext", number]
