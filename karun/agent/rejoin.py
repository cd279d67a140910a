"""The way up over TCP: to one ancestor (`Dial`), or to the first that accepts this node (`Rejoin`).

An agent that has lost its parent dials its ancestors.  Parent first (its connection may have broken
while it lives), unless it had fallen silent; then grandparent, and so on to the head.  Each gets
TRY_S; after a round without success there is a pause.  Once connected with the head it waits for
its word, as long as the caller lets it: without the head there is no run, and to dial it anew would
mean to stand in its queue once more.
"""

from __future__ import annotations

import os
from _socket import AF_INET, AF_INET6, IPPROTO_TCP, SO_ERROR, SOCK_STREAM, SOL_SOCKET, TCP_NODELAY
from _socket import socket as Socket

from . import frames, proof
from .channel import Channel
from .loop import WRITE, Loop, Timer
from .setup import Setup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TRY_S = 2.0
PAUSE_S = 0.3
IN_PROGRESS = 115


class Dial:
    """One ancestor, asked to let this node in."""

    def __init__(
        self,
        loop: Loop,
        setup: Setup,
        index: int,
        found: Callable[[Channel, int], None],
        failed: Callable[[bool], None],
    ) -> None:
        """*found(channel, rank)*: the channel's handlers are to be set; *failed(turned away)*.
        *index* is the ancestor's among those of *setup*."""
        self._loop, self._setup, self._index = loop, setup, index
        self._found, self._failed = found, failed
        self._timer: Timer | None = None
        self._socket: Socket | None = None
        self._channel: Channel | None = None
        self._challenge = b""
        self._nonce = b""

    @property
    def is_connected(self) -> bool:
        return self._channel is not None

    def start(self) -> None:
        """Begin; *failed* may be called at once."""
        host, port = self._setup.ancestors[self._index]
        self._timer = self._loop.at(TRY_S, self._fail)
        try:
            self._socket = sock = Socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM)
        except OSError:  # no descriptors are left
            self._fail()
            return
        sock.setblocking(False)
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        error = sock.connect_ex((host, port))
        if error not in (0, IN_PROGRESS):
            self._fail()
            return
        self._loop.watch(sock.fileno(), WRITE, self._connected)

    def stop(self) -> None:
        """Give up without a word."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.closed = _nothing
            channel.close("too slow")

    def _fail(self, *, turned_away: bool = False) -> None:
        self.stop()
        self._failed(turned_away)

    def _connected(self, _events: int) -> None:
        sock, self._socket = self._socket, None
        assert sock is not None
        self._loop.unwatch(sock.fileno())
        if sock.getsockopt(SOL_SOCKET, SO_ERROR):
            sock.close()
            self._fail()
            return
        if self._timer is not None and self._index == len(self._setup.ancestors) - 1:
            self._timer.cancel()
        fd = sock.detach()
        self._channel = Channel(self._loop, fd, fd, size_max=proof.UNPROVED_SIZE_MAX)
        self._channel.start(self._frame, self._closed)

    def _frame(self, channel: Channel, kind: int, _rank: int, payload: bytes) -> None:
        token, rank = self._setup.token, self._setup.rank
        if kind == frames.CHALLENGE and not self._challenge:
            self._challenge, self._nonce = payload, os.urandom(proof.NONCE_SIZE)
            channel.send(frames.PROVE, rank, proof.prove(token, rank, payload, self._nonce))
            return
        ancestor = None
        if kind == frames.ACCEPT and self._challenge:
            ancestor = proof.accepted(token, rank, self._challenge, self._nonce, payload)
        if ancestor is None:
            channel.close("not an ancestor")
            return
        if self._timer is not None:
            self._timer.cancel()
        down, up = proof.seals(token, rank, proof.nonce_of(self._challenge), self._nonce)
        channel.trust(sent=up, heard=down)
        self._channel = None
        self._found(channel, ancestor)

    def _closed(self, _channel: Channel, _reason: str) -> None:
        self._channel = None
        self._fail(turned_away=True)


class Rejoin:
    """One search for an ancestor."""

    def __init__(
        self, loop: Loop, setup: Setup, first: int, found: Callable[[Channel, int, int], None]
    ) -> None:
        """*found(channel, rank, index in ancestors)*; the channel's handlers are to be set."""
        self._loop, self._setup, self._found = loop, setup, found
        self._at = first
        self._pause: Timer | None = None
        self._turned_away_s = 0.0
        """When an ancestor last closed a connection."""
        self._dial: Dial
        self._try()

    @property
    def is_near(self) -> bool:
        """Whether there is a connection with an ancestor, or was just now: it lives, then, and has
        no time."""
        return self._dial.is_connected or self._loop.now - self._turned_away_s < TRY_S

    def stop(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._dial.stop()

    def _try(self) -> None:
        self._dial = Dial(self._loop, self._setup, self._at, self._reached, self._next)
        self._dial.start()

    def _reached(self, channel: Channel, rank: int) -> None:
        self._found(channel, rank, self._at)

    def _next(self, turned_away: bool) -> None:
        if turned_away:
            self._turned_away_s = self._loop.now
        self._at = (self._at + 1) % len(self._setup.ancestors)
        self._pause = self._loop.at(PAUSE_S if self._at == 0 else 0.0, self._try)


def _nothing(_channel: Channel, _reason: str) -> None:
    pass
