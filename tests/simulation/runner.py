"""Many schedules on all cores, and what they showed."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from tests.simulation.disk import GuardTripped
from tests.simulation.facts import stand_ins
from tests.simulation.invariants import Stuck, Violation
from tests.simulation.node import Node
from tests.simulation.plan import random_plan
from tests.simulation.world import World

FLOORS = {
    "nullified_views": 1.8,
    "double_notarizations": 1.2,
    "restarts": 1.2,
    "attacker_stake": 0.18,
    "epoch_edges": 2.0,
    "set_changes": 2.0,
    "later_views": 1.5,
    "accusations": 3.0,
}
"""What a schedule must contain on average, so that it tests anything: stated, checked, printed.
`set_changes` are epochs that end and are followed by other validators or weights, `later_views`
those in which the last block of an epoch was notarized again (N7)."""
FLOOR_SEEDS = 200
"""Fewer schedules than these are no sample for the floors."""
CHANGED = 0.95
"""The least share of schedules with a change of validators."""
CHUNK = 20
"""Schedules that a process takes at a time."""


class WorkerDied(RuntimeError):
    """A process that ran schedules is gone: killed, or out of memory. `first` to `last` are the
    seeds among which it died."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(f"a process died among the seeds {first} to {last}")
        self.first, self.last = first, last


@dataclass(frozen=True)
class Outcome:
    """One schedule. `found` is empty when nothing was."""

    seed: int
    kind: str
    found: str
    heights: int
    totals: Counter[str]
    attacker_stake: float
    points: Counter[str]
    strategies: tuple[str, ...]


def run(seed: int, validators: int | None = None, node: type[Node] = Node) -> Outcome:
    """One schedule; what it finds is an outcome, not an exception."""
    with stand_ins():
        plan = random_plan(seed, validators)
        world = World(plan, seed + 1_000_000, node)
        kind, found = _find(world)
    watcher = world.watcher
    totals = Counter(
        nullified_views=len(watcher.nullified),
        double_notarizations=watcher.double_notarizations,
        restarts=world.restarts,
        epoch_edges=watcher.edges,
        set_changes=watcher.set_changes,
        later_views=watcher.later_views,
        accusations=watcher.accusations,
    )
    return Outcome(
        seed,
        kind,
        found,
        len(watcher.ids),
        totals,
        watcher.attacker_stake,
        Counter(world.crash_points),
        tuple(sorted({strategy for _, strategy in plan.attackers})),
    )


def _find(world: World) -> tuple[str, str]:
    try:
        world.run()
    except (Violation, GuardTripped) as error:
        found = str(error)
        double = isinstance(error, GuardTripped) or found.startswith("double sign")
        return "double_signs" if double else "disagreements", found
    except Stuck as error:
        return "stuck", str(error)
    except Exception as error:  # a schedule that breaks the core or shell is a finding, not the end
        return "crashes", f"{type(error).__name__}: {error}"
    return "", ""


def run_chunk(seeds: range, validators: int | None) -> list[Outcome]:
    """What one process does at a time."""
    return [run(seed, validators) for seed in seeds]


def run_many(
    first: int,
    count: int,
    validators: int | None = None,
    task: Callable[[range, int | None], list[Outcome]] = run_chunk,
) -> Iterator[Outcome]:
    """Schedules `first` to `first + count - 1`, in order, on all cores. Raises WorkerDied."""
    end = first + count
    chunks = [range(at, min(at + CHUNK, end)) for at in range(first, end, CHUNK)]
    cores = min(os.cpu_count() or 1, len(chunks))
    if cores == 1:
        for chunk in chunks:
            yield from task(chunk, validators)
        return
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(cores, context, signal.signal, ignore) as pool:
        futures = [pool.submit(task, chunk, validators) for chunk in chunks]
        try:
            for done, future in enumerate(futures):  # noqa: B007 (the pool breaks at one of them)
                yield from future.result()
        except BrokenProcessPool as error:
            running = chunks[done : done + cores]
            raise WorkerDied(running[0][0], running[-1][-1]) from error
        finally:
            for future in futures:
                future.cancel()


@dataclass
class Summary:
    """The sum of outcomes."""

    seeds: int = 0
    disagreements: int = 0
    double_signs: int = 0
    stuck: int = 0
    crashes: int = 0

    def __post_init__(self) -> None:
        self.heights = 0
        self.least_height: int | None = None
        self.totals: Counter[str] = Counter()
        self.stake = 0.0
        self.changed = 0
        """Schedules in which the validators changed."""
        self.points: Counter[str] = Counter()
        self.strategies: Counter[str] = Counter()
        self.findings: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        if outcome.found:
            self.findings.append(outcome)
            setattr(self, outcome.kind, getattr(self, outcome.kind) + 1)
        else:
            least = self.least_height
            self.least_height = outcome.heights if least is None else min(least, outcome.heights)
        self.heights += outcome.heights
        self.totals += outcome.totals
        self.changed += outcome.totals["set_changes"] > 0
        self.stake += outcome.attacker_stake
        self.points += outcome.points
        self.strategies.update(outcome.strategies)

    def per_schedule(self) -> dict[str, float]:
        """Averages, by the names of `FLOORS`."""
        count = max(self.seeds, 1)
        totals = {**self.totals, "attacker_stake": self.stake}
        return {name: round(totals.get(name, 0) / count, 3) for name in FLOORS}

    def below_floor(self) -> list[str]:
        """Averages that are too low; none for a handful of schedules."""
        if self.seeds < FLOOR_SEEDS:
            return []
        found = [name for name, value in self.per_schedule().items() if value < FLOORS[name]]
        return found + ["changed"] * (self.changed < CHANGED * self.seeds)
