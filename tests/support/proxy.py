"""A TCP proxy in front of one daemon that can lose answers and fall silent.

Runs in the test's own trio loop.  It knows nothing of frames: `lose_answers` throws away what the
daemon says from now on, and once something was thrown away ends the connection, so that a request
has been carried out and its answer is lost.  `silent` holds everything back in both directions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from common.endpoint import parse_address
from nfsp.config import ClusterConfig

__all__ = ["Proxy", "in_front_of_mds"]

_SIZE = 1 << 16


class Proxy:
    """Made by `in_front_of_mds`."""

    def __init__(self, target: str) -> None:
        self._target = parse_address(target)
        self.lose_answers = False
        self.lost_count = 0
        """Connections that ended with a lost answer."""
        self.lost = trio.Event()
        self._may_pass = trio.Event()
        self._may_pass.set()

    def silence(self) -> None:
        self._may_pass = trio.Event()

    def speak(self) -> None:
        self._may_pass.set()

    async def serve(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream(*self._target)
        except OSError:
            await near.aclose()
            return
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, near, far, False, nursery.cancel_scope)
            nursery.start_soon(self._pump, far, near, True, nursery.cancel_scope)

    async def _pump(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        is_answer: bool,
        scope: trio.CancelScope,
    ) -> None:
        try:
            while data := await source.receive_some(_SIZE):
                await self._may_pass.wait()
                if is_answer and self.lose_answers:
                    self.lose_answers = False
                    self.lost_count += 1
                    self.lost.set()
                    break
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


@asynccontextmanager
async def in_front_of_mds(config: ClusterConfig) -> AsyncIterator[tuple[Proxy, ClusterConfig]]:
    """Run a proxy; yields it and the configuration that leads through it."""
    proxy = Proxy(config.mds[0].address)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1")
        )
        port = listeners[0].socket.getsockname()[1]
        mds = replace(config.mds[0], address=f"127.0.0.1:{port}", socket="")
        yield proxy, replace(config, mds=(mds,))
        nursery.cancel_scope.cancel()
