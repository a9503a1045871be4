"""Many schedules on all cores, and what they showed."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tests.simulation.disk import GuardTripped
from tests.simulation.invariants import Stuck, Violation
from tests.simulation.node import Node
from tests.simulation.plan import random_plan
from tests.simulation.world import World

FLOORS = {
    "nullified_views": 1.5,
    "double_notarizations": 1.0,
    "restarts": 1.2,
    "attacker_stake": 0.18,
}
"""What a schedule must contain on average, so that it tests anything: stated, checked, printed."""
FLOOR_SEEDS = 200
"""Fewer schedules than these are no sample for the floors."""
CHUNK = 20
"""Schedules that a process takes at a time."""


@dataclass(frozen=True)
class Outcome:
    """One schedule. `found` is empty when nothing was."""

    seed: int
    kind: str
    found: str
    heights: int
    nullified_views: int
    double_notarizations: int
    restarts: int
    attacker_stake: float
    points: Counter[str]
    strategies: tuple[str, ...]


def run(seed: int, validators: int | None = None) -> Outcome:
    """One schedule; what it finds is an outcome, not an exception."""
    plan = random_plan(seed, validators)
    world = World(plan, seed + 1_000_000, Node)
    kind = found = ""
    try:
        world.run()
    except (Violation, GuardTripped) as error:
        found = str(error)
        double = isinstance(error, GuardTripped) or found.startswith("double sign")
        kind = "double_signs" if double else "disagreements"
    except Stuck as error:
        kind, found = "stuck", str(error)
    except Exception as error:  # a schedule that breaks the core or shell is a finding, not the end
        kind, found = "crashes", f"{type(error).__name__}: {error}"
    return Outcome(
        seed,
        kind,
        found,
        len(world.watcher.ids),
        len(world.watcher.nullified),
        world.watcher.double_notarizations,
        world.restarts,
        plan.attacker_stake,
        Counter(world.crash_points),
        tuple(sorted({strategy for _, strategy in plan.attackers})),
    )


def _task(arguments: tuple[int, int | None]) -> Outcome:
    return run(*arguments)


def run_many(first: int, count: int, validators: int | None = None) -> Iterator[Outcome]:
    """Schedules `first` to `first + count - 1`, in order, on all cores."""
    tasks = [(seed, validators) for seed in range(first, first + count)]
    cores = min(os.cpu_count() or 1, count)
    if cores == 1 or count < CHUNK:
        yield from map(_task, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(_task, tasks, chunksize=CHUNK)


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
        for name in ("nullified_views", "double_notarizations", "restarts"):
            self.totals[name] += getattr(outcome, name)
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
        return [name for name, value in self.per_schedule().items() if value < FLOORS[name]]
