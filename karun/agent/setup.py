"""What a parent tells an agent first: who it is, in which run, and the way back.  Pure.

Also the connectors: from their description to the command that reaches a node.  A connector is
`argv` with `%h` for the node, and how the remote words are given to it: as words or as
one line that a shell on the node reads (`lined`).
"""

from __future__ import annotations

from . import frames

VERSION = 1
AUTO, ALWAYS, NEVER = "auto", "always", "never"
"""Whether nodes call nodes: as it turns out, by order, not at all."""
QUEUED_S = 60.0
"""How much longer than `reattach_s` who comes back may take while the head has no time for it."""
OTHER_PYTHONS = "python3.13 python3.12 python3.11 python3.10 python3.14 python3"


class Setup:
    """The facts of a run as one node has them."""

    __slots__ = (
        "ancestors", "name", "parent", "ping_s", "rank", "reattach_s", "run_id", "size", "token",
    )  # fmt: skip

    def __init__(
        self,
        run_id: str,
        token: bytes,
        rank: int,
        name: str,
        size: int,
        parent: int,
        ancestors: list[tuple[str, int]],
        ping_s: float,
        reattach_s: float,
    ) -> None:
        self.run_id, self.token = run_id, token
        self.rank, self.name, self.size, self.parent = rank, name, size, parent
        self.ancestors = ancestors
        """Host and port, the parent first, the head last; an empty host is where the connector
        came from."""
        self.ping_s = ping_s
        self.reattach_s = reattach_s

    def encode(self) -> bytes:
        where = [field for host, port in self.ancestors for field in (host, port)]
        return frames.pack(
            VERSION, self.run_id, self.token, self.rank, self.name, self.size, self.parent,
            frames.pack(*where), int(self.ping_s * 1000), int(self.reattach_s * 1000),
        )  # fmt: skip

    @classmethod
    def decode(cls, payload: bytes) -> Setup:
        """Raises FrameError."""
        fields = frames.unpack(payload)
        if frames.number(fields[0]) != VERSION or len(fields) != 10:
            raise frames.FrameError("the head speaks another version")
        where = frames.unpack(fields[7])
        return cls(
            frames.text(fields[1]), fields[2], frames.number(fields[3]), frames.text(fields[4]),
            frames.number(fields[5]), frames.number(fields[6]),
            [
                (frames.text(host), frames.number(port))
                for host, port in zip(where[::2], where[1::2], strict=True)
            ],
            frames.number(fields[8]) / 1000, frames.number(fields[9]) / 1000,
        )  # fmt: skip


class Dialling:
    """How nodes are called: connector, archive, deadlines; the same for the head and relays."""

    __slots__ = ("argv", "connect_s", "digest", "lined", "loader", "python", "tree", "window")

    def __init__(
        self,
        argv: list[str],
        *,
        lined: bool,
        python: str,
        loader: str,
        digest: str,
        connect_s: float,
        window: int,
        tree: str,
    ) -> None:
        self.argv = argv
        """The connector; `%h` becomes the node's name, `%%` a percent sign."""
        self.lined = lined
        """Whether the remote words end up on one line for a shell."""
        self.python, self.loader, self.digest = python, loader, digest
        self.connect_s = connect_s
        self.window = window
        """Calls at a time."""
        self.tree = tree

    @property
    def is_proved(self) -> bool:
        """Whether it is known that nodes can call nodes, or that they cannot."""
        return self.tree != AUTO

    def command(self, node: str, *, search: bool) -> list[str]:
        """Return the words that start the agent on *node*; *search*: by any Python's name."""
        argv = [_filled(word, node) for word in self.argv]
        if not self.lined:
            return [*argv, self.python, "-I", "-S", "-c", self.loader]
        # No quote, blank, dollar or newline inside: any shell reads this alike.
        if not search:
            return [*argv, f"exec {self.python} -I -S -c '{self.loader}'"]
        # Tried, not just looked for: a shim is there even if what it stands for is not.
        probe = "import sys; sys.exit(sys.version_info < (3, 10))"
        line = (
            f'for p in {OTHER_PYTHONS}; do $p -I -S -c "{probe}" </dev/null 2>/dev/null && '
            'exec $p -I -S -c "$0"; done; echo KARUN1 none'
        )
        return [*argv, f"exec sh -c '{line}' '{self.loader}'"]

    def encode(self) -> bytes:
        return frames.pack(
            frames.pack(*self.argv), int(self.lined), self.python, self.loader, self.digest,
            int(self.connect_s * 1000), self.window, self.tree,
        )  # fmt: skip

    @classmethod
    def decode(cls, payload: bytes) -> Dialling:
        argv, lined, python, loader, digest, connect_ms, window, tree = frames.unpack(payload)
        return cls(
            [frames.text(word) for word in frames.unpack(argv)],
            lined=lined == b"1",
            python=frames.text(python),
            loader=frames.text(loader),
            digest=frames.text(digest),
            connect_s=frames.number(connect_ms) / 1000,
            window=frames.number(window),
            tree=frames.text(tree),
        )


def _filled(word: str, node: str) -> str:
    return "%".join(part.replace("%h", node) for part in word.split("%%"))
