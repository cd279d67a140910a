"""Programs built with MPICH start under karun's PMI-1 server, on one node and on a tree of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.pmi_world import run_world

SOURCE = r"""
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
    int rank, size, sum;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (argc > 1 && rank == atoi(argv[1])) MPI_Abort(MPI_COMM_WORLD, 42);
    MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    printf("%d of %d: %d\n", rank, size, sum);
    MPI_Finalize();
    return 0;
}
"""

pytestmark = pytest.mark.skipif(shutil.which("mpicc.mpich") is None, reason="no MPICH (mpicc)")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("mpich")
    source = directory / "sum.c"
    source.write_text(SOURCE)
    subprocess.run(["mpicc.mpich", "-o", directory / "sum", source], check=True)
    return str(directory / "sum")


@pytest.mark.parametrize("ranks_per_node", [[1], [3], [2, 1], [1, 1, 2]])
def test_an_allreduce_sums_over_all_ranks(program: str, ranks_per_node: list[int]) -> None:
    size = sum(ranks_per_node)
    world = run_world([program], ranks_per_node)
    assert world.aborts == []
    assert world.codes == [0] * size
    assert [text.decode() for text in world.output] == [
        f"{rank} of {size}: {size * (size - 1) // 2}\n" for rank in range(size)
    ]


def test_mpi_abort_ends_the_run_with_its_code(program: str) -> None:
    world = run_world([program, "1"], [2, 1])
    assert [(one.rank, one.code) for one in world.aborts] == [(1, 42)]
    assert all(world.codes)
