"""The lower side of a node of the tree, agent or head: its children, and the ways down.

Invariants
  * a frame goes down, and is taken, on the way on which its node attached last, by the node's own
    count: ways may overtake each other;
  * a child that says nothing for `silence` is lost, unless we ourselves were asleep;
  * a lost child is reported once, and not if it has come back on another connection;
  * what comes up is passed on at once; when the way up is full, children are not read.
"""

from __future__ import annotations

import os
from _socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    IPV6_V6ONLY,
    SOCK_STREAM,
    TCP_NODELAY,
)
from _socket import socket as Socket

from . import frames, proof
from .channel import SILENCE_PINGS, Channel
from .dialer import Dialer
from .loop import READ, Loop, boot_id
from .member import introduction
from .setup import ALWAYS, Dialling, Setup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .caller import Call

STRANGERS_MAX = 256
"""Let in at a time; more wait in the kernel's queue, where they cost nothing."""
STRANGER_S = 5.0
CROWD_S = 0.1
"""For so long nobody is let in when no descriptors are left."""
QUEUE_LENGTH = 4096
"""All nodes may come at once: when a relay is lost, or after this host stood still.  A queue that
is too short is worse than none: who is turned away believes itself connected for seconds."""


class Hub:
    """Children and calls of one node."""

    def __init__(
        self,
        loop: Loop,
        setup: Setup,
        dialling: Dialling,
        archive: bytes,
        *,
        up: Callable[[int, int, bytes], None],
        tell_parent: Callable[[int, bytes], None],
        lost: Callable[[int, int, str], None],
        failed: Callable[[int, str, bytes, int], None],
        local: bool,
    ) -> None:
        """*up(kind, rank, payload)* gets what comes from below for the head, *tell_parent(kind,
        payload)* what is for the parent, *lost(rank, introduction, reason)* a child that had
        attached (so often), *failed(rank, "stage:reason", connector's words, wait status)* a node
        that is given up.  *local*: all nodes are on this machine, so nobody else need find the way
        back."""
        self._loop = loop
        loop.grow()
        self._setup = setup
        self._local = local
        self._up, self._lost = up, lost
        self._routes: dict[int, Channel] = {}
        self._introductions: dict[int, tuple[bytes, int]] = {}
        """Of each node below, its incarnation, and how often that has introduced itself."""
        self._forced = dialling.tree == ALWAYS
        self._boot_id = boot_id()
        self.dialer = Dialer(
            loop, dialling, archive, is_head=setup.rank == frames.HEAD, connected=self.connected,
            failed=failed, down=self.send, up=tell_parent,
        )  # fmt: skip
        self._strangers: dict[Channel, bytes] = {}
        self._arrived: set[Channel] = set()
        """Of those that have proved themselves: who has yet to attach."""
        self._listener: Socket | None = None
        self.children: set[Channel] = set()
        self.ancestors: list[tuple[str, int]] = []
        self._next_tick = loop.now + setup.ping_s
        self._slept_s = 0.0
        self._paused = False
        self._port = 0
        self._empty: Callable[[], None] | None = None
        loop.at(setup.ping_s, self._tick)

    def connected(self, call: Call, channel: Channel, early: bytes) -> None:
        """A call has come through: set its agent up."""
        self._listen()
        mine = self._setup
        setup = Setup(
            mine.run_id, mine.token, call.rank, call.name, mine.size, mine.rank,
            self.ancestors, mine.ping_s, mine.reattach_s,
        )  # fmt: skip
        channel.peer = call.rank
        channel.send(frames.SETUP, call.rank, setup.encode())
        self.children.add(channel)
        channel.start(self._frame, self._closed, early)
        if self._paused:
            channel.pause(True)

    # The ways down.

    def send(self, rank: int, kind: int, payload: bytes) -> bool:
        """Send to a node below; False: there is no way to it now."""
        channel = self._routes.get(rank)
        if channel is None:
            return False
        channel.send(kind, rank, payload)
        return True

    def broadcast(self, kind: int, payload: bytes) -> None:
        data = frames.encode(kind, frames.ALL, payload)
        for channel in list(self.children):
            channel.send_raw(data)

    def below(self) -> list[int]:
        """Return the nodes to which there is a way."""
        return list(self._routes)

    def drop(self, rank: int) -> None:
        """Forget the way to a node: the head has given it up."""
        self._routes.pop(rank, None)

    def pause(self, paused: bool) -> None:
        """Stop reading what comes from below, or go on."""
        if paused != self._paused:
            self._paused = paused
            for channel in list(self.children):
                channel.pause(paused)

    def _frame(self, channel: Channel, kind: int, rank: int, payload: bytes) -> None:
        if frames.ASK <= kind <= frames.CANNOT:
            self.dialer.told(channel.peer, kind, payload)
        elif kind == frames.EVENT:
            if self._routes.get(rank) is channel:  # else it came this way once, and tells it again
                self._up(kind, rank, payload)
        elif kind == frames.BARRIER:
            self._up(kind, rank, payload)
        elif kind == frames.ATTACH:
            self._attached(channel, rank, payload)
        else:
            channel.close("protocol error: a child gives no orders")

    def _attached(self, channel: Channel, rank: int, payload: bytes) -> None:
        if rank >= self._setup.size:
            raise frames.FrameError(f"no node has rank {rank}")
        incarnation, count, _applied, _parent, where, _direct = introduction(payload)
        known = self._introductions.get(rank)
        if known is not None and known[0] == incarnation and known[1] >= count:
            return  # a later one was quicker, on another way
        # Whether it would make the launch quicker if it called: not if it shares this machine.
        calls = self._forced or where != self._boot_id
        call = self.dialer.call_of(channel)
        before = self._routes.get(rank)
        self._routes[rank] = channel  # before it is given work
        if call is not None and not self.dialer.attached(call, calls=calls):
            if before is not None:
                self._routes[rank] = before
            channel.close("another try was quicker")
            return
        self._introductions[rank] = (incarnation, count)
        if call is None and rank == channel.peer:
            self._arrived.discard(channel)
            self.dialer.came(rank, calls=calls)
        elif call is None:
            self.dialer.seen(channel.peer, rank)
        self._up(frames.ATTACH, rank, payload)

    def _closed(self, channel: Channel, reason: str) -> None:
        self.children.discard(channel)
        self._arrived.discard(channel)
        if self._empty is not None and not self.children:
            self._empty()
        call = self.dialer.call_of(channel)
        if call is not None:
            call.gone()
            return
        current = self._routes.get(channel.peer) is channel
        for rank in [rank for rank, way in self._routes.items() if way is channel]:
            del self._routes[rank]
        if current:
            self.dialer.lost(channel.peer)
            self._lost(channel.peer, self._introductions[channel.peer][1], reason)

    def _tick(self) -> None:
        ping_s = self._setup.ping_s
        late = self._loop.now - self._next_tick
        self._slept_s += late
        for channel in [*self.children, *self._strangers]:
            if late > ping_s or channel.paused:
                channel.heard = self._loop.now
            elif self._loop.now - channel.heard > SILENCE_PINGS * ping_s:
                channel.close(f"no answer for {SILENCE_PINGS * ping_s:.0f} s")
                continue
            if self._loop.now - channel.sent >= ping_s and channel in self.children:
                channel.send(frames.PING, 0)
        self._next_tick = self._loop.now + ping_s
        self._loop.at(ping_s, self._tick)

    @property
    def slept_s(self) -> float:
        """How long this process did not get round to its timers, all in all."""
        return self._slept_s + max(0.0, self._loop.now - self._next_tick)

    # Those who come back, or over to a connection of their own.

    def _listen(self) -> None:
        """Open the door, for children of lost children too, before the first child is set up."""
        if self._listener is not None:
            return
        self._listener = listener = _listener(self._local)
        listener.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)  # for all that it lets in
        listener.listen(QUEUE_LENGTH)
        listener.setblocking(False)
        self._open()
        self._port = listener.getsockname()[1]
        self.moved()

    def moved(self) -> None:
        """This node has (new) ancestors: children called from now on are told of them."""
        self.ancestors = [("", self._port), *self._setup.ancestors]

    def _open(self) -> None:
        if self._listener is not None and len(self._strangers) < STRANGERS_MAX:
            self._loop.watch(self._listener.fileno(), READ, self._knock)

    def _knock(self, _events: int) -> None:
        assert self._listener is not None
        while len(self._strangers) < STRANGERS_MAX:
            try:
                fd, _address = self._listener._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptors are left; those who wait would wake us at once
                self._loop.at(CROWD_S, self._open)
                break
            self._challenge(fd)
        self._loop.unwatch(self._listener.fileno())

    def _leave(self, channel: Channel) -> None:
        """This one is no stranger any more: there is a place for another."""
        del self._strangers[channel]
        self._open()

    @property
    def is_sought(self) -> bool:
        """Whether there are some who may be coming back."""
        return bool(self._strangers or self._arrived)

    def _challenge(self, fd: int) -> None:
        channel = Channel(self._loop, fd, fd, size_max=proof.UNPROVED_SIZE_MAX)
        nonce = os.urandom(proof.NONCE_SIZE)
        self._strangers[channel] = nonce
        channel.start(self._stranger_frame, self._stranger_closed)
        channel.send(frames.CHALLENGE, 0, frames.pack(nonce))
        self._loop.at(STRANGER_S, lambda: self._still_strange(channel))

    def _still_strange(self, channel: Channel) -> None:
        if channel in self._strangers:
            channel.close("did not prove itself")

    def _stranger_closed(self, channel: Channel, _reason: str) -> None:
        self._leave(channel)

    def _stranger_frame(self, channel: Channel, kind: int, rank: int, payload: bytes) -> None:
        nonce = self._strangers[channel]
        token = self._setup.token
        theirs = None
        if kind == frames.PROVE:
            theirs = proof.proved(token, rank, nonce, payload)
        if theirs is None:
            channel.close("did not prove itself")
            return
        self._leave(channel)
        channel.peer = rank
        channel.frame, channel.closed = self._frame, self._closed
        self.children.add(channel)
        self._arrived.add(channel)
        answer = proof.accept(token, self._setup.rank, rank, nonce, theirs)
        channel.send(frames.ACCEPT, rank, answer)
        down, up = proof.seals(token, rank, nonce, theirs)
        channel.trust(sent=down, heard=up)
        if self._paused:
            channel.pause(True)

    def when_empty(self, callback: Callable[[], None]) -> None:
        """Call back when the last child is gone."""
        self._empty = callback
        if not self.children:
            callback()

    def close(self) -> None:
        """End all calls and connections, without a word."""
        if self._listener is not None:
            self._loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self.dialer.stop()
        for channel in [*self.children, *self._strangers]:
            channel.close("stopped")


def _listener(local: bool) -> Socket:
    """Return a socket bound for both families where there are two, or for this machine only."""
    if local:
        listener = Socket(AF_INET, SOCK_STREAM)
        listener.bind(("127.0.0.1", 0))
        return listener
    try:
        listener = Socket(AF_INET6, SOCK_STREAM)
        listener.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
    except OSError:
        listener = Socket(AF_INET, SOCK_STREAM)
        listener.bind(("", 0))
    return listener
