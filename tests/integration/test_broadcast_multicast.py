"""Laws of a multicast pass over real sockets: once to all, and connections bring the rest."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from common.broadcast import casting, datagram, group
from common.broadcast.datagram import DatagramCodec, DatagramKind
from common.broadcast.depot import BEHIND_COUNT
from common.broadcast.node import HopOptions
from common.broadcast.sink import FileSink
from common.broadcast.topology import Kind
from common.broadcast.transfer import Progress
from common.errors import Code, KaError
from tests.support.transfers import (
    CHUNK_SIZE,
    Party,
    Processes,
    file_sinks,
    random_file,
    shape,
)

NODES = 5
CHUNKS = 160
SIZE = CHUNKS * CHUNK_SIZE - 5
EVERYBODY = (1 << NODES + 1) - 2
PACED = HopOptions(rate_limit=10e6)


def check_files(directory: Path, data: bytes, *without: int) -> None:
    for rank in range(1, NODES + 1):
        if rank not in without:
            assert (directory / f"out{rank}").read_bytes() == data


@contextmanager
def losing(monkeypatch: pytest.MonkeyPatch, every: int) -> Iterator[None]:
    """Let each socket that hears the group lose one in *every* datagrams."""
    decode = DatagramCodec.decode
    counts: dict[int, int] = {}

    def lose(codec: DatagramCodec, data: memoryview) -> datagram.Datagram | None:
        found = decode(codec, data)
        counts[id(codec)] = counts.get(id(codec), 0) + 1
        return None if counts[id(codec)] % every == 0 else found

    with monkeypatch.context() as patch:
        patch.setattr(DatagramCodec, "decode", lose)
        yield


async def copy(directory: Path, party: Party | None = None) -> tuple[int, dict[int, str]]:
    """Copy; return what has left the source, and the notes."""
    sent_size = 0

    def told(progress: Progress) -> None:
        nonlocal sent_size
        sent_size = progress.sent_size

    party = party or Party(shape(Kind.MULTICAST, NODES), PACED)
    sinks = file_sinks(directory, NODES)
    summary = await party.run(directory / "source", sinks, on_progress=told)
    assert summary.verified == EVERYBODY
    return sent_size, summary.notes


async def test_the_source_sends_everything_once_for_all(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", SIZE)
    sent_size, notes = await copy(tmp_path)
    check_files(tmp_path, data)
    assert SIZE <= sent_size < 1.1 * SIZE
    assert not notes


async def test_what_all_have_already_is_not_sent_again(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", SIZE)
    await copy(tmp_path)
    changed = data[: 100 * CHUNK_SIZE] + random_file(tmp_path / "source", CHUNK_SIZE, seed=2)
    changed += data[101 * CHUNK_SIZE :]
    (tmp_path / "source").write_bytes(changed)
    sent_size, _ = await copy(tmp_path)
    check_files(tmp_path, changed)
    assert CHUNK_SIZE <= sent_size < 3 * CHUNK_SIZE


async def test_lost_datagrams_are_sent_again_into_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_file(tmp_path / "source", SIZE)
    with losing(monkeypatch, 50):
        sent_size, _ = await copy(tmp_path)
    check_files(tmp_path, data)
    # A fiftieth for each node, at most; by connections it would be nearly all of it, again.
    assert sent_size < 1.3 * SIZE


@pytest.mark.parametrize("deaf", [(3,), (1, 2, 3, 4, 5)])
async def test_who_cannot_hear_is_served_by_connections_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: tuple[int, ...]
) -> None:
    data = random_file(tmp_path / "source", SIZE)
    monkeypatch.setattr(casting, "DEAF_S", 0.4 if len(deaf) == NODES else 3.0)
    listen, listener_count = group.open_listener, 0

    def open_listener(transfer_id: bytes, towards: str) -> socket.socket:
        nonlocal listener_count
        listener_count += 1
        if listener_count in deaf:
            raise KaError(Code.UNREACHABLE, "no multicast here")
        return listen(transfer_id, towards)

    monkeypatch.setattr(group, "open_listener", open_listener)
    _, notes = await copy(tmp_path)
    check_files(tmp_path, data)
    assert list(notes.values()) == ["multicast did not bring 100 % of the data"] * len(deaf)


async def test_where_the_source_cannot_send_connections_bring_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_sender(transfer_id: bytes, towards: str) -> socket.socket:
        raise KaError(Code.UNREACHABLE, "no multicast here")

    data = random_file(tmp_path / "source", SIZE)
    monkeypatch.setattr(group, "open_sender", open_sender)
    _, notes = await copy(tmp_path)
    check_files(tmp_path, data)
    assert set(notes) == set(range(1, NODES + 1))


async def test_what_strangers_send_into_the_group_does_nothing(tmp_path: Path) -> None:
    """Wrong data, and an early end, under a token that is not the transfer's."""
    data = random_file(tmp_path / "source", SIZE)
    party = Party(shape(Kind.MULTICAST, NODES), PACED)
    transfer = party.job.transfer_id
    codec = DatagramCodec(transfer, b"x" * 32)
    noise = codec.header(DatagramKind.DATA, 5, 0, bytes(1400)) + bytes(1400)
    end = codec.header(DatagramKind.OVER, 0, 0)
    async with trio.open_nursery() as nursery:

        async def disturb() -> None:
            with group.open_sender(transfer, party.job.addresses[1]) as stranger:
                while True:
                    for one in (noise, end, b"", b"KaM1", noise[:60]):
                        stranger.send(one)
                    await trio.sleep(0.001)

        nursery.start_soon(disturb)
        sent_size, notes = await copy(tmp_path, party)
        nursery.cancel_scope.cancel()
    check_files(tmp_path, data)
    assert sent_size < 1.1 * SIZE
    assert not notes


@pytest.mark.parametrize(("rank", "number"), [(3, signal.SIGSTOP), (1, signal.SIGKILL)])
def test_a_node_that_stops_or_dies_in_the_pass_holds_nobody_up(
    tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    data = random_file(tmp_path / "source", SIZE)
    with Processes(
        shape(Kind.MULTICAST, NODES),
        tmp_path / "source",
        lambda one: tmp_path / f"out{one}",
        HopOptions(rate_limit=5e6),
    ) as processes:
        processes.nodes[rank].wait_for(CHUNKS // 4)
        processes.nodes[rank].send_signal(number)
        assert processes.source.wait() == 2
        assert list(processes.source.report["others"]) == [str(rank)]
        for other, node in processes.nodes.items():
            if other != rank:
                assert node.wait() == 0
        assert processes.source.report["sent_size"] < 1.2 * SIZE
    check_files(tmp_path, data, rank)


class SlowSink(FileSink):
    """A disk that takes some time for each chunk, and is never written to but by the thread."""

    is_prompt = False
    most_count = 0

    def write(self, chunks: Sequence[tuple[int, memoryview]]) -> list[int]:
        self.most_count = max(self.most_count, len(chunks))
        time.sleep(0.02 * len(chunks))
        return super().write(chunks)


async def test_a_sink_that_cannot_follow_holds_little_and_holds_up_nobody(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", SIZE)
    party = Party(shape(Kind.MULTICAST, NODES), PACED)
    slow = SlowSink(str(tmp_path / "out5"))
    sinks = {**file_sinks(tmp_path, NODES), NODES: slow}
    verified_s: list[tuple[int, float]] = []

    def told(progress: Progress) -> None:
        if not verified_s or verified_s[-1][0] != progress.verified_count:
            verified_s.append((progress.verified_count, trio.current_time()))

    summary = await party.run(tmp_path / "source", sinks, on_progress=told)
    assert summary.verified == EVERYBODY
    check_files(tmp_path, data)
    others_s = next(now for count, now in verified_s if count >= NODES - 1)
    assert verified_s[-1][1] - others_s > 0.5  # the last one was behind, and alone in it
    assert slow.most_count <= BEHIND_COUNT + 2
