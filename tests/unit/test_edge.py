"""An edge: when the owner hears of what has come of a chunk."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

from common.broadcast.edge import START_SIZE, Edge, chunk_header
from common.framing import PAYLOAD_SIZE_MAX, FrameReceiver
from common.messages import Message

SIZE = 256 * 1024
PIECE_SIZE = 64 * 1024
DATA = bytes(range(256)) * (SIZE // 256)


class Owner:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.news = trio.Event()

    def tell(self, what: str) -> None:
        self.told.append(what)
        self.news.set()

    async def has_told(self, what: str) -> list[str]:
        """Return all that was told, up to and with *what*."""
        with trio.fail_after(5):
            while what not in self.told:
                self.news = trio.Event()
                await self.news.wait()
        told, self.told = self.told, []
        return told

    def chunk_begins(self, edge: Edge, chunk: int, size: int) -> memoryview:
        edge.piece_size = PIECE_SIZE
        return memoryview(bytearray(size))

    def bytes_came(self, edge: Edge, chunk: int, data: memoryview, size: int) -> None:
        assert data[:size] == DATA[:size]
        self.tell(f"{size} bytes")

    def bytes_heard(self, edge: Edge) -> None:
        self.tell("heard")

    def chunk_came(self, edge: Edge, chunk: int, data: memoryview) -> None:
        assert data == DATA
        self.tell(f"chunk {chunk}")

    def chunk_lost(self, chunk: int, data: memoryview) -> None:
        self.tell(f"chunk {chunk} lost")

    def message_came(self, edge: Edge, message: Message) -> None: ...

    def request_came(self, edge: Edge, request_id: int, body: bytes) -> None: ...

    def answer_came(self, edge: Edge, request_id: int, body: bytes, payload: bytes) -> None: ...

    def bytes_left(self, edge: Edge) -> None: ...

    def edge_broke(self, edge: Edge, reason: str) -> None:
        self.tell("broke")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def test_little_of_a_chunk_is_told_by_the_clock_and_much_of_it_at_once(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    owner = Owner()
    receiver = FrameReceiver(body_size_max=4096, payload_size_max=PAYLOAD_SIZE_MAX)
    edge = Edge(ours, receiver, owner, peer=1, life=b"")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(edge.run)
        theirs.sendall(chunk_header(bytes(16), 3, SIZE) + DATA[:1000])
        await trio.sleep(0.05)
        assert owner.told == []
        edge.poke()
        assert await owner.has_told("heard") == ["1000 bytes", "heard"]
        edge.poke()
        theirs.sendall(DATA[1000 : 1000 + PIECE_SIZE])
        piece = f"{1000 + PIECE_SIZE} bytes"
        assert await owner.has_told(piece) == [piece]
        edge.poke()  # it flows: there is nothing to be taken by force
        assert await owner.has_told("heard") == ["heard"]
        theirs.sendall(DATA[1000 + PIECE_SIZE :])
        assert (await owner.has_told("chunk 3"))[-1] == "chunk 3"
        theirs.sendall(chunk_header(bytes(16), 4, SIZE))
        await trio.sleep(0.05)
        edge.poke()  # chunk 3 may have come in pieces
        edge.poke()
        assert (await owner.has_told("0 bytes"))[-2:] == ["0 bytes", "heard"]
        theirs.close()
        assert await owner.has_told("broke") == ["chunk 4 lost", "broke"]


async def test_when_slow_start_is_over_the_machine_s_own_congestion_control_goes_on(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    def used() -> bytes:
        name: bytes = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.rstrip(b"\0")

    def take(size: int) -> None:
        while size:
            size -= len(theirs.recv(size))

    ours, theirs = pair
    usual = used()
    begins = b"reno" if usual in (b"cubic", b"bbr") else usual
    goes_on = b"cubic" if usual == b"bbr" else usual
    receiver = FrameReceiver(body_size_max=4096, payload_size_max=PAYLOAD_SIZE_MAX)
    edge = Edge(ours, receiver, Owner(), peer=1, life=b"")
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.run)
            for size, name in ((START_SIZE - 1, begins), (1, goes_on)):
                edge.put([bytes(size)])
                edge.flush()
                await trio.to_thread.run_sync(take, size)
                assert used() == name
            edge.close()
