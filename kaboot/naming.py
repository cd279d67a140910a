"""Naming: which node an unknown machine is.

Pure.  Two ways, in this order:
  * its serial number stands in the inventory, at a node without a MAC (mainboards get replaced:
    a node that has a MAC already is not renamed by a serial anybody could claim);
  * somebody is walking through the room, switching machines on in the order of a list
    (`kaboot learn`): the next free name is its name.

Not here: remembering it (store.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import Code, KaError
from kaboot.model import Inventory, Machine

__all__ = ["check_queue", "name_for"]


def name_for(inventory: Inventory, machine: Machine, queue: Sequence[str]) -> str | None:
    """Return the name of an unknown machine, if one is known; `inventory` has what was learned."""
    if machine.mac in inventory.by_mac:
        return None
    if machine.serial:
        for node in inventory.nodes.values():
            if node.serial == machine.serial and not node.macs:
                return node.name
    for name in queue:
        waiting = inventory.nodes.get(name)
        if waiting is not None and not waiting.macs:
            return name
    return None


def check_queue(inventory: Inventory, names: Sequence[str]) -> None:
    """Raise USAGE if names cannot be given out."""
    if not names:
        raise KaError(Code.USAGE, "no names to give out")
    for name in names:
        node = inventory.nodes.get(name)
        if node is None:
            raise KaError(
                Code.USAGE, f"no node {name!r} in the inventory; add it, or a group of it"
            )
        if node.macs:
            raise KaError(
                Code.USAGE,
                f"{name} has its MAC already, {node.macs[0]}; `kaboot forget` undoes learning",
            )
