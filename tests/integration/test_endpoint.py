"""Dialing and serving: who gets in, who does not, what a stranger costs, and fencing."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from common import greeting
from common.endpoint import dial, listen
from common.errors import Code, KaError
from common.framing import Kind, encode_frame
from common.messages import decode_error, encode_error
from common.session import HANDSHAKE_BODY_SIZE_MAX, ClientHandshake, Identity
from common.transport import Connection, Reply
from tests.support.peers import CLUSTER, KEY, Peers, Raw, failure, identity, opened

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


def caller(address: str, path: str = "", timeout: float = 5.0) -> Callable[[], object]:
    return lambda: dial(address, path, identity=identity(), key=KEY, timeout=timeout)


# ---------------------------------------------------------------- who gets in


async def test_a_client_with_the_key_is_known_by_its_identity(peers: Peers) -> None:
    await peers.client(who=Identity(CLUSTER, "mds", "mds1", b"i" * 16), number=7)
    server = await peers.server_end()
    assert (server.role, server.peer, server.incarnation, server.number) == (
        "mds", "mds1", b"i" * 16, 7,
    )  # fmt: skip


async def test_a_wrong_key_or_cluster_is_refused_and_said(peers: Peers) -> None:
    who = identity()
    for cluster, key, code in ((CLUSTER, bytes(32), Code.AUTH), ("x", KEY, Code.WRONG_CLUSTER)):
        stranger = who._replace(cluster_id=cluster)
        error = await failure(
            lambda: dial(peers.address, peers.path, identity=stranger, key=key)  # noqa: B023
        )
        assert error.code is code
    assert peers.connections == []


async def test_garbage_is_refused_and_others_are_served(peers: Peers) -> None:
    for data in (
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        os.urandom(5000),
        encode_frame(Kind.REQUEST, 1, b""),
    ):
        raw = Raw(await peers.connect_raw())
        await raw.send(data)
        assert await raw.ended()
        raw.close()
    client = await peers.client()
    assert (await client.call(b"fine", timeout=LONG_S))[0] == b"fine"


async def test_a_stranger_can_make_us_hold_little(peers: Peers) -> None:
    raw = Raw(await peers.connect_raw())
    await raw.send(encode_frame(Kind.HANDSHAKE, 0, bytes(HANDSHAKE_BODY_SIZE_MAX + 1)))
    assert await raw.ended()


async def test_half_open_connections_are_bounded_and_keep_nobody_out(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "HANDSHAKE_TIMEOUT_S", 1.0)
    silent = [Raw(await peers.connect_raw()) for _ in range(greeting.STRANGERS_MAX)]
    await wait_all_tasks_blocked(0.01)
    late = Raw(await peers.connect_raw())
    assert await silent[0].ended(), "the oldest makes room"
    client = await peers.client()
    assert (await client.call(b"in", timeout=LONG_S))[0] == b"in"
    for raw in (*silent, late):
        assert await raw.ended(), "their time is over"
    client = await peers.client()
    assert (await client.call(b"in", timeout=LONG_S))[0] == b"in"


async def test_a_handshake_cut_short_at_any_point_harms_nobody(peers: Peers) -> None:
    hello = ClientHandshake(identity(), KEY, connection=1, nonce=b"n" * 32).start()
    frame = encode_frame(Kind.HANDSHAKE, 0, hello)
    for size in (0, 1, 39, 40, len(frame) - 1, len(frame)):
        raw = Raw(await peers.connect_raw())
        await raw.send(frame[:size])
        raw.close()
    client = await peers.client()
    assert (await client.call(b"in", timeout=LONG_S))[0] == b"in"


async def test_requests_may_follow_the_proof_at_once(peers: Peers) -> None:
    raw = Raw(await peers.connect_raw())
    handshake = ClientHandshake(identity(), KEY, connection=1, nonce=b"n" * 32)
    await raw.send(encode_frame(Kind.HANDSHAKE, 0, handshake.start()))
    proof = handshake.receive((await raw.frame()).body)
    assert proof is not None
    await raw.send(encode_frame(Kind.HANDSHAKE, 0, proof) + encode_frame(Kind.REQUEST, 1, b"early"))
    assert (await raw.frame()).kind is Kind.HANDSHAKE
    assert (await raw.frame()).body == b"early"


# ---------------------------------------------------------------- dialing


async def one_answer(server: socket.socket, data: bytes) -> None:
    """Be a server that says *data* to one caller, whatever it says."""
    server.settimeout(10)
    sock, _ = await trio.to_thread.run_sync(server.accept)
    with sock:
        await trio.to_thread.run_sync(sock.recv, 1000)
        await trio.to_thread.run_sync(sock.sendall, data)


@pytest.mark.parametrize("code", [Code.ENOENT, Code.UNREACHABLE, Code.SESSION_UNKNOWN])
async def test_an_unproved_server_cannot_answer_for_the_file_system(
    tmp_path: Path, code: Code
) -> None:
    path = str(tmp_path / "s")
    with listen("", path)[0] as server:
        async with trio.open_nursery() as nursery:
            data = encode_frame(Kind.ERROR, 0, encode_error(KaError(code)))
            nursery.start_soon(one_answer, server, data)
            assert (await failure(caller("", path))).code is Code.PROTOCOL


async def test_a_server_that_hangs_up_is_unreachable(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen("", path)[0] as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_answer, server, b"")
            assert (await failure(caller("", path))).code is Code.UNREACHABLE


async def test_a_silent_server_is_a_timeout(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen("", path)[0]:
        assert (await failure(caller("", path, 0.05))).code is Code.TIMEOUT


async def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    with listen("127.0.0.1:0")[0] as unused:
        host, port = unused.getsockname()
    for call in (caller(f"{host}:{port}"), caller("", str(tmp_path / "none"))):
        assert (await failure(call)).code is Code.UNREACHABLE


@pytest.mark.parametrize("leftover", ["none", "stale socket", "file"])
async def test_tcp_is_used_where_nobody_listens_on_the_path(tmp_path: Path, leftover: str) -> None:
    path = tmp_path / "s"
    if leftover == "stale socket":
        listen("", str(path))[0].close()
    elif leftover == "file":
        path.write_text("")
    async with opened(tmp_path / "t", tcp=True) as peers:
        client = await dial(peers.address, str(path), identity=identity(), key=KEY)
        assert client.peer == peers.address
        client.close()


async def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(Path("unused"), tcp=True) as peers:
        _, port = peers.address.split(":")

        async def found(*_args: object, **_kwargs: object) -> list[object]:
            entry = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
            # 127.0.0.2 is this host too, and nobody listens there.
            return [(*entry, ("127.0.0.2", int(port))), (*entry, ("127.0.0.1", int(port)))]

        monkeypatch.setattr(trio.socket, "getaddrinfo", found)
        client = await dial(f"name:{port}", "", identity=identity(), key=KEY)
        client.close()


# ---------------------------------------------------------------- listening


async def test_an_address_in_use_is_busy(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen("127.0.0.1:0")[0] as taken, listen("", path)[0]:
        host, port = taken.getsockname()
        for address, unix in ((f"{host}:{port}", ""), ("", path)):
            with pytest.raises(KaError) as caught:
                listen(address, unix)
            assert caught.value.code is Code.BUSY
            assert (address or unix) in str(caught.value)


async def test_a_stale_socket_is_replaced_and_anything_else_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen("", str(path))[0].close()
    listen("", str(path))[0].close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(KaError) as caught:
        listen("127.0.0.1:0", str(path))
    assert caught.value.code is Code.BUSY
    assert path.read_text() == "precious"


async def test_a_path_too_long_is_one_clear_line() -> None:
    with pytest.raises(KaError) as caught:
        listen("", "/tmp/" + "x" * 200)
    assert "too long" in str(caught.value)


# ---------------------------------------------------------------- fencing


class Disk:
    """A handler whose work nobody can interrupt, as a write in a thread cannot be."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.go = trio.Event()
        self.started = trio.Event()

    def __call__(self, connection: Connection, body: bytes, _p: memoryview | None) -> object:
        return self.write(connection.number) if body == b"write" else self.read(connection.number)

    def read(self, number: int) -> Reply:
        self.events.append(f"read by {number}")
        return Reply(b"")

    async def write(self, number: int) -> Reply:
        self.started.set()
        with trio.move_on_after(LONG_S, shield=True):
            await self.go.wait()
        self.events.append(f"write by {number}")
        return Reply(b"")


async def test_a_newer_connection_waits_for_what_the_older_still_does(tmp_path: Path) -> None:
    disk, who = Disk(), identity()
    async with opened(tmp_path / "s", disk) as peers:  # type: ignore[arg-type]
        first = await peers.client(who=who, number=1)
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                error = await failure(lambda: first.call(b"write", timeout=LONG_S))
                assert error.code is Code.UNREACHABLE

            async def read(number: int) -> None:
                connection = await peers.client(who=who, number=number)
                try:
                    await connection.call(b"read", timeout=LONG_S)
                except KaError as error:
                    assert error.code is Code.UNREACHABLE  # noqa: PT017 (when it is superseded)
                    assert number == 2

            nursery.start_soon(write)
            await disk.started.wait()
            nursery.start_soon(read, 2)
            await first.closed.wait()
            nursery.start_soon(read, 3)
            await wait_all_tasks_blocked(0.01)
            other = await peers.client()
            await other.call(b"read", timeout=LONG_S)
            assert disk.events == ["read by 1"], "only the other client gets on"
            disk.go.set()
        assert disk.events == ["read by 1", "write by 1", "read by 3"]


async def test_a_connection_that_is_not_newer_is_turned_away(tmp_path: Path) -> None:
    disk, who = Disk(), identity()
    async with opened(tmp_path / "s", disk) as peers:  # type: ignore[arg-type]
        newest = await peers.client(who=who, number=5)
        await newest.call(b"read", timeout=LONG_S)
        for number in (4, 5):
            zombie = await peers.client(who=who, number=number)
            error = await failure(lambda: zombie.call(b"read", timeout=LONG_S))  # noqa: B023
            assert error.code is Code.UNREACHABLE
        await newest.call(b"read", timeout=LONG_S)
        assert disk.events == ["read by 5", "read by 5"]
        newest.close()
        await (await peers.server_end()).ended.wait()
        await wait_all_tasks_blocked(0.01)
        await (await peers.client(who=who, number=5)).call(b"read", timeout=LONG_S)


# ---------------------------------------------------------------- trouble in one connection


async def test_a_bug_in_the_servers_greeting_does_not_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "s") as peers:
        monkeypatch.setattr(peers, "connections", None)  # appending to it will raise
        client = await peers.client()
        assert (await failure(lambda: client.call(b"", timeout=LONG_S))).code is Code.UNREACHABLE
        monkeypatch.setattr(peers, "connections", [])
        client = await peers.client()
        assert (await client.call(b"fine", timeout=LONG_S))[0] == b"fine"


async def test_stopping_the_server_closes_strangers_and_peers(peers: Peers) -> None:
    raw = Raw(await peers.connect_raw())
    await raw.send(b"K")
    client = await peers.client()
    await peers.stop()
    assert await raw.ended()
    await client.ended.wait()


async def test_a_refusal_is_said_before_the_connection_ends(peers: Peers) -> None:
    raw = Raw(await peers.connect_raw())
    await raw.send(encode_frame(Kind.HANDSHAKE, 0, b"\xc1"))
    frame = await raw.frame()
    assert frame.kind is Kind.ERROR
    assert decode_error(frame.body).code is Code.PROTOCOL
    assert await raw.ended()
