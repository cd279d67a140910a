"""A little MPI launcher for tests: real processes, a tree of `karun.pmi` proxies, no network.

Each node of the world is a proxy; node 0 is the root, node n's parent is (n - 1) // 2.  Messages
between proxies are handed over at once, in the order in which they come.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from karun.pmi import (
    Abort,
    Action,
    BarrierDown,
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
        self._proxies = []
        for node, ranks in enumerate(ranks_per_node):
            first = len(self.node_of)
            self.node_of |= dict.fromkeys(range(first, first + ranks), node)
            children = [child for child in (2 * node + 1, 2 * node + 2) if child < count]
            proxy = Proxy(
                kvs_name,
                size,
                range(first, first + ranks),
                children,
                is_root=node == 0,
                mapping=process_mapping(ranks_per_node),
            )
            self._proxies.append((proxy, children))

    def receive(self, rank: int, data: bytes) -> None:
        node = self.node_of[rank]
        self._do(node, self._proxies[node][0].receive(rank, data))

    def closed(self, rank: int) -> None:
        node = self.node_of[rank]
        self._do(node, self._proxies[node][0].closed(rank))

    def _do(self, node: int, actions: list[Action]) -> None:
        queue = deque((node, action) for action in actions)
        while queue:
            here, action = queue.popleft()
            if isinstance(action, Reply):
                self.replies.append((action.rank, action.data))
            elif isinstance(action, Abort):
                self.aborts.append(action)
            elif isinstance(action, BarrierUp):
                self.messages += 1
                parent = (here - 1) // 2
                found = self._proxies[parent][0].from_child(here, action.payload)
                queue.extend((parent, one) for one in found)
            else:
                assert isinstance(action, BarrierDown)
                for child in self._proxies[here][1]:
                    self.messages += 1
                    found = self._proxies[child][0].from_parent(action.payload)
                    queue.extend((child, one) for one in found)


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
