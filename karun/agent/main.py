"""The agent: one node of a run.  Runs commands, passes frames on, calls further nodes.

Concurrency: one thread, one loop; every method runs to its end before the next begins.

Invariants
  * what the head is told goes through `Member`, so it is told exactly once;
  * without a way to the head for `reattach_s` (and QUEUED_S more if it just has no time), every
    command here and every agent below is ended;
  * after QUIT nothing of the run is left on this node.
"""

from __future__ import annotations

import os
import sys
from _functools import partial  # type: ignore[import-not-found]

from . import frames
from .channel import SILENCE_PINGS, Channel
from .keeper import Keeper
from .loop import Loop, boot_id
from .member import Member
from .process import SIGKILL, Process
from .setup import QUEUED_S, Dialling, Setup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .hub import Hub
    from .loop import Timer
    from .rejoin import Dial, Rejoin
    from .world import Worlds

SETUP_S = 60.0
QUIT_S = 2.0
NEAR_S = 1.0
"""How often it is asked whether the head is there and has no time."""
HELD_SIZE_MAX = 1 << 20
"""Of the way up: beyond it children are not read."""
SILENT = "no answer"


def main() -> None:
    """Serve the parent on standard input and output until the run is over."""
    null = os.open("/dev/null", os.O_RDWR)
    read_fd, write_fd = os.dup(0), os.dup(1)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)
    try:
        os.setsid()  # a terminal's hangup is not for us: the parent ends us, or nobody
    except OSError:
        pass
    agent = Agent(read_fd, write_fd)
    while True:
        agent.loop.step(agent.loop.timeout())


class Agent:
    """This node."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.loop = Loop()
        self._up: Channel | None = Channel(self.loop, read_fd, write_fd)
        self._setup: Setup | None = None
        self._member = Member(0, os.urandom(8))
        self._hub: Hub | None = None
        self._keeper = Keeper(self.loop)
        self._processes: dict[int, Process] = {}
        self._env: dict[str, str] = {}
        """Of commands; they add to it."""
        self._worlds: Worlds | None = None
        self._rejoin: Rejoin | None = None
        self._move: Dial | None = None
        """Asks the parent for a connection of this node's own, while there is a way."""
        self._former: Channel | None = None
        """The way up from before the move, until the head knows of the new one."""
        self._patience: Timer | None = None
        """Runs out when the way back has been looked for long enough."""
        self._ending = False
        self._next_tick = 0.0
        self.loop.at(SETUP_S, self._never_set_up)
        self._up.start(self._from_above, self._parent_lost)

    def _never_set_up(self) -> None:
        if self._setup is None:
            os._exit(1)

    def _begin(self, payload: bytes) -> None:
        self._setup = setup = Setup.decode(payload)
        host, port = setup.ancestors[0]
        origin = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
        setup.ancestors[0] = (host or origin or "127.0.0.1", port)
        self._member.rank = setup.rank
        self._env = {
            **os.environ,
            "KARUN_RANK": str(setup.rank),
            "KARUN_SIZE": str(setup.size),
            "KARUN_NODE": setup.name,
        }
        self._next_tick = self.loop.now + setup.ping_s
        self.loop.at(setup.ping_s, self._tick)
        self._attach()

    # Up.

    def _attach(self) -> None:
        assert self._setup is not None
        assert self._up is not None
        introduction = self._member.attach(
            self._setup.parent, boot_id(), direct=self._up.is_direct
        )
        self._up.send(frames.ATTACH, self._setup.rank, introduction)
        if self._worlds is not None:
            self._worlds.again()

    def _tell(self, kind: int, *parts: bytes | str | int) -> None:
        payload = self._member.event(kind, *parts)
        if payload is not None:
            self._send_up(frames.EVENT, self._member.rank, payload)
        self._pace()

    def _pace(self) -> None:
        """Read no more output than the head has taken, or go on."""
        for process in list(self._processes.values()):
            process.pause(self._member.full)

    def _send_up(self, kind: int, rank: int, payload: bytes) -> None:
        if self._up is None:
            return  # whoever told it keeps it, and tells it again when asked to attach
        self._up.send(kind, rank, payload)
        if self._up is not None and self._up.held_size > HELD_SIZE_MAX and self._hub is not None:
            self._up.drained = self._drained
            self._hub.pause(True)

    def _from_below(self, kind: int, rank: int, payload: bytes) -> None:
        if kind == frames.BARRIER:
            self._world().take(payload)
        else:
            self._send_up(kind, rank, payload)

    def _drained(self) -> None:
        assert self._hub is not None
        assert self._up is not None
        self._up.drained = None
        self._hub.pause(False)

    def _child_lost(self, rank: int, introduction: int, reason: str) -> None:
        self._tell(frames.LOST, rank, introduction, reason)

    def _call_failed(self, rank: int, reason: str, words: bytes, status: int) -> None:
        self._tell(frames.FAILED, rank, reason, words, status)

    def _tell_parent(self, kind: int, payload: bytes) -> None:
        if self._up is not None:
            self._up.send(kind, self._member.rank, payload)

    # The way up is lost, and found.

    def _tick(self) -> None:
        assert self._setup is not None
        ping_s = self._setup.ping_s
        up, now = self._up, self.loop.now
        if up is not None:
            if now - self._next_tick > ping_s:
                up.heard = now  # we slept; the parent may have spoken
            elif now - up.heard > SILENCE_PINGS * ping_s:
                up.close(SILENT)
            elif now - up.sent >= ping_s:
                up.send(frames.PING, 0)
        self._next_tick = now + ping_s
        self.loop.at(ping_s, self._tick)

    def _parent_lost(self, channel: Channel, reason: str) -> None:
        if channel is self._former:
            self._former = None
            return
        self._leave_former()
        if self._move is not None:
            self._move.stop()
            self._move = None
        self._up = None
        if self._setup is None or self._ending:
            os._exit(0)
        if self._hub is not None:
            self._hub.pause(False)
        self._member.joined = False
        from .rejoin import Rejoin

        many = len(self._setup.ancestors) > 1
        self._rejoin = Rejoin(
            self.loop, self._setup, 1 if many and reason == SILENT else 0, self._parent_found
        )
        self._patience = self.loop.at(self._setup.reattach_s, lambda: self._no_way(QUEUED_S))

    def _no_way(self, left_s: float) -> None:
        """The way back has been looked for long enough, unless this node stands in a queue."""
        if self._rejoin is None or not self._rejoin.is_near or left_s <= 0:
            self._quit()
        else:
            self._patience = self.loop.at(NEAR_S, lambda: self._no_way(left_s - NEAR_S))

    def _parent_found(self, channel: Channel, rank: int, index: int) -> None:
        assert self._setup is not None
        self._rejoin = None
        if self._patience is not None:
            self._patience.cancel()
        self._up = channel
        channel.frame, channel.closed = self._from_above, self._parent_lost
        self._setup.parent = rank
        self._setup.ancestors = self._setup.ancestors[index:]
        if self._hub is not None:
            self._hub.moved()
            self._hub.broadcast(frames.RESYNC, b"")
        self._attach()

    # Over to a connection of this node's own, away from what called it.

    def _begin_move(self) -> None:
        if self._up is None or self._up.is_direct or self._move is not None:
            return
        from .rejoin import Dial

        assert self._setup is not None
        self._move = Dial(self.loop, self._setup, 0, self._moved, self._stays)
        self._move.start()

    def _moved(self, channel: Channel, rank: int) -> None:
        self._move = None
        self._former = self._up
        if self._former is not None:
            self._former.drained = None
        if self._hub is not None:
            self._hub.pause(False)
        self._parent_found(channel, rank, 0)

    def _stays(self, _turned_away: bool) -> None:
        """The parent cannot be reached: the way that there is remains."""
        self._move = None

    def _leave_former(self) -> None:
        former, self._former = self._former, None
        if former is not None:
            former.closed = lambda _channel, _reason: None
            former.close("moved")

    # Down.

    def _from_above(self, channel: Channel, kind: int, rank: int, payload: bytes) -> None:
        if self._setup is None:
            if kind != frames.SETUP:
                raise frames.FrameError("no setup")
            self._begin(payload)
            return
        if rank == frames.ALL and self._hub is not None:
            self._hub.broadcast(kind, payload)
        if rank in (frames.ALL, self._setup.rank):
            if kind == frames.WELCOME and channel is self._up:
                self._leave_former()
            self._take(kind, payload)
        elif self._hub is not None:
            self._hub.send(rank, kind, payload)

    def _take(self, kind: int, payload: bytes) -> None:
        member = self._member
        if kind == frames.ORDER:
            order = member.order(payload)
            if order is not None:
                self._obey(*order)
        elif kind == frames.ACK:
            member.ack(frames.number(frames.unpack(payload)[0]))
            self._pace()
        elif kind == frames.WELCOME:
            for event in member.welcome(payload):
                self._send_up(frames.EVENT, member.rank, event)
            self._pace()
        elif kind == frames.RESYNC:
            self._attach()
        elif kind == frames.MOVE:
            self._begin_move()
        elif kind == frames.CALL:
            self._call(payload)
        elif kind == frames.RECALL and self._hub is not None:
            self._hub.dialer.recalled()
        elif kind == frames.QUIT or (kind == frames.REFUSE and member.refused(payload)):
            self._quit()

    def _obey(self, sequence: int, kind: int, fields: list[bytes]) -> None:
        if kind == frames.COMMAND:
            self._run(sequence, fields)
            return
        if kind in (frames.WORLD, frames.RANK, frames.PASSED):
            self._obey_world(sequence, kind, fields)
            return
        process = self._processes.get(frames.number(fields[0]))
        if kind == frames.INPUT:
            if process is not None:
                process.write(fields[1])
            else:
                self._tell(frames.CONSUMED, fields[0], len(fields[1]))
        elif process is not None and kind == frames.INPUT_END:
            process.end_input()
        elif process is not None and kind == frames.SIGNAL:
            process.signal(frames.number(fields[1]))

    def _obey_world(self, sequence: int, kind: int, fields: list[bytes]) -> None:
        worlds = self._world()
        first = frames.number(fields[0])
        if kind == frames.WORLD:
            worlds.begin(sequence, first)
        elif kind == frames.RANK:
            self._run(sequence, fields[2:], (first, frames.number(fields[1])))
        else:
            worlds.passed(first, frames.number(fields[1]), fields[2])

    def _world(self) -> Worlds:
        if self._worlds is None:
            from .world import Worlds

            assert self._setup is not None
            self._worlds = Worlds(
                self.loop, self._setup, self._tell, self._tell_parent,
                lambda: self._hub.below() if self._hub is not None else (),
            )  # fmt: skip
        return self._worlds

    def _run(
        self, command: int, fields: list[bytes], place: tuple[int, int] | None = None
    ) -> None:
        """Start a command; *place*: as a rank of an MPI program, its world and local rank."""
        assert self._setup is not None
        flags, limit_ms, cwd, words, settings, members = fields
        if members and not _is_member(members, self._setup.rank):
            return
        by_sudo = b"r" in flags and os.geteuid() != 0
        env = self._env
        if settings or place is not None or by_sudo:  # each of which adds to it
            env = env.copy()
            for setting in frames.unpack(settings):
                name, _, value = frames.text(setting).partition("=")
                env[name] = value
        argv = [frames.text(word) for word in frames.unpack(words)]
        if b"s" in flags:
            argv = [os.environ.get("SHELL") or "/bin/sh", "-c", argv[0]]

        self._processes[command] = process = Process(
            self.loop, self._keeper,
            output=partial(self._tell, frames.OUTPUT, command),
            consumed=partial(self._tell, frames.CONSUMED, command),
            exited=partial(self._exited, command, place),
        )  # fmt: skip
        third = -1
        if place is not None:
            more, third = self._world().place(*place)
            env.update(more)
        task, before = b"t" in flags, b""
        if by_sudo:
            from . import rooted

            if task:
                argv, before = rooted.task_of(argv, env)
            else:
                argv = rooted.command(argv)
            task = False
        process.start(
            argv, env, frames.text(cwd),
            pty=b"p" in flags, fed=b"i" in flags, limit_s=frames.number(limit_ms) / 1000,
            task=task, third=third, by_sudo=by_sudo, before=before,
        )  # fmt: skip
        if third >= 0:
            os.close(third)

    def _exited(
        self, command: int, place: tuple[int, int] | None, code: int, signal: int
    ) -> None:
        del self._processes[command]
        if place is not None:
            self._world().ended(*place, code, signal)
        self._tell(frames.EXITED, command, code, signal)

    def _call(self, payload: bytes) -> None:
        dialling, nodes, *times_us = frames.unpack(payload)
        if self._hub is None:
            self._become_relay(Dialling.decode(dialling))
        assert self._hub is not None
        fields = frames.unpack(nodes)
        gap_s, ready_s, late_s = (frames.number(field) / 1e6 for field in times_us)
        self._hub.dialer.take(
            [
                (frames.number(rank), frames.text(name))
                for rank, name in zip(fields[::2], fields[1::2], strict=True)
            ],
            (gap_s, ready_s, late_s),
        )

    def _become_relay(self, dialling: Dialling) -> None:
        # What only relays need is not loaded by leaves, which are the most.
        import zlib

        from .hub import Hub

        assert self._setup is not None
        with open(sys.path[0], "rb") as archive:
            data = zlib.compress(archive.read(), 9)
        self._hub = Hub(
            self.loop, self._setup, dialling, data,
            up=self._from_below, tell_parent=self._tell_parent, lost=self._child_lost,
            failed=self._call_failed, local="SSH_CONNECTION" not in os.environ,
        )  # fmt: skip

    def _quit(self) -> None:
        """End everything of this run on this node and below, then this agent."""
        if self._ending:
            return
        self._ending = True
        for process in list(self._processes.values()):
            process.signal(SIGKILL)
        for search in (self._rejoin, self._move):
            if search is not None:
                search.stop()
        if self._hub is None:
            os._exit(0)
        self._hub.broadcast(frames.QUIT, b"")
        self._hub.when_empty(lambda: os._exit(0))
        self.loop.at(QUIT_S, lambda: os._exit(0))


def _is_member(bits: bytes, rank: int) -> bool:
    return rank >> 3 < len(bits) and bool(bits[rank >> 3] >> (rank & 7) & 1)
