"""kaboot's command line: what it prints for people and programs, and how it refuses."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kaboot as face
from kaboot.cli import main
from kaboot.control import store_path
from kaboot.model import Machine
from kaboot.store import Store
from tests.support.boot_site import INVENTORY, write_site

Kaboot = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="kaboot")
def _kaboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kaboot:
    """Run the command line on a site; returns exit code, standard output and standard error."""
    path, _ = write_site(tmp_path)
    monkeypatch.setenv("KABOOT_CONFIG", str(path))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kaboot", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def saw(directory: Path, *macs: str) -> None:
    _, made = write_site(directory)
    with Store.open(store_path(made)) as store:
        for number, mac in enumerate(macs):
            machine = Machine(mac, "pcbios", "x86_64", "SER\x1b", "Box", "10.78.0.100")
            store.saw(machine, "", "script", "discover", number + 1)


def test_set_is_what_show_and_render_say(kaboot: Kaboot) -> None:
    assert kaboot("set", "pc[1-3]", "rescue") == (0, "pc[1-3]: rescue\n", "")
    code, out, _ = kaboot("show", "pc[1-4]", "--json")
    assert code == 0
    steps = {node["name"]: node["step"] for node in json.loads(out)["nodes"]}
    assert steps == {"pc1": "rescue", "pc2": "rescue", "pc3": "rescue", "pc4": "install"}
    _, out, _ = kaboot("render", "pc1")
    assert "/files/rescue/vmlinuz" in out
    assert out.startswith("#!ipxe\n# kaboot: pc1: rescue\n")
    _, out, _ = kaboot("render", "pc1", "--grub")
    assert "linux '(tftp,10.78.0.1)/files/rescue/vmlinuz'" in out


def test_show_is_a_table_for_people(kaboot: Kaboot, tmp_path: Path) -> None:
    kaboot("set", "pc1", "local")
    saw(tmp_path, "52:54:00:00:00:01", "52:54:00:00:00:99")
    kaboot("learn", "pc4", "--no-wait")
    code, out, err = kaboot("show")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["NODE", "STEP", "SINCE", "MAC", "ADDRESS", "LAST", "SEEN", "STAGE"]
    assert lines[1].split()[:2] == ["pc1", "local"]
    assert "not learned" in lines[4]
    assert lines[10].startswith("UNKNOWN MACHINE")
    assert lines[11].startswith("52:54:00:00:00:99  10.78.0.100  Box      SER?")
    assert lines[-1] == "learning: the next machine is pc4 (1 to go)"


def test_events_tell_who_set_what(kaboot: Kaboot) -> None:
    kaboot("set", "pc1", "rescue")
    kaboot("set", "pc2", "menu")
    _, out, _ = kaboot("show", "--events")
    assert [line.split()[2:] for line in out.splitlines()] == [
        ["pc1", "step", "rescue", "(set)"],
        ["pc2", "step", "menu", "(set)"],
    ]
    _, out, _ = kaboot("show", "pc2", "--events", "--json")
    assert [event["detail"] for event in json.loads(out)] == ["menu (set)"]


def test_machines_already_seen_are_named_in_order_and_forgotten_again(
    kaboot: Kaboot, tmp_path: Path
) -> None:
    kaboot("show")
    saw(tmp_path, "52:54:00:00:00:98", "52:54:00:00:00:97")
    code, out, _ = kaboot("learn", "pc[4-6]", "--seen")
    assert code == 0
    assert out == "pc4  52:54:00:00:00:98\npc5  52:54:00:00:00:97\n"
    assert kaboot("learn", "pc4", "--seen")[0] == 2
    assert kaboot("forget", "pc4") == (0, "forgot 52:54:00:00:00:98\n", "")
    assert kaboot("learn", "pc4", "--no-wait")[0] == 0


def test_learn_tells_names_as_they_are_given_and_gives_out_no_more_when_interrupted(
    kaboot: Kaboot, tmp_path: Path
) -> None:
    kaboot("show")
    command = [sys.executable, "-c", "from kaboot.cli import main; main()", "learn", "pc[4-5]"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stderr.readline() == "switch on pc4 now, then the others in turn\n"
        saw(tmp_path, "52:54:00:00:00:98")
        with Store.open(tmp_path / "state/kaboot.db") as store:
            assert store.queue() == ["pc4", "pc5"]
            assert store.learn("52:54:00:00:00:98", "pc4", 5, why="test")
        assert run.stdout.readline() == "pc4  52:54:00:00:00:98\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(10) == 130
        assert run.stderr.read().strip() == "kaboot: interrupted"
    with Store.open(tmp_path / "state/kaboot.db") as store:
        assert store.queue() == []


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["set", "pc9", "local"], 2, "no node 'pc9' in the inventory"),
        (["set", "pc[1-9]", "local"], 2, "no node 'pc9'"),
        (["set", "pc1", "loca"], 2, "no step 'loca'"),
        (["set", "pc1", "custom:nothing"], 2, "no profile 'nothing'"),
        (["set", "pc[", "local"], 2, "not a node set"),
        (["set", "", "local"], 2, "no nodes named"),
        (["show", "pc9"], 2, "no node 'pc9'"),
        (["render"], 2, "name a node, or --dnsmasq, or --site"),
        (["render", "pc1", "--dnsmasq"], 2, "name a node, or --dnsmasq, or --site"),
        (["learn"], 2, "name nodes, or --stop"),
        (["learn", "pc1", "--no-wait"], 2, "pc1 has its MAC already"),
        (["-c", "/nowhere.toml", "show"], 2, "/nowhere.toml: No such file"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_a_refusal_is_one_line_and_changes_nothing(
    kaboot: Kaboot, arguments: list[str], code: int, complaint: str
) -> None:
    found = kaboot(*arguments)
    assert found[0] == code
    assert complaint in found[2]
    assert found[2].count("\n") == 1
    assert kaboot("show", "--events")[1] == ""


def test_check_names_what_would_fail_and_exits_1(kaboot: Kaboot, tmp_path: Path) -> None:
    code, out, _ = kaboot("check", "--json")
    assert code == 1
    texts = [finding["text"] for finding in json.loads(out) if finding["problem"]]
    assert f"no directory {tmp_path / 'files'} ('files' in [site])" in texts
    assert "no network interface br0" in texts
    (tmp_path / "files").mkdir()
    _, out, _ = kaboot("check")
    assert f"problem: profile install: no file {tmp_path}/files/deploy/vmlinuz" in out
    assert "remark: 6 nodes have no MAC yet (pc3, pc4, pc5, pc6, ...): kaboot learn" in out


def test_a_directory_of_somebody_elses_does_not_become_the_state(
    kaboot: Kaboot, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/precious").touch()
    code, _, err = kaboot("show")
    assert (code, err) == (2, f"kaboot: 'state' {tmp_path}/state is neither empty nor kaboot's\n")


def test_every_command_has_help_with_an_example(kaboot: Kaboot) -> None:
    for command in ("", "set", "show", "render", "check", "learn", "forget"):
        code, out, _ = kaboot(*command.split(), "--help")
        assert code == 0
        assert "Example: kaboot " in out


def test_the_public_face_assigns_and_follows_events(tmp_path: Path) -> None:
    path, _ = write_site(tmp_path, INVENTORY)
    with face.Control.open(path) as control:
        assert control.assign(["pc1", "pc2"], "install").step is face.Step.INSTALL
        events = control.events()
        assert [event.node for event in events] == ["pc1", "pc2"]
        assert control.events(after=events[-1].id) == []
        assert control.nodes()[0].assignment == face.Assignment(face.Step.INSTALL)


def test_what_has_been_done_is_no_failure_when_nobody_can_hear_of_it(tmp_path: Path) -> None:
    path, _ = write_site(tmp_path)
    program = "from common.starting import command; command('kaboot.cli')"
    words = [sys.executable, "-c", program, "-c", str(path), "set", "pc1", "rescue"]
    closed = ["sh", "-c", '"$@" >&-', "sh", *words]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_two_commands_may_be_the_first(
    kaboot: Kaboot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_site(tmp_path)
    mkdir = Path.mkdir

    def another_is_quicker(directory: Path, *words: Any, **named: Any) -> None:
        monkeypatch.setattr(Path, "mkdir", mkdir)
        face.Control.open(path).close()

    monkeypatch.setattr(Path, "mkdir", another_is_quicker)
    assert kaboot("set", "pc1", "rescue") == (0, "pc1: rescue\n", "")


def test_serve_takes_as_many_connections_as_the_hard_limit_allows(kaboot: Kaboot) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] // 2, limits[1]))
    try:
        code, _, err = kaboot("serve")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (code, soft) == (2, hard)
    assert err.startswith("kaboot: cannot serve HTTP on 10.78.0.1:"), err
