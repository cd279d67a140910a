"""Run simulated broadcasts: what the tests share, and a command to replay or hunt for seeds.

python -m tests.support.simulate --receivers 1000 --chunks 16 --seed 7
python -m tests.support.simulate --receivers 60 --first 0 --count 200
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping

import click

from common.broadcast.node import Action, Send, SendChunk, SendPast
from common.broadcast.scenario import Scenario, draw
from common.broadcast.simulator import Breach, Outcome, Simulation
from common.broadcast.topology import Kind
from common.broadcast.wire import Ack, Alive, Report

__all__ = ["play", "run_seed", "trace_of"]


def play(scenario: Scenario, seed: int = 1, *, have: Mapping[int, int] | None = None) -> Outcome:
    return Simulation(scenario, random.Random(seed), have=have).run()


def run_seed(
    seed: int, *, receivers: int, chunks: int, kind: Kind | None = None
) -> tuple[Scenario, Outcome]:
    """Draw a scenario and run it; what it was is printed, so that a failure can be replayed."""
    rng = random.Random(seed)
    scenario = draw(rng, receiver_count=receivers, chunk_count=chunks, kind=kind)
    print(f"seed {seed}, {receivers} receivers, {chunks} chunks: {scenario}")
    return scenario, Simulation(scenario, rng).run()


def trace_of(scenario: Scenario, seed: int = 1) -> list[str]:
    """Return what hops did, line by line, but for the chatter of chunks, acks and progress."""
    found: list[str] = []

    def note(now: float, rank: int, action: Action) -> None:
        if isinstance(action, SendChunk):
            return
        if not isinstance(action, Send | SendPast):
            found.append(f"{now:.3f} {rank}: {action}")
        elif not isinstance(action.message, Ack | Alive | Report):
            fields = action.message._asdict()
            del fields["transfer"]
            text = " ".join(f"{key}={value}" for key, value in fields.items())
            name = type(action.message).__name__
            arrow = "->" if isinstance(action, Send) else "=>"
            found.append(f"{now:.3f} {rank} {arrow} {action.peer} {name} {text}".rstrip())

    simulation = Simulation(scenario, random.Random(seed))
    simulation.trace = note
    simulation.run()
    return found


@click.command()
@click.option("--receivers", default=60, show_default=True)
@click.option("--chunks", default=32, show_default=True)
@click.option("--kind", type=click.Choice([kind.value for kind in Kind]))
@click.option("--seed", type=int, help="Run this one and show the scenario.")
@click.option("--first", default=0, show_default=True)
@click.option("--count", default=20, show_default=True)
def main(
    receivers: int, chunks: int, kind: str | None, seed: int | None, first: int, count: int
) -> None:
    """Simulate broadcasts with random faults; one line for each seed."""
    seeds: Iterable[int] = range(first, first + count) if seed is None else [seed]
    wanted = Kind(kind) if kind else None
    for one in seeds:
        rng = random.Random(one)
        scenario = draw(rng, receiver_count=receivers, chunk_count=chunks, kind=wanted)
        if seed is not None:
            click.echo(scenario)
        began = time.process_time()
        name = f"seed {one:5} {scenario.shape.kind.value:9}"
        try:
            found = Simulation(scenario, rng).run()
        except Breach as breach:
            click.echo(f"{name} BREACH {breach}")
            continue
        click.echo(
            f"{name} {found.seconds:6.2f} s, longest stall {found.longest_stall_s:4.2f} s,"
            f" {len(found.summary.others)} not verified,"
            f" {found.chunks_sent - receivers * chunks:+} chunks, {found.event_count} events"
            f" in {time.process_time() - began:.1f} s"
        )


if __name__ == "__main__":
    main()
