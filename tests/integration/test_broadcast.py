"""Laws of a transfer over real sockets: everybody has every byte, or says why not."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from common.broadcast.briefing import decode_plan
from common.broadcast.manifest import Algorithm
from common.broadcast.node import HopOptions
from common.broadcast.outcome import Verdict
from common.broadcast.sink import FileSink
from common.broadcast.source import Source, spool_command
from common.broadcast.store import Sink
from common.broadcast.stream_sink import CommandSink, DeviceSink
from common.broadcast.topology import Kind
from common.errors import Code, KaError
from tests.support.transfers import (
    CHUNK_SIZE,
    Party,
    Processes,
    damaging,
    file_sinks,
    random_file,
    shape,
)

KINDS = [Kind.CHAIN, Kind.BINARY, Kind.STRIPES]
NODES = 5
QUICK = HopOptions(lost_grace_s=0.3)


def all_but(*ranks: int) -> int:
    return sum(1 << rank for rank in range(1, NODES + 1) if rank not in ranks)


def check_files(directory: Path, data: bytes, *without: int) -> None:
    for rank in range(1, NODES + 1):
        path = directory / f"out{rank}"
        if rank in without:
            assert not path.exists()
        else:
            assert path.read_bytes() == data
            assert not list(directory.glob(f".ka-part-out{rank}"))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE, 20 * CHUNK_SIZE + 17])
async def test_every_node_has_every_byte(tmp_path: Path, kind: Kind, size: int) -> None:
    data = random_file(tmp_path / "source", size)
    summary = await Party(shape(kind, NODES)).run(tmp_path / "source", file_sinks(tmp_path, NODES))
    assert summary.exit_code == 0
    assert summary.verified == all_but()
    check_files(tmp_path, data)


async def test_blake2b_serves_where_xxhash_is_missing(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 5 * CHUNK_SIZE)
    summary = await Party(shape(Kind.CHAIN, NODES)).run(
        tmp_path / "source", file_sinks(tmp_path, NODES), algorithm=Algorithm.BLAKE2B
    )
    assert summary.exit_code == 0
    check_files(tmp_path, data)


async def test_mode_and_time_arrive(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 100)
    (tmp_path / "source").chmod(0o4751)
    os.utime(tmp_path / "source", ns=(1, 1_234_567_890_123_456_789))
    await Party(shape(Kind.CHAIN, 1)).run(tmp_path / "source", file_sinks(tmp_path, 1))
    status = (tmp_path / "out1").stat()
    assert status.st_mode & 0o7777 == 0o4751
    assert status.st_mtime_ns == 1_234_567_890_123_456_789


async def test_what_a_command_prints_goes_into_commands(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 9 * CHUNK_SIZE + 5)
    spool = spool_command(["cat", str(tmp_path / "source")], str(tmp_path))
    sinks: dict[int, Sink] = {
        rank: CommandSink(["cp", "/dev/stdin", str(tmp_path / f"out{rank}")], str(tmp_path))
        for rank in (1, 2)
    }
    summary = await Party(shape(Kind.CHAIN, 2)).run(Source(spool), sinks)
    assert summary.exit_code == 0
    for rank in (1, 2):
        assert (tmp_path / f"out{rank}").read_bytes() == (tmp_path / "source").read_bytes()


async def test_holes_do_not_travel_and_are_emptied_on_a_device(tmp_path: Path) -> None:
    size = 9 * CHUNK_SIZE + 3
    with (tmp_path / "source").open("wb") as file:
        file.write(b"start")
        file.seek(9 * CHUNK_SIZE)
        file.write(b"end")
    device = tmp_path / "device"
    device.write_bytes(b"\xff" * (10 * CHUNK_SIZE))
    sent = []
    summary = await Party(shape(Kind.CHAIN, 1)).run(
        tmp_path / "source",
        {1: DeviceSink(str(device))},
        on_progress=lambda progress: sent.append(progress.sent_size),
    )
    assert summary.exit_code == 0
    written = device.read_bytes()
    assert written[:size] == (tmp_path / "source").read_bytes()
    assert written[size:] == b"\xff" * (10 * CHUNK_SIZE - size)
    assert max(sent) < CHUNK_SIZE
    assert device.stat().st_blocks * 512 < 3 * CHUNK_SIZE


async def test_holes_do_not_travel_and_stay_holes(tmp_path: Path) -> None:
    with (tmp_path / "source").open("wb") as file:
        file.write(b"start")
        file.seek(1 << 30)
        file.write(b"end")
    sent = []
    await Party(shape(Kind.CHAIN, 1)).run(
        tmp_path / "source",
        file_sinks(tmp_path, 1),
        on_progress=lambda progress: sent.append(progress.sent_size),
    )
    status = (tmp_path / "out1").stat()
    assert status.st_size == (1 << 30) + 3
    assert status.st_blocks * 512 < 1 << 20
    assert max(sent, default=0) < 1 << 20


# ------------------------------------------------------------ faults


@pytest.mark.parametrize("rank", [1, 3, NODES])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_failing_command_costs_its_own_node_alone(
    tmp_path: Path, kind: Kind, rank: int
) -> None:
    data = random_file(tmp_path / "source", 40 * CHUNK_SIZE)
    sinks = file_sinks(tmp_path, NODES)
    sinks[rank] = CommandSink(["sh", "-c", "head -c 500000 >/dev/null; exit 3"], str(tmp_path))
    summary = await Party(shape(kind, NODES)).run(tmp_path / "source", sinks)
    assert summary.exit_code == 2
    assert summary.verified == all_but(rank)
    assert summary.others[rank].verdict is Verdict.FAILED
    assert summary.others[rank].reason == "sh ended with 3"
    check_files(tmp_path, data, rank)


@pytest.mark.parametrize("rank", [1, 3, NODES])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_destination_that_cannot_be_written_is_reported(
    tmp_path: Path, kind: Kind, rank: int
) -> None:
    data = random_file(tmp_path / "source", 4 * CHUNK_SIZE)
    sinks = file_sinks(tmp_path, NODES)
    sinks[rank] = FileSink(str(tmp_path / "missing" / "file"))
    summary = await Party(shape(kind, NODES)).run(tmp_path / "source", sinks)
    assert summary.verified == all_but(rank)
    assert "No such file" in summary.others[rank].reason
    check_files(tmp_path, data, rank)


@pytest.mark.parametrize("rank", [1, 3, NODES])
@pytest.mark.parametrize("kind", KINDS)
async def test_damage_on_the_way_is_found_and_mended(tmp_path: Path, kind: Kind, rank: int) -> None:
    data = random_file(tmp_path / "source", 40 * CHUNK_SIZE)
    party = Party(shape(kind, NODES))
    parents = {tree.parents[rank] for tree in party.job.topology.trees}
    async with trio.open_nursery() as nursery:
        release = trio.Event()

        async def stand_between(
            parent: int, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
        ) -> None:
            async with damaging(party.job.addresses[parent], 3 * CHUNK_SIZE + 1000) as address:
                task_status.started(address)
                await release.wait()

        for parent in parents:
            address = await nursery.start(stand_between, parent)
            party.calls_through(rank, parent, address)
        summary = await party.run(tmp_path / "source", file_sinks(tmp_path, NODES))
        release.set()
    assert summary.exit_code == 0
    check_files(tmp_path, data)


async def test_nodes_that_never_come_are_named_and_the_others_served(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 4 * CHUNK_SIZE)
    sinks = file_sinks(tmp_path, NODES)
    del sinks[2]
    party = Party(shape(Kind.CHAIN, NODES), QUICK)
    for sock in party.sockets[2]:
        sock.close()
    summary = await party.run(tmp_path / "source", sinks)
    assert summary.exit_code == 2
    assert summary.verified == all_but(2)
    assert summary.others[2].verdict is Verdict.LOST
    check_files(tmp_path, data, 2)


async def test_when_nobody_comes_the_exit_code_says_so(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 10)
    party = Party(shape(Kind.CHAIN, 2), QUICK)
    for sockets in party.sockets[1:]:
        for sock in sockets:
            sock.close()
    summary = await party.run(tmp_path / "source", {})
    assert summary.exit_code == 1
    assert set(summary.others) == {1, 2}


async def test_a_source_that_changes_meanwhile_ends_the_transfer(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 200 * CHUNK_SIZE)
    party = Party(shape(Kind.CHAIN, 1), replace(QUICK, orphan_s=1.0))

    class ChangingSink(FileSink):
        def put(self, chunk: int, at: int, part: memoryview) -> None:
            with (tmp_path / "source").open("r+b") as file:
                file.seek(150 * CHUNK_SIZE)
                file.write(b"changed")
            super().put(chunk, at, part)

    with pytest.raises(ExceptionGroup) as caught:
        await party.run(tmp_path / "source", {1: ChangingSink(str(tmp_path / "out1"))})
    error = caught.value.exceptions[0]
    assert isinstance(error, KaError)
    assert "changed" in str(error)
    assert not (tmp_path / "out1").exists()


# ------------------------------------------------------------ strangers and forgeries


async def test_without_the_token_there_is_nothing_to_be_had(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 4 * CHUNK_SIZE)
    party = Party(shape(Kind.CHAIN, 2), replace(QUICK, orphan_s=1.0))
    party.jobs[1] = replace(party.job, token=b"x" * 32)
    summary = await party.run(tmp_path / "source", file_sinks(tmp_path, 2))
    assert summary.verified == 1 << 2
    error = party.results[1]
    assert isinstance(error, KaError)
    assert error.code is Code.AUTH
    assert not (tmp_path / "out1").exists()


async def test_a_node_of_another_transfer_is_turned_away(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 4 * CHUNK_SIZE)
    party = Party(shape(Kind.CHAIN, 2), QUICK)
    party.jobs[2] = replace(party.job, transfer_id=bytes(16))
    summary = await party.run(tmp_path / "source", file_sinks(tmp_path, 2))
    assert summary.verified == 1 << 1
    error = party.results[2]
    assert isinstance(error, KaError)
    assert error.code is Code.WRONG_CLUSTER


def test_a_plan_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 3 * CHUNK_SIZE)
    source = Source(str(tmp_path / "source"))
    source.scan()
    transfer_id, token = bytes(range(16)), b"t" * 32
    plan = source.make_plan(
        transfer_id, token, name="x", chunk_size=CHUNK_SIZE, algorithm=Algorithm.XXH3
    )
    source.close()
    assert decode_plan(plan.encoded, token, transfer_id).manifest == plan.manifest
    for position in range(len(plan.encoded)):
        forged = bytearray(plan.encoded)
        forged[position] ^= 1
        with pytest.raises(KaError) as caught:
            decode_plan(bytes(forged), token, transfer_id)
        assert caught.value.code in (Code.AUTH, Code.PROTOCOL)


BARE = """
import runpy, sys
sys.modules["xxhash"] = sys.modules["lmdb"] = None
import msgpack
assert msgpack.Packer.__module__ == "msgpack.fallback"
sys.argv[0] = "node"
runpy.run_module("common.broadcast", run_name="__main__")
"""


def test_a_node_with_nothing_but_an_interpreter_takes_part(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 3 * CHUNK_SIZE + 1)
    processes = Processes(
        shape(Kind.CHAIN, 2),
        tmp_path / "source",
        lambda rank: tmp_path / f"out{rank}",
        QUICK,
        interpreter=["env", "MSGPACK_PUREPYTHON=1", sys.executable, "-c", BARE],
        algorithm=Algorithm.BLAKE2B,
    )
    with processes:
        assert processes.source.wait() == 0
    for rank in (1, 2):
        assert (tmp_path / f"out{rank}").read_bytes() == data
