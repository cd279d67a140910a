"""`--via windows` without a Windows: real ssh and sftp, and a stand-in for PowerShell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from bench.sshd import Sshd, addresses
from common.errors import Code, KaError
from karun import windows, windows_nodes
from karun.copied import Step
from karun.windows_nodes import WindowsNodes
from tests.support import powershell
from tests.support.karun import Collect

HARD_WORDS = ["C:\\Program Files\\x.exe", 'a "quoted" b', "it's", "$env:Path", "%PATH%", "`n", "",
              "a\\", "tail\\\\", "& del *", "ünï\u2019s", "^|<>", "two\nlines"]  # fmt: skip


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    directory = tmp_path_factory.mktemp("windows")
    program = powershell.install(directory / "bin")
    try:
        extra = "Subsystem sftp internal-sftp"
        with Sshd(directory, path=str(program), extra=extra) as running:
            yield running
    except KaError as error:
        pytest.skip(str(error))


def nodes(sshd: Sshd, count: int) -> WindowsNodes:
    return WindowsNodes(addresses(count), ssh_config=str(sshd.config), connect_s=30, window=4)


async def test_no_shell_in_between_touches_a_word(sshd: Sshd) -> None:
    async with nodes(sshd, 6) as run:
        outcomes = await run.command(HARD_WORDS, sink=(sink := Collect()), cwd="D:\\it's")
    script = windows.run_script(HARD_WORDS, line=False, cwd="D:\\it's", env={})
    assert [one.exit_code for one in outcomes] == [0] * 6
    assert {sink.outputs[rank, 1].decode() for rank in range(6)} == {script}


async def test_exit_codes_and_unreachable_nodes_are_told_apart(sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host 127.1.0.2\n  Port 1\n" + sshd.client_config())
    run = WindowsNodes(addresses(3), ssh_config=str(config), connect_s=30, window=4)
    outcomes = await run.command(["echo exit-code-7"], line=True)
    assert [one.exit_code for one in outcomes] == [7, 255, 7]
    assert outcomes[1].reason == "connection refused"


async def test_a_copy_arrives_and_is_checked_on_every_node(sshd: Sshd, tmp_path: Path) -> None:
    tree = tmp_path / "a tree"
    (tree / "in ner").mkdir(parents=True)
    (tree / "in ner" / 'odd "name" [x]*').write_bytes(b"1" * 300_000)
    (tree / "empty").write_bytes(b"")
    single = tmp_path / "single"
    single.write_bytes(b"alone")
    async with nodes(sshd, 3) as run:
        results = await run.copy([str(tree), str(single)], f"{tmp_path}/to/%h")
    assert [one.reason for one in results] == [None] * 3
    for node in addresses(3):
        at = tmp_path / "to" / node
        await trio.run_process(["diff", "-r", tree, at / "a tree"])
        assert (at / "single").read_bytes() == b"alone"
        assert {path.name for path in at.iterdir()} == {"a tree", "single"}


async def test_a_file_that_is_not_what_was_meant_is_named(sshd: Sshd, tmp_path: Path) -> None:
    source = tmp_path / "image"
    source.write_bytes(b"good")

    def change(_: Step) -> None:
        source.write_bytes(b"bad!")  # summed, and not sent yet

    async with nodes(sshd, 1) as run:
        (result,) = await run.copy([str(source)], f"{tmp_path}/to", on_progress=change)
    assert result.reason == "differs: image"


async def test_a_destination_that_cannot_be_written_costs_its_node_only(
    sshd: Sshd, tmp_path: Path
) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x")
    first, second = addresses(2)
    (tmp_path / second).write_bytes(b"in the way")
    async with nodes(sshd, 2) as run:
        results = await run.copy([str(source)], f"{tmp_path}/%h")
    assert results[0].reason is None
    assert results[1].reason is not None
    assert (tmp_path / first / "file").read_bytes() == b"x"


async def test_a_node_that_answers_and_does_nothing_holds_nobody_for_ever(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_nodes, "GRACE_S", 3.0)
    source = tmp_path / "file"
    source.write_bytes(b"x")
    async with nodes(sshd, 1) as run:
        (result,) = await run.copy([str(source)], f"{tmp_path}/hangs")
        (outcome,) = await run.command(["hangs"], limit_s=1)
    assert result.reason == "not checked within 3 s"
    assert outcome.exit_code == 124


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--sudo", "--", "x"],
        ["run", "--mpi", "--", "x"],
        ["run", "--pty", "--", "x"],
        ["gather", "a", "b"],
        ["copy", "--topology", "chain", "/etc/hostname", "x"],
        ["copy", "/nowhere/at/all", "x"],
        ["copy", "/etc/hostname", "\\\\server\\share"],
    ],
)
def test_what_windows_nodes_do_not_take_is_one_line(sshd: Sshd, words: list[str]) -> None:
    command, *rest = words
    done = subprocess.run(
        [sys.executable, "-m", "karun.entry", command, "--via", "windows", "-w", "127.1.0.1",
         "--ssh-config", sshd.config, *rest],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_command_longer_than_windows_takes_is_refused() -> None:
    with pytest.raises(KaError) as caught:
        windows.remote_command("x" * 4000)
    assert caught.value.code is Code.E2BIG
