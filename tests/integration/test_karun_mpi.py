"""`karun run --mpi`: real MPICH programs on real agents, local ones and over ssh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.sshd import Sshd, addresses
from common.errors import KaError
from tests.integration.test_mpich import SOURCE
from tests.support.running import wait_until

pytestmark = pytest.mark.skipif(shutil.which("mpicc.mpich") is None, reason="no MPICH (mpicc)")

SUMS = {count: b": %d\n" % (count * (count - 1) // 2) for count in range(1, 25)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("mpi")
    source = directory / "sum.c"
    source.write_text(SOURCE)
    subprocess.run(["mpicc.mpich", "-o", directory / "sum", source], check=True)
    return str(directory / "sum")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "karun.entry", "run", "--mpi", *words]


def mpi(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*words), stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("nodes", "ranks", "units"),
    [
        ("n1", 1, ["n1"]),
        ("n[1-3]", 1, ["n1", "n2", "n3"]),
        ("n[1-2]", 2, ["n1:0", "n1:1", "n2:2", "n2:3"]),
    ],
)
def test_an_allreduce_sums_over_all_ranks(
    program: str, nodes: str, ranks: int, units: list[str]
) -> None:
    found = mpi("--via", "local", "-w", nodes, "--ranks", str(ranks), "--", program)
    assert (found.returncode, found.stderr) == (0, b"")
    size = len(units)
    expected = [
        f"{unit}: {rank} of {size}".encode() + SUMS[size] for rank, unit in enumerate(units)
    ]
    assert sorted(found.stdout.splitlines(keepends=True)) == expected


def test_an_abort_ends_all_ranks_and_the_run_with_its_code(program: str) -> None:
    found = mpi("--via", "local", "-w", "n[1-2]", "--ranks", "2", "--", program, "1")
    assert found.returncode == 42
    assert found.stderr.splitlines()[-2:] == [
        b"karun: n1:1: exited with exit code 42",
        b"karun: n2:[2-3],n1:0: stopped (rank 1 called MPI_Abort)",
    ]


@pytest.mark.parametrize(
    ("what", "code", "why"),
    [
        ("exit 9", 9, "ended with exit code 9 before MPI_Init"),
        ("exit 0", 1, "ended while others wait for it in a barrier"),
        ("kill -9 $$", 137, "was killed by signal 9 before MPI_Init"),
    ],
)
def test_a_rank_that_is_gone_before_init_ends_the_run(
    program: str, what: str, code: int, why: str
) -> None:
    script = f"[ $PMI_RANK = 1 ] && {what}; exec {program}"
    found = mpi("--via", "local", "-w", "n[1-3]", "--", script)
    assert found.returncode == code
    assert f"karun: n[1,3]: stopped (rank 1 {why})" in found.stderr.decode().splitlines()


def test_a_program_that_is_not_there_and_one_without_mpi_end_as_they_do() -> None:
    assert mpi("--via", "local", "-w", "n[1-2]", "--", "no-such-program").returncode == 127
    found = mpi("--via", "local", "-w", "n[1-2]", "--", "echo", "hello")
    assert (found.returncode, sorted(found.stdout.split(b"\n"))) == (
        0, [b"", b"n1: hello", b"n2: hello"],
    )  # fmt: skip


def test_the_time_limit_is_for_the_whole_program() -> None:
    found = mpi("--via", "local", "-w", "n[1-2]", "-u", "0.5", "--", "sleep", "1000")
    assert found.returncode == 255
    assert found.stderr == b"karun: n[1-2]: command timed out (after 0.5 s)\n"


def test_each_rank_has_a_record_and_rank_0_the_input() -> None:
    found = subprocess.run(
        command("--via", "local", "-w", "n[1-2]", "--json", "--ranks", "2", "--", "cat"),
        input=b"for the first", capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    *records, summary = map(json.loads, found.stdout.splitlines())
    assert {one["node"]: one["stdout"] for one in records} == {
        "n1:0": "for the first", "n1:1": "", "n2:2": "", "n2:3": "",
    }  # fmt: skip
    assert summary["codes"] == {"0": "n1:[0-1],n2:[2-3]"}


def test_a_lost_node_ends_the_run(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 0.5; echo $PMI_RANK $PPID >> {pids}; exec sleep 1000"
    words = command("--via", "local", "-w", "n[1-3]", "--", "sh", "-c", script)
    running = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: pids.exists() and pids.read_text().count("\n") == 3, "the ranks")
    agents = dict(line.split() for line in pids.read_text().splitlines())
    os.kill(int(agents["2"]), signal.SIGKILL)
    _out, errors = running.communicate(timeout=60)
    assert running.returncode == 255
    assert b"karun: n[1-2]: stopped (rank 2 was lost)" in errors.splitlines()


def test_ranks_start_on_all_nodes_or_on_none(tmp_path: Path, program: str) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  ProxyCommand false\n")
    found = mpi("--ssh-config", str(config), "-w", "n[1-2]", "--", program)
    assert found.returncode == 255
    assert b"unreachable" in found.stderr


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    try:
        with Sshd(tmp_path_factory.mktemp("sshd")) as running:
            yield running
    except KaError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("tree", ["never", "always"])
def test_ranks_find_each_other_over_ssh_and_through_relays(
    sshd: Sshd, program: str, tree: str
) -> None:
    nodes = ",".join(addresses(6))
    found = mpi(
        "--ssh-config", str(sshd.config), "--tree", tree, "-t", "60", "-f", "2", "-w", nodes,
        "--ranks", "2", "--", program,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, b"")
    lines = found.stdout.splitlines(keepends=True)
    assert len(lines) == 12
    assert all(line.endswith(SUMS[12]) for line in lines)
