"""A connection over real sockets: answers, errors, deadlines, ends, and peers that misbehave."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from common import serving
from common.buffers import BufferPool
from common.errors import Code, KaError
from common.framing import BODY_SIZE_MAX, PAYLOAD_SIZE_MAX, Kind, encode_frame
from common.messages import encode_error
from common.transport import Connection, Reply
from tests.support.peers import Peers, echo, failure, opened, pair

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


# ---------------------------------------------------------------- the plain case


@pytest.mark.parametrize("size", [0, 1, 40, 16_384, MIB, PAYLOAD_SIZE_MAX])
async def test_bodies_and_payloads_arrive_unchanged(peers: Peers, size: int) -> None:
    client = await peers.client()
    data = os.urandom(size)
    into = memoryview(bytearray(size))
    answer = await client.call(b"body", [data[:7], data[7:]], into=into, timeout=LONG_S)
    assert answer == (b"body", size)
    assert into == data


async def test_empty_payloads_are_no_payloads(peers: Peers) -> None:
    client = await peers.client()
    assert await client.call(b"x", [b"", b""], timeout=LONG_S) == (b"x", 0)
    assert await client.call(b"y", [b"", b"1"], into=memoryview(bytearray(1)), timeout=LONG_S) == (
        b"y",
        1,
    )


async def test_a_thousand_concurrent_calls_get_their_own_answers(tmp_path: Path) -> None:
    running, most = 0, 0

    async def work(body: bytes) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.lowlevel.checkpoint()
        running -= 1
        return Reply(body)

    async with opened(tmp_path / "s", lambda _c, body, _p: work(body)) as peers:
        client = await peers.client()
        answers: dict[int, bytes] = {}

        async def one(index: int) -> None:
            answers[index] = (await client.call(b"%d" % index, timeout=LONG_S))[0]

        async with trio.open_nursery() as nursery:
            for index in range(1000):
                nursery.start_soon(one, index)
    assert answers == {index: b"%d" % index for index in range(1000)}
    assert most <= serving.IN_HAND_COUNT_MAX


async def test_requests_go_in_both_directions_without_a_deadlock(tmp_path: Path) -> None:
    """Every request makes its handler ask back, more of them than a side takes in hand."""

    async def ask_back(connection: Connection, body: bytes) -> Reply:
        return Reply((await connection.call(b"back " + body, timeout=LONG_S))[0])

    async def answer(body: bytes) -> Reply:
        return Reply(b"client says " + body)

    async with opened(tmp_path / "s", lambda c, body, _p: ask_back(c, body)) as peers:
        client = await peers.client(handler=lambda _c, body, _p: answer(body))
        answers = set()

        async def one(index: int) -> None:
            answers.add((await client.call(b"%d" % index, timeout=LONG_S))[0])

        async with trio.open_nursery() as nursery:
            for index in range(600):
                nursery.start_soon(one, index)
    assert answers == {b"client says back %d" % index for index in range(600)}


async def test_bulk_in_both_directions_does_not_deadlock(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as peers:
        client = await peers.client(handler=echo)
        server = await peers.server_end()
        data = os.urandom(4 * MIB)

        async def one(connection: Connection) -> None:
            into = memoryview(bytearray(len(data)))
            await connection.call(b"", [data], into=into, timeout=LONG_S)
            assert into == data

        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(one, client)
                nursery.start_soon(one, server)


async def test_notifications_need_no_answer_and_do_not_mix(tmp_path: Path) -> None:
    gate = trio.Event()
    seen: list[bytes] = []

    async def take(body: bytes) -> None:
        await gate.wait()
        seen.append(body)

    def handle(_c: Connection, body: bytes, _p: memoryview | None) -> object:
        return Reply(b"") if body == b"ask" else take(body)

    async with opened(tmp_path / "s", handle) as peers:  # type: ignore[arg-type]
        client = await peers.client()
        for index in range(5):
            client.notify(b"%d" % index)
        await client.call(b"ask", timeout=LONG_S)
        gate.set()
        await wait_all_tasks_blocked()
        assert sorted(seen) == [b"0", b"1", b"2", b"3", b"4"]


# ---------------------------------------------------------------- errors


async def test_a_handlers_error_reaches_the_caller(tmp_path: Path) -> None:
    def fail(_c: Connection, body: bytes, _p: memoryview | None) -> Reply:
        if body == b"ka":
            raise KaError(Code.ENOENT, "no such entry", ino=3)
        if body == b"name":
            raise KaError(Code.EIO, b"\xff".decode("utf-8", "surrogateescape"))
        raise ZeroDivisionError("oops")

    async def fail_later(c: Connection, body: bytes, p: memoryview | None) -> Reply:
        return fail(c, body, p)

    for handler in (fail, fail_later):
        async with opened(tmp_path / handler.__name__, handler) as peers:
            client = await peers.client()
            error = await failure(lambda: client.call(b"ka", [b"p"], timeout=LONG_S))  # noqa: B023
            assert error.code is Code.ENOENT
            assert str(error) == "no such entry (ino=3)"
            assert error.remote
            for body, code in ((b"name", Code.EIO), (b"bug", Code.INTERNAL)):
                error = await failure(lambda: client.call(body, timeout=LONG_S))  # noqa: B023
                assert error.code is code
            assert client.is_open


@pytest.mark.parametrize(
    "reply", [Reply(bytes(BODY_SIZE_MAX + 1)), Reply(b"", bytes(PAYLOAD_SIZE_MAX + 1)), None]
)
async def test_an_impossible_answer_costs_only_its_request(
    tmp_path: Path, reply: Reply | None
) -> None:
    async def later() -> Reply | None:
        return reply

    def handle(_c: Connection, body: bytes, _p: memoryview | None) -> object:
        return {b"now": reply, b"ok": Reply(b"ok")}[body] if body != b"later" else later()

    async with opened(tmp_path / "s", handle) as peers:  # type: ignore[arg-type]
        client = await peers.client()
        for body in (b"now", b"later"):
            error = await failure(lambda: client.call(body, timeout=LONG_S))  # noqa: B023
            assert error.code is (Code.E2BIG if reply else Code.INTERNAL)
        assert (await client.call(b"ok", timeout=LONG_S))[0] == b"ok"


async def test_a_request_too_large_is_refused_here(peers: Peers) -> None:
    client = await peers.client()
    error = await failure(lambda: client.call(bytes(BODY_SIZE_MAX + 1), timeout=LONG_S))
    assert error.code is Code.E2BIG
    assert client.in_flight_count == 0
    assert client.is_open


async def test_losing_the_connection_fails_every_call() -> None:
    client, raw = pair()
    errors: list[KaError] = []

    async def one() -> None:
        errors.append(await failure(lambda: client.call(b"", timeout=LONG_S)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        for _ in range(300):  # more than may be in flight
            nursery.start_soon(one)
        await wait_all_tasks_blocked()
        raw.close()
    assert [error.code for error in errors] == [Code.UNREACHABLE] * 300
    assert (await failure(lambda: client.call(b"", timeout=LONG_S))).code is Code.UNREACHABLE


@pytest.mark.parametrize("cut", [1, 39, 42, 44, 500])
async def test_a_peer_that_dies_in_the_middle_of_a_frame_is_unreachable(cut: int) -> None:
    client, raw = pair()
    errors: list[KaError] = []

    async def one() -> None:
        into = memoryview(bytearray(1000))
        errors.append(await failure(lambda: client.call(b"", into=into, timeout=LONG_S)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(one)
        frame = await raw.frame()
        whole = encode_frame(Kind.REPLY, frame.request_id, b"body", 1000) + bytes(1000)
        await raw.send(whole[:cut])
        raw.close()
    assert [error.code for error in errors] == [Code.UNREACHABLE]


async def test_a_send_that_fails_is_the_callers_error_even_when_cancelled() -> None:
    client, raw = pair()
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        raw.close()
        with trio.CancelScope() as scope:
            scope.cancel()
            error = await failure(lambda: client.call(b"", timeout=LONG_S))
        assert error.code is Code.UNREACHABLE


async def test_a_connection_level_error_is_not_taken_for_an_answer() -> None:
    client, raw = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await raw.send(encode_frame(Kind.ERROR, 0, encode_error(KaError(Code.ENOENT))))
        error = await failure(lambda: client.call(b"", timeout=LONG_S))
    raw.close()
    assert error.code is Code.UNREACHABLE


# ---------------------------------------------------------------- deadlines and cancellation


async def test_a_late_answer_is_a_timeout_and_stops_the_handler(tmp_path: Path) -> None:
    stopped = trio.Event()

    async def for_ever() -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            stopped.set()
        raise AssertionError

    async with opened(tmp_path / "s", lambda _c, _b, _p: for_ever()) as peers:
        client = await peers.client()
        error = await failure(lambda: client.call(b"", timeout=0.01))
        assert error.code is Code.TIMEOUT
        assert not error.remote
        await stopped.wait()
        assert client.is_open
        assert client.in_flight_count == 0


async def test_cancelling_a_call_stops_its_handler_and_no_other(tmp_path: Path) -> None:
    started, stopped, go = trio.Event(), trio.Event(), trio.Event()

    async def wait(body: bytes) -> Reply:
        started.set()
        try:
            await go.wait()
        except trio.Cancelled:
            assert body == b"cancelled"
            stopped.set()
            raise
        return Reply(body)

    async with opened(tmp_path / "s", lambda _c, body, _p: wait(body)) as peers:
        client = await peers.client()
        async with trio.open_nursery() as nursery:

            async def other() -> None:
                assert (await client.call(b"other", timeout=LONG_S))[0] == b"other"

            nursery.start_soon(other)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(lambda: client.call(b"cancelled", timeout=LONG_S))
                    await started.wait()
                    await wait_all_tasks_blocked()
                    scope.cancel()
            await stopped.wait()
            go.set()


async def test_a_cancelled_calls_buffer_is_not_touched_afterwards() -> None:
    client, raw = pair()
    into = memoryview(bytearray(MIB))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        async with trio.open_nursery() as inner:

            async def call() -> None:
                await client.call(b"", into=into, timeout=LONG_S)

            inner.start_soon(call)
            frame = await raw.frame()
            await raw.send(encode_frame(Kind.REPLY, frame.request_id, b"", MIB) + b"\x01" * 50_000)
            await wait_all_tasks_blocked()
            assert into[49_999] == 1, "in the middle of the payload"
            inner.cancel_scope.cancel()
        into[:] = bytes(MIB)
        assert (await raw.frame()).kind is Kind.CANCEL
        await raw.send(b"\x02" * (MIB - 50_000))
        # The stream is still in step, and the next answer has its own buffer.
        async with trio.open_nursery() as inner:
            small = memoryview(bytearray(4))

            async def again() -> None:
                assert await client.call(b"", into=small, timeout=LONG_S) == (b"ok", 4)

            inner.start_soon(again)
            await raw.answer(await raw.frame(), b"ok", b"data")
        assert bytes(small) == b"data"
        assert into == bytes(MIB)
        client.close()
    raw.close()


async def test_a_cancelled_calls_payload_is_sent_as_it_was() -> None:
    """Its buffer goes back to its owner while a part of the frame waits for the socket."""
    client, raw = pair()
    pool = BufferPool()
    view = pool.take(8 * MIB)
    view[:] = b"\x01" * len(view)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        async with trio.open_nursery() as inner:
            inner.start_soon(lambda: client.call(b"first", [view], timeout=LONG_S))
            await wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        view[:] = b"\x02" * len(view)
        pool.give(view)
        nursery.start_soon(lambda: client.call(b"second", timeout=LONG_S))
        frame, payload = await raw.message()
        assert (frame.body, payload) == (b"first", b"\x01" * 8 * MIB)
        assert (await raw.frame()).kind is Kind.CANCEL
        await raw.answer(await raw.frame())
        client.close()
    raw.close()


async def test_an_answer_after_the_deadline_is_thrown_away() -> None:
    client, raw = pair()
    into = memoryview(bytearray(MIB))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        error = await failure(lambda: client.call(b"", into=into, timeout=0.01))
        assert error.code is Code.TIMEOUT
        await raw.answer(await raw.frame(), b"", b"\x01" * MIB)
        assert (await raw.frame()).kind is Kind.CANCEL
        async with trio.open_nursery() as inner:
            inner.start_soon(lambda: client.call(b"", timeout=LONG_S))
            await raw.answer(await raw.frame())
        assert into == bytes(MIB)
        client.close()
    raw.close()


# ---------------------------------------------------------------- peers that break the protocol


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n" * 2,
        encode_frame(Kind.REQUEST, 0, b""),
        encode_frame(Kind.NOTIFY, 5, b""),
        encode_frame(Kind.HANDSHAKE, 0, b""),
        encode_frame(Kind.REQUEST, 5, b"wait") + encode_frame(Kind.REQUEST, 5, b"wait"),
        encode_frame(Kind.CANCEL, 5, b"", 10) + bytes(10),
        encode_frame(Kind.ERROR, 0, b"garbage"),
    ],
    ids=["http", "request 0", "notify 5", "handshake", "twice", "cancel payload", "error"],
)
async def test_breaking_the_protocol_ends_that_connection_alone(
    tmp_path: Path, data: bytes
) -> None:
    async def wait() -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    def handle(_c: Connection, body: bytes, _p: memoryview | None) -> object:
        return wait() if body == b"wait" else Reply(body)

    async with opened(tmp_path / "s", handle) as peers:  # type: ignore[arg-type]
        client = await peers.client()
        raw = await peers.raw()
        await raw.send(data)
        assert await raw.ended()
        raw.close()
        assert (await client.call(b"fine", timeout=LONG_S))[0] == b"fine"


async def test_answers_to_nothing_are_ignored() -> None:
    client, raw = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        for kind in (Kind.REPLY, Kind.CANCEL, Kind.ERROR):
            await raw.send(encode_frame(kind, 99, b""))
        await raw.send(encode_frame(Kind.REPLY, 98, b"", 5) + b"12345")
        async with trio.open_nursery() as inner:
            inner.start_soon(lambda: client.call(b"", timeout=LONG_S))
            await raw.answer(await raw.frame())
        client.close()
    raw.close()


async def test_requests_to_a_side_that_serves_none_end_the_connection() -> None:
    client, raw = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await raw.request(1)
        await client.ended.wait()
    assert await raw.ended()
    raw.close()


# ---------------------------------------------------------------- ending


async def test_handlers_are_cancelled_and_over_before_the_end_is_told() -> None:
    events: list[str] = []
    started = trio.Event()

    async def work() -> Reply:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            events.append("handler over")
        raise AssertionError

    server, raw = pair(lambda _c, _b, _p: work())
    server.on_close(lambda: events.append("closed"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        await raw.request(1)
        await started.wait()
        raw.close()
    assert events == ["handler over", "closed"]
    server.on_close(lambda: events.append("at once"))
    assert events[-1] == "at once"


async def test_a_peer_hears_of_the_end_while_handlers_still_run() -> None:
    started, go = trio.Event(), trio.Event()

    async def work() -> Reply:
        started.set()
        with trio.move_on_after(LONG_S, shield=True):
            await go.wait()
        return Reply(b"")

    server, raw = pair(lambda _c, _b, _p: work())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        await raw.request(1)
        await started.wait()
        server.close()
        assert await raw.ended()
        assert not server.ended.is_set()
        go.set()
    raw.close()


async def test_a_connection_closed_before_it_ran_leaves_no_socket() -> None:
    client, raw = pair()
    client.close()
    assert await raw.ended()
    raw.close()
