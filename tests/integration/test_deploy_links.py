"""What the head takes from a machine: its word, a reason in one line, and not more than is good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from kadeploy.broadcast import LINE_SIZE_MAX, START_S, Receiver, broadcast
from kadeploy.links import ANSWER_SIZE_MAX, Identity, SshLink, SshOptions
from kadeploy.orders import Place, WriteImage
from tests.support import deploy
from tests.support.deploy_web import ROOT

ORDER = WriteImage(Place("/dev/sda", "SN1", 1 << 30), "raw", "zstd", deploy.SUM, 0, 1, "")


def answering(program: str) -> SshLink:
    """Return a link whose ssh is a program: what stands before `ssh` runs instead of it."""
    return SshLink("pc1", SshOptions(wrapper=(sys.executable, "-c", program)))


def machine(said: str) -> SshLink:
    """Return a link to a deployment environment that answers every order in the same way."""
    return acting(f"print({said})")


def acting(line: str) -> SshLink:
    """Return a link to a deployment environment that does the same at every order."""
    return answering(
        "import os, sys\nask = sys.argv[-1]\n"
        "if 'boot_id' in ask: print('yes', '', 'boot', sep='\\n')\n"
        "elif ask.startswith('cat >'): sys.stdin.buffer.read()\n"
        f"else: {line}"
    )


async def test_a_machine_says_what_it_is() -> None:
    link = answering("print('yes'); print('token'); print('boot')")
    assert await link.identify() == Identity(True, "token", "boot")


async def test_why_a_machine_is_not_reached_is_the_last_line() -> None:
    link = answering("import sys; print('banner', file=sys.stderr); sys.exit('no route')")
    with pytest.raises(KaError, match="pc1: no route") as caught:
        await link.identify()
    assert caught.value.code is Code.UNREACHABLE


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_a_machine_that_does_not_stop_talking_is_not_listened_to(stream: str) -> None:
    link = answering(f"import sys\nwhile True: sys.{stream}.write('x' * {ANSWER_SIZE_MAX // 16})")
    with pytest.raises(KaError, match="does not end") as caught:
        await link.identify()
    assert caught.value.code is Code.PROTOCOL


@pytest.mark.parametrize(
    "said",
    ["'[' * 200_000", """'{"ok": false, "code": [1]}'""", """'{"ok": 1, "code": {}}'""", "'[]'"],
)
async def test_an_answer_that_is_none_is_that_machines_fault_alone(said: str) -> None:
    link = machine(said)
    with pytest.raises(KaError, match=r"pc1: no answer \(0\)") as caught:
        await link.ask("facts")
    assert caught.value.code is Code.PROTOCOL


async def test_why_a_machine_failed_is_one_printable_line() -> None:
    link = machine(r"""'{"ok": false, "error": "\\u001b[31m\\nred \\ud800"}'""")
    with pytest.raises(KaError) as caught:
        await link.ask("facts")
    assert str(caught.value) == "?[31m?red ?"


async def test_an_image_that_cannot_be_read_is_one_line() -> None:
    link = machine("""'{"ok": true}'""")
    for name, why in (("/nowhere/disk.img", "No such file"), ("/proc/self/mem", "Input/output")):
        with pytest.raises(KaError, match=f"image {name}: {why}"):
            await link.ask("do", ORDER, image=Path(name))


async def test_an_image_that_changes_while_it_is_broadcast_is_one_line(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    change = f"os.truncate({str(image)!r}, 100); print('127.0.0.1:1', flush=True)"
    receiver = Receiver("pc1", acting(f"{change}; sys.stdin.read()"), ORDER, "127.0.0.1")
    with pytest.raises(KaError, match="changed while it was being read"):
        await broadcast(image, {"pc1": receiver}, "127.0.0.1", lambda *_: None)


async def test_a_receiver_that_does_not_stop_talking_is_not_listened_to(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"content")
    said: list[str] = []
    talk = f"[sys.stdout.write('x' * {LINE_SIZE_MAX // 16}) for _ in iter(int, 1)]"
    receiver = Receiver("pc1", acting(talk), ORDER, "127.0.0.1")
    with trio.fail_after(START_S / 2):
        await broadcast(image, {"pc1": receiver}, "127.0.0.1", lambda *words: said.extend(words))
    assert said == ["pc1", "its receiver did not start", ""]


async def test_an_ssh_that_cannot_be_started_is_one_line() -> None:
    link = SshLink("pc1", SshOptions(wrapper=("/nowhere/netns",)))
    with pytest.raises(KaError, match="/nowhere/netns cannot be started: No such file"):
        await link.identify()
    with pytest.raises(KaError, match="/nowhere/netns cannot be started: No such file"):
        async with link.started("facts"):
            pass


def test_more_nodes_are_asked_at_once_than_the_soft_limit_has_descriptors_for(
    tmp_path: Path,
) -> None:
    count = 60
    lines = [f"  - {{name: pc{one}}}" for one in range(1, count + 1)]
    (tmp_path / "nodes.yaml").write_text("\n".join(["nodes:", *lines, ""]))
    wrapper = [sys.executable, "-c", "import time; time.sleep(3); raise SystemExit(255)"]
    text = f'nodes = "nodes.yaml"\nstate = "state"\n[ssh]\nwrapper = {json.dumps(wrapper)}\n'
    (tmp_path / "kadeploy.toml").write_text(text)
    (tmp_path / "debian.tar.zst").touch()
    (tmp_path / "env.yaml").write_text(deploy.LINUX)
    kadeploy = [sys.executable, "-c", "from kadeploy.cli import main; main()"]
    words = [*kadeploy, "-c", "kadeploy.toml", "plan", "-w", f"pc[1-{count}]", "./env.yaml"]
    limited = ["sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(limited, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    told = {f"pc{one}: pc{one}: 255" for one in range(1, count + 1)}
    assert set(done.stdout.splitlines()) == told
