"""The door of a run: who knocks without the token, or speaks nonsense, gets nothing.

And connectors that need no network of their own: network namespaces, and rsh as a program.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import karun
from karun.agent import frames, proof
from karun.agent.hub import STRANGERS_MAX, Hub
from karun.orders import Invocation
from karun.roster import Roster, State
from tests.support.karun import Collect
from tests.support.volumes import until


def door(run: karun.Run) -> int:
    """The port at which the head takes lost nodes back."""
    return run.engine._hub.ancestors[0][1]


async def said(stream: trio.SocketStream) -> list[tuple[int, int, bytes]]:
    """All frames until the other side closes."""
    decoder = frames.Decoder()
    found: list[tuple[int, int, bytes]] = []
    try:
        async for data in stream:
            found += decoder.feed(bytes(data))
    except trio.BrokenResourceError:
        pass
    return found


def proof_with(token: bytes) -> Callable[[bytes], bytes]:
    def answer(challenge: bytes) -> bytes:
        payload = proof.prove(token, 0, challenge, os.urandom(proof.NONCE_SIZE))
        return frames.encode(frames.PROVE, 0, payload)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        proof_with(bytes(32)),
        lambda _: frames.encode(frames.ATTACH, 0, frames.pack(b"i", 1, 0, 0, b"", 1)),
        lambda _: frames.encode(frames.EVENT, 0, b"\xff" * 100),
        lambda _: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        lambda _: b"\xff" * 4096,
    ],
)
async def test_a_stranger_gets_a_challenge_and_no_more(answer: Callable[[bytes], bytes]) -> None:
    async with karun.Run(["a", "b"], "local") as run:
        await run.launched()
        async with await trio.open_tcp_stream("127.0.0.1", door(run)) as stream:
            decoder = frames.Decoder()
            challenges = list(decoder.feed(bytes(await stream.receive_some(4096))))
            assert [kind for kind, _, _ in challenges] == [frames.CHALLENGE]
            await stream.send_all(answer(challenges[0][2]))
            with trio.fail_after(10):
                assert await said(stream) == []
        outcomes = await run.command(["true"])
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]


async def test_who_holds_the_token_is_answered_with_a_proof() -> None:
    async with karun.Run(["a"], "local") as run:
        await run.launched()
        token = run.engine._hub._setup.token
        async with await trio.open_tcp_stream("127.0.0.1", door(run)) as stream:
            decoder = frames.Decoder()
            ((_, _, challenge),) = decoder.feed(bytes(await stream.receive_some(4096)))
            nonce = os.urandom(proof.NONCE_SIZE)
            payload = proof.prove(token, 0, challenge, nonce)
            await stream.send_all(frames.encode(frames.PROVE, 0, payload))
            ((kind, _, accept),) = decoder.feed(bytes(await stream.receive_some(4096)))
        assert kind == frames.ACCEPT
        assert proof.accepted(token, 0, challenge, nonce, accept) == frames.HEAD


async def test_a_word_of_a_node_that_a_later_one_has_overtaken_does_not_lead_back() -> None:
    """On two connections, as when it moves: it is heard on the second, and only there."""
    async with karun.Run(["a"], "local") as run:
        await run.launched()
        hub = run.engine._hub
        (first,) = hub.children
        incarnation = run.engine.roster._incarnations[0]
        assert await run.move() == []
        second = hub._routes[0]
        assert second is not first
        late = frames.pack(incarnation, 1, 0, frames.HEAD, b"", 0)
        first.frame(first, frames.ATTACH, 0, late)
        assert hub._routes[0] is second
        with trio.fail_after(30):
            outcomes = await run.command(["true"])
    assert [outcome.exit_code for outcome in outcomes] == [0]


async def test_words_put_into_a_connection_are_not_obeyed_and_end_it(tmp_path: Path) -> None:
    """As somebody on the way would, who has not got the token."""
    async with karun.Run(["a", "b"], "local") as run:
        await run.launched()
        assert await run.move() == []
        engine, hub = run.engine, run.engine._hub
        channel = next(one for one in hub.children if one.peer == 0)
        words = Invocation(("touch", str(tmp_path / "touched"))).fields()
        _, order = Roster(2).order(frames.COMMAND, *words, b"")
        os.write(channel._write_fd, frames.encode(frames.ORDER, 0, order))
        await until(lambda: not channel.open, "the node to hang up")
        await until(lambda: engine.roster.states[0] is State.JOINED, "the node to come back")
        outcomes = await run.command(["true"])
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert not (tmp_path / "touched").exists()


async def test_many_strangers_do_not_keep_a_run_from_its_work() -> None:
    async with karun.Run(["a", "b"], "local") as run:
        await run.launched()
        knocking = [
            await trio.open_tcp_stream("127.0.0.1", door(run))
            for _ in range(STRANGERS_MAX + 16)
        ]
        outcomes = await run.command(["true"])
        assert len(run.engine._hub._strangers) <= STRANGERS_MAX
        for one in knocking:
            await one.aclose()
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]


async def test_without_descriptors_a_door_stays_shut_for_a_moment_and_does_not_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    knocks: list[int] = []
    knock = Hub._knock

    def counted(hub: Hub, events: int) -> None:
        knocks.append(events)
        knock(hub, events)

    monkeypatch.setattr(Hub, "_knock", counted)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with karun.Run(["a", "b"], "local") as run:
        await run.launched()
        with socket.create_connection(("127.0.0.1", door(run))) as stranger:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                await trio.sleep(0.5)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert 1 < len(knocks) < 10
            stranger.settimeout(30)
            challenge = await trio.to_thread.run_sync(stranger.recv, 4096)
            assert next(iter(frames.Decoder().feed(challenge)))[0] == frames.CHALLENGE


async def test_an_agent_speaks_for_itself_only_and_is_out_when_it_says_what_none_says() -> None:
    async with karun.Run(["a", "b"], "local") as run:
        await run.launched()
        channels = {channel.peer: channel for channel in run.engine._hub.children}
        received = list(run.engine.roster._received)
        lie = frames.pack(1, 0, frames.LOST, 1, "a lie")
        channels[0].frame(channels[0], frames.EVENT, 1, lie)
        channels[0].frame(channels[0], frames.EVENT, 7, lie)
        assert run.engine.roster._received == received
        for payload in (b"", b"\xff", frames.pack(b"i", 1), frames.pack(b"i", "x", 0, 0, b"", 0)):
            with pytest.raises(frames.FrameError):  # on which the channel closes
                channels[1].frame(channels[1], frames.ATTACH, 1, payload)
        channels[1].frame(channels[1], frames.EVENT, 1, frames.pack(1, 0, frames.OUTPUT, "x"))
        first, second = await run.command(["true"])
    assert first.exit_code == 0
    assert (second.stage, second.reason) == (
        "lost", "said what no agent says: an event of kind 1 with 1 fields"
    )  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_network_namespace_is_a_node() -> None:
    name = f"ka{os.getpid()}"
    await trio.run_process(["ip", "netns", "add", name])
    try:
        sink = Collect()
        async with karun.Run([name], "netns") as run:
            await run.launched()
            assert await run.move() == [name], "there is no way by TCP, so it stays"
            await run.command(["readlink", "/proc/self/ns/net"], sink=sink)
    finally:
        await trio.run_process(["ip", "netns", "delete", name])
    assert sink.outputs[0, 1].strip() != os.fsencode(os.readlink("/proc/self/ns/net"))


async def test_rsh_is_given_the_command_as_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rsh = tmp_path / "rsh"
    rsh.write_text('#!/bin/sh\n[ "$1 $2" = "-l me" ] || exit 1\nexec sh -c "$4"\n')
    rsh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sink = Collect()
    async with karun.Run(["n1", "n2"], karun.connector("rsh", user="me")) as run:
        await run.command(["sh", "-c", "echo $KARUN_NODE"], sink=sink)
    assert [sink.outputs[rank, 1] for rank in (0, 1)] == [b"n1\n", b"n2\n"]
