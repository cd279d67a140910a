"""The steps of a deployment, as data: what there is to do, for how long, how often, how else.

Pure.  `workflow.py` walks a node along these; `deploying.py` carries them out.

A deployment is three macro-steps in a row.  Each is an ordered list of implementations: a node that
has used up its tries of one goes on with the next.  An implementation is a row of micro-steps; a
try that fails begins the row again, after the micro-step's own tries are used up.

Times grow with the number of nodes where a shared thing (the head's link, a boot server) makes
them: `timeout_ms + per_node_ms * nodes`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import Code, KaError

__all__ = [
    "Hook",
    "Implementation",
    "Macro",
    "MacroStep",
    "MicroStep",
    "Options",
    "When",
    "Window",
    "Workflow",
    "default_workflow",
    "with_hooks",
]

SECOND = 1000


class Macro(enum.Enum):
    SET_DEPLOYMENT_ENV = "SetDeploymentEnv"
    BROADCAST_ENV = "BroadcastEnv"
    BOOT_NEW_ENV = "BootNewEnv"


@dataclass(frozen=True, slots=True)
class Window:
    """How many nodes may be in a step at once, and how often one may enter."""

    name: str
    count: int
    pause_ms: int = 0
    """At most `count` nodes start within any stretch of this length (0: no such limit)."""

    def validate(self) -> None:
        if self.count < 1 or self.pause_ms < 0:
            raise ValueError(f"window {self.name}: count is at least 1, pause_ms at least 0")


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One thing done to a node.  `action` is what `deploying.py` knows it by."""

    name: str
    action: str
    timeout_ms: int
    retries: int = 0
    """More tries of this step alone, before the implementation fails."""
    per_node_ms: int = 0
    arguments: tuple[str, ...] = ()
    window: str = ""
    together: bool = False
    """Started for all nodes that are there as one: a broadcast."""
    gather_ms: int = 0
    """How long the first node there waits for the others still on their way."""
    ignore_failure: bool = False
    refusal_is_final: bool = False
    """What it refuses (USAGE: a disk that is too small) would be the same after another reboot."""

    def deadline_ms(self, node_count: int) -> int:
        return self.timeout_ms + self.per_node_ms * node_count


@dataclass(frozen=True, slots=True)
class Implementation:
    name: str
    steps: tuple[MicroStep, ...]
    retries: int = 0


@dataclass(frozen=True, slots=True)
class MacroStep:
    macro: Macro
    implementations: tuple[Implementation, ...]


@dataclass(frozen=True, slots=True)
class Workflow:
    macros: tuple[MacroStep, ...]
    windows: tuple[Window, ...] = ()
    breakpoints: tuple[str, ...] = field(default=())
    """Micro-steps before which nodes are held."""

    def steps(self) -> Iterator[tuple[int, int, int, MicroStep]]:
        """Yield every micro-step with its indexes: macro, implementation, step."""
        for at, macro in enumerate(self.macros):
            for how, implementation in enumerate(macro.implementations):
                for index, step in enumerate(implementation.steps):
                    yield at, how, index, step

    def outline(self) -> list[dict[str, Any]]:
        """Return the names of everything, as plain values: what a node's indexes mean."""
        return [
            {
                "macro": macro.macro.value,
                "ways": [
                    {"way": one.name, "steps": [step.name for step in one.steps]}
                    for one in macro.implementations
                ],
            }
            for macro in self.macros
        ]

    def validate(self) -> None:
        """Check what the automaton relies on; raises USAGE."""
        windows = {window.name for window in self.windows}
        names = {step.name for *_, step in self.steps()}
        for window in self.windows:
            window.validate()
        for macro in self.macros:
            if not macro.implementations or not all(one.steps for one in macro.implementations):
                raise KaError(Code.USAGE, f"{macro.macro.value} has nothing to do")
        for *_, step in self.steps():
            if step.window and step.window not in windows:
                raise KaError(Code.USAGE, f"step {step.name}: no window {step.window!r}")
            if step.timeout_ms <= 0 or step.retries < 0:
                raise KaError(Code.USAGE, f"step {step.name}: timeout_ms is more than 0")
        for name in self.breakpoints:
            if name not in names:
                known = ", ".join(sorted(names))
                raise KaError(Code.USAGE, f"no step {name!r} to stop at: {known}")


class When(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    INSTEAD = "instead"


@dataclass(frozen=True, slots=True)
class Hook:
    """A command of yours around a micro-step.  Words; `{node}` is filled in; run on the head."""

    step: str
    when: When
    command: tuple[str, ...]
    timeout_ms: int = 60 * SECOND
    retries: int = 0
    ignore_failure: bool = False

    def validate(self) -> None:
        if not self.command:
            raise ValueError(f"hook {self.when.value} {self.step}: no command")


def with_hooks(workflow: Workflow, hooks: Sequence[Hook]) -> Workflow:
    """Return the workflow with the hooks as micro-steps of their own; raises USAGE."""
    names = {step.name for *_, step in workflow.steps()}
    for hook in hooks:
        if hook.step not in names:
            raise KaError(Code.USAGE, f"hook: no step {hook.step!r}")

    def around(step: MicroStep) -> list[MicroStep]:
        own = [hook for hook in hooks if hook.step == step.name]
        made = [_hook_step(hook) for hook in own if hook.when is When.BEFORE]
        instead = [_hook_step(hook) for hook in own if hook.when is When.INSTEAD]
        made += instead or [step]
        return made + [_hook_step(hook) for hook in own if hook.when is When.AFTER]

    return replace(
        workflow,
        macros=tuple(
            replace(
                macro,
                implementations=tuple(
                    replace(one, steps=tuple(new for step in one.steps for new in around(step)))
                    for one in macro.implementations
                ),
            )
            for macro in workflow.macros
        ),
    )


def _hook_step(hook: Hook) -> MicroStep:
    return MicroStep(
        f"{hook.when.value}-{hook.step}",
        "hook",
        hook.timeout_ms,
        hook.retries,
        arguments=hook.command,
        ignore_failure=hook.ignore_failure,
    )


@dataclass(frozen=True, slots=True)
class Options:
    """What of the usual way can be set."""

    image_count: int = 1
    reboot_window: int = 50
    reboot_pause_ms: int = 10 * SECOND
    kexec: bool = False
    powered: bool = True
    """There are ways to power nodes besides asking them."""
    asked: bool = True
    """The system that starts can be asked who it is: a Windows cannot."""
    boot_timeout_ms: int = 200 * SECOND
    boot_per_node_ms: int = 500
    send_timeout_ms: int = 3600 * SECOND
    gather_ms: int = 30 * SECOND
    stream_window: int = 4

    @property
    def levels(self) -> tuple[str, ...]:
        return ("soft", "hard", "harder") if self.powered else ("soft",)


def default_workflow(options: Options) -> Workflow:
    """Return the usual way: network boot, broadcast, reboot; mildest reboot first."""
    return Workflow(
        (
            MacroStep(Macro.SET_DEPLOYMENT_ENV, _enter(options)),
            MacroStep(Macro.BROADCAST_ENV, _write(options)),
            MacroStep(Macro.BOOT_NEW_ENV, _leave(options)),
        ),
        (
            Window("reboot", options.reboot_window, options.reboot_pause_ms),
            Window("stream", options.stream_window),
        ),
    )


def _reboot(name: str, level: str) -> MicroStep:
    return MicroStep(name, "reboot", 60 * SECOND, arguments=(level,), window="reboot")


def _set_boot(name: str, step: str) -> MicroStep:
    return MicroStep(name, "set-boot", 20 * SECOND, 2, arguments=(step,))


def _wait(name: str, options: Options) -> MicroStep:
    return MicroStep(name, name, options.boot_timeout_ms, per_node_ms=options.boot_per_node_ms)


def _enter(options: Options) -> tuple[Implementation, ...]:
    return tuple(
        Implementation(
            f"reboot-{level}",
            (
                _set_boot("boot-deployment", "install"),
                _reboot("reboot", level),
                _wait("wait-deployment", options),
                MicroStep("check-disks", "check", 60 * SECOND, 1, refusal_is_final=True),
            ),
        )
        for level in options.levels
    )


def _write(options: Options) -> tuple[Implementation, ...]:
    prepare = MicroStep("prepare-disks", "prepare", 300 * SECOND, 1)
    customize = MicroStep("customize", "finish", 300 * SECOND, 1)
    send = MicroStep(
        "send", "send", options.send_timeout_ms, 1, together=True, gather_ms=options.gather_ms
    )
    stream = MicroStep("stream", "stream", options.send_timeout_ms, window="stream")
    indexes = [str(index) for index in range(options.image_count)]
    sends = (replace(send, name=f"send-{one}", arguments=(one,)) for one in indexes)
    streams = (replace(stream, name=f"stream-{one}", arguments=(one,)) for one in indexes)
    return (
        Implementation("broadcast", (prepare, *sends, customize), retries=1),
        Implementation("stream", (prepare, *streams, customize)),
    )


def _leave(options: Options) -> tuple[Implementation, ...]:
    set_boot = _set_boot("boot-deployed", "deployed")
    wait = _wait("wait-system" if options.asked else "wait-gone", options)
    start = MicroStep("restart", "start", 60 * SECOND, arguments=("reboot",), window="reboot")
    made = [Implementation("reboot", (set_boot, start, wait))]
    if options.kexec:
        kexec = replace(start, name="kexec", arguments=("kexec",))
        made.insert(0, Implementation("kexec", (set_boot, kexec, wait)))
    if not options.asked:
        return tuple(made)  # what sets itself up, unseen, must not be switched off
    made += [
        Implementation(f"power-{level}", (set_boot, _reboot("power-cycle", level), wait))
        for level in options.levels
        if level != "soft"
    ]
    return tuple(made)
