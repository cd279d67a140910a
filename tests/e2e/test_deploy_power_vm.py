"""Power by management controllers that are not ours, over virtual machines."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from kadeploy.nodes import NodeSpec, PowerSpec
from kadeploy.power import PowerAction, reboot_steps
from kadeploy.power_drivers import power
from tests.support.power_lab import PASSWORD, Machine, ipmi_sim, redfish_emulator

pytestmark = pytest.mark.vm
WAIT_S = 60.0

Controller = tuple[PowerSpec, Machine]


@pytest.fixture
def bmc(tmp_path: Path) -> Iterator[Controller]:
    if shutil.which("ipmi_sim") is None:
        pytest.skip("not installed: openipmi")
    with ipmi_sim(tmp_path) as made:
        yield made


@pytest.fixture
def redfish(tmp_path: Path) -> Iterator[Controller]:
    with redfish_emulator(tmp_path) as made:
        yield made


def write_password(spec: PowerSpec, password: str) -> None:
    Path(spec.password_file).write_text(password)


async def until(what: str, there: Callable[[], Awaitable[bool]]) -> None:
    with trio.move_on_after(WAIT_S):
        while True:
            if await there():
                return
            await trio.sleep(0.1)  # another program's process; nothing tells
    raise AssertionError(f"never: {what}")


async def until_started(spec: PowerSpec, machine: Machine) -> int | None:
    async def on() -> bool:
        return await power(spec, "pc1", PowerAction.STATUS) == "on" and machine.started

    await until("on, and its firmware running", on)
    return machine.pid


async def until_off(spec: PowerSpec, machine: Machine) -> None:
    async def off() -> bool:
        return await power(spec, "pc1", PowerAction.STATUS) == "off" and machine.pid is None

    await until("off", off)


async def test_deploy_starts_and_stops_a_vm_through_ipmi(bmc: Controller) -> None:
    spec, machine = bmc
    assert await power(spec, "pc1", PowerAction.STATUS) == "off"
    assert machine.pid is None
    await power(spec, "pc1", PowerAction.ON)
    first = await until_started(spec, machine)
    await power(spec, "pc1", PowerAction.OFF)
    await until_off(spec, machine)
    # What `run` does when nothing milder helped: off, a pause, on.
    for step in reboot_steps(NodeSpec("pc1", power=(spec,)), "harder"):
        assert step.spec is not None
        await power(step.spec, "pc1", step.action)
    assert await until_started(spec, machine) != first


async def test_deploy_asks_many_vm_controllers_at_once(tmp_path: Path) -> None:
    """pyghmi has one table of sessions for all threads: calls must not get into each other."""
    if shutil.which("ipmi_sim") is None:
        pytest.skip("not installed: openipmi")
    with contextlib.ExitStack() as stack:
        controllers = []
        for index in range(4):
            directory = tmp_path / str(index)
            directory.mkdir()
            controllers.append(stack.enter_context(ipmi_sim(directory)))
        said: list[list[str]] = [[] for _ in controllers]

        async def ask(index: int) -> None:
            for _ in range(5):
                spec = controllers[index][0]
                said[index].append(await power(spec, f"pc{index}", PowerAction.STATUS))

        async with trio.open_nursery() as nursery:
            for index in range(len(controllers)):
                nursery.start_soon(ask, index)
        assert said == [["off"] * 5] * len(controllers)


async def test_deploy_starts_and_stops_a_vm_through_redfish(redfish: Controller) -> None:
    spec, machine = redfish
    assert await power(spec, "pc1", PowerAction.STATUS) == "off"
    await power(spec, "pc1", PowerAction.ON)  # takes the emulator up to 11 s, as hardware would
    await until_started(spec, machine)
    await power(spec, "pc1", PowerAction.OFF)
    await until_off(spec, machine)


async def test_deploy_is_told_why_a_vm_controller_refuses(redfish: Controller) -> None:
    spec, _ = redfish
    write_password(spec, "wrong")
    with pytest.raises(KaError, match="401") as caught:
        await power(spec, "pc1", PowerAction.STATUS)
    assert caught.value.code is Code.EIO
    write_password(spec, PASSWORD)
    nowhere = PowerSpec(spec.driver, f"{spec.address}0", 0, spec.user, spec.password_file)
    with pytest.raises(KaError, match="404") as caught:
        await power(nowhere, "pc1", PowerAction.ON)
    assert PASSWORD not in str(caught.value)
