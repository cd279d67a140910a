"""`python -m bench slow`: it copies, compares, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.slow import main

NEEDS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and iproute2"
)


@NEEDS_ROOT
def test_it_reports_a_base_and_each_slow_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--nodes", "3", "--size", "4MiB", "--kinds", "chain", "--slow", "2", "--after", "0"]
    assert main([*words, "--scratch", str(tmp_path)]) == 0
    base, slow = capsys.readouterr().out.splitlines()
    assert base.startswith("chain    no node slow")
    assert slow.startswith("chain    node 2 slow")
    assert slow.endswith("%")
    assert not list(tmp_path.iterdir())
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"kb{os.getpid() % 100000}n" not in listed.stdout


@pytest.mark.parametrize(
    "words", [["--slow", "0"], ["--slow", "9"], ["--slow", "x"], ["--kinds", "flat"]]
)
def test_what_cannot_be_measured_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().out
    assert said.startswith("bench slow: ")
    assert said.count("\n") == 1
