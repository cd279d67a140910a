"""The demo as a whole, with little data: it passes, and it leaves nothing, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.demo_place import marked, mounts_below

pytestmark = pytest.mark.fuse

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 120


@contextmanager
def demo(directory: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    arguments = ("--files", "30", "--tree-size", "100KB", "--directory", str(directory), *more)
    with subprocess.Popen(
        [sys.executable, "-m", "bench.demo", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def left(directory: Path) -> list[object]:
    """What a demo that ran below *directory* has left."""
    below = list(directory.iterdir())
    return [*mounts_below(directory), *below, *(pid for path in below for pid in marked(path))]


def test_the_demo_passes_and_leaves_nothing(short_path: Path) -> None:
    with demo(short_path, "--size", "12MiB") as process:
        text, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, text
    assert "all equal" in text
    for iod in ("iod1", "iod2", "iod3"):
        assert f"on {iod}: {iod}/data/" in text
    assert text.splitlines()[-1].startswith("Everything written was read back equal")
    assert left(short_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["starting", "mounted", "writing"])
def test_an_interrupted_demo_leaves_nothing(
    short_path: Path, number: signal.Signals, moment: str
) -> None:
    with demo(short_path, "--size", "12MiB") as process:
        assert process.stdout is not None
        if moment == "starting":
            while not list(short_path.glob("*/cluster/run/iod1.pid")):
                assert process.poll() is None
        elif moment == "mounted":
            assert process.stdout.readline().startswith("starting")
        else:
            while not list(short_path.glob("*/cluster/iod1/data/*/*/*")):
                assert process.poll() is None
        os.kill(process.pid, number)
        text = process.stdout.read()
        assert process.wait(TIMEOUT_S) == 128 + number, text
    assert "tearing down" in text
    assert left(short_path) == []
