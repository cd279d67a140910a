"""karun over real ssh: one sshd that answers on many loopback addresses."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from bench.sshd import Sshd, addresses
from common.errors import KaError
from karun import api
from karun.api import Outcome, Run
from karun.engine import Limits
from tests.support.karun import Collect


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    try:
        with Sshd(tmp_path_factory.mktemp("sshd")) as running:
            yield running
    except KaError as error:
        pytest.skip(str(error))


def ssh_clients() -> list[int]:
    """Those that this process has started."""
    children = map(Path("/proc").joinpath, Path("/proc/thread-self/children").read_text().split())
    return [int(child.name) for child in children if (child / "comm").read_text() == "ssh\n"]


async def run_true(
    config: str, nodes: list[str], connect_s: float = 30.0, login_s: float = 60.0
) -> list[Outcome]:
    connector = api.connector("ssh", ssh_config=config, connect_s=connect_s)
    limits = Limits(connect_s=connect_s, login_s=login_s)
    async with Run(nodes, connector, limits=limits) as run:
        return await run.command(["true"])


def config(sshd: Sshd, path: Path, **settings: str) -> str:
    path.write_text(sshd.client_config(**settings))
    return str(path)


async def test_many_nodes_run_a_command_and_tell_their_codes(sshd: Sshd) -> None:
    sink = Collect()
    nodes = addresses(24)
    connector = api.connector("ssh", ssh_config=str(sshd.config), connect_s=60.0)
    async with Run(nodes, connector, limits=Limits(connect_s=60.0)) as run:
        script = "echo $KARUN_NODE; exit $KARUN_RANK"
        outcomes = await run.command([script], line=True, sink=sink)
        again = await run.command(["cat"], stdin=b"for all", sink=(second := Collect()))
    assert [one.reason for one in outcomes] == [None] * 24
    assert [outcome.exit_code for outcome in outcomes] == list(range(24))
    assert [sink.outputs[rank, 1].decode() for rank in range(24)] == [f"{n}\n" for n in nodes]
    assert {outcome.exit_code for outcome in again} == {0}
    assert {second.outputs[rank, 1] for rank in range(24)} == {b"for all"}


async def test_nodes_that_have_moved_do_without_ssh(sshd: Sshd) -> None:
    connector = api.connector("ssh", ssh_config=str(sshd.config), connect_s=60.0)
    async with Run(addresses(6), connector, limits=Limits(connect_s=60.0)) as run:
        await run.launched()
        assert await run.move() == []
        clients = ssh_clients()
        assert len(clients) == 6, "they stay: sshd may end what a connection has started with it"
        for client in clients:
            os.kill(client, signal.SIGSTOP)
        try:
            with trio.fail_after(60):
                outcomes = await run.command(["cat"], stdin=b"for all", sink=(sink := Collect()))
        finally:
            for client in clients:
                os.kill(client, signal.SIGCONT)
    assert [outcome.exit_code for outcome in outcomes] == [0] * 6
    assert {sink.outputs[rank, 1] for rank in range(6)} == {b"for all"}


async def test_a_node_that_refuses_costs_itself_only(sshd: Sshd, tmp_path: Path) -> None:
    text = "Host 127.1.0.2\n  Port 1\n" + sshd.client_config()
    path = tmp_path / "config"
    path.write_text(text)
    outcomes = await run_true(str(path), addresses(3))
    assert [outcome.exit_code for outcome in outcomes] == [0, 255, 0]
    assert outcomes[1].reason == "connection refused"


async def test_an_unknown_host_is_one_line(sshd: Sshd, tmp_path: Path) -> None:
    unknown = config(sshd, tmp_path / "config", UserKnownHostsFile="/dev/null")
    (outcome,) = await run_true(unknown, addresses(1))
    assert outcome.reason == "unknown host key; add it to known_hosts"


async def test_a_changed_host_key_is_one_line(sshd: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known"
    public = sshd.key.with_suffix(".pub").read_text()  # a key, but not this host's
    known.write_text(f"[127.*]:{sshd.port} {public}")
    (outcome,) = await run_true(
        config(sshd, tmp_path / "config", UserKnownHostsFile=str(known)), addresses(1)
    )
    assert outcome.reason == "changed host key; if that is right, ssh-keygen -R"


async def test_a_bad_key_is_one_line(sshd: Sshd, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger)]
    await trio.run_process(keygen)
    path = config(sshd, tmp_path / "config", IdentityFile=str(stranger))
    (outcome,) = await run_true(path, addresses(1))
    assert outcome.reason == "permission denied; no accepted key (or password needed)"


async def test_a_host_that_does_not_answer_is_given_up_after_the_connect_timeout(
    sshd: Sshd, tmp_path: Path
) -> None:
    path = tmp_path / "config"
    path.write_text("Host 127.1.0.2\n  ProxyCommand sleep 1000\n" + sshd.client_config())
    outcomes = await run_true(str(path), addresses(3), connect_s=1.0, login_s=2.0)
    assert [outcome.exit_code for outcome in outcomes] == [0, 255, 0]
    assert "timeout" in str(outcomes[1].reason)


async def test_a_node_without_python_is_one_line(tmp_path: Path) -> None:
    with Sshd(tmp_path, extra="ForceCommand exit 127") as running:
        (outcome,) = await run_true(str(running.config), addresses(1))
    assert outcome.reason == "no Python 3.10 on the node"


async def test_chatter_of_login_scripts_does_not_disturb(tmp_path: Path) -> None:
    force = 'ForceCommand echo "Welcome!"; echo; eval "$SSH_ORIGINAL_COMMAND"'
    with Sshd(tmp_path, extra=force) as running:
        (outcome,) = await run_true(str(running.config), addresses(1))
    assert outcome.exit_code == 0


async def test_python_is_found_under_other_names(tmp_path: Path) -> None:
    force = 'ForceCommand eval "$(echo "$SSH_ORIGINAL_COMMAND" | sed s,/usr/bin/python3,/nope,)"'
    with Sshd(tmp_path, extra=force) as running:
        (outcome,) = await run_true(str(running.config), addresses(1))
    assert outcome.exit_code == 0


async def test_logins_that_sshd_drops_are_tried_again(tmp_path: Path) -> None:
    with Sshd(tmp_path, login_count_max=4) as running:
        outcomes = await run_true(str(running.config), addresses(12))
    assert {outcome.exit_code for outcome in outcomes} == {0}


async def test_paramiko_reaches_nodes_as_ssh_does(sshd: Sshd, tmp_path: Path) -> None:
    sink = Collect()
    nodes = addresses(3)
    public = sshd.host_key.with_suffix(".pub").read_text()
    known = tmp_path / "known"  # paramiko knows no patterns
    known.write_text("".join(f"[{node}]:{sshd.port} {public}" for node in nodes))
    path = config(sshd, tmp_path / "config", UserKnownHostsFile=str(known))
    connector = api.connector("paramiko", ssh_config=path, connect_s=30.0)
    async with Run(nodes, connector) as run:
        script = "cat; exit $KARUN_RANK"
        outcomes = await run.command(["sh", "-c", script], stdin=bytes(300_000), sink=sink)
    assert [outcome.exit_code for outcome in outcomes] == [0, 1, 2]
    assert {sink.outputs[rank, 1] for rank in range(3)} == {bytes(300_000)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"UserKnownHostsFile": "/dev/null"}, "unknown host key; add it to known_hosts"),
        ({"Port": "1"}, "connection refused"),
    ],
)
async def test_paramiko_says_what_is_wrong_as_ssh_does(
    sshd: Sshd, tmp_path: Path, settings: dict[str, str], reason: str
) -> None:
    path = config(sshd, tmp_path / "config", **settings)
    async with Run(addresses(1), api.connector("paramiko", ssh_config=path)) as run:
        (outcome,) = await run.command(["true"])
    assert outcome.reason == reason
