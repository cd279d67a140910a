"""What the head takes from a machine: its word, a reason in one line, and not more than is good."""

from __future__ import annotations

import sys

import pytest

from common.errors import Code, KaError
from kadeploy.links import ANSWER_SIZE_MAX, Identity, SshLink, SshOptions


def answering(program: str) -> SshLink:
    """Return a link whose ssh is a program: what stands before `ssh` runs instead of it."""
    return SshLink("pc1", SshOptions(wrapper=(sys.executable, "-c", program)))


def machine(said: str) -> SshLink:
    """Return a link to a deployment environment that answers every order in the same way."""
    return answering(
        "import sys\nask = sys.argv[-1]\n"
        "if 'boot_id' in ask: print('yes', '', 'boot', sep='\\n')\n"
        "elif ask.startswith('cat >'): sys.stdin.buffer.read()\n"
        f"else: print({said})"
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
