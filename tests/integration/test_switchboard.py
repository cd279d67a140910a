"""The switchboard: what overtakes, and what is left when one of two connections ends."""

from __future__ import annotations

import trio

from common.broadcast.edge import Edge
from common.broadcast.switchboard import Switchboard
from common.broadcast.topology import Kind, Shape
from common.broadcast.transfer import new_job
from common.broadcast.wire import HOP, Alive
from common.framing import Kind as FrameKind
from common.framing import encode_frame
from common.messages import Message
from common.outbox import Growing, GrowingPayload
from common.sockets import listen


class Owner:
    """Writes down whose messages came, and which connections broke."""

    def __init__(self) -> None:
        self.board: Switchboard | None = None
        self.heard: list[int] = []
        self.broke: list[Edge] = []
        self.news = trio.Event()

    async def wait_for(self, heard_count: int, broke_count: int = 0) -> None:
        with trio.fail_after(5):
            while len(self.heard) < heard_count or len(self.broke) < broke_count:
                self.news = trio.Event()
                await self.news.wait()

    def message_came(self, edge: Edge, message: Message) -> None:
        assert isinstance(message, Alive)
        self.heard.append(message.have_count)
        self.news.set()

    def edge_broke(self, edge: Edge, reason: str) -> None:
        assert self.board is not None
        self.board.drop(edge)
        self.broke.append(edge)
        self.news.set()

    def chunk_begins(self, edge: Edge, chunk: int, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def chunk_came(self, edge: Edge, chunk: int, data: memoryview) -> None: ...

    def chunk_lost(self, chunk: int, data: memoryview) -> None: ...

    def request_came(self, edge: Edge, request_id: int, body: bytes) -> None: ...

    def answer_came(self, edge: Edge, request_id: int, body: bytes, payload: bytes) -> None: ...

    def bytes_came(self, edge: Edge, chunk: int, data: memoryview, size: int) -> None: ...

    def bytes_heard(self, edge: Edge) -> None: ...

    def bytes_left(self, edge: Edge) -> None: ...


async def test_a_message_comes_past_what_is_stuck_and_the_other_way_stays_open() -> None:
    sockets = [listen("127.0.0.1:0") for _ in range(2)]
    addresses = [f"127.0.0.1:{one[0].getsockname()[1]}" for one in sockets]
    job = new_job(Shape(Kind.CHAIN, (1,)), addresses)

    def said(number: int) -> bytes:
        return encode_frame(FrameKind.NOTIFY, 0, HOP.encode(Alive(job.transfer_id, 0, number, 0)))

    def unreachable(peer: int, reason: str) -> None:
        raise AssertionError(reason)

    ours, theirs = Owner(), Owner()
    ours.board = Switchboard(job, 0, ours, unreachable)
    theirs.board = Switchboard(job, 1, theirs, unreachable)
    released: list[str] = []
    async with trio.open_nursery() as nursery:
        for board, listening in zip((ours.board, theirs.board), sockets, strict=True):
            await nursery.start(board.serve, listening)
        ours.board.put(1, (said(1),))
        await theirs.wait_for(1)
        # Of this nothing ever comes, so all behind it waits.
        stuck = GrowingPayload(Growing(memoryview(bytearray(1000))))
        ours.board.put(1, (stuck,), lambda: released.append("stuck"))
        ours.board.put(1, (said(2),))
        ours.board.put_past(1, (said(3),))
        await theirs.wait_for(2, broke_count=1)
        assert theirs.heard == [1, 3]
        assert released == ["stuck"]
        assert ours.broke == []  # this side has ended it itself
        theirs.board.put(0, (said(4),))
        theirs.board.flush()
        await ours.wait_for(1)
        ours.board.put(1, (said(5),))
        ours.board.flush()
        await theirs.wait_for(3)
        assert theirs.heard == [1, 3, 5]
        nursery.cancel_scope.cancel()
    for listening in sockets:
        listening[0].close()
