"""Mock nodes for whole deployments: every step takes its time, some fail, some never end.

`python -m tests.support.deploy_mock STORE COUNT SECONDS_PER_STEP` runs the head of the deployment
in STORE in real time, so that it can be killed; begun if there is none.  Which node does what is
drawn from its name, so that two heads of one deployment see the same nodes.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trio

from kadeploy.head import Head, Report
from kadeploy.steps import MicroStep, Options, Workflow, default_workflow
from kadeploy.store import Store
from kadeploy.workflow import Deployment


def name_of(index: int) -> str:
    return f"pc{index:03}"


class MockNodes:
    """Steps of `Steps`: one in twenty nodes has a fault that needs another way, one is dead."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.calls: Counter[tuple[str, str]] = Counter()
        self.inside: Counter[str] = Counter()
        self.inside_max: Counter[str] = Counter()
        self.reboots_at: list[float] = []

    async def run(self, step: MicroStep, nodes: Sequence[str], report: Report) -> None:
        self.inside[step.window] += len(nodes)
        self.inside_max[step.window] = max(self.inside[step.window], self.inside_max[step.window])
        if step.action == "reboot":
            self.reboots_at += [trio.current_time()] * len(nodes)
        try:
            for node in nodes:
                self.calls[node, step.name] += 1
            rng = random.Random(f"{nodes[0]}/{step.name}")
            await trio.sleep(self.step_s * (0.5 + rng.random()))
            for node in nodes:
                if not self.hangs(node, step):
                    report(node, self.fault(node, step))
            if any(self.hangs(node, step) for node in nodes):
                await trio.sleep_forever()
        finally:
            self.inside[step.window] -= len(nodes)

    def hangs(self, node: str, step: MicroStep) -> bool:
        """pc013 never comes up in the deployment environment."""
        return node == "pc013" and step.action == "wait-deployment"

    def fault(self, node: str, step: MicroStep) -> str:
        index = int(node[2:])
        if step.action == "reboot" and step.arguments == ("soft",) and index % 20 == 7:
            return "no answer to ssh"
        if step.action == "prepare" and node == "pc042":
            return "disk system refused"
        if step.action == "send" and index % 50 == 9:
            return "lost in the middle"
        return ""


def workflow(step_s: float) -> Workflow:
    """The default one; times are a step's, so that a killed head's run is short too."""
    return default_workflow(
        Options(
            reboot_window=50,
            reboot_pause_ms=int(step_s * 1000),
            boot_timeout_ms=int(5_000 * step_s),
            boot_per_node_ms=int(50 * step_s),
            gather_ms=int(3_000 * step_s),
        )
    )


async def main(path: Path, count: int, step_s: float) -> None:
    with Store.open(path) as store:
        if not store.deployments():
            environment = store.add_environment("debian", 1, path, "text", 0)
            store.begin(environment, {}, [name_of(index) for index in range(1, count + 1)], 0)
        row = store.deployment()
        with store.claim(row.id):
            deployment = Deployment(workflow(step_s), store.nodes(row.id))
            mock = MockNodes(step_s)
            await Head(store, row.id, deployment, mock).run()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
