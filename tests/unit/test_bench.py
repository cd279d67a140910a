"""The benchmark harness: what it computes, what it refuses, that it leaves nothing behind.

No peer is started here and no time is asserted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import cpu, large, load, realtree, report, small
from bench.cell import Cell
from bench.cpu import ProcessTime
from bench.facts import file_system_of
from bench.inside import SYSTEMS, run_group
from bench.load import Place
from bench.model import Failure, Sample, Scale, Unit, parse_size
from bench.realtree import RealTree
from bench.run import UNITS, main, parse, turns
from bench.scratch import scratch
from bench.systems import command, wait_until
from bench.workloads import WORKLOADS, groups, plan
from common.errors import Code, KaError

TINY = Scale(
    size_bytes=2 << 20, read_count=32, file_count=16, fsync_count=4, tree_entries_max=30
)  # fmt: skip
ROOT = Path(__file__).parents[2]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces needs root")


def sample(system: str, workload: str, seconds: float, *, run: int = 1, amount: int = 0) -> Sample:
    return Sample(system, workload, run, seconds, amount or 10**9, 0.5, 0.25, 0.1, 0.2)


@pytest.fixture
def tree(tmp_path: Path) -> RealTree:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    for index in range(20):
        (source / "deep" / f"file{index:02d}").write_bytes(os.urandom(index * 100))
    (source / "deep" / "link").symlink_to("file01")
    os.link(source / "deep" / "file03", source / "deep" / "er" / "hard")
    return realtree.build(tmp_path / "tree.tar", entries_max=30, roots=[source])


@pytest.fixture
def place(tmp_path: Path, tree: RealTree) -> Place:
    directory = tmp_path / "place"
    directory.mkdir()
    return Place(directory, TINY, tree, seed=1)


# --- sizes, scales, options -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 1 << 30), ("512 MiB", 512 << 20), ("10MB", 10**7), ("7", 7), ("2k", 2048)],
)
def test_size_is_read_with_its_suffix(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text())
def test_text_that_is_no_size_is_refused_with_usage(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except KaError as error:
        assert error.code is Code.USAGE  # noqa: PT017


@pytest.mark.parametrize(
    "arguments",
    [
        ["--systems", "local,nosuch"],
        ["--workloads", "nosuch"],
        ["--systems", ","],
        ["--size", "1000"],
        ["--size", "big"],
        ["--runs", "0"],
    ],
)
def test_wrong_option_is_refused_before_anything_starts(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == Code.USAGE.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_group_name_stands_for_its_workloads() -> None:
    chosen = parse(["--workloads", "rm,small"]).workloads
    assert chosen[0] == "rm"
    assert set(chosen[1:]) == {w.name for w in WORKLOADS if w.group == "small"}


def test_everything_runs_by_default() -> None:
    options = parse([])
    assert set(options.systems) == set(SYSTEMS)
    assert set(options.workloads) == set(UNITS)


# --- order ----------------------------------------------------------------------------------


def test_plan_puts_what_a_workload_needs_before_it() -> None:
    assert [w.name for w in plan("large", ["read_warm"])] == ["write", "read_cold", "read_warm"]
    assert [w.name for w in plan("tree", ["rm"])] == ["untar", "rm"]
    assert plan("tree", ["write"]) == []


def test_needs_name_earlier_workloads_of_the_same_group() -> None:
    for index, workload in enumerate(WORKLOADS):
        earlier = {w.name for w in WORKLOADS[:index] if w.group == workload.group}
        assert set(workload.needs) <= earlier


@given(st.integers(1, 5), st.integers(0, 40))
def test_every_turn_has_every_system_once(count: int, turn: int) -> None:
    systems = [f"s{index}" for index in range(count)]
    assert sorted(turns(systems, turn)) == systems


def test_every_system_comes_first_equally_often() -> None:
    firsts = [turns(["a", "b", "c"], turn)[0] for turn in range(6)]
    assert {first: firsts.count(first) for first in firsts} == {"a": 2, "b": 2, "c": 2}


# --- report ---------------------------------------------------------------------------------


def test_rate_is_the_median_and_spread_half_the_range() -> None:
    samples = [sample("nfsp", "write", s, run=r) for r, s in enumerate((1.0, 2.0, 10.0))]
    figure = report.summarise(samples, {"write": Unit.BYTES})["write", "nfsp"]
    assert figure.rate == pytest.approx(500)
    assert figure.spread == pytest.approx((1000 - 100) / 2 / 500)


def test_cpu_is_per_gigabyte_or_per_thousand_operations() -> None:
    samples = [
        sample("nfsp", "write", 1.0, amount=2 * 10**9),
        sample("nfsp", "rm", 1.0, amount=500),
    ]
    figures = report.summarise(samples, {"write": Unit.BYTES, "rm": Unit.FILES})
    assert figures["write", "nfsp"].servers_cpu == pytest.approx(0.25)
    assert figures["rm", "nfsp"].servers_cpu == pytest.approx(1.0)
    assert figures["rm", "nfsp"].client_cpu == pytest.approx(0.5)


def test_ratio_is_to_the_fastest_peer_and_never_to_ourselves() -> None:
    samples = [
        sample("local", "write", 0.1),
        sample("nfsp", "write", 0.5),
        sample("gluster", "write", 2.0),
        sample("moosefs", "write", 1.0),
    ]
    figures = report.summarise(samples, UNITS)
    assert report.best_peer(figures, "write") == "moosefs"
    assert report.ratio(figures, "write", "nfsp", "moosefs") == pytest.approx(2.0)
    assert report.ratio(figures, "write", "nfsp", "local") == pytest.approx(0.2)
    assert report.ratio(figures, "write", "nfsp", "nosuch") is None


def test_share_taken_elsewhere_is_of_all_processors() -> None:
    samples = [sample("nfsp", "write", 0.5), sample("local", "write", 0.5)]
    assert report.elsewhere(samples, processor_count=2) == pytest.approx(0.2)
    assert report.elsewhere([], processor_count=2) == 0


def test_report_shows_ratios_facts_and_failures() -> None:
    text = report.render(
        [sample("nfsp", "write", 0.5), sample("gluster", "write", 1.0)],
        UNITS,
        systems=["local", "nfsp", "gluster", "moosefs"],
        facts={"kernel": "Linux 6"},
        failures=[Failure("moosefs", "start", "no master")],
    )
    assert "kernel  Linux 6" in text
    row = next(line for line in text.splitlines() if line.startswith("write"))
    assert row.split() == [
        "write",
        "MB/s",
        "2,000",
        "±0%",
        "1,000",
        "±0%",
        "2.00",
        "(gluster)",
        "-",
    ]
    assert "moosefs, start: no master" in text
    assert "local" not in text.splitlines()[6]  # nothing was measured, so it has no column


def test_report_of_a_run_in_which_nothing_started_still_says_why() -> None:
    text = report.render(
        [], UNITS, systems=["nfsp"], facts={}, failures=[Failure("nfsp", "start", "no command")]
    )
    assert "nfsp, start: no command" in text


# --- processor time -------------------------------------------------------------------------


def test_stat_line_is_parsed_whatever_the_process_is_called() -> None:
    tail = "S 7 1 1 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 99 0 0"
    assert cpu.parse_stat(f"42 (a) b (c) {tail}") == ProcessTime(42, 7, 127)


def test_own_process_is_in_the_snapshot_with_its_parent() -> None:
    assert cpu.snapshot()[os.getpid()].parent == os.getppid()


def test_busy_time_of_the_machine_includes_stolen_time_and_no_idling(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 20 30 9999 888 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert cpu.machine_busy_s(tmp_path) == pytest.approx(165 / os.sysconf("SC_CLK_TCK"))


def test_cpu_is_divided_between_servers_client_and_load() -> None:
    tick = os.sysconf("SC_CLK_TCK")
    before = {1: ProcessTime(1, 0, 0), 2: ProcessTime(2, 1, 5), 3: ProcessTime(3, 1, tick)}
    after = {
        1: ProcessTime(1, 0, 0),
        2: ProcessTime(2, 1, 5 + 9 * tick),  # the load generator
        3: ProcessTime(3, 1, 3 * tick),  # a server
        4: ProcessTime(4, 1, tick),  # the client
        5: ProcessTime(5, 4, tick),  # what the client started
    }
    used = cpu.used_between(before, after, client={4}, load={2})
    assert used.servers_s == pytest.approx(2)
    assert used.client_s == pytest.approx(2)


def test_time_of_a_daemon_that_ended_is_kept_by_the_process_that_reaped_it() -> None:
    tick = os.sysconf("SC_CLK_TCK")
    before = {1: ProcessTime(1, 0, 0), 9: ProcessTime(9, 1, tick)}
    after = {1: ProcessTime(1, 0, 4 * tick)}
    used = cpu.used_between(before, after, client=(), load=())
    assert used.servers_s == pytest.approx(3)


# --- workloads ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", groups())
def test_every_workload_does_its_amount_and_passes_its_own_check(group: str, place: Place) -> None:
    for workload in plan(group, list(UNITS)):
        timed = workload.run(place)
        assert timed.amount > 0
        assert timed.seconds > 0
        if workload.check is not None:
            workload.check(place)


def test_changed_byte_in_the_large_file_is_found(place: Place) -> None:
    large.write_large(place)
    with (place.directory / "large").open("r+b") as file:
        file.seek(1_500_000)
        byte = file.read(1)
        file.seek(1_500_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(KaError, match="MiB 1 came back different"):
        large.check_large(place)


def test_short_large_file_is_no_figure(place: Place) -> None:
    large.write_large(place)
    os.truncate(place.directory / "large", 1 << 20)
    with pytest.raises(KaError, match="read 1048576 bytes"):
        large.read_large(place)


def test_exchanged_small_files_are_found(place: Place) -> None:
    small.create("eight", 8)(place)
    one, two = (place.directory / "eight" / "3" / f"{index:06d}" for index in (0, 1))
    one.write_bytes(two.read_bytes())
    with pytest.raises(KaError, match="came back different"):
        small.check_contents(place)


def test_missing_small_file_is_found_by_the_walk(place: Place) -> None:
    small.create("one", 1)(place)
    small.create("eight", 8)(place)
    (place.directory / "one" / "0" / "000000").unlink()
    with pytest.raises(KaError, match="the walk met"):
        small.walk_stat(place)


def test_failing_worker_fails_the_workload(capfd: pytest.CaptureFixture[str]) -> None:
    def worker(number: int) -> None:
        if number == 2:
            raise OSError("no luck")

    with pytest.raises(KaError, match="1 of 4 workers failed"):
        load.in_parallel(worker, 4)
    assert "worker 2: no luck" in capfd.readouterr().err


def test_real_tree_counts_what_is_in_the_archive(tree: RealTree) -> None:
    with tarfile.open(tree.archive) as tar:
        members = tar.getmembers()
    assert len(members) == tree.entry_count == 3 + 20 + 1 + 1
    assert sum(member.size for member in members if member.isreg()) == tree.size_bytes
    assert not any(member.islnk() for member in members)


def test_real_tree_stops_at_the_number_of_entries_asked_for(tmp_path: Path) -> None:
    for index in range(9):
        (tmp_path / f"{index}").touch()
    tree = realtree.build(tmp_path / "t.tar", entries_max=5, roots=[tmp_path])
    assert tree.entry_count == 5


# --- facts, commands ------------------------------------------------------------------------


def test_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    table = "\n".join(
        [
            "20 1 8:1 / / rw - ext4 /dev/a rw",
            f"21 20 8:2 / {tmp_path} rw,noatime - xfs /dev/b rw",
            f"22 20 8:3 / {tmp_path}-other rw - btrfs /dev/c rw",
        ]
    )
    assert file_system_of(tmp_path / "x", table) == f"xfs (/dev/b on {tmp_path}, rw,noatime)"


def test_command_failure_is_its_last_line() -> None:
    with pytest.raises(KaError, match="exit code 3: second"):
        command("sh", "-c", "echo first; echo second; exit 3")


def test_waiting_ends_at_once_when_the_process_has_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("cannot bind\n\n")
    with subprocess.Popen(["false"]) as process, pytest.raises(KaError, match="cannot bind"):
        wait_until(lambda: False, "it", timeout_s=60, processes=[process], log=log)


# --- nothing is left ------------------------------------------------------------------------


def test_leftovers_of_a_killed_run_are_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / "ka-bench" / "gluster" / "brick0"
    left.mkdir(parents=True)
    (left / "data").write_bytes(b"x")
    (tmp_path / "mine").touch()
    with scratch(tmp_path) as directory:
        assert [entry.name for entry in directory.iterdir()] == ["lock"]
        (directory / "new").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_second_run_at_the_same_time_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    with scratch(tmp_path) as directory:
        (directory / "store").touch()
        with pytest.raises(KaError) as caught, scratch(tmp_path):
            pass
        assert caught.value.code is Code.EBUSY
        assert (directory / "store").exists()


def test_system_that_lost_its_mount_is_not_measured_on_the_disk_below(
    tmp_path: Path, tree: RealTree
) -> None:
    system = SYSTEMS["nfsp"](tmp_path)
    with pytest.raises(KaError, match="nothing is mounted"):
        run_group(system, "small", list(UNITS), run=1, scale=TINY, tree=tree)
    assert list(system.root.iterdir()) == []


def test_unusable_scratch_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KaError, match="cannot use"), scratch(tmp_path / "file"):
        pass


def question(group: str, tree: RealTree) -> dict[str, object]:
    return {
        "group": group,
        "selected": list(UNITS),
        "run": 1,
        "scale": dataclasses.asdict(TINY),
        "tree": {**dataclasses.asdict(tree), "archive": str(tree.archive)},
    }


@needs_root
def test_cell_measures_and_ends_all_its_processes(tmp_path: Path, tree: RealTree) -> None:
    with Cell("local", tmp_path / "local") as cell:
        assert cell.ask({}, timeout_s=30)["tcp_cc"]
        inside = _processes_of(tmp_path)
        samples = cell.ask(question("large", tree), timeout_s=60)["samples"]
    assert len(inside) >= 3
    assert not _processes_of(tmp_path)
    names = [Sample(**sample).workload for sample in samples]
    assert names == [workload.name for workload in WORKLOADS if workload.group == "large"]
    assert not (tmp_path / "local" / "mnt" / "large-1").exists()


@needs_root
def test_failed_group_is_reported_and_the_cell_goes_on(tmp_path: Path, tree: RealTree) -> None:
    with Cell("local", tmp_path / "local") as cell:
        cell.ask({}, timeout_s=30)
        missing = dataclasses.replace(tree, archive=tmp_path / "missing")
        with pytest.raises(KaError, match="untar: tar ended with exit code 2"):
            cell.ask(question("tree", missing), timeout_s=60)
        assert cell.ask(question("small", tree), timeout_s=60)["samples"]


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_no_process_and_at_most_files(tmp_path: Path, number: int) -> None:
    arguments = ["--systems", "local", "--quick", "--runs", "50", "--scratch", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as harness:  # fmt: skip
        assert harness.stderr is not None
        for line in harness.stderr:
            if line.startswith(b"run 1"):
                break
        watched = [os.pidfd_open(pid) for pid in _processes_of(tmp_path)]
        harness.send_signal(number)
        harness.communicate()
        ended = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
        assert harness.returncode == ended[signal.Signals(number)]
    assert len(watched) >= 3
    deadline = time.monotonic() + 20
    for pidfd in watched:
        # Readable when the process has ended.
        assert select.select([pidfd], [], [], deadline - time.monotonic())[0]
        os.close(pidfd)
    assert not _processes_of(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    if number == signal.SIGKILL:
        with scratch(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_run_of_the_local_disk_writes_report_and_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samples.json"
    base = tmp_path / "scratch"
    arguments = ["--systems", "local", "--workloads", "small", "--quick", "--size", "1MiB"]
    assert main([*arguments, "--scratch", str(base), "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    names = [Sample(**sample).workload for sample in document["samples"]]
    assert names == [workload.name for workload in WORKLOADS if workload.group == "small"]
    assert document["facts"]["kernel"] in capsys.readouterr().out
    assert list(base.iterdir()) == []


def _processes_of(directory: Path) -> list[int]:
    """Return the processes that have *directory* in their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                line = Path("/proc", name, "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(directory).encode() in line:
                found.append(int(name))
    return found
