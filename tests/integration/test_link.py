"""Links: callers need not know that connections come and go."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from common import link as link_module
from common.endpoint import listen
from common.errors import Code, KaError
from common.link import Link
from common.session import Identity
from common.transport import Connection, Reply
from tests.support.peers import KEY, echo, identity, opened

LONG_S = 20.0


@pytest.fixture(autouse=True)
async def _limit() -> AsyncIterator[None]:
    """Nothing here may hang."""
    with trio.fail_after(60):
        yield


@asynccontextmanager
async def linked(
    address: str,
    path: str,
    *,
    patience_s: float = LONG_S,
    who: Identity | None = None,
    key: bytes = KEY,
    on_connect: Callable[[Connection], Awaitable[None]] | None = None,
) -> AsyncIterator[Link]:
    link = Link(
        "peer", address, path, identity=who or identity(), key=key, patience_s=patience_s,
        on_connect=on_connect,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        yield link
        nursery.cancel_scope.cancel()


async def failure(link: Link, body: bytes = b"", patience_s: float | None = None) -> KaError:
    with pytest.raises(KaError) as caught:
        await link.call(body, patience_s=patience_s)
    return caught.value


@pytest.mark.parametrize("tcp", [False, True])
async def test_calls_outlive_a_restart_of_the_server(tmp_path: Path, tcp: bool) -> None:
    async with opened(tmp_path / "s", tcp=tcp) as peers, linked(peers.address, peers.path) as link:
        assert await link.call(b"before") == (b"before", 0)
        answers: list[bytes] = []

        async def one(index: int) -> None:
            into = memoryview(bytearray(3))
            assert await link.call(b"%d" % index, [b"a", b"bc"], into=into) == (b"%d" % index, 3)
            answers.append(bytes(into))

        async with trio.open_nursery() as nursery:
            await peers.stop()
            for index in range(50):
                nursery.start_soon(one, index)
            await wait_all_tasks_blocked(0.02)
            assert not link.connected
            peers.start(echo)
        assert answers == [b"abc"] * 50


async def test_a_request_in_flight_is_repeated_on_the_new_connection(tmp_path: Path) -> None:
    started = trio.Event()

    async def hang() -> Reply:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    async with (
        opened(tmp_path / "s", lambda _c, _b, _p: hang()) as peers,
        linked("", peers.path) as link,
    ):

        async def restart() -> None:
            await started.wait()
            await peers.stop()
            peers.start(echo)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(restart)
            assert (await link.call(b"again"))[0] == b"again"


async def test_connections_are_numbered_upwards(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as peers, linked("", peers.path) as link:
        for _ in range(3):
            await link.call(b"")
            link.close()
        assert [server.number for server in peers.connections] == [1, 2, 3]


async def test_answers_that_no_repetition_mends_are_raised_at_once(tmp_path: Path) -> None:
    calls = 0

    def refuse(_c: Connection, _b: bytes, _p: memoryview | None) -> Reply:
        nonlocal calls
        calls += 1
        raise KaError(Code.ENOENT, "no such entry")

    async with opened(tmp_path / "s", refuse) as peers:
        async with linked("", peers.path) as link:
            for _ in range(2):  # with a new connection, and with a standing one
                assert (await failure(link)).code is Code.ENOENT
            assert calls == 2
        async with linked("", peers.path, key=bytes(32)) as link:
            assert (await failure(link)).code is Code.AUTH


async def test_a_busy_peer_is_asked_again(tmp_path: Path) -> None:
    calls = 0

    def busy_twice(_c: Connection, body: bytes, _p: memoryview | None) -> Reply:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise KaError(Code.BUSY)
        return Reply(body)

    async with opened(tmp_path / "s", busy_twice) as peers, linked("", peers.path) as link:
        assert (await link.call(b"x"))[0] == b"x"
        assert len(peers.connections) == 1


async def test_a_timeout_the_peer_met_elsewhere_keeps_the_connection(tmp_path: Path) -> None:
    calls = 0

    def elsewhere(_c: Connection, body: bytes, _p: memoryview | None) -> Reply:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KaError(Code.TIMEOUT, "an iod did not answer")
        return Reply(body)

    async with opened(tmp_path / "s", elsewhere) as peers, linked("", peers.path) as link:
        await link.call(b"")
        await link.call(b"")
        assert calls == 3
        assert len(peers.connections) == 1


async def test_a_hung_connection_is_given_up_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "CALL_TIMEOUT_S", 0.05)

    async def hang() -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    def handle(connection: Connection, body: bytes, _p: memoryview | None) -> object:
        return hang() if connection.number == 1 and body == b"x" else Reply(body)

    async with (
        opened(tmp_path / "s", handle) as peers,  # type: ignore[arg-type]
        linked("", peers.path) as link,
    ):
        await link.call(b"warm")
        assert (await link.call(b"x"))[0] == b"x"
        assert [server.number for server in peers.connections] == [1, 2]


async def test_patience_has_an_end_that_names_the_peer(tmp_path: Path) -> None:
    async with linked("", str(tmp_path / "none"), patience_s=0.1) as link:
        error = await failure(link)
        assert error.code is Code.UNREACHABLE
        assert str(error).startswith("peer: ")
        assert (await failure(link, patience_s=0)).code is Code.UNREACHABLE


async def test_many_callers_of_a_silent_peer_fail_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share attempts: none waits for as many time-outs as there are callers."""
    monkeypatch.setattr(link_module, "ATTEMPT_MIN_S", 0.1)
    path = str(tmp_path / "s")
    with listen("", path)[0]:  # accepts in the kernel, and says nothing
        async with linked("", path, patience_s=0.2) as link:
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(failure, link)
            assert trio.current_time() - began < 2


async def test_on_connect_comes_first_on_every_connection(tmp_path: Path) -> None:
    seen: list[tuple[int, bytes]] = []

    def note(connection: Connection, body: bytes, _p: memoryview | None) -> Reply:
        seen.append((connection.number, body))
        return Reply(body)

    async def greet(connection: Connection) -> None:
        await connection.call(b"greet", timeout=LONG_S)

    async with opened(tmp_path / "s", note) as peers:
        async with linked("", peers.path, on_connect=greet) as link:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(link.call, b"call")
            link.close()
            await link.call(b"call")
        assert seen == [(1, b"greet"), *[(1, b"call")] * 3, (2, b"greet"), (2, b"call")]


async def test_a_connection_whose_greeting_fails_is_not_used(tmp_path: Path) -> None:
    async def refuse(_connection: Connection) -> None:
        raise KaError(Code.SESSION_UNKNOWN)

    async with opened(tmp_path / "s") as peers, linked("", peers.path, on_connect=refuse) as link:
        assert (await failure(link)).code is Code.SESSION_UNKNOWN
        assert not link.connected
        await (await peers.server_end()).ended.wait()


async def test_a_link_that_does_not_run_is_unreachable(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as peers:
        async with linked("", peers.path) as link:
            await link.call(b"")
        assert (await failure(link, patience_s=0)).code is Code.UNREACHABLE


async def test_a_cancelled_caller_leaves_the_link_usable(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    silent = listen("", path)[0]
    async with linked("", path) as link:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.call, b"")
            await wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        silent.close()
        async with opened(tmp_path / "s"):
            assert (await link.call(b"x"))[0] == b"x"
