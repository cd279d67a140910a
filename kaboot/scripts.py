"""What a machine is told, as a script for iPXE or for GRUB.

Pure: an action in, a text out.  Which of the two a machine gets depends on the program that asks.
iPXE fetches by HTTP.  The GRUB that Debian signs for network boot speaks TFTP only, and under
Secure Boot takes no module that would add to it: its files come from dnsmasq.

Invariants
  * every word in a script has passed words.py; comments and notices are checked here once more;
  * a script never ends in a prompt: what cannot be loaded is tried again, what cannot be booted
    from the disk goes back to the firmware, which tries its next boot entry;
  * a script holds no secret: words.py refuses them in arguments, and there are no others.

Local boot.  BIOS: iPXE's `sanboot` starts the first disk, and if there is none, the firmware goes
on.  UEFI: iPXE ends with an error, which makes the firmware try its next entry; ending with
success would stop some firmwares in their menu.  GRUB starts the Linux boot loader it finds on
the disk.  It never starts Windows' one, which may hang behind shim: a disk with Windows alone is
left to the firmware's next entry.

Not here: choosing the action (steps.py).
"""

from __future__ import annotations

from collections.abc import Callable

from kaboot.model import Inventory
from kaboot.steps import Action, Kernel, Local, Menu, Program, Wait
from kaboot.words import grub_quoted, printable, url_path

__all__ = ["UNKNOWN_GRUB", "entry_grub", "entry_ipxe", "to_grub", "to_ipxe"]

RETRY_S = 10
NOTICE_SIZE_MAX = 120

UNKNOWN_GRUB = "unknown.cfg"
"""What GRUB reads on a machine that has no configuration of its own."""

_LINUX_LOADERS = (
    "/EFI/debian/shimx64.efi",
    "/EFI/debian/grubx64.efi",
    "/EFI/ubuntu/shimx64.efi",
    "/EFI/fedora/shimx64.efi",
    "/EFI/opensuse/shim.efi",
    "/EFI/debian/shimaa64.efi",
    "/EFI/debian/grubaa64.efi",
)
_FALLBACK_LOADERS = ("/EFI/BOOT/BOOTX64.EFI", "/EFI/BOOT/BOOTAA64.EFI")
_WINDOWS_LOADER = "/EFI/Microsoft/Boot/bootmgfw.efi"


# ---------------------------------------------------------------- iPXE


def entry_ipxe(inventory: Inventory) -> str:
    """Return the script every iPXE gets first: it says who it is and asks for its own."""
    facts = "&".join(
        (
            "platform=${platform}",
            "arch=${buildarch}",
            "serial=${serial:uristring}",
            "product=${product:uristring}",
        )
    )
    return _ipxe_text(
        "first script, the same for all machines",
        [
            ":again",
            f"chain --replace {inventory.site.url}/ipxe/${{netX/mac:hexhyp}}?{facts} ||",
            f"echo kaboot does not answer, again in {RETRY_S} s",
            f"sleep {RETRY_S}",
            "goto again",
        ],
    )


def to_ipxe(inventory: Inventory, comment: str, action: Action) -> str:
    """Return the iPXE script of one machine."""
    lines = _IPXE[type(action)](inventory, action)
    return _ipxe_text(
        comment,
        [
            *lines,
            ":failed",
            f"echo kaboot: this did not load, again in {RETRY_S} s",
            f"sleep {RETRY_S}",
            f"chain --replace {inventory.site.url}/boot.ipxe || goto failed",
        ],
    )


def _ipxe_text(comment: str, lines: list[str]) -> str:
    return "\n".join(["#!ipxe", f"# kaboot: {_safe(comment)}", *lines, ""])


def _ipxe_local(inventory: Inventory, action: Local) -> list[str]:
    lines = [f"echo {_safe(action.notice)}"] if action.notice else []
    if action.pause_s:
        lines.append(f"sleep {action.pause_s}")
    return [
        *lines,
        "iseq ${platform} efi && exit 1 ||",
        "sanboot --no-describe --drive 0x80 || exit 0",
    ]


def _ipxe_kernel(inventory: Inventory, action: Kernel) -> list[str]:
    files = f"{inventory.site.url}/files"
    # The kernel's EFI stub finds an initrd by the name on the command line; iPXE for BIOS does
    # not mind.
    named = [(f"initrd{index}", path) for index, path in enumerate(action.initrds)]
    arguments = " ".join([*(f"initrd={name}" for name, _ in named), *action.arguments])
    return [
        f"kernel --name linux {files}/{url_path(action.kernel)} {arguments} || goto failed",
        *(f"initrd --name {name} {files}/{url_path(path)} || goto failed" for name, path in named),
        "boot || goto failed",
    ]


def _ipxe_program(inventory: Inventory, action: Program) -> list[str]:
    return [f"chain {inventory.site.url}/files/{url_path(action.path)} || goto failed", "exit 0"]


def _ipxe_menu(inventory: Inventory, action: Menu) -> list[str]:
    lines = [f"menu {_safe(action.title)}"]
    lines += [f"item entry-{entry.key} {_safe(entry.title)}" for entry in action.entries]
    first = f"entry-{action.entries[0].key}"
    lines.append(
        f"choose --timeout {action.timeout_s * 1000} --default {first} target"
        f" && goto ${{target}} || goto {first}"
    )
    for entry in action.entries:
        lines.append(f":entry-{entry.key}")
        lines += _IPXE[type(entry.action)](inventory, entry.action)
    return lines


def _ipxe_wait(inventory: Inventory, action: Wait) -> list[str]:
    return [
        f"echo kaboot: {_safe(action.reason)}, again in {action.delay_s} s",
        f"sleep {action.delay_s}",
        f"chain --replace {inventory.site.url}/boot.ipxe || goto failed",
    ]


_IPXE: dict[type, Callable[..., list[str]]] = {
    Local: _ipxe_local,
    Kernel: _ipxe_kernel,
    Program: _ipxe_program,
    Menu: _ipxe_menu,
    Wait: _ipxe_wait,
}


# ---------------------------------------------------------------- GRUB


def entry_grub(inventory: Inventory) -> str:
    """Return the configuration every network GRUB reads first: it asks for its machine's own.

    `configfile` runs the other one in a context of its own, in which menus work.
    """
    node = f"{_grub_device(inventory)}/grub/node"
    return _grub_text(
        "first configuration, the same for all machines",
        [
            "set timeout=0",
            'echo "kaboot: this machine is $net_default_mac"',
            "while true; do",
            f'  if [ -s "{node}/$net_default_mac.cfg" ]; then',
            f'    configfile "{node}/$net_default_mac.cfg"',
            "  else",
            f'    configfile "{node}/{UNKNOWN_GRUB}"',
            "  fi",
            f"  echo 'kaboot: this did not boot, again in {RETRY_S} s'",
            f"  sleep {RETRY_S}",
            "done",
        ],
    )


def to_grub(inventory: Inventory, comment: str, action: Action) -> str:
    """Return the GRUB configuration of one machine."""
    return _grub_text(comment, _GRUB[type(action)](inventory, action))


def _grub_text(comment: str, lines: list[str]) -> str:
    return "\n".join([f"# kaboot: {_safe(comment)}", *lines, ""])


def _grub_device(inventory: Inventory) -> str:
    return f"(tftp,{inventory.site.address})"


def _grub_local(inventory: Inventory, action: Local) -> list[str]:
    lines = [f"echo {grub_quoted(_safe(action.notice))}"] if action.notice else []
    if action.pause_s:
        lines.append(f"sleep {action.pause_s}")
    linux, fallback = " ".join(_LINUX_LOADERS), " ".join(_FALLBACK_LOADERS)
    return [
        *lines,
        'if [ "$grub_platform" = pc ]; then',
        "  set root=(hd0)",
        "  chainloader +1",
        "  boot",
        "fi",
        f"for loader in {linux}; do",
        *_grub_chain(),
        "done",
        f"if search --no-floppy --file --set=disk {_WINDOWS_LOADER}; then exit 1; fi",
        f"for loader in {fallback}; do",
        *_grub_chain(),
        "done",
        "exit 1",
    ]


def _grub_chain() -> list[str]:
    return [
        "  if search --no-floppy --file --set=disk $loader; then",
        "    set root=$disk",
        "    if chainloader $loader; then boot; fi",
        "  fi",
    ]


def _grub_kernel(inventory: Inventory, action: Kernel) -> list[str]:
    files = f"{_grub_device(inventory)}/files"
    arguments = " ".join(grub_quoted(word) for word in action.arguments)
    initrds = " ".join(grub_quoted(f"{files}/{url_path(path)}") for path in action.initrds)
    load = f"linux {grub_quoted(f'{files}/{url_path(action.kernel)}')} {arguments}"
    if not initrds:
        return [f"if {load}; then boot; fi"]
    return [f"if {load}; then", f"  if initrd {initrds}; then boot; fi", "fi"]


def _grub_program(inventory: Inventory, action: Program) -> list[str]:
    path = grub_quoted(f"{_grub_device(inventory)}/files/{url_path(action.path)}")
    return [f"if chainloader {path}; then boot; fi"]


def _grub_menu(inventory: Inventory, action: Menu) -> list[str]:
    lines = [
        f"echo {grub_quoted(_safe(action.title))}",
        f"set timeout={action.timeout_s}",
        "set default=0",
    ]
    for entry in action.entries:
        lines.append(f"menuentry {grub_quoted(_safe(entry.title))} --id {entry.key} {{")
        lines += [f"  {line}" for line in _GRUB[type(entry.action)](inventory, entry.action)]
        lines.append("}")
    return lines


def _grub_wait(inventory: Inventory, action: Wait) -> list[str]:
    # The end of the file is the way back to the loop of the first configuration.
    return [
        f"echo {grub_quoted(f'kaboot: {_safe(action.reason)}, again in {action.delay_s} s')}",
        f"sleep {action.delay_s}",
    ]


_GRUB: dict[type, Callable[..., list[str]]] = {
    Local: _grub_local,
    Kernel: _grub_kernel,
    Program: _grub_program,
    Menu: _grub_menu,
    Wait: _grub_wait,
}


def _safe(text: str) -> str:
    """Text for people to read, of which neither program takes anything for its own language."""
    plain = printable(text, NOTICE_SIZE_MAX)
    return "".join("?" if c in "$'\"\\`{}#|&;" else c for c in plain)
