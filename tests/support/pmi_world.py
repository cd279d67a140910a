"""A little MPI launcher for tests: real processes, a tree of `karun.pmi` proxies, no network.

Node 0 is the root, node n's parent is (n - 1) // 2.  Messages between nodes are handed over at
once, in the order in which they come.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

from karun.agent.barrier import Gathering
from karun.pmi import (
    MISSED,
    Abort,
    Action,
    BarrierUp,
    Proxy,
    Reply,
    environment,
    process_mapping,
)

__all__ = ["Tree", "World", "run_world"]

DEADLINE_S = 60.0


class Tree:
    """Proxies, and what they have to say to each other."""

    def __init__(self, ranks_per_node: Sequence[int], kvs_name: str = "kvs_0") -> None:
        size = sum(ranks_per_node)
        count = len(ranks_per_node)
        self.node_of: dict[int, int] = {}
        self.replies: list[tuple[int, bytes]] = []
        self.aborts: list[Abort] = []
        self.messages = 0
        self._proxies: list[Proxy] = []
        self._gatherings = [Gathering() for _ in ranks_per_node]
        self._subtrees = [_bits(_subtree(node, ranks_per_node)) for node in range(count)]
        for node, ranks in enumerate(ranks_per_node):
            first = len(self.node_of)
            self.node_of |= dict.fromkeys(range(first, first + ranks), node)
            mapping = process_mapping(ranks_per_node)
            self._proxies.append(
                Proxy(kvs_name, size, range(first, first + ranks), mapping=mapping)
            )

    def receive(self, rank: int, data: bytes) -> None:
        node = self.node_of[rank]
        self._do(node, self._proxies[node].receive(rank, data))

    def closed(self, rank: int) -> None:
        node = self.node_of[rank]
        self._do(node, self._proxies[node].closed(rank))

    def exited(self, rank: int, code: int) -> None:
        node = self.node_of[rank]
        self._do(node, self._proxies[node].exited(rank, code))

    def _do(self, node: int, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Reply):
                self.replies.append((action.rank, action.data))
            elif isinstance(action, BarrierUp):
                self._gatherings[node].bring(1 << node, action.payload, action.left)
                self._climb(node)
            else:
                self.aborts.append(action)

    def _climb(self, node: int) -> None:
        """Pass on what is whole, from parent to parent, and down again from the root."""
        while self._gatherings[node].has(self._subtrees[node]):
            if node == 0:
                self._reached(self._gatherings[0])
                return
            news = self._gatherings[node].news(0)
            if news is None:
                return
            self.messages += 1
            node = (node - 1) // 2
            self._gatherings[node].take(news, len(self._gatherings))

    def _reached(self, root: Gathering) -> None:
        if not root.waits:
            return
        if root.left >= 0:
            self.aborts.append(Abort(root.left, 1, MISSED))
            return
        number, puts = root.number, root.puts
        for node, gathering in enumerate(self._gatherings):
            self.messages += node > 0
            gathering.passed(number)
            self._do(node, self._proxies[node].released(puts))


def _subtree(node: int, ranks_per_node: Sequence[int]) -> list[int]:
    """Return the nodes with ranks at or below a node."""
    if node >= len(ranks_per_node):
        return []
    below = [one for child in (1, 2) for one in _subtree(2 * node + child, ranks_per_node)]
    return ([node] if ranks_per_node[node] else []) + below


def _bits(nodes: Sequence[int]) -> int:
    return sum(1 << node for node in nodes)


@dataclass(slots=True)
class World:
    """How a run ended."""

    codes: list[int]
    output: list[bytes]
    aborts: list[Abort] = field(default_factory=list)


def run_world(argv: Sequence[str], ranks_per_node: Sequence[int]) -> World:
    """Run a program as all ranks; kill them when one of them aborts."""
    tree = Tree(ranks_per_node)
    size = sum(ranks_per_node)
    selector = selectors.DefaultSelector()
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = socket.socketpair()
        node = tree.node_of[rank]
        local = (rank - sum(ranks_per_node[:node]), ranks_per_node[node])
        processes.append(
            subprocess.Popen(
                argv,
                env=os.environ | environment(rank, size, theirs.fileno(), local),
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        theirs.close()
        ends.append(ours)
        selector.register(ours, selectors.EVENT_READ, rank)
    while selector.get_map() and not tree.aborts:
        events = selector.select(DEADLINE_S)
        assert events, "the ranks say nothing"
        for key, _ in events:
            data = ends[key.data].recv(65536)
            if data:
                tree.receive(key.data, data)
            else:
                selector.unregister(ends[key.data])
                tree.closed(key.data)
        for rank, reply in tree.replies:
            ends[rank].sendall(reply)
        tree.replies.clear()
    for process in processes if tree.aborts else []:
        process.kill()
    output = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    for end in ends:
        end.close()
    selector.close()
    return World([process.returncode for process in processes], output, tree.aborts)
