"""The way back: an agent that has lost its parent dials its ancestors until one accepts it.

Parent first (its connection may have broken while it lives), unless it had fallen silent; then
grandparent, and so on to the head.  Each gets TRY_S; after a round without success there is a
pause.  Once connected with the head it waits for its word, as long as the caller lets it: without
the head there is no run, and to dial it anew would mean to stand in its queue once more.
"""

from __future__ import annotations

import os
from _socket import AF_INET, AF_INET6, SO_ERROR, SOCK_STREAM, SOL_SOCKET
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


class Rejoin:
    """One search for an ancestor."""

    def __init__(
        self, loop: Loop, setup: Setup, first: int, found: Callable[[Channel, int, int], None]
    ) -> None:
        """*found(channel, rank, index in ancestors)*; the channel's handlers are to be set."""
        self._loop, self._setup, self._found = loop, setup, found
        self._at = first
        self._timer: Timer | None = None
        self._socket: Socket | None = None
        self._channel: Channel | None = None
        self._challenge = b""
        self._nonce = b""
        self._over = False
        self._turned_away_s = 0.0
        """When an ancestor last closed a connection."""
        self._dial()

    @property
    def is_near(self) -> bool:
        """Whether there is a connection with an ancestor, or was just now: it lives, then, and has
        no time."""
        return self._channel is not None or self._loop.now - self._turned_away_s < TRY_S

    def stop(self) -> None:
        self._over = True
        self._give_up()

    def _dial(self) -> None:
        if self._over:
            return
        host, port = self._setup.ancestors[self._at]
        self._timer = self._loop.at(TRY_S, self._next)
        self._socket = sock = Socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM)
        sock.setblocking(False)
        error = sock.connect_ex((host, port))
        if error not in (0, IN_PROGRESS):
            self._next()
            return
        self._loop.watch(sock.fileno(), WRITE, self._connected)

    def _connected(self, _events: int) -> None:
        sock, self._socket = self._socket, None
        assert sock is not None
        self._loop.unwatch(sock.fileno())
        if sock.getsockopt(SOL_SOCKET, SO_ERROR):
            sock.close()
            self._next()
            return
        if self._timer is not None and self._at == len(self._setup.ancestors) - 1:
            self._timer.cancel()
        fd = sock.detach()
        self._channel = Channel(self._loop, fd, fd, size_max=proof.UNPROVED_SIZE_MAX)
        self._challenge = b""
        self._channel.start(self._frame, self._closed)

    def _frame(self, channel: Channel, kind: int, _rank: int, payload: bytes) -> None:
        setup = self._setup
        if kind == frames.CHALLENGE and not self._challenge:
            self._challenge, self._nonce = payload, os.urandom(proof.NONCE_SIZE)
            answer = proof.prove(setup.token, setup.rank, payload, self._nonce)
            channel.send(frames.PROVE, setup.rank, answer)
            return
        ancestor = None
        if kind == frames.ACCEPT and self._challenge:
            ancestor = proof.accepted(
                setup.token, setup.rank, self._challenge, self._nonce, payload
            )
        if ancestor is None:
            channel.close("not an ancestor")
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        channel.trust()
        self._found(channel, ancestor, self._at)

    def _closed(self, _channel: Channel, _reason: str) -> None:
        self._channel = None
        self._turned_away_s = self._loop.now
        if not self._over:
            self._next()

    def _give_up(self) -> None:
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

    def _next(self) -> None:
        self._give_up()
        self._at = (self._at + 1) % len(self._setup.ancestors)
        pause_s = PAUSE_S if self._at == 0 else 0.0
        self._timer = self._loop.at(pause_s, self._dial)


def _nothing(_channel: Channel, _reason: str) -> None:
    pass
