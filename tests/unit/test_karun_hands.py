"""Reboots by real processes: a shell script stands for ssh, a directory for a node."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from common.errors import KaError
from karun.hands import BOOT_ID_FILE, ProcessHands, words
from karun.lines import STDERR, STDOUT
from karun.power import Policy, Verdict
from karun.reboot import reboot
from karun.rebooting import main

# ssh's place is taken by: sh SSH NODE 'COMMAND'.  A node boots in a moment; `flag` is there while
# it is up.
SSH = """
cd "$(dirname "$0")/$1" 2>/dev/null || { echo "ssh: no route to host $1" >&2; exit 255; }
case $2 in
    "cat %s") cat boot_id || exit 255 ;;
    reboot)
        [ -e deaf ] && { echo "starting"; echo "sudo: a password is required" >&2; exit 1; }
        rm boot_id
        (sleep 0.2; echo 22222222-0000-4000-8000-000000000002 >boot_id) >&- 2>&- &
        exit 255 ;;
    *) echo "what is '$2'?" >&2; exit 127 ;;
esac
"""
OLD = "11111111-0000-4000-8000-000000000001"


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    (tmp_path / "ssh").write_text(SSH % BOOT_ID_FILE)
    for name in ("n1", "n2", "n3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "boot_id").write_text(OLD + "\n")
    (tmp_path / "n2/deaf").write_text("")
    return tmp_path


def hands(cluster: Path, hard: list[str] | None = None) -> ProcessHands:
    return ProcessHands(NAMES, ["sh", str(cluster / "ssh"), "%h"], hard=hard)


async def test_a_boot_id_is_asked_for_over_the_connector(cluster: Path) -> None:
    ours = hands(cluster)
    assert await ours.boot_id(0) == OLD
    assert await ours.boot_id(3) == ""
    (cluster / "n1/boot_id").write_text("Welcome to this machine, dear user!!\n")
    assert await ours.boot_id(0) == ""


async def test_a_refusal_is_the_last_line_and_a_broken_connection_is_none(cluster: Path) -> None:
    ours = hands(cluster)
    assert await ours.order(0) == ""
    assert await ours.order(1) == "sudo: a password is required"


async def test_nodes_reboot_one_after_the_other(cluster: Path) -> None:
    policy = Policy(window=1, failures_max=9, probe_s=0.05, ask_s=10, order_s=10)
    plan = await reboot(4, policy, hands(cluster))
    assert list(plan.verdicts()) == [
        (Verdict.UP, ""),
        (Verdict.FAILED, "would not reboot (sudo: a password is required)"),
        (Verdict.UP, ""),
        (Verdict.FAILED, "unreachable before the reboot"),
    ]


class Screen:
    has_reader = True

    def __init__(self) -> None:
        self.text = {STDOUT: b"", STDERR: b""}

    def write(self, stream: int, data: bytes) -> None:
        self.text[stream] += data


NAMES = ["n1", "n2", "n3", "gone"]
POLICY = Policy(window=2, failures_max=9, probe_s=0.05, ask_s=10, order_s=10)


def test_the_command_prints_verdicts_folded(cluster: Path) -> None:
    screen = Screen()
    assert main(NAMES, POLICY, hands(cluster), screen) == 2
    assert screen.text[STDOUT] == b"n[1,3]: up\n"
    assert screen.text[STDERR].decode() == (
        "karun: n2: would not reboot (sudo: a password is required)\n"
        "karun: gone: unreachable before the reboot\n"
    )


def test_the_command_prints_json(cluster: Path) -> None:
    screen = Screen()
    assert main(NAMES, POLICY, hands(cluster), screen, as_json=True) == 2
    *records, summary = map(json.loads, screen.text[STDOUT].splitlines())
    assert records[0] == {"type": "node", "node": "n1", "rank": 0, "state": "up", "reason": None}
    assert [record["state"] for record in records] == ["up", "failed", "up", "failed"]
    assert summary == {
        "type": "summary", "nodes": 4, "up": 2, "failed": 2, "skipped": 0, "unfinished": 0,
        "exit_code": 2,
    }  # fmt: skip


def test_an_interrupted_command_tells_what_was_ordered_and_what_was_not(cluster: Path) -> None:
    class Interrupted(ProcessHands):
        asked_count = 0

        async def boot_id(self, node: int) -> str:
            self.asked_count += 1
            if self.asked_count == 2:
                os.kill(os.getpid(), signal.SIGINT)
                await trio.sleep_forever()
            return await super().boot_id(node)

    screen = Screen()
    ours = Interrupted(NAMES, ["sh", str(cluster / "ssh"), "%h"])
    assert main(NAMES, replace(POLICY, window=1), ours, screen) == 130
    assert screen.text[STDERR].decode() == (
        "karun: n1: ordered, and not yet seen to come back\nkarun: gone,n[2-3]: not begun\n"
    )


async def test_a_hard_reboot_is_a_command_here_with_the_nodes_name(cluster: Path) -> None:
    good = hands(cluster, ["cp", "-r", str(cluster / "n1"), str(cluster / "cycled-%h")])
    assert await good.order(3) == ""
    assert (cluster / "cycled-gone").is_dir()
    assert await hands(cluster, ["false"]).order(0) == "exit code 1"
    assert await hands(cluster, ["/nonexistent/ipmitool"]).order(0) == (
        "/nonexistent/ipmitool: No such file or directory"
    )


def test_a_command_is_parted_as_a_shell_does() -> None:
    assert words("ipmitool -H '%h bmc' power cycle") == [
        "ipmitool",
        "-H",
        "%h bmc",
        "power",
        "cycle",
    ]
    for text in ("", "  ", "a 'b"):
        with pytest.raises(KaError, match="not a command"):
            words(text)
