"""A cell, seen from inside: the first two processes of a system's namespaces.

The first one only reaps orphans, as init does: a daemon that has ended must be gone for those who
wait for that, and what processor time it used stays readable as the first process's.  The second
starts the system, then answers one question at a time: run these workloads of a group.  Around
each workload it makes things equal: everything written before is on the disk, for a cold one the
mount was given up, the kernel's caches dropped and the mount retaken; and it reads what processor
time the system used meanwhile.

The namespace's other processes end with the first one, so it needs no clean-up of its own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import cpu
from bench.facts import tcp_congestion_control
from bench.load import Place
from bench.model import Sample, Scale
from bench.peers import Gluster, MooseFs
from bench.realtree import RealTree
from bench.systems import ADDRESS, Local, Nfsp, System, command
from bench.workloads import Workload, plan
from common.errors import Code, KaError, from_errno

__all__ = ["SYSTEMS", "run_group"]

SYSTEMS: dict[str, type[System]] = {
    system.name: system for system in (Local, Nfsp, Gluster, MooseFs)
}


def main() -> None:
    """Be init; in a child, serve questions.  When that ends, so does everything."""
    server = os.fork()
    if not server:
        _serve()
        return
    while os.wait()[0] != server:
        pass


def _serve() -> None:
    """Answer questions from standard input until it ends; the first one is: start."""
    # What programs started from here print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    system: System | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if system is None:
                system, answer = _start()
            else:
                answer = _measure(system, question)
        except (KaError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers)


def _start() -> tuple[System, dict[str, Any]]:
    command("ip", "link", "set", "lo", "up")
    command("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
    system = SYSTEMS[sys.argv[1]](Path(sys.argv[2]))
    system.start()
    return system, {"version": system.version(), "tcp_cc": tcp_congestion_control()}


def _measure(system: System, question: dict[str, Any]) -> dict[str, Any]:
    tree = question["tree"]
    samples = run_group(
        system,
        question["group"],
        question["selected"],
        run=question["run"],
        scale=Scale(**question["scale"]),
        tree=RealTree(Path(tree["archive"]), tree["entry_count"], tree["size_bytes"]),
    )
    return {"samples": [asdict(sample) for sample in samples]}


def run_group(
    system: System, group: str, selected: list[str], *, run: int, scale: Scale, tree: RealTree
) -> list[Sample]:
    """Run *group* in a new directory of *system*; return the samples of *selected*."""
    if system.has_mount and not system.root.is_mount():
        # Left so by an earlier failure; writing here would measure the local disk.
        raise KaError(Code.UNREACHABLE, f"nothing is mounted on {system.root} any more")
    directory = system.root / f"{group}-{run}"
    directory.mkdir()
    place = Place(directory, scale, tree, seed=run)
    samples = []
    for workload in plan(group, selected):
        try:
            sample = _run(system, workload, place, run)
            if workload.check is not None:
                workload.check(place)
        except KaError as error:
            raise KaError(error.code, f"{workload.name}: {error}") from error
        except OSError as error:
            raise KaError(from_errno(error.errno or 0), f"{workload.name}: {error}") from error
        if workload.name in selected:
            samples.append(sample)
    shutil.rmtree(directory)
    return samples


def _run(system: System, workload: Workload, place: Place, run: int) -> Sample:
    if workload.cold:
        system.unmount()
    os.sync()  # what others wrote before must not be written now
    if workload.cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        system.mount()
    client = system.client_pids()
    before, load_s, busy_s = cpu.snapshot(), -_load_cpu_s(), -cpu.machine_busy_s()
    timed = workload.run(place)
    busy_s += cpu.machine_busy_s()
    load_s += _load_cpu_s()
    used = cpu.used_between(before, cpu.snapshot(), client=client, load={os.getpid()})
    return Sample(
        system=system.name,
        workload=workload.name,
        run=run,
        seconds=timed.seconds,
        amount=timed.amount,
        cpu_servers_s=used.servers_s,
        cpu_client_s=used.client_s,
        cpu_load_s=load_s,
        cpu_elsewhere_s=max(0.0, busy_s - load_s - used.servers_s - used.client_s),
    )


def _load_cpu_s() -> float:
    """Return the time of this process and of the workers it has waited for."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime


if __name__ == "__main__":
    main()
