"""The micro-steps, carried out: what `steps.py` names and `head.py` starts.

Position: head.py (when) -> this -> links.py, broadcast.py, power_drivers.py, kaboot (how).

A node's plan is made when its facts are asked for (`check`); a head that was killed makes it again,
the same, for a plan follows from description, node and disk alone.  Every order of a plan may be
carried out twice.

Not here: retries and times (workflow.py).
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from common import log
from common.errors import Code, KaError
from kaboot import Control
from kadeploy import descriptions, power_drivers
from kadeploy.broadcast import Receiver, broadcast
from kadeploy.disks import facts_from_json
from kadeploy.environment import Environment
from kadeploy.head import Report
from kadeploy.links import Identity, SshLink
from kadeploy.nodes import Nodes, NodeSpec
from kadeploy.orders import Order
from kadeploy.plan import NodePlan, make_plan
from kadeploy.power import reboot_steps
from kadeploy.settings import Settings
from kadeploy.steps import MicroStep

__all__ = ["Deployer", "Target", "plan_for"]

POLL_S = 1.0
GONE_POLL_COUNT = 10
"""Unanswered in a row: it has left the deployment environment, no single packet was lost."""
_logger = log.get("kadeploy.deploying")


@dataclass(frozen=True, slots=True)
class Target:
    """What is deployed: the environment, where its files are, and the nodes file."""

    environment: Environment
    directory: Path
    nodes: Nodes
    token: str

    def image_path(self, index: int) -> Path:
        return self.directory / list(self.environment.images())[index].file

    def read(self, name: str) -> str:
        return descriptions.read_text(self.directory / name)

    def stored_sizes(self) -> dict[str, int]:
        """Return the bytes of each image; raises USAGE for one that is not there."""
        sizes = {}
        for image in self.environment.images():
            path = self.directory / image.file
            try:
                sizes[image.file] = path.stat().st_size
            except OSError as error:
                raise KaError(Code.USAGE, f"image {path}: {error.strerror}") from None
        return sizes


async def plan_for(target: Target, node: NodeSpec, link: SshLink) -> NodePlan:
    """Ask a node for its facts and make its plan."""
    answer = await link.ask("facts")
    return make_plan(
        target.environment,
        node,
        target.nodes,
        facts_from_json(answer.get("facts", {})),
        read=target.read,
        stored_sizes=target.stored_sizes(),
        token=target.token,
    )


@dataclass(slots=True)
class _Machine:
    """What the head remembers of a node while it runs."""

    spec: NodeSpec
    link: SshLink
    plan: NodePlan | None = None
    boot_id: str = ""
    """Of the system that was told to go."""
    lock: trio.Lock = field(default_factory=trio.Lock)


class Deployer:
    """`head.Steps` on real nodes."""

    def __init__(self, target: Target, settings: Settings, names: Sequence[str]) -> None:
        """Raises USAGE for a node that is in no nodes file or has no address."""
        self._target = target
        self._settings = settings
        self._machines: dict[str, _Machine] = {}
        for name in names:
            spec = target.nodes.get(name)
            address = spec.address.partition("/")[0] or name
            self._machines[name] = _Machine(spec, SshLink(address, settings.ssh))
        self._actions: dict[str, Callable[[MicroStep, _Machine], Awaitable[None]]] = {
            "set-boot": self._set_boot,
            "reboot": self._reboot,
            "wait-deployment": self._wait_deployment,
            "check": self._check,
            "prepare": self._prepare,
            "stream": self._stream,
            "finish": self._finish,
            "start": self._start,
            "wait-system": self._wait_system,
            "wait-gone": self._wait_gone,
            "hook": self._hook,
        }

    async def run(self, step: MicroStep, nodes: Sequence[str], report: Report) -> None:
        """Carry out one step; see `head.Steps`."""
        if step.action == "send":
            await self._send(step, nodes, report)
            return
        for name in nodes:
            _logger.info("step.started", node=name, step=step.name)
            await self._actions[step.action](step, self._machines[name])
            report(name, "")

    # ------------------------------------------------------------ into the deployment environment

    async def _set_boot(self, step: MicroStep, machine: _Machine) -> None:
        inventory = self._settings.kaboot
        if inventory is None:
            raise KaError(Code.USAGE, "no kaboot inventory in the configuration (key kaboot)")

        def assign() -> None:
            with Control.open(inventory) as control:
                control.assign([machine.spec.name], step.arguments[0], why="kadeploy")

        await trio.to_thread.run_sync(assign)

    async def _reboot(self, step: MicroStep, machine: _Machine) -> None:
        machine.boot_id = ""
        for one in reboot_steps(machine.spec, step.arguments[0]):
            if one.spec is None:
                machine.boot_id = (await machine.link.identify()).boot_id
                await machine.link.reboot()
            else:
                await power_drivers.power(one.spec, machine.spec.name, one.action)
            await trio.sleep(one.then_wait_s)

    async def _wait_deployment(self, step: MicroStep, machine: _Machine) -> None:
        def there(one: Identity) -> bool:
            return one.deployment_environment and one.boot_id != machine.boot_id

        await self._until(machine, there)

    async def _until(self, machine: _Machine, there: Callable[[Identity], bool]) -> Identity:
        """Ask until the answer is right; the workflow's time-out ends it."""
        while True:
            try:
                identity = await machine.link.identify()
                if there(identity):
                    return identity
            except KaError as error:
                if error.code not in (Code.UNREACHABLE, Code.PROTOCOL):
                    raise
            await trio.sleep(POLL_S)

    # ------------------------------------------------------------ the disks

    async def _check(self, step: MicroStep, machine: _Machine) -> None:
        machine.plan = await plan_for(self._target, machine.spec, machine.link)

    async def _plan(self, machine: _Machine) -> NodePlan:
        async with machine.lock:
            if machine.plan is None:
                machine.plan = await plan_for(self._target, machine.spec, machine.link)
            return machine.plan

    async def _prepare(self, step: MicroStep, machine: _Machine) -> None:
        await self._orders(machine, (await self._plan(machine)).prepare)

    async def _orders(self, machine: _Machine, orders: Sequence[Order]) -> None:
        if orders:
            await machine.link.ask("do", *orders)

    async def _stream(self, step: MicroStep, machine: _Machine) -> None:
        index = int(step.arguments[0])
        plan = await self._plan(machine)
        image = self._target.image_path(index)
        await machine.link.ask("do", plan.images[index].order, image=image)

    async def _send(self, step: MicroStep, nodes: Sequence[str], report: Report) -> None:
        if not self._settings.listen:
            raise KaError(Code.USAGE, "no address to broadcast from (key listen)")
        index = int(step.arguments[0])
        receivers = {}
        for name in nodes:
            machine = self._machines[name]
            try:
                order = (await self._plan(machine)).images[index].order
            except KaError as error:
                report(name, str(error))
                continue
            address = machine.spec.address.partition("/")[0] or name
            receivers[name] = Receiver(name, machine.link, order, address)
        path = self._target.image_path(index)
        await broadcast(path, receivers, self._settings.listen, report)

    async def _finish(self, step: MicroStep, machine: _Machine) -> None:
        await self._orders(machine, (await self._plan(machine)).finish)

    # ------------------------------------------------------------ into the new system

    async def _start(self, step: MicroStep, machine: _Machine) -> None:
        plan = await self._plan(machine)
        order = plan.start
        if step.arguments == ("kexec",):
            if plan.kexec is None:
                raise KaError(Code.USAGE, "no kernel of this environment can be started by kexec")
            order = plan.kexec
        machine.boot_id = (await machine.link.identify()).boot_id
        await machine.link.ask("do", order)

    async def _wait_system(self, step: MicroStep, machine: _Machine) -> None:
        """Wait for the very system that was deployed: not the old one, not our environment."""

        def there(one: Identity) -> bool:
            fresh = not one.deployment_environment and one.boot_id != machine.boot_id
            return fresh and one.token == self._target.token

        await self._until(machine, there)

    async def _wait_gone(self, step: MicroStep, machine: _Machine) -> None:
        """Wait until the deployment environment is gone and nothing that we know came instead.

        A Windows says no more: its first start takes minutes, and it has no root.
        """
        silent_count = 0
        while silent_count < GONE_POLL_COUNT:
            await trio.sleep(POLL_S)
            try:
                there = await machine.link.identify()
            except KaError as error:
                if error.code not in (Code.UNREACHABLE, Code.PROTOCOL):
                    raise
                silent_count += 1
                continue
            silent_count = 0
            machine.boot_id = machine.boot_id or there.boot_id
            if there.boot_id != machine.boot_id:
                what = "the deployment environment" if there.deployment_environment else "a Linux"
                raise KaError(Code.EIO, f"what started is {what}, not the system to be started")

    # ------------------------------------------------------------ yours

    async def _hook(self, step: MicroStep, machine: _Machine) -> None:
        words = [word.replace("{node}", machine.spec.name) for word in step.arguments]
        run = functools.partial(
            trio.run_process, words, stdin=b"", capture_stdout=True, capture_stderr=True
        )
        try:
            done = await run(check=False)
        except OSError as error:
            raise KaError(Code.USAGE, f"hook {words[0]}: {error.strerror}") from None
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise KaError(Code.EIO, f"hook {words[0]} failed ({done.returncode}): {' '.join(said)}")
