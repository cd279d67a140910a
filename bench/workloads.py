"""The load: what is done to a file system, given nothing but a directory on it.

Each workload does a fixed amount of work and times only that; it prepares before and checks the
data after, outside the timed part.  A check that fails raises: a figure of a file system that
returned something else is not printed.

Workloads come in groups, in the order of WORKLOADS.  A group starts in an empty directory and one
workload uses what those it `needs` left there.  `cold` ones are run after every cache was dropped
(inside.py does that).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import large, small, tree
from bench.load import Place, Timed
from bench.model import Unit

__all__ = ["WORKLOADS", "Workload", "groups", "plan"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the tables."""

    name: str
    group: str
    unit: Unit
    meaning: str
    run: Callable[[Place], Timed]
    check: Callable[[Place], None] | None = None
    cold: bool = False
    needs: tuple[str, ...] = ()


WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "write", "large", Unit.BYTES,
        "one large file, 1 MiB at a time, then fsync and close",
        large.write_large,
    ),
    Workload(
        "read_cold", "large", Unit.BYTES,
        "the same file, 1 MiB at a time, after all caches were dropped",
        large.read_large, large.check_large, cold=True, needs=("write",),
    ),
    Workload(
        "read_warm", "large", Unit.BYTES,
        "the same file again, just read",
        large.read_large, needs=("write", "read_cold"),
    ),
    Workload(
        "randread_1", "large", Unit.READS,
        "4 KiB at random places of it, one at a time, cold",
        large.random_reads(1), cold=True, needs=("write",),
    ),
    Workload(
        "randread_16", "large", Unit.READS,
        "the same by 16 workers at once, cold",
        large.random_reads(16), cold=True, needs=("write",),
    ),
    Workload(
        "create_1", "small", Unit.FILES,
        "create, write 4 KiB, close; one worker, one directory",
        small.create("one", 1), small.check_sizes("one", 1),
    ),
    Workload(
        "create_8", "small", Unit.FILES,
        "the same by 8 workers, each in its own directory",
        small.create("eight", 8), small.check_sizes("eight", 8),
    ),
    Workload(
        "create_fsync", "small", Unit.FILES,
        "create, write 4 KiB, fsync, close; one worker",
        small.create("fsync", 1, fsync=True), small.check_sizes("fsync", 1),
    ),
    Workload(
        "stat_cold", "small", Unit.FILES,
        "list every directory and stat every entry of create_1 and create_8, cold",
        small.walk_stat, cold=True, needs=("create_1", "create_8"),
    ),
    Workload(
        "stat_warm", "small", Unit.FILES,
        "the same walk again at once",
        small.walk_stat, needs=("create_1", "create_8", "stat_cold"),
    ),
    Workload(
        "smallread_cold", "small", Unit.FILES,
        "open, read, close each file of create_8, cold; one worker",
        small.read_each, small.check_contents, cold=True, needs=("create_8",),
    ),
    Workload(
        "untar", "tree", Unit.FILES,
        "tar -x of a real tree (the archive is on the local disk)",
        tree.untar,
    ),
    Workload(
        "tar_cold", "tree", Unit.FILES,
        "tar -c of that tree into a pipe, cold",
        tree.tar_to_pipe, tree.check_tree, cold=True, needs=("untar",),
    ),
    Workload(
        "rm", "tree", Unit.FILES,
        "rm -rf of that tree",
        tree.remove, needs=("untar",),
    ),
)  # fmt: skip


def groups() -> list[str]:
    """Return the groups in the order in which they run."""
    return list(dict.fromkeys(workload.group for workload in WORKLOADS))


def plan(group: str, selected: Sequence[str]) -> list[Workload]:
    """Return what *group* has to run so that *selected* can, in order."""
    wanted: set[str] = set()
    for workload in reversed(WORKLOADS):  # what is needed always comes earlier
        if workload.group == group and (workload.name in selected or workload.name in wanted):
            wanted |= {workload.name, *workload.needs}
    return [workload for workload in WORKLOADS if workload.name in wanted]
