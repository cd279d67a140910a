"""Links to the iods of a cluster map: what the client and the mds both need of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import trio

from common.checksum import Buffer
from common.errors import Code, KaError
from common.link import Link
from common.session import Identity
from common.transport import Connection
from nfsp import wire
from nfsp.model import ClusterMap, Layout

__all__ = ["IodLinks", "for_each"]

_Reply = TypeVar("_Reply")


class IodLinks:
    """One link for each iod of the map.  `run` must be running."""

    def __init__(
        self,
        *,
        identity: Identity,
        key: bytes,
        patience_s: float,
        on_connect: Callable[[Connection], Awaitable[None]] | None = None,
        fetch_map: Callable[[], Awaitable[ClusterMap]] | None = None,
    ) -> None:
        """`fetch_map` asks for the current map when an iod knows a newer one than we do."""
        self._fetch_map = fetch_map
        self._identity = identity
        self._key = key
        self._patience_s = patience_s
        self._on_connect = on_connect
        self._links: dict[int, Link] = {}
        self._places: dict[int, tuple[str, str]] = {}
        self._chains: dict[int, tuple[int, ...]] = {}
        self._nursery: trio.Nursery | None = None
        self.epoch = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def use_map(self, cluster_map: ClusterMap) -> None:
        """Take a cluster map into use; connections are made as they are needed."""
        assert self._nursery is not None
        self.epoch = cluster_map.epoch
        self._chains = {chain.chain: chain.iods for chain in cluster_map.chains}
        for iod in cluster_map.iods:
            if self._places.get(iod.iod) != (iod.address, iod.socket):
                if iod.iod in self._links:
                    self._links[iod.iod].close()
                link = Link(
                    f"iod{iod.iod}",
                    iod.address,
                    iod.socket,
                    identity=self._identity,
                    key=self._key,
                    patience_s=self._patience_s,
                    on_connect=self._on_connect,
                )
                await self._nursery.start(link.run)
                self._links[iod.iod] = link
                self._places[iod.iod] = (iod.address, iod.socket)

    @property
    def iods(self) -> list[int]:
        return sorted(self._links)

    def is_local(self, iod: int) -> bool:
        """Whether we are connected to an iod that is on this host."""
        link = self._links.get(iod)
        return link is not None and link.is_local

    def iods_of(self, layout: Layout, column: int) -> tuple[int, ...]:
        """Return the iods that hold a column, head of the chain first."""
        chain = layout.chains[column]
        try:
            return self._chains[chain]
        except KeyError:
            raise KaError(Code.EIO, f"chain {chain} is not in the cluster map") from None

    async def call(
        self,
        iod: int,
        message: Any,
        reply: type[_Reply],
        *,
        data: Sequence[Buffer] = (),
        into: memoryview | None = None,
        patience_s: float | None = None,
    ) -> tuple[_Reply, int]:
        """Send a repeatable request; return the answer and the size of its payload in *into*."""
        link = self._links.get(iod)
        if link is None:
            raise KaError(Code.EIO, f"iod {iod} is not in the cluster map")
        try:
            body, size = await link.call(
                wire.IOD.encode(message), data, into=into, patience_s=patience_s
            )
        except KaError as error:
            if error.code is not Code.EPOCH_STALE or self._fetch_map is None:
                raise
            await self.use_map(await self._fetch_map())
            if self.epoch == message.epoch:
                raise
            message = message._replace(epoch=self.epoch)
            body, size = await link.call(
                wire.IOD.encode(message), data, into=into, patience_s=patience_s
            )
        answer = wire.IOD.decode(body)
        if not isinstance(answer, reply):
            raise KaError(
                Code.PROTOCOL, f"expected {reply.__name__}, got {type(answer).__name__}"
            )
        return answer, size

    async def request(
        self, iod: int, message: Any, reply: type[_Reply], *, patience_s: float | None = None
    ) -> _Reply:
        """Send a repeatable request without payload; return the answer."""
        return (await self.call(iod, message, reply, patience_s=patience_s))[0]


async def for_each(calls: Sequence[Callable[[], Awaitable[object]]]) -> None:
    """Await all calls together; when all have ended, raise the first KaError among them."""
    if len(calls) == 1:
        await calls[0]()
        return
    errors: list[KaError] = []

    async def one(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except KaError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(one, call)
    if errors:
        raise errors[0]
