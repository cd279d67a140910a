"""Monitoring: /proc to counters, counters to rates, rates to a folded table."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.errors import KaError
from karun import sampler
from karun.nodes import Names
from karun.sampler import FIELDS, UNKNOWN
from karun.top import COLUMNS, Monitor, Rates, Thresholds, rates, to_text
from karun.top_table import to_table

ROOT = Path(__file__).parents[2]
FILES = {
    "/proc/uptime": "1234.56 4000.00\n",
    "/proc/loadavg": "1.25 0.80 0.50 3/421 12345\n",
    "/proc/stat": (
        "cpu  100 10 40 800 50 0 5 5 7 0\ncpu0 50 5 20 400 25 0 2 3 4 0\n"
        "cpu1 50 5 20 400 25 0 3 2 3 0\nintr 1 2 3\nprocs_running 3\n"
    ),
    "/proc/meminfo": (
        "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    4000 kB\n"
        "SwapTotal:       2000 kB\nSwapFree:        1500 kB\nHugePages_Total:    0\n"
    ),
    "/proc/net/dev": (
        "Inter-|   Receive                |  Transmit\n face |bytes    packets errs\n"
        "    lo: 9999 1 0 0 0 0 0 0 9999 1 0 0 0 0 0 0\n"
        "  eth0: 1000 1 0 0 0 0 0 0 200 1 0 0 0 0 0 0\n"
        "enp3s0:500 1 0 0 0 0 0 0 70 1 0 0 0 0 0 0\n"
        " bond0: 1500 1 0 0 0 0 0 0 270 1 0 0 0 0 0 0\n"
        "eth0.7: 30 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n"
    ),
    "/proc/diskstats": (
        "   8       0 sda 10 0 100 5 20 0 40 9 0 1 2 0 0 0 0\n"
        "   8       1 sda1 10 0 100 5 20 0 40 9 0 1 2\n"
        " 259       0 nvme0n1 1 0 8 5 2 0 16 9 0 1 2\n"
        " 259       1 nvme0n1p1 1 0 8 5 2 0 16 9 0 1 2\n"
        " 253       0 dm-0 1 0 8 5 2 0 16 9 0 1 2\n   7       0 loop0 1 0 8 5 2 0 16 9 0 1 2\n"
    ),
}


def read(path: str) -> str:
    return FILES[path]


def test_counters_are_read_from_proc() -> None:
    assert dict(zip(FIELDS, sampler.sample(read), strict=True)) == {
        "uptime_ms": 1_234_560,
        "core_count": 2,
        "load_milli": 1250,
        "running_count": 3,
        "cpu_busy_ticks": 160,
        "cpu_total_ticks": 1010,
        "memory_total_kib": 16000,
        "memory_available_kib": 4000,
        "swap_used_kib": 500,
        "net_received_bytes": 1500,
        "net_sent_bytes": 270,
        "disk_read_bytes": 108 * 512,
        "disk_written_bytes": 56 * 512,
    }


def test_a_network_without_hardware_counts_what_there_is() -> None:
    files = {"/proc/net/dev": "lo: 9 1 0 0 0 0 0 0 9 1\nveth0: 5 1 0 0 0 0 0 0 6 1\n"}
    found = sampler.sample(lambda path: files.get(path, ""))
    assert found[FIELDS.index("net_received_bytes")] == 5


def test_what_is_not_told_is_unknown() -> None:
    assert sampler.sample(lambda path: "") == [UNKNOWN] * len(FIELDS)


@given(st.text(alphabet="cpu0123456789 .:\n/-sdamMTolFre", max_size=80))
def test_any_text_gives_counters(text: str) -> None:
    found = sampler.sample(lambda path: text)
    assert len(found) == len(FIELDS)
    assert all(value >= UNKNOWN for value in found)


def test_this_machine_tells_something_and_samples_travel() -> None:
    found = sampler.sample()
    assert found[FIELDS.index("memory_total_kib")] > 0
    assert found[FIELDS.index("cpu_total_ticks")] > 0
    assert sampler.decode(sampler.encode(found)) == found


@pytest.mark.parametrize(
    "data", [b"", b"1 2 3", b"x" * 40, b"1 " * 12 + b"a", b"1 " * 12 + b"\xff"]
)
def test_what_is_not_a_sample_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        sampler.decode(data)


@pytest.mark.parametrize("name", ["sampler", "pmi"])
def test_what_the_agent_runs_imports_nothing(name: str) -> None:
    code = (
        "import sys; before = set(sys.modules); text = open(sys.argv[1]).read();"
        "exec(compile(text, 'm', 'exec'), {'__name__': 'm'});"
        "print(sorted(set(sys.modules) - before))"
    )
    argv = [sys.executable, "-I", "-S", "-c", code, str(ROOT / "karun" / f"{name}.py")]
    found = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert found.stdout == "['__future__']\n"


def test_this_machine_has_a_row() -> None:
    monitor = Monitor(1, 1)
    first = second = sampler.sample()
    while second[0] == first[0] or second[5] == first[5]:
        second = sampler.sample()
    monitor.take(0, first, 0)
    monitor.take(0, second, 1)
    found = monitor.of(0, 1)
    assert isinstance(found, Rates)
    assert found.cpu is not None
    assert found.memory is not None
    [row] = monitor.rows(1)
    assert len(row.cells) == len(COLUMNS)


# ---------------------------------------------------------------- rates and rows


def counters(uptime_s: float = 100, **values: int) -> list[int]:
    base = {
        "uptime_ms": int(uptime_s * 1000), "core_count": 4, "load_milli": 500, "running_count": 1,
        "cpu_busy_ticks": 0, "cpu_total_ticks": 0, "memory_total_kib": 1000,
        "memory_available_kib": 800, "swap_used_kib": 0, "net_received_bytes": 0,
        "net_sent_bytes": 0, "disk_read_bytes": 0, "disk_written_bytes": 0,
    }  # fmt: skip
    return [(base | values)[name] for name in FIELDS]


def test_rates_are_of_the_time_between() -> None:
    found = rates(
        counters(100),
        counters(
            102, cpu_busy_ticks=100, cpu_total_ticks=400, net_sent_bytes=4096, load_milli=6000
        ),
    )
    assert found is not None
    assert (found.cpu, found.sent, found.received) == (0.25, 2048.0, 0.0)
    assert (found.load, found.load_per_core) == (6.0, 1.5)
    assert found.memory == pytest.approx(0.2)


def test_a_counter_that_went_back_gives_no_rate() -> None:
    found = rates(counters(100, net_sent_bytes=50), counters(101))
    assert found is not None
    assert found.sent is None
    assert rates(counters(100), counters(5)) is None  # rebooted
    assert rates(counters(100), counters(100)) is None
    assert rates([UNKNOWN] * len(FIELDS), counters()) is None


@given(st.lists(st.integers(UNKNOWN, 1 << 62), min_size=2 * len(FIELDS), max_size=2 * len(FIELDS)))
def test_any_counters_give_rates_within_bounds(values: list[int]) -> None:
    monitor = Monitor(1, 1)
    monitor.take(0, values[: len(FIELDS)], 0)
    monitor.take(0, values[len(FIELDS) :], 1)
    found = monitor.of(0, 1)
    if isinstance(found, Rates):
        for share in (found.cpu, found.memory):
            assert share is None or 0 <= share <= 1
    assert len(monitor.rows(1)) == 1


def watched() -> tuple[Monitor, Names]:
    """Eight nodes: most idle, one busy, one swapping, one lost, one that has just come."""
    monitor = Monitor(8, period_s=1)
    for rank in range(8):
        monitor.take(rank, counters(100), 10)
    for rank in range(8):
        values = {"cpu_busy_ticks": rank, "cpu_total_ticks": 400, "load_milli": 500 + rank}
        if rank == 3:
            values = {"cpu_busy_ticks": 399, "cpu_total_ticks": 400, "load_milli": 7900}
        if rank == 4:
            values |= {"swap_used_kib": 512 << 10, "load_milli": 620}
        if rank not in (5, 6):
            monitor.take(rank, counters(101, **values), 11)
    monitor.failed(5, "no route to host")
    monitor.failed(6, "x")
    monitor.take(6, counters(1), 11)
    return monitor, Names([f"n{rank}" for rank in range(8)])


def test_nodes_that_read_the_same_share_a_row_and_the_highest_is_first() -> None:
    monitor, names = watched()
    rows = monitor.rows(11)
    assert [(names.fold(row.nodes), row.reason) for row in rows] == [
        ("n3", ""),
        ("n4", ""),
        ("n[0-2,7]", ""),
        ("n5", "no route to host"),
        ("n6", "no second sample yet"),
    ]
    assert [COLUMNS[at].key for at, alarm in enumerate(rows[0].alarms) if alarm] == ["load", "cpu"]
    assert [COLUMNS[at].key for at, alarm in enumerate(rows[1].alarms) if alarm] == ["swap_used"]
    assert rows[2].cells[:3] == ("0.5", "0%", "20%")


def test_a_node_that_falls_silent_has_no_data_after_three_periods() -> None:
    monitor, _ = watched()
    assert isinstance(monitor.of(0, 13.9), Rates)
    assert monitor.of(0, 14.1) == "no data for more than 3 s"


def test_rows_can_be_sorted_and_narrowed_to_alarms() -> None:
    monitor, _ = watched()
    assert monitor.rows(11, sort="swap_used")[0].nodes == (4,)
    assert [row.nodes for row in monitor.rows(11, only_alarms=True)] == [(3,), (4,), (5,), (6,)]
    calm = Thresholds(load_per_core=9, cpu=2, memory=2, swap_used=1e12)
    assert not any(any(row.alarms) for row in monitor.rows(11, thresholds=calm))
    with pytest.raises(KaError, match="no such column: 'nosuch'"):
        monitor.rows(11, sort="nosuch")


def test_ten_thousand_idle_nodes_are_one_row() -> None:
    monitor = Monitor(10_000, 1)
    for rank in range(10_000):
        monitor.take(rank, counters(100), 0)
        monitor.take(rank, counters(101, cpu_busy_ticks=rank % 5, cpu_total_ticks=400), 1)
    assert [len(row.nodes) for row in monitor.rows(1)] == [10_000]


def test_the_text_has_a_row_for_each_kind_and_the_whole() -> None:
    monitor, names = watched()
    lines = list(to_text(monitor.rows(11), monitor.total(11), names, width=110))
    assert " ".join(lines[0].split()) == (
        "load cpu memory swap net in net out disk rd disk wr nodes"
    )
    assert " ".join(lines[1].split()) == "7.9! 100%! 20% 0 0 0 0 0 n3 (1)"
    assert lines[3].endswith("  n[0-2,7] (4)")
    assert lines[4] == "n5 (1): no route to host"
    assert lines[-1].endswith("  all (8)")
    assert all(len(line) <= 110 for line in lines)


def drawn(width: int) -> Iterator[str]:
    monitor, names = watched()
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(to_table(monitor.rows(11), monitor.total(11), names, title="karun top"))
    assert isinstance(console.file, io.StringIO)
    yield from console.file.getvalue().splitlines()


def test_the_table_is_drawn_within_the_terminal() -> None:
    lines = list(drawn(100))
    assert all(len(line) <= 100 for line in lines)
    assert any("n[0-2,7] (4)" in line for line in lines)
    assert any("no route to host" in line for line in lines)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0"), (999, "0"), (1_400, "1.5K"), (2_400, "2K"), (9_960, "10K"), (12_345, "12K"),
     (123_456, "120K"), (996_000, "1M"), (1.2e9, "1G"), (3e13, "30T")],
)  # fmt: skip
def test_amounts_are_rounded_so_that_they_fold(size: float, shown: str) -> None:
    column = next(column for column in COLUMNS if column.key == "sent")
    assert column.show(size) == shown
