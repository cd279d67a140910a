"""What the head takes from a machine: its word, a reason in one line, and not more than is good."""

from __future__ import annotations

import sys

import pytest

from common.errors import Code, KaError
from kadeploy.links import ANSWER_SIZE_MAX, Identity, SshLink, SshOptions


def answering(program: str) -> SshLink:
    """Return a link whose ssh is a program: what stands before `ssh` runs instead of it."""
    return SshLink("pc1", SshOptions(wrapper=(sys.executable, "-c", program)))


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
