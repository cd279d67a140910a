"""What a connection may hold, and what becomes of payloads, files and buffers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from common import serving
from common.errors import Code
from common.framing import Kind, encode_frame
from common.transport import Connection, FilePayload, Reply
from tests.support.peers import Peers, failure, opened, pair

MIB = 1 << 20
LONG_S = 20.0


@pytest.fixture(autouse=True)
async def _limit() -> AsyncIterator[None]:
    """Nothing here may hang."""
    with trio.fail_after(60):
        yield


@pytest.fixture(params=["unix", "tcp"])
async def peers(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peers]:
    """An echo server, reached both ways."""
    async with opened(tmp_path / "socket", tcp=request.param == "tcp") as found:
        yield found


# ---------------------------------------------------------------- limits


async def test_all_callers_that_wait_for_room_get_on() -> None:
    client, raw = pair()
    done = 0

    async def one() -> None:
        nonlocal done
        await client.call(b"", [bytes(4 * MIB)], timeout=LONG_S)
        done += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        async with trio.open_nursery() as inner:
            for _ in range(20):
                inner.start_soon(one)
            await wait_all_tasks_blocked()
            assert client.in_flight_count < 20
            for _ in range(20):
                await raw.answer(await raw.frame())
        assert done == 20
        client.close()
    raw.close()


async def test_a_caller_without_room_is_told_in_time() -> None:
    """The peer reads nothing: neither its deadline nor the end of the connection is missed."""
    client, raw = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        errors: list[Code] = []

        async def one(timeout: float) -> None:
            call = client.call(b"", [bytes(8 * MIB)], timeout=timeout)
            errors.append((await failure(lambda: call)).code)

        async with trio.open_nursery() as inner:
            for _ in range(10):
                inner.start_soon(one, LONG_S)
            await wait_all_tasks_blocked()
            await one(0.01)
            assert errors == [Code.TIMEOUT]
            client.close()
        assert errors[1:] == [Code.UNREACHABLE] * 10
    raw.close()


async def test_a_peer_that_takes_nothing_costs_bounded_memory(tmp_path: Path) -> None:
    answered = 0

    def handle(_c: Connection, _b: bytes, _p: memoryview | None) -> Reply:
        nonlocal answered
        answered += 1
        return Reply(b"", bytes(MIB))

    async with opened(tmp_path / "s", handle) as peers:
        raw = await peers.raw()
        flood = [encode_frame(Kind.REQUEST, index + 1, b"") for index in range(500)]
        await raw.send(b"".join(flood))
        await wait_all_tasks_blocked(0.01)
        limit = serving.ANSWER_QUEUE_SIZE_MAX // MIB + 8  # what the sockets themselves hold
        assert answered <= limit
        for _ in range(500):
            assert (await raw.frame()).kind is Kind.REPLY
        raw.close()


@pytest.mark.parametrize(
    ("payload_size", "count"),
    [(0, serving.IN_HAND_COUNT_MAX), (MIB, serving.IN_HAND_SIZE_MAX // MIB)],
)
async def test_a_flood_of_requests_is_taken_in_hand_step_by_step(
    tmp_path: Path, payload_size: int, count: int
) -> None:
    started, go = 0, trio.Event()

    async def wait() -> Reply:
        nonlocal started
        started += 1
        await go.wait()
        return Reply(b"")

    async with opened(tmp_path / "s", lambda _c, _b, _p: wait()) as peers:
        raw = await peers.raw()

        async def flood() -> None:
            for index in range(count + 50):
                await raw.request(index + 1, b"", bytes(payload_size))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            while started < count:
                await wait_all_tasks_blocked(0.001)
            await wait_all_tasks_blocked(0.02)
            assert started == count
            go.set()
            for _ in range(count + 50):
                assert (await raw.frame()).kind is Kind.REPLY
        raw.close()


async def test_notifications_to_a_deaf_peer_end_the_connection() -> None:
    client, raw = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        sent = 0
        while client.is_open:
            client.notify(bytes(MIB))
            sent += 1
            assert sent < 100
    raw.close()


# ---------------------------------------------------------------- payloads


async def test_a_reply_may_contain_its_requests_payload(tmp_path: Path) -> None:
    def part(_c: Connection, body: bytes, payload: memoryview | None) -> Reply:
        assert payload is not None
        return Reply(body, payload[1000:])

    async with opened(tmp_path / "s", part) as peers:
        client = await peers.client()

        async def one(index: int) -> None:
            into = memoryview(bytearray(4 * MIB))
            data = bytes([index]) * (4 * MIB)
            answer = await client.call(b"", [data], into=into, timeout=LONG_S)
            assert answer == (b"", 4 * MIB - 1000)
            assert into[:-1000] == data[1000:]

        async with trio.open_nursery() as nursery:
            for index in range(12):
                nursery.start_soon(one, index)


def file_payload(path: Path, length: int, released: list[int], flags: int = os.O_RDONLY) -> Reply:
    fd = os.open(path, flags)

    def release() -> None:
        released.append(fd)
        os.close(fd)

    return Reply(b"file", FilePayload(fd, 0, length, release))


@pytest.mark.parametrize("tcp", [False, True])
async def test_files_are_sent_by_the_kernel_and_released_once(tmp_path: Path, tcp: bool) -> None:
    path, released = tmp_path / "data", list[int]()
    data = os.urandom(10 * MIB)
    path.write_bytes(data)

    def handle(_c: Connection, body: bytes, _p: memoryview | None) -> Reply:
        return file_payload(path, int(body), released)

    async with opened(tmp_path / "s", handle, tcp=tcp) as peers:
        client = await peers.client()
        for size in (0, 1, 10 * MIB):
            into = memoryview(bytearray(size))
            answer = await client.call(b"%d" % size, into=into, timeout=LONG_S)
            assert answer == (b"file", size)
            assert into == data[:size]
        assert len(released) == 3


@pytest.mark.parametrize(("flags", "good"), [(os.O_RDONLY, 1000), (os.O_WRONLY, 0)])
async def test_a_file_that_cannot_be_sent_whole_ends_in_zeros(
    tmp_path: Path, flags: int, good: int
) -> None:
    """It is the receiver's checksum that tells; the connection and its other requests go on."""
    path, released = tmp_path / "data", list[int]()
    path.write_bytes(b"\x01" * 1000)

    def handle(_c: Connection, _b: bytes, _p: memoryview | None) -> Reply:
        return file_payload(path, 3 * MIB, released, flags)

    async with opened(tmp_path / "s", handle) as peers:
        client = await peers.client()
        into = memoryview(bytearray(b"\x07" * 3 * MIB))
        for _ in range(2):
            assert await client.call(b"", into=into, timeout=LONG_S) == (b"file", 3 * MIB)
            assert into == b"\x01" * good + bytes(3 * MIB - good)
        assert len(released) == 2


async def test_a_file_is_released_when_nobody_takes_it(tmp_path: Path) -> None:
    path, released = tmp_path / "data", list[int]()
    path.write_bytes(bytes(16 * MIB))

    def handle(_c: Connection, _b: bytes, _p: memoryview | None) -> Reply:
        return file_payload(path, 16 * MIB, released)

    async with opened(tmp_path / "s", handle) as peers:
        raw = await peers.raw()
        for index in range(3):
            await raw.request(index + 1)
        await raw.send(encode_frame(Kind.NOTIFY, 0, b""))
        await wait_all_tasks_blocked()
        assert len(released) < 4
        raw.close()
        server = await peers.server_end()
        await server.ended.wait()
        assert len(released) == 4


async def test_more_payload_than_asked_for_ends_the_connection() -> None:
    client, raw = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        into = memoryview(bytearray(10))
        async with trio.open_nursery() as inner:

            async def call() -> None:
                error = await failure(lambda: client.call(b"", into=into, timeout=LONG_S))
                assert error.code is Code.UNREACHABLE

            inner.start_soon(call)
            await raw.answer(await raw.frame(), b"", b"\x01" * 11)
        assert into == bytes(10)
    raw.close()
