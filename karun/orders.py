"""Orders to nodes: what a command is, who has not ended it, who is told.  Pure.

Commands, copies and gathers are given to `Orders`, whatever is behind it: the engine of a run
(karun/engine.py), or a session that others share (karun/joined.py).

Invariant: for every node of a command one of `exited` and `failed` is told, once, and after it
nothing more of that node.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from karun.agent import frames
from karun.feed import Feed

__all__ = ["TIMEOUT", "Command", "Commands", "Invocation", "Orders", "Sink"]

TIMEOUT = "timeout"
FIELD_COUNT = 5


class Sink(Protocol):
    """Who is told what the nodes do.  Ranks count from 0, in the order of the nodes."""

    def output(self, rank: int, stream: int, data: bytes) -> None:
        """Bytes that a command wrote to standard output (1) or error (2)."""

    def exited(self, rank: int, code: int, signal: int) -> None:
        """A command has ended: its exit code, or the signal that ended it."""

    def failed(self, rank: int, stage: str, reason: str) -> None:
        """A node is out (stage connect, agent, lost), or its command was out of time (timeout)."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """What is run, and how."""

    argv: Sequence[str]
    line: bool = False
    """Whether the only word is a line for the node's shell."""
    pty: bool = False
    fed: bool = False
    """Whether standard input comes."""
    task: bool = False
    """Whether the words are those of a task of the agent's own (karun/agent/task.py)."""
    sudo: bool = False
    """As root, by `sudo -n`, where the agent is not."""
    cwd: str = ""
    env: Sequence[str] = ()
    """NAME=VALUE."""
    limit_s: float = 0.0
    """0: none."""
    place: tuple[int, int] | None = None
    """As a rank of an MPI program: its world, and which one of its node.  Of a run only."""

    def fields(self) -> tuple[bytes | str | int, ...]:
        """Return it, but for its place, as the fields of a message."""
        asked = {"s": self.line, "p": self.pty, "i": self.fed, "t": self.task, "r": self.sudo}
        flags = "".join(flag for flag, is_asked in asked.items() if is_asked)
        argv, env = frames.pack(*self.argv), frames.pack(*self.env)
        return flags, int(self.limit_s * 1000), self.cwd, argv, env

    @staticmethod
    def of(fields: Sequence[bytes]) -> Invocation:
        """Return what such fields say; raises FrameError."""
        if len(fields) != FIELD_COUNT:
            raise frames.FrameError("not a command")
        flags, limit_ms, cwd, argv, env = fields
        return Invocation(
            [frames.text(word) for word in frames.unpack(argv)],
            line=b"s" in flags, pty=b"p" in flags, fed=b"i" in flags, task=b"t" in flags,
            sudo=b"r" in flags, cwd=frames.text(cwd),
            env=[frames.text(setting) for setting in frames.unpack(env)],
            limit_s=frames.number(limit_ms) / 1000,
        )  # fmt: skip


class Command:
    """A command on its way: who has not ended yet."""

    def __init__(
        self,
        number: int,
        ranks: Iterable[int],
        sink: Sink,
        feed: Feed | None,
        limit_s: float,
        audience: Collection[int] | None = None,
    ) -> None:
        self.number = number
        self.audience = audience
        """Who is told what is ordered of it; None: all nodes of the run."""
        self.limit_s = limit_s
        self.sink = sink
        self.pending = set(ranks)
        self.feed = feed
        self.done: Callable[[], None] = _nothing


class Orders(Protocol):
    """Who takes commands, and tells their sinks."""

    @property
    def closed(self) -> bool:
        """Whether nothing can be ordered any more."""

    def command(
        self, invocation: Invocation, sink: Sink, *, ranks: Sequence[int] | None = None
    ) -> Command:
        """Order a command on all nodes, or on these; nodes that are out are told to the sink."""

    def feed(self, command: Command, data: bytes) -> None:
        """Send standard input to all; see `Feed.room` for when."""

    def end_input(self, command: Command) -> None:
        """Let standard input end."""

    def signal(self, command: Command, number: int) -> None:
        """Send a signal to the command's processes on all nodes."""

    def abandon(self, command: Command) -> None:
        """Kill a command everywhere, and hear no more of it."""


class Commands:
    """The commands that have not ended on all their nodes."""

    def __init__(self) -> None:
        self._all: dict[int, Command] = {}

    def add(self, command: Command) -> None:
        self._all[command.number] = command

    def drop(self, command: Command) -> None:
        self._all.pop(command.number, None)

    def find(self, number: int, rank: int | None = None) -> Command | None:
        """Return a command, if it has not ended on this node."""
        command = self._all.get(number)
        has_ended = command is not None and rank is not None and rank not in command.pending
        return None if has_ended else command

    def on(self, rank: int) -> list[Command]:
        """Return the commands that this node has not ended."""
        return [command for command in self._all.values() if rank in command.pending]

    def exited(self, command: Command, rank: int, code: int, signal: int) -> None:
        command.sink.exited(rank, code, signal)
        self._settled(command, rank)

    def failed(self, command: Command, rank: int, stage: str, reason: str) -> None:
        command.sink.failed(rank, stage, reason)
        self._settled(command, rank)

    def _settled(self, command: Command, rank: int) -> None:
        command.pending.discard(rank)
        if command.feed is not None:
            command.feed.gone(rank)
        if not command.pending and command.number in self._all:
            del self._all[command.number]
            command.done()


def _nothing() -> None:
    pass
