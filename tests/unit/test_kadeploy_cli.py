"""kadeploy's command line: what it prints, what it refuses, its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.errors import Code, KaError
from kadeploy import settings
from kadeploy.cli import kadeploy
from kadeploy.descriptions import read_nodes
from kadeploy.orders import TOKEN_PATH
from kadeploy.store import Store
from kadeploy.workflow import NodeState, Status, StepRecord
from tests.support import deploy

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "cancel", "env", "env add", "env check", "env list", "env show", "history", "mkenv", "plan",
    "power", "record", "run", "serve", "status", "token", "token add", "token list", "token revoke",
)  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A head's configuration with an environment beside it."""
    (tmp_path / "kadeploy.toml").write_text('nodes = "nodes.yaml"\nstate = "state"\n')
    (tmp_path / "nodes.yaml").write_text(
        'ssh_keys: ["ssh-ed25519 AAAAC3Nz root@head"]\ndomain: lab.example\nnodes:\n'
        "  - {name: pc1, address: 10.0.0.1/24, disks: [{role: system, serial: SN0001}],\n"
        "     variables: [{name: room, value: E12}]}\n"
        "  - {name: pc2, disks: [{role: system, serial: SN0002}]}\n"
    )
    (tmp_path / "env.yaml").write_text(deploy.LINUX)
    (tmp_path / "debian.tar.zst").write_bytes(bytes(5000))
    for name in ("motd.j2", "first.sh"):
        (tmp_path / name).write_text(deploy.read_template(name))
    (tmp_path / "facts.json").write_text(json.dumps(deploy.raw_facts()))
    return tmp_path


@dataclass(frozen=True)
class Answer:
    exit_code: int
    stdout: str
    stderr: str


def call(site: Path, *words: str) -> Answer:
    """Run the command line as the installed program does."""
    program = "from kadeploy.cli import main; main()"
    command = [sys.executable, "-c", program, "-c", str(site / "kadeploy.toml"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(kadeploy, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Example: kadeploy" in result.output


@pytest.mark.parametrize(("compression", "count"), [("zstd", 1), ("none", 0)])
def test_a_check_says_which_images_begin_again_when_they_are_cut_off(
    site: Path, compression: str, count: int
) -> None:
    kind = f"kind: raw, compression: {compression}"
    text = deploy.LINUX.replace("kind: tar, compression: zstd", kind)
    (site / "env.yaml").write_text(text)
    said = call(site, "env", "check", str(site / "env.yaml"))
    assert said.exit_code == 0
    assert said.stdout.count("note: debian.tar.zst is compressed") == count


def test_an_environment_is_added_listed_shown_and_checked(site: Path) -> None:
    path = str(site / "env.yaml")
    assert call(site, "env", "check", path).exit_code == 0
    assert call(site, "env", "add", path).stdout == "debian12 version 3 added\n"
    (row,) = json.loads(call(site, "env", "list", "--json").stdout)
    assert (row["name"], row["version"], row["path"]) == ("debian12", 3, path)
    assert call(site, "env", "show", "debian12").stdout == deploy.LINUX
    wrong = call(site, "env", "check", "--sums", path)
    assert wrong.exit_code == 2
    assert "its checksum is sha256:" in wrong.stderr


def test_a_missing_image_is_one_line(site: Path) -> None:
    (site / "debian.tar.zst").unlink()
    result = call(site, "env", "add", str(site / "env.yaml"))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "No such file" in result.stderr


def test_plan_prints_what_would_be_done_from_facts(site: Path) -> None:
    words = ["plan", "-w", "pc1", "--facts", str(site / "facts.json"), str(site / "env.yaml")]
    result = call(site, *words)
    assert result.exit_code == 0, result.stderr
    assert "- /dev/sda1 at 1MiB, 1GiB: ext4 old" in result.stdout
    assert TOKEN_PATH in result.stdout
    (content,) = json.loads(call(site, *words, "--json").stdout)
    assert content["disks"][0]["holds_data"] is True


def test_plan_refuses_a_disk_by_its_serial_and_plans_the_others(site: Path) -> None:
    words = ["plan", "-w", "pc[1-2]", "--facts", str(site / "facts.json"), str(site / "env.yaml")]
    result = call(site, *words)
    assert result.exit_code == 1
    assert "pc1: UEFI" in result.stdout
    assert "pc2: pc2: disk system refused: no disk has serial SN0002" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run"], 2, "run needs -w NODES"),
        (["run", "-w", "pc1", "nothing"], 2, "no environment nothing"),
        (["run", "-w", "pc9", "debian12"], 2, "no node 'pc9'"),
        (["run", "-w", "pc1", "debian12", "--breakpoint", "x"], 2, "no step 'x' to stop at"),
        (["status"], 2, "no such deployment"),
        (["power", "-w", "pc1", "on"], 1, ""),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_begins(
    site: Path, words: list[str], code: int, said: str
) -> None:
    call(site, "env", "add", str(site / "env.yaml"))
    result = call(site, *words)
    assert result.exit_code == code
    assert said in result.stderr
    with Store.open(site / "state/kadeploy.db") as store:
        assert store.deployments() == []


def test_a_run_that_another_was_quicker_than_leaves_no_trace(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(site, "env", "add", str(site / "env.yaml"))

    def require_free(store: Store, names: Sequence[str], but: int = 0) -> None:
        if but:  # between `begin` and the head's own look
            raise KaError(Code.BUSY, "pc1 is being deployed by 7")

    monkeypatch.setattr(Store, "require_free", require_free)
    words = ["-c", str(site / "kadeploy.toml"), "run", "-w", "pc1", "debian12"]
    result = CliRunner().invoke(kadeploy, words)
    assert str(result.exception) == "pc1 is being deployed by 7"
    with Store.open(site / "state/kadeploy.db") as store:
        assert store.deployments() == []


def test_status_names_every_failure_with_its_reason(site: Path) -> None:
    call(site, "env", "add", str(site / "env.yaml"))
    with Store.open(site / "state/kadeploy.db") as store:
        number = store.begin(store.environment("debian12"), {}, ["pc1", "pc2", "pc3"], 0)
        done = NodeState("pc1", status=Status.DEPLOYED)
        lost = NodeState("pc2", status=Status.FAILED, reason="disk is gone")
        store.save(number, [done, lost], [], 1)
    result = call(site, "status")
    assert result.exit_code == 1
    assert "deployed: pc1" in result.stdout
    assert "failed: pc2: disk is gone" in result.stdout
    assert "1 debian12 3" in call(site, "history").stdout


def test_the_history_of_a_node_is_asked_for_with_its_deployment(site: Path) -> None:
    call(site, "env", "add", str(site / "env.yaml"))
    with Store.open(site / "state/kadeploy.db") as store:
        number = store.begin(store.environment("debian12"), {}, ["pc1", "pc2"], 0)
        record = StepRecord("pc2", "BootNewEnv", "reboot", "restart", 0, 0, 1, True, "")
        store.save(number, [], [record], 1)
    assert "pc2 BootNewEnv reboot/restart" in call(site, "history", "1", "-w", "pc2").stdout
    assert call(site, "history", "1", "-w", "pc1").stdout == ""
    for words, said in (
        (["-w", "pc1"], "-w NODE goes with NUMBER"),
        (["1", "-w", "pc[1-2]"], "no node 'pc[1-2]' in deployment 1"),
    ):
        result = call(site, "history", *words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert said in result.stderr


def test_cancel_gives_up_what_no_head_carries_out(site: Path) -> None:
    call(site, "env", "add", str(site / "env.yaml"))
    with Store.open(site / "state/kadeploy.db") as store:
        number = store.begin(store.environment("debian12"), {}, ["pc1", "pc2", "pc3"], 0)
        store.save(number, [NodeState("pc1", status=Status.DEPLOYED)], [], 1)
        assert call(site, "cancel", "-w", "pc9").exit_code == 2
        for empty in ("", "pc1!pc1"):
            assert "no nodes named" in call(site, "cancel", "-w", empty).stderr
        assert call(site, "cancel", "-w", "pc2").stdout == "deployment 1: pc2 given up\n"
        assert store.deployment(number).ended_ms is None
        call(site, "cancel")
        assert store.deployment(number).ended_ms is not None
        assert [node.status.value for node in store.nodes(number)] == [
            "deployed", "failed", "failed",
        ]  # fmt: skip
    assert "has ended" in call(site, "cancel").stderr


def test_a_deployment_goes_on_with_the_steps_it_was_begun_with_or_not_at_all(site: Path) -> None:
    call(site, "env", "add", str(site / "env.yaml"))
    config = site / "kadeploy.toml"
    text = config.read_text()
    hook = '[[hook]]\nstep = "boot-deployment"\nwhen = "{}"\ncommand = ["true"]\n'.format
    config.write_text(text + hook("before"))
    begun = call(site, "run", "-w", "pc1", "debian12", "--breakpoint", "boot-deployment")
    assert "held: pc1" in begun.stdout
    for changed in (text, text + hook("after")):
        config.write_text(changed)
        result = call(site, "run", "--resume")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "deployment 1 was begun with other steps: set hooks" in result.stderr
    assert len(json.loads(call(site, "history", "1", "--json").stdout)) == 1
    assert call(site, "cancel").exit_code == 0


@pytest.mark.parametrize(
    "more", [("-w", "pc1"), ("debian12",), ("--missing",), ("--breakpoint", "boot-deployment")]
)
def test_to_go_on_takes_nothing_that_would_not_count(site: Path, more: tuple[str, ...]) -> None:
    """Who names other nodes does not mean those of the last deployment."""
    call(site, "env", "add", str(site / "env.yaml"))
    with Store.open(site / "state/kadeploy.db") as store:
        store.begin(store.environment("debian12"), {}, ["pc2"], 0)
        refused = call(site, "run", "--resume", *more)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "--resume goes on with the last deployment as it was begun" in refused.stderr
        assert not store.history(1)


def test_every_path_of_a_file_is_relative_to_it(tmp_path: Path) -> None:
    """The server's directory is /, that of who types a command his own."""
    config, nodes = tmp_path / "kadeploy.toml", tmp_path / "nodes.yaml"
    config.write_text('[ssh]\nkey = "id"\nknown_hosts = "hosts"\nconfig = "/etc/ssh_config"\n')
    power = "{driver: ipmi, address: bmc, password_file: secret/bmc}"
    nodes.write_text(f"nodes: [{{name: pc1, power: [{power}]}}]")
    options = settings.load(config).ssh
    assert (options.key, options.known_hosts) == (tmp_path / "id", tmp_path / "hosts")
    assert options.config == Path("/etc/ssh_config")
    assert read_nodes(nodes).nodes[0].power[0].password_file == str(tmp_path / "secret/bmc")


def test_to_go_on_with_what_has_ended_does_not_end_it_again(site: Path) -> None:
    call(site, "env", "add", str(site / "env.yaml"))
    with Store.open(site / "state/kadeploy.db") as store:
        number = store.begin(store.environment("debian12"), {}, ["pc1"], 0)
        store.save(number, [NodeState("pc1", status=Status.DEPLOYED)], [], 1)
        store.end(number, 2)
        assert call(site, "run", "--resume").exit_code == 0
        assert store.deployment(number).ended_ms == 2


def test_a_private_key_is_not_put_into_what_everybody_can_fetch(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(keygen, check=True)
    (tmp_path / "empty").touch()
    for key in (path, tmp_path / "empty"):
        result = call(tmp_path, "mkenv", str(tmp_path / "deploy"), "--key", str(key))
        assert result.exit_code == 2
        assert "not a public key of OpenSSH" in result.stderr
    for kind in ("ed25519", "rsa", "ecdsa"):
        again = [*keygen[:3], kind, *keygen[4:-1], str(tmp_path / kind)]
        subprocess.run(again, check=True)
        public = f'from="10.0.0.1" {(tmp_path / f"{kind}.pub").read_text()}'
        (tmp_path / "keys").write_text(f"# of the head\n{public}")
        environment = {"PATH": "/nowhere"}  # what comes next is refused in its turn
        program = "from kadeploy.cli import main; main()"
        words = ["mkenv", str(tmp_path / "deploy"), "--key", str(tmp_path / "keys")]
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stderr == "kadeploy: mmdebstrap is not installed\n"


def test_an_image_of_a_tree_that_it_lies_in_holds_all_but_itself(tmp_path: Path) -> None:
    root = tmp_path / "golden"
    for name in ("etc/passwd", "tmp/scratch", "images/root[1].tar", "images/root1.tar"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("old")
    image = root / "images/root[1].tar"
    result = call(tmp_path, "record", "--compression", "none", str(root), str(image))
    assert (result.exit_code, result.stderr) == (0, "")
    with tarfile.open(image) as archive:
        names = [member.name for member in archive if member.isfile()]
    assert names == ["./etc/passwd", "./images/root1.tar"]


def test_a_device_is_not_replaced_by_an_image(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = call(tmp_path, "record", str(tmp_path), str(pipe))
    assert result.exit_code == 2
    assert result.stderr == f"kadeploy: {pipe} is there, and is not a file\n"
    assert pipe.is_fifo()


def test_a_token_is_shown_once_listed_without_it_and_revoked(site: Path) -> None:
    words = ["--nodes", "pc[1-2]", "--rights", "view,deploy", "--days", "3"]
    made = call(site, "token", "add", "alice", *words)
    assert made.exit_code == 0, made.stderr
    text = made.stdout.strip()
    number = text[3:11]
    assert call(site, "token", "list").stdout == f"{number} alice pc[1-2] view,deploy\n"
    listed = call(site, "token", "list", "--json").stdout
    assert text[12:] not in listed
    assert "digest" not in listed
    assert call(site, "token", "revoke", number).stdout == f"{number} of alice is void\n"
    assert call(site, "token", "revoke", number).exit_code == 2
    assert call(site, "token", "list").stdout == ""
    wrong = call(site, "token", "add", "alice", "--nodes", "pc1", "--rights", "root")
    assert wrong.exit_code == 2
    assert "no right 'root'" in wrong.stderr
    for_ever = ["--nodes", "pc1", "--rights", "view", "--days", "9" * 20]
    assert "not in the range" in call(site, "token", "add", "bob", *for_ever).stderr
    assert call(site, "token", "list").exit_code == 0
