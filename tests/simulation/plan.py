"""One schedule: who takes part, what goes wrong, in which dose. Made from a seed, or by hand."""

import random
from dataclasses import dataclass, field

from tdmld.chain.pacing import Times

STRATEGIES = (
    "equivocator",
    "twins",
    "nuller",
    "silent leader",
    "lying parent",
    "stale votes",
    "withholder",
    "timer",
)
"""Attackers by name; each has a room in `tests/simulation/attackers`."""

HEIGHTS = 10
"""Final heights that every random schedule reaches at least."""


@dataclass
class Plan:
    """Probabilities are per message; times in seconds of virtual time.

    `attackers` are (validator, strategy). `skews` are errors of wall clocks, `rates` of monotonic
    ones. `execution` is the longest time that executing a block takes.
    """

    stakes: tuple[int, ...]
    attackers: tuple[tuple[int, str], ...] = ()
    chaos: float = 10.0
    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.05
    slow: float = 0.0
    partitions: int = 0
    crashes: int = 0
    wiped: int | None = None
    skews: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    execution: float = 0.01
    transactions: int = 6
    heights: int = 0
    calm: float = 240.0
    times: Times = field(default_factory=lambda: Times(0.5, 2.0, 0.3, 30.0))

    @property
    def attacker_stake(self) -> float:
        """The share of the stake that attacks; less than a third."""
        return sum(self.stakes[i] for i, _ in self.attackers) / sum(self.stakes)


def random_plan(seed: int, validators: int | None = None) -> Plan:
    """Everything that goes wrong, in random doses."""
    rng = random.Random(seed)
    count = validators or rng.randint(4, 7)
    stakes = [rng.choice((1, 1, 2, 3, 5, 8)) for _ in range(count)]
    if len(set(stakes)) == 1:
        stakes[rng.randrange(count)] += 1
    total, room = sum(stakes), sum(stakes)
    order = sorted(range(count), key=lambda i: (stakes[i], rng.random()))
    if rng.random() < 0.6:
        rng.shuffle(order)
    attackers: list[int] = []
    if rng.random() < 0.9:
        for index in order:
            if 3 * (total - room + stakes[index]) < total:
                attackers.append(index)
                room -= stakes[index]
    together = rng.choice(STRATEGIES) if rng.random() < 0.5 else None
    named = tuple((i, together or rng.choice(STRATEGIES)) for i in attackers)
    spare = [
        i for i in range(count) if i not in attackers and 3 * (total - room + stakes[i]) < total
    ]
    wiped = rng.choice(spare) if spare and rng.random() < 0.6 else None
    skews = [rng.uniform(-4, 4) for _ in range(count)]
    if wiped is None and spare and rng.random() < 0.2:
        skews[rng.choice(spare)] = rng.choice((-60.0, 60.0))
    return Plan(
        tuple(stakes),
        named,
        chaos=rng.uniform(6, 12),
        loss=rng.choice((0.0, 0.05, 0.3)),
        duplicate=rng.choice((0.0, 0.1)),
        delay=rng.choice((0.01, 0.05, 0.6, 1.2)),
        slow=rng.choice((0.0, 0.1, 0.3)),
        partitions=rng.randint(0, 3),
        crashes=rng.randint(0, 5) + (wiped is not None),
        wiped=wiped,
        skews=tuple(skews),
        rates=tuple(rng.uniform(0.9, 1.1) for _ in range(count)),
        execution=rng.choice((0.0, 0.01, 0.01, 0.8)),
        transactions=rng.randint(3, 6),
        heights=HEIGHTS,
    )
