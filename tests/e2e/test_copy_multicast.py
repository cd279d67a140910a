"""A multicast copy between network namespaces joined by a bridge: sent once, and always whole."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.netlab import NetLab
from bench.systems import command
from common.broadcast.node import HopOptions
from common.broadcast.topology import Kind
from tests.support.transfers import CHUNK_SIZE, Processes, random_file, shape

NODES = 6
SIZE = 8 << 20
RATE_MBIT = 40.0
OPTIONS = HopOptions(expected_rate=RATE_MBIT * 1e6 / 8)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nft") is None,
    reason="namespaces and filters need root, iproute2 and nftables",
)


@pytest.fixture
def lab() -> Iterator[NetLab]:
    with NetLab((NODES + 1,), rate_mbit=RATE_MBIT) as found:
        yield found


@contextmanager
def copying(lab: NetLab, directory: Path, options: HopOptions = OPTIONS) -> Iterator[Processes]:
    def target(rank: int) -> Path:
        return directory / f"out{rank}"

    kind = shape(Kind.MULTICAST, NODES)
    with Processes(kind, directory / "source", target, options, lab=lab) as processes:
        yield processes


def drop(lab: NetLab, node: int, percent: int) -> None:
    """Let a node lose multicast datagrams: not IGMP, nor anything else."""
    share = f"numgen random mod 100 < {percent} " if percent < 100 else ""
    rules = (
        "add table ip loss",
        "add chain ip loss in { type filter hook input priority 0; }",
        f"add rule ip loss in ip daddr 239.255.0.0/16 ip protocol udp {share}drop",
    )
    for rule in rules:
        command(*lab.inside(node, "nft", rule))


def check(directory: Path, data: bytes, *without: int) -> None:
    for rank in range(1, NODES + 1):
        if rank not in without:
            assert (directory / f"out{rank}").read_bytes() == data


def test_the_head_sends_one_image_for_six_nodes(lab: NetLab, tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", SIZE)
    with copying(lab, tmp_path) as processes:
        before = lab.sent_size(0)
        assert processes.source.wait() == 0
        sent_size = lab.sent_size(0) - before
    check(tmp_path, data)
    assert SIZE < sent_size < 1.15 * SIZE
    assert not processes.source.report["notes"]


def test_with_loss_at_all_nodes_everybody_has_every_byte(lab: NetLab, tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", SIZE)
    for node in range(1, NODES + 1):
        drop(lab, node, 3)
    with copying(lab, tmp_path) as processes:
        before = lab.sent_size(0)
        assert processes.source.wait() == 0
        sent_size = lab.sent_size(0) - before
    check(tmp_path, data)
    # Three of a hundred for each of six nodes: much less than a second time everything.
    assert sent_size < 1.6 * SIZE


@pytest.mark.parametrize("deaf", [(2,), (1, 2, 3, 4, 5, 6)])
def test_who_is_shut_off_from_multicast_is_served_by_connections(
    lab: NetLab, tmp_path: Path, deaf: tuple[int, ...]
) -> None:
    data = random_file(tmp_path / "source", SIZE)
    for node in deaf:
        drop(lab, node, 100)
    with copying(lab, tmp_path) as processes:
        assert processes.source.wait() == 0
        notes = processes.source.report["notes"]
    check(tmp_path, data)
    assert notes == {str(node): "multicast did not bring 100 % of the data" for node in deaf}


@pytest.mark.parametrize("rank", [1, 4])
def test_a_receiver_that_is_stopped_does_not_hold_the_others(
    lab: NetLab, tmp_path: Path, rank: int
) -> None:
    data = random_file(tmp_path / "source", SIZE)
    with copying(lab, tmp_path) as processes:
        before = lab.sent_size(0)
        processes.nodes[rank].wait_for(SIZE // CHUNK_SIZE // 4)
        processes.nodes[rank].send_signal(signal.SIGSTOP)
        assert processes.source.wait() == 2
        assert list(processes.source.report["others"]) == [str(rank)]
        for other, node in processes.nodes.items():
            if other != rank:
                assert node.wait() == 0
                assert node.report["stall_s"] < 2
        assert lab.sent_size(0) - before < 1.15 * SIZE
    check(tmp_path, data, rank)
