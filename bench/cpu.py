"""Processor time of a system's processes, from /proc.

A system runs in a pid namespace of its own with its own /proc, so "every process but the load
generator" is exactly the system: no pid file is trusted and no process is missed.  A process's
figure contains that of the children it has waited for (cutime, cstime); orphans are waited for by
the namespace's first process, whose figure is counted too.  So no daemon's time is lost when it
ends.

Resolution is one clock tick (10 ms) per process.  Kernel threads (write-back, journal) belong to
no namespace and are not counted, for any system.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ProcessTime",
    "Used",
    "children_of",
    "machine_busy_s",
    "parse_stat",
    "snapshot",
    "used_between",
]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessTime:
    """What one process has used so far."""

    pid: int
    parent: int
    ticks: int


@dataclass(frozen=True, slots=True)
class Used:
    """Seconds of processor time between two snapshots."""

    servers_s: float
    client_s: float


def parse_stat(text: str) -> ProcessTime:
    """Return the figures of one /proc/PID/stat; the name in it may hold spaces and parentheses."""
    pid, _, rest = text.partition(" (")
    fields = rest.rpartition(") ")[2].split()
    utime, stime, cutime, cstime = (int(fields[index]) for index in range(11, 15))
    return ProcessTime(int(pid), int(fields[1]), utime + stime + cutime + cstime)


def snapshot(proc: Path = Path("/proc")) -> dict[int, ProcessTime]:
    """Return every process of this pid namespace."""
    found = {}
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                process = parse_stat((proc / name / "stat").read_text(errors="replace"))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended between the listing and the reading
            found[process.pid] = process
    return found


def machine_busy_s(proc: Path = Path("/proc")) -> float:
    """Return the seconds all processors together have been busy, time stolen by a host included."""
    with (proc / "stat").open() as file:
        values = [int(value) for value in file.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = values
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def children_of(pid: int, processes: Mapping[int, ProcessTime]) -> set[int]:
    """Return the pids whose parent is *pid*."""
    return {process.pid for process in processes.values() if process.parent == pid}


def used_between(
    before: Mapping[int, ProcessTime],
    after: Mapping[int, ProcessTime],
    *,
    client: Iterable[int],
    load: Iterable[int],
) -> Used:
    """Return what was used between two snapshots.

    *client* are the mount's processes; what descends from them counts as the client.  *load* are
    the load generator's own processes, left out.
    """
    left_out = set(load)
    roots = set(client)
    servers = clients = 0
    for sign, processes in ((-1, before), (1, after)):
        for pid, process in processes.items():
            if pid in left_out:
                continue
            if _descends(pid, roots, processes):
                clients += sign * process.ticks
            else:
                servers += sign * process.ticks
    # A process whose parent is the load generator vanishes with its time; never go below zero.
    return Used(max(0, servers) / _TICKS_PER_S, max(0, clients) / _TICKS_PER_S)


def _descends(pid: int, roots: set[int], processes: Mapping[int, ProcessTime]) -> bool:
    seen: set[int] = set()
    while pid not in roots:
        process = processes.get(pid)
        if process is None or pid in seen:
            return False
        seen.add(pid)
        pid = process.parent
    return True
