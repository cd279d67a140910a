"""A head with three hundred mock nodes: windows, times, fall-backs; kill -9 and on again."""

from __future__ import annotations

import contextlib
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from common.errors import KaError
from kadeploy import views
from kadeploy.head import Head, Report
from kadeploy.steps import MicroStep
from kadeploy.store import Store
from kadeploy.workflow import Deployment, Status
from tests.support.deploy_mock import MockNodes, name_of, workflow

COUNT = 300
STEP_S = 10.0
EXPECTED_FAILURES = {"pc013", "pc042"}


def begin(store: Store, count: int) -> int:
    environment = store.add_environment("debian", 1, Path("/env.yaml"), "text", 0)
    return store.begin(environment, {}, [name_of(index) for index in range(1, count + 1)], 0)


async def test_three_hundred_nodes_are_deployed_by_the_rules(
    autojump_clock: MockClock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mock = MockNodes(STEP_S)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with Store.open(tmp_path / "store.db") as store:
        number = begin(store, COUNT)
        deployment = Deployment(workflow(STEP_S), store.nodes(number))
        await Head(store, number, deployment, mock).run()
        states = {node.name: node for node in store.nodes(number)}
        history = store.history(number)
        assert store.deployment(number).ended_ms is not None
    after = resource.getrusage(resource.RUSAGE_SELF)
    failed = {name for name, node in states.items() if node.status is Status.FAILED}
    assert failed == EXPECTED_FAILURES
    assert states["pc042"].reason == "prepare-disks: disk system refused"
    assert "wait-deployment" in states["pc013"].reason

    # The dead one: every way in was tried, each for as long as its timeout says.
    waits = [row for row in history if row.node == "pc013" and row.step == "wait-deployment"]
    assert [row.implementation for row in waits] == ["reboot-soft", "reboot-hard", "reboot-harder"]
    limit_ms = int(5_000 * STEP_S) + int(50 * STEP_S) * COUNT
    assert all(limit_ms <= row.took_ms <= limit_ms + 1000 for row in waits)

    # Those that do not answer softly are rebooted hard, those lost in the chain get a stream.
    assert {row.implementation for row in history if row.node == "pc007" and not row.ok} == {
        "reboot-soft"
    }
    streamed = {row.node for row in history if row.step == "stream-0"}
    assert streamed == {name_of(index) for index in range(1, COUNT + 1) if index % 50 == 9}
    assert mock.inside_max["stream"] <= 4

    # The window: never more than 50 at once, nor within one pause.
    assert mock.inside_max["reboot"] <= 50
    times = sorted(mock.reboots_at)
    assert all(
        late - early >= STEP_S * 0.99 for early, late in zip(times, times[50:], strict=False)
    )

    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with capsys.disabled():
        print(
            f"\nhead of {COUNT} nodes: {len(history)} steps, {cpu_s:.1f} s of CPU,"
            f" {after.ru_maxrss / 1024:.0f} MiB resident at most (tests included)"
        )
    assert cpu_s < 60


class Buggy(MockNodes):
    """Trips over one node."""

    async def run(self, step: MicroStep, nodes: Sequence[str], report: Report) -> None:
        if step.name == "prepare-disks" and name_of(3) in nodes:
            raise ValueError("what it says makes no sense to us")
        await super().run(step, nodes, report)


async def test_a_bug_that_one_node_brings_out_fails_that_node_alone(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    with Store.open(tmp_path / "store.db") as store:
        number = begin(store, 6)
        deployment = Deployment(workflow(STEP_S), store.nodes(number))
        await Head(store, number, deployment, Buggy(STEP_S)).run()
        states = {node.name: node for node in store.nodes(number)}
    failed = {name for name, node in states.items() if node.status is not Status.DEPLOYED}
    assert failed == {name_of(3)}
    reason = "prepare-disks: internal error: ValueError('what it says makes no sense to us')"
    assert states[name_of(3)].reason == reason


def test_a_deployment_goes_on_where_a_killed_head_left_it(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    command = [sys.executable, "-m", "tests.support.deploy_mock", str(path), "60", "0.15"]
    done: Counter[tuple[str, str]] = Counter()
    kills = 0
    with Store.open(path) as store:
        number = begin(store, 60)
        while store.deployment(number).ended_ms is None:
            seen = len(store.history(number))
            with subprocess.Popen(command) as head:
                deadline = time.monotonic() + 60
                while head.poll() is None and (
                    kills >= 3 or len(store.history(number)) < seen + 120
                ):
                    if time.monotonic() > deadline:
                        head.kill()
                    time.sleep(0.02)  # looks at the store; nothing tells when it changes
                if head.poll() is None:
                    head.kill()
                    kills += 1
            assert head.returncode in (0, -signal.SIGKILL)
        history = store.history(number)
        states = {node.name: node.status for node in store.nodes(number)}
    assert kills == 3
    assert {name for name, status in states.items() if status is not Status.DEPLOYED} == (
        EXPECTED_FAILURES
    )
    for row in history:
        if row.ok:
            done[row.node, f"{row.implementation}/{row.step}"] += 1
    repeated = {key for key, times in done.items() if times > 1}
    # A second try of an implementation repeats its steps; a killed head repeats none.
    assert {node for node, _ in repeated} <= {name_of(index) for index in (9, 42, 59)}


def test_a_deployment_has_one_head(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as one, Store.open(tmp_path / "store.db") as two:
        number = begin(one, 1)
        with one.claim(number), pytest.raises(KaError, match="another process"), two.claim(number):
            pass


def test_a_store_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    Store.open(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(KaError, match="chmod 600"):
        Store.open(path)


def test_a_version_means_one_text_for_ever(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as store:
        store.add_environment("debian", 1, tmp_path, "text", 0)
        store.add_environment("debian", 1, tmp_path, "text", 1)
        with pytest.raises(KaError, match="raise the version"):
            store.add_environment("debian", 1, tmp_path, "other", 2)
        store.add_environment("debian", 2, tmp_path, "other", 3)
        assert store.environment("debian").version == 2


def test_only_what_a_node_was_last_deployed_with_counts(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as store:
        number = begin(store, 1)
        (node,) = store.nodes(number)
        assert store.has(node.name) is None
        done = type(node)(node.name, status=Status.DEPLOYED)
        store.save(number, [done], [], 5)
        assert store.has(node.name) == ("debian", 1)


async def test_held_nodes_wait_in_the_store_until_a_head_releases_them(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    mock = MockNodes(STEP_S)
    stopping = replace(workflow(STEP_S), breakpoints=("prepare-disks",))
    with Store.open(tmp_path / "store.db") as store:
        number = begin(store, 3)
        await Head(store, number, Deployment(stopping, store.nodes(number)), mock).run()
        held = [node for node in store.nodes(number) if node.status is Status.HELD]
        assert len(held) == 3
        assert store.deployment(number).ended_ms is None
        deployment = Deployment(stopping, store.nodes(number))
        names = [node.name for node in held]
        await Head(store, number, deployment, mock, release=names).run()
        assert {node.status for node in store.nodes(number)} == {Status.DEPLOYED}
        assert all(row.ok for row in store.history(number))


async def test_nodes_that_are_cancelled_end_while_the_others_go_on(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    mock = MockNodes(STEP_S)
    with Store.open(tmp_path / "store.db") as store:
        number = begin(store, 4)
        head = Head(store, number, Deployment(workflow(STEP_S), store.nodes(number)), mock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(head.run)
            await trio.sleep(STEP_S)
            with Store.open(tmp_path / "store.db") as other:
                other.ask_cancel(number, ["pc002"], "cancelled")
        nodes = store.nodes(number)
        assert [node.name for node in nodes] == ["pc001", "pc002", "pc003", "pc004"]
        assert [node.reason for node in nodes] == ["", "cancelled", "", ""]
        last = store.history(number, "pc002")[-1]
        assert (last.ok, last.reason) == (False, "cancelled")
        assert {node.status for node in nodes if not node.reason} == {Status.DEPLOYED}


async def test_what_a_step_that_went_well_says_is_in_the_history(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    class Talkers(MockNodes):
        async def run(self, step: MicroStep, nodes: Sequence[str], report: Report) -> None:
            for node in nodes:
                report(node, "", "1GiB of 4GiB were there already" if step.action == "send" else "")

    with Store.open(tmp_path / "store.db") as store:
        number = begin(store, 1)
        deployment = Deployment(workflow(STEP_S), store.nodes(number))
        await Head(store, number, deployment, Talkers(STEP_S)).run()
        (node,) = store.nodes(number)
        assert (node.status, node.reason) == (Status.DEPLOYED, "")
        lines = [views.try_line(row) for row in store.history(number)]
        (said,) = [line for line in lines if "already" in line]
        assert "send-0 try 1 done in" in said
        assert said.endswith(" s: 1GiB of 4GiB were there already")


def test_a_node_is_in_the_hands_of_one_head_at_a_time(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as store:
        first = begin(store, 2)
        second = begin(store, 3)
        store.require_free(["pc001"], second)
        with store.claim(first):
            with pytest.raises(KaError, match="pc001 is being deployed by 1"):
                store.require_free(["pc001", "pc003"], second)
            store.require_free(["pc003"], second)
            store.require_free(["pc001"], first)
        store.require_free(["pc001"], second)


def test_a_store_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with Store.open(path) as store:
        number = begin(store, 1)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE cancels")
        db.execute("PRAGMA user_version=1")
    with Store.open(path) as store:
        store.ask_cancel(number, ["pc001"], "cancelled")
        assert store.cancels(number) == {"pc001": "cancelled"}
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(KaError, match="later version"):
        Store.open(path)
