"""Power: which way to switch a node, mildest first.

Pure.  A reboot has three levels.  Soft asks the running system; hard cycles the power by the node's
first way; harder switches it off and on by its last way (a PDU, a relay), for boards whose
management has gone astray.  `power_drivers.py` does it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import Code, KaError
from kadeploy.nodes import NodeSpec, PowerDriver, PowerSpec

__all__ = ["LEVELS", "PowerAction", "PowerStep", "reboot_steps"]

LEVELS = ("soft", "hard", "harder")
OFF_S = 5.0
"""What capacitors get to run dry."""
# What a driver cannot do at all.
_ONLY = {
    PowerDriver.WAKE: frozenset({"on"}),
    PowerDriver.SSH: frozenset({"soft-off", "cycle"}),
}


class PowerAction(enum.Enum):
    ON = "on"
    OFF = "off"
    CYCLE = "cycle"
    SOFT_OFF = "soft-off"
    STATUS = "status"


@dataclass(frozen=True, slots=True)
class PowerStep:
    """One thing to do; `spec` None: ask the system that runs on the node to reboot."""

    spec: PowerSpec | None
    action: PowerAction
    then_wait_s: float = 0.0


def reboot_steps(node: NodeSpec, level: str) -> list[PowerStep]:
    """Return what a reboot of a level is for a node; raises USAGE if it has no such way."""
    if level == "soft":
        return [PowerStep(None, PowerAction.CYCLE)]
    if level not in LEVELS:
        raise KaError(Code.USAGE, f"no level {level!r}: {', '.join(LEVELS)}")
    order = node.power if level == "hard" else tuple(reversed(node.power))
    able = [spec for spec in order if can(spec, PowerAction.CYCLE)]
    wakes = [spec for spec in node.power if can(spec, PowerAction.ON)]
    if not able:
        if wakes and level == "harder":
            return [PowerStep(wakes[0], PowerAction.ON)]  # it may only be off
        raise KaError(Code.USAGE, f"{node.name}: no way to cycle its power")
    if level == "hard" or not can(able[0], PowerAction.OFF):
        return [PowerStep(able[0], PowerAction.CYCLE)]
    return [
        PowerStep(able[0], PowerAction.OFF, OFF_S),
        PowerStep(able[0], PowerAction.ON),
    ]


def can(spec: PowerSpec, action: PowerAction) -> bool:
    return action.value in _ONLY.get(spec.driver, {one.value for one in PowerAction})


def first_able(specs: Sequence[PowerSpec], action: PowerAction) -> PowerSpec:
    """Return the mildest way to do something; raises USAGE."""
    for spec in specs:
        if can(spec, action):
            return spec
    raise KaError(Code.USAGE, f"no way to do {action.value} on this node")
