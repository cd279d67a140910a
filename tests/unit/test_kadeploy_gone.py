"""The end of a deployment whose system cannot be asked: gone from ours, and nothing else came."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import Code, KaError
from kadeploy import deploying
from kadeploy.deploying import Deployer, Target
from kadeploy.links import SshOptions
from kadeploy.settings import Settings
from kadeploy.steps import Macro, MicroStep, Options, Workflow, default_workflow
from tests.support import deploy

OURS = "yes\\n\\n{boot}\\n"
LINUX = "no\\nsome-token\\n{boot}\\n"
# In ssh's place: each call answers with the next line of a file, or not at all.
SSH = """#!/bin/sh
line=$(head -n 1 {queue})
sed -i 1d {queue}
[ "$line" ] || exit 255
printf "$line"
"""


def way_out(workflow: Workflow) -> list[tuple[str, list[str]]]:
    (last,) = [one for one in workflow.macros if one.macro is Macro.BOOT_NEW_ENV]
    return [(one.name, [step.name for step in one.steps]) for one in last.implementations]


def test_a_system_that_cannot_be_asked_is_waited_for_blindly_and_never_switched_off() -> None:
    assert way_out(default_workflow(Options(asked=False))) == [
        ("reboot", ["boot-deployed", "restart", "wait-gone"])
    ]
    asked = way_out(default_workflow(Options()))
    assert [name for name, _ in asked] == ["reboot", "power-hard", "power-harder"]
    assert all(steps[-1] == "wait-system" for _, steps in asked)


async def wait_gone(directory: Path, *answers: str) -> None:
    queue, ssh = directory / "queue", directory / "ssh"
    queue.write_text("\n".join([*answers, ""]))
    ssh.write_text(SSH.format(queue=queue))
    target = Target(deploy.environment(deploy.DUAL), directory, deploy.nodes(), "token")
    settings = Settings(ssh=SshOptions(wrapper=("sh", str(ssh))))
    deployer = Deployer(target, settings, ["pc1"])
    reports: list[tuple[str, str]] = []
    step = MicroStep("wait-gone", "wait-gone", 1000)
    await deployer.run(step, ["pc1"], lambda name, fault: reports.append((name, fault)))
    assert reports == [("pc1", "")]
    assert queue.read_text() == ""


@pytest.fixture(autouse=True, name="_quick")
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "POLL_S", 0.0)
    monkeypatch.setattr(deploying, "GONE_POLL_COUNT", 3)


async def test_silence_after_our_environment_is_a_good_end(tmp_path: Path) -> None:
    ours = OURS.format(boot="b1")
    await wait_gone(tmp_path, ours, "", "", ours, ours, "", "", "")


@pytest.mark.parametrize(
    ("answer", "said"), [(OURS, "the deployment environment"), (LINUX, "a Linux")]
)
async def test_what_answers_with_another_boot_is_not_the_system(
    tmp_path: Path, answer: str, said: str
) -> None:
    with pytest.raises(KaError, match=f"what started is {said}") as caught:
        await wait_gone(tmp_path, OURS.format(boot="b1"), "", answer.format(boot="b2"))
    assert caught.value.code is Code.EIO
