"""One site under control: its inventory and its store together, for commands and for kadeploy.

The server reads the same file and the same store, so a step set here is what the machine gets next,
whether a server runs or not.  Blocking.

Not here: serving (service.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import Code, KaError
from kaboot import inventory as inventory_file
from kaboot import naming
from kaboot.model import Assignment, Inventory, Node
from kaboot.steps import Action, decide, parse_assignment
from kaboot.store import Event, MachineRow, Store

__all__ = ["Control", "NodeStatus", "node_assignment", "store_path"]

STORE_NAME = "kaboot.db"


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node: what it is to boot, since when (ns; 0: by the inventory), its machine if seen."""

    node: Node
    assignment: Assignment
    since_ns: int
    seen: MachineRow | None


def store_path(inventory: Inventory) -> Path:
    return Path(inventory.site.state) / STORE_NAME


def node_assignment(store: Store, node: Node) -> Assignment:
    """Return what a node is to boot: as set, else as the inventory says."""
    return store.assignment(node.name) or Assignment(node.step, node.profile)


class Control:
    """Open with `Control.open`, close at the end; a context manager does."""

    def __init__(self, inventory: Inventory, store: Store) -> None:
        self._file = inventory
        self._store = store

    @classmethod
    def open(cls, path: Path) -> Control:
        """Read an inventory file and open its store; raises KaError."""
        inventory = inventory_file.load(path)
        state = Path(inventory.site.state)
        made = not store_path(inventory).exists()
        try:
            state.mkdir(mode=0o755, parents=True, exist_ok=True)
            # In this order: the first file that another command makes there is the store.
            strange = any(state.iterdir()) and not store_path(inventory).exists()
        except OSError as error:
            raise KaError(Code.USAGE, f"{state}: cannot make it: {error.strerror}") from None
        if strange:
            # The server will own it: not a directory that is somebody else's already.
            raise KaError(Code.USAGE, f"'state' {state} is neither empty nor kaboot's")
        control = cls(inventory, Store.open(store_path(inventory)))
        if made and os.geteuid() == 0:
            # The server, which gives up root, must be able to write what root made.
            owner = state.stat()
            os.chown(store_path(inventory), owner.st_uid, owner.st_gid)
        return control

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def inventory(self) -> Inventory:
        """The inventory with what was learned so far."""
        return self._file.with_learned(self._store.learned())

    def node(self, name: str) -> Node:
        """Return a node by name or MAC; raises USAGE."""
        inventory = self.inventory
        found = inventory.nodes.get(name) or inventory.by_mac.get(name.lower())
        if found is None:
            raise KaError(Code.USAGE, f"no node {name!r} in the inventory")
        return found

    def assign(self, names: Sequence[str], step: str, *, why: str = "set") -> Assignment:
        """Set the step of nodes (`install`, `custom:memtest`), all or none; raises USAGE."""
        assignment = parse_assignment(step)
        nodes = [self.node(name).name for name in names]
        if not nodes:
            raise KaError(Code.USAGE, "no nodes named")
        self._file.check(assignment, nodes[0])
        self._store.assign(nodes, assignment, time.time_ns(), why=why)
        return assignment

    def action(self, name: str) -> tuple[Assignment, Action]:
        """Return what a node is to boot, and what it is told."""
        node = self.node(name)
        assignment = node_assignment(self._store, node)
        mac = node.macs[0] if node.macs else "02:00:00:00:00:00"
        return assignment, decide(self.inventory, mac, node, assignment)

    def nodes(self) -> list[NodeStatus]:
        """Return all nodes in the inventory's order."""
        assignments = self._store.assignments()
        seen: dict[str, MachineRow] = {}
        inventory = self.inventory
        for row in self._store.machines():
            owner = inventory.by_mac.get(row.machine.mac)
            if owner is not None:
                last = seen.get(owner.name)
                if last is None or last.last_ns < row.last_ns:
                    seen[owner.name] = row
        return [
            NodeStatus(
                node,
                *assignments.get(node.name, (Assignment(node.step, node.profile), 0)),
                seen.get(node.name),
            )
            for node in inventory.nodes.values()
        ]

    def unknown(self) -> list[MachineRow]:
        """Return machines that asked for a boot and are not in the inventory."""
        known = self.inventory.by_mac
        return [row for row in self._store.machines() if row.machine.mac not in known]

    def events(self, *, after: int = 0, node: str = "", count: int = 1000) -> list[Event]:
        """Return events, oldest first, all with an id above `after` or the last `count`."""
        return self._store.events(after=after, node=node, count=count)

    # ------------------------------------------------------------ learning

    def start_learning(self, names: Sequence[str]) -> None:
        """Give these names to unknown machines in the order they appear; raises USAGE."""
        naming.check_queue(self.inventory, names)
        self._store.set_queue(names)

    def stop_learning(self) -> None:
        self._store.set_queue([])

    def learning(self) -> list[str]:
        """Return the names still to be given out."""
        return self._store.queue()

    def learn_seen(self, names: Sequence[str]) -> dict[str, str]:
        """Give names to unknown machines already seen, oldest first; return name to MAC."""
        naming.check_queue(self.inventory, names)
        given: dict[str, str] = {}
        for name, row in zip(names, self.unknown(), strict=False):
            mac = row.machine.mac
            if self._store.learn(mac, name, time.time_ns(), why="in order of appearance"):
                given[name] = mac
        return given

    def forget(self, names: Sequence[str]) -> list[str]:
        """Undo learning by node name or MAC; return the MACs forgotten."""
        return self._store.forget([name.lower() for name in names])
