"""The command: which systems run which workloads, in what order, and what comes of it.

Every system is started once and stays up; they take turns group by group, each time in another
order, so that a slow minute of the machine does not fall on one of them alone.  One that cannot
start or breaks off is reported and the others go on; the exit code then is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import facts, packages, realtree
from bench.cell import Cell, require_root
from bench.inside import SYSTEMS
from bench.model import Failure, Sample, Scale, parse_size
from bench.realtree import RealTree
from bench.report import elsewhere, render
from bench.scratch import scratch
from bench.workloads import WORKLOADS, groups, plan
from common.errors import Code, KaError

__all__ = ["Options", "main", "parse", "turns"]

_START_TIMEOUT_S = 120.0
_GROUP_TIMEOUT_S = 900.0
_SPARE_BYTES = 2 << 30
"""Left on the disk besides the large files: the trees, logs, what the stores preallocate."""

UNITS = {workload.name: workload.unit for workload in WORKLOADS}


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    systems: tuple[str, ...]
    workloads: tuple[str, ...]
    scale: Scale
    run_count: int
    base: Path
    json_file: Path | None
    may_install: bool


def parse(arguments: Sequence[str]) -> Options:
    """Return the options.  Raises KaError(USAGE); --help and --list exit."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Run the same workloads on nfsp, on peers and on the local disk.",
        epilog="example: python -m bench --systems local,nfsp --workloads large --runs 5",
    )
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="default: %(default)s")
    parser.add_argument("--workloads", default=",".join(groups()),
                        help="names or groups, see --list; default: all")  # fmt: skip
    parser.add_argument("--size", help="of the large file; default: 1GiB, with --quick 128MiB")
    parser.add_argument("--runs", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="small counts, to try things out")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), metavar="DIR",
                        help="where all systems store; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--no-install", action="store_true",
                        help="do not install the peers' Debian packages")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the workloads and exit")
    given = parser.parse_args(arguments)
    if given.list:
        for workload in WORKLOADS:
            print(f"{workload.group:<6} {workload.name:<15} {workload.meaning}")
        parser.exit()
    scale = Scale.quick() if given.quick else Scale()
    if given.size is not None:
        scale = replace(scale, size_bytes=parse_size(given.size))
    scale.validate()
    run_count = given.runs if given.runs is not None else (1 if given.quick else 3)
    if run_count < 1:
        raise KaError(Code.USAGE, "--runs must be at least 1")
    return Options(
        systems=_chosen(given.systems, "system", {name: (name,) for name in SYSTEMS}),
        workloads=_chosen(given.workloads, "workload", _workload_names()),
        scale=scale,
        run_count=run_count,
        base=given.scratch,
        json_file=given.json,
        may_install=not given.no_install,
    )


def _workload_names() -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in UNITS}
    for group in groups():
        names[group] = tuple(workload.name for workload in WORKLOADS if workload.group == group)
    return names


def _chosen(text: str, kind: str, known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    chosen: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in known:
            raise KaError(Code.USAGE, f"no {kind} {name!r}; there are: {', '.join(known)}")
        chosen.update(dict.fromkeys(known[name]))
    if not chosen:
        raise KaError(Code.USAGE, f"no {kind} given")
    return tuple(chosen)


def turns(systems: Sequence[str], turn: int) -> list[str]:
    """Return the order of turn number *turn*: nobody always comes first, or after the same one."""
    first = turn % len(systems)
    rotated = [*systems[first:], *systems[:first]]
    return rotated if turn // len(systems) % 2 == 0 else rotated[::-1]


class _Contest:
    """One run of the benchmark: the cells that are up, and what they gave."""

    def __init__(self, options: Options, directory: Path, stack: ExitStack) -> None:
        self._options = options
        self._directory = directory
        self._stack = stack
        self._cells: dict[str, Cell] = {}
        self.samples: list[Sample] = []
        self.failures: list[Failure] = []
        self.facts = facts.gather(directory)

    def start(self, name: str) -> None:
        """Start a system; note the failure if it cannot."""
        _say(f"starting {name}")
        try:
            packages.ensure(SYSTEMS[name].programs, may_install=self._options.may_install)
        except KaError as error:
            self._failed(name, "start", error)
            return
        cell = self._stack.enter_context(Cell(name, self._directory / name))
        try:
            answer = cell.ask({}, timeout_s=_START_TIMEOUT_S)
        except KaError as error:
            self._failed(name, "start", error)
            cell.close()  # half a system must not take time from the others
            return
        self._cells[name] = cell
        self.facts["TCP congestion control"] = answer["tcp_cc"]
        self.facts[name] = answer["version"]

    def measure(self) -> None:
        """Run every group of workloads, every run, on every system that is up."""
        tree = realtree.build(
            self._directory / "tree.tar",
            entries_max=self._options.scale.tree_entries_max,
            roots=realtree.sources(),
        )
        self.facts["real tree"] = f"{tree.entry_count:,} entries, {tree.size_bytes / 1e6:.1f} MB"
        turn = 0
        for run in range(1, self._options.run_count + 1):
            for group in groups():
                if not plan(group, self._options.workloads):
                    continue
                for name in turns(self._options.systems, turn):
                    if name in self._cells:
                        self._measure_group(name, group, run, tree)
                turn += 1

    def _measure_group(self, name: str, group: str, run: int, tree: RealTree) -> None:
        _say(f"run {run} of {self._options.run_count}, {group}: {name}")
        question = {
            "group": group,
            "selected": self._options.workloads,
            "run": run,
            "scale": asdict(self._options.scale),
            "tree": {**asdict(tree), "archive": str(tree.archive)},
        }
        try:
            answer = self._cells[name].ask(question, timeout_s=_GROUP_TIMEOUT_S)
        except KaError as error:
            self._failed(name, f"{group}, run {run}", error)
            if error.code in (Code.TIMEOUT, Code.UNREACHABLE):
                self._cells.pop(name).close()
            return
        self.samples += [Sample(**sample) for sample in answer["samples"]]

    def _failed(self, name: str, where: str, error: KaError) -> None:
        _say(f"{name} failed: {error}")
        self.failures.append(Failure(name, where, str(error)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_space(options: Options, directory: Path) -> None:
    # Once more than there are runs: some systems free deleted data late or keep it in a trash.
    needed = len(options.systems) * options.scale.size_bytes * (options.run_count + 1)
    needed += _SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise KaError(
            Code.ENOSPC,
            f"{needed / 1e9:.1f} GB are needed below {directory}, {free / 1e9:.1f} GB are free;"
            " give --scratch, a smaller --size, or fewer --runs",
        )


def _run(options: Options) -> int:
    require_root()
    with scratch(options.base) as directory, ExitStack() as stack:
        _check_space(options, directory)
        contest = _Contest(options, directory, stack)
        for name in options.systems:
            contest.start(name)
        contest.measure()
    share = elsewhere(contest.samples, os.cpu_count() or 1)
    contest.facts["taken elsewhere"] = f"{share:.0%} of the processors' time while timing"
    print(
        render(
            contest.samples,
            UNITS,
            systems=options.systems,
            facts=contest.facts,
            failures=contest.failures,
        )
    )
    if options.json_file is not None:
        document = {
            "facts": contest.facts,
            "scale": asdict(options.scale),
            "samples": [asdict(sample) for sample in contest.samples],
            "failures": [asdict(failure) for failure in contest.failures],
        }
        options.json_file.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if contest.failures else 0


def _on_signal(number: int, _frame: types.FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    try:
        return _run(parse(sys.argv[1:] if arguments is None else arguments))
    except KaError as error:
        _say(f"bench: {error}")
        return error.code.exit_code
    except KeyboardInterrupt:
        _say("bench: interrupted; everything was ended and removed")
        return 130
