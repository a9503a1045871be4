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
    "two faces",
    "absent",
)
"""Attackers by name; each has a room in `tests/simulation/attackers`."""

HEIGHTS = 10
"""Final heights that every random schedule reaches at least."""
NO_EPOCHS = 1_000_000
"""`epoch_blocks` of a chain that stays in its first epoch."""

Weights = tuple[tuple[int, int], ...]
"""(node, weight) of a set."""


@dataclass
class Plan:
    """Probabilities are per message; times in seconds of virtual time.

    `stakes` are the weights of the first set, by node: 0 for one that is no member yet. `sets` are
    those of the epochs from 1 on; after them the sets stay (`churn`: or are elected).
    `attackers` are (node, strategy). `weak` are honest nodes that may fail like attackers: together
    they have less than a third of every set. `skews` are errors of wall clocks, `rates` of
    monotonic ones. `execution` is the longest time that executing a block takes.

    Around the last block of an epoch, once it is notarized: `edge_crashes` processes die within
    their next steps, `edge_partitions` says how often the network falls apart, and votes that
    finalize it are lost for its first `held_back` views.
    """

    stakes: tuple[int, ...]
    attackers: tuple[tuple[int, str], ...] = ()
    weak: frozenset[int] = frozenset()
    epoch_blocks: int = NO_EPOCHS
    sets: tuple[Weights, ...] = ()
    churn: bool = False
    chaos: float = 10.0
    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.05
    slow: float = 0.0
    partitions: int = 0
    crashes: int = 0
    edge_crashes: int = 0
    edge_partitions: float = 0.0
    held_back: int = 0
    wiped: int | None = None
    skews: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    execution: float = 0.01
    transactions: int = 6
    heights: int = 0
    calm: float = 240.0
    times: Times = field(default_factory=lambda: Times(0.5, 2.0, 0.3, 30.0))


def random_plan(seed: int, validators: int | None = None) -> Plan:
    """Everything that goes wrong, in random doses."""
    rng = random.Random(seed)
    count = validators or rng.randint(4, 6)
    nodes = count + rng.choice((0, 1, 2, 2))
    members = sorted(rng.sample(range(nodes), count))
    weights = [1] * count
    while len(set(weights)) == 1 or 2 * max(weights) >= sum(weights):
        weights = [rng.choice((1, 1, 2, 3, 5, 8)) for _ in members]
    stakes = [0] * nodes
    for number, weight in zip(members, weights, strict=True):
        stakes[number] = weight
    faulty = _attackers(rng, stakes)
    together = rng.choice(STRATEGIES) if rng.random() < 0.5 else None
    named = tuple((i, together or rng.choice(STRATEGIES)) for i in faulty)
    total, taken = sum(stakes), sum(stakes[i] for i in faulty)
    spare = [i for i in range(nodes) if i not in faulty and 3 * (taken + stakes[i]) < total]
    wiped = rng.choice(spare) if spare and rng.random() < 0.5 else None
    skews = [rng.uniform(-4, 4) for _ in range(nodes)]
    weak = frozenset() if wiped is None else frozenset([wiped])
    if wiped is None and spare and rng.random() < 0.2:
        wrong = rng.choice(spare)
        skews[wrong] = rng.choice((-60.0, 60.0))
        weak = frozenset([wrong])
    return Plan(
        tuple(stakes),
        named,
        weak,
        epoch_blocks=rng.choice((2, 2, 3, 3, 4, 5)),
        churn=True,
        chaos=rng.uniform(6, 12),
        loss=rng.choice((0.0, 0.05, 0.3)),
        duplicate=rng.choice((0.0, 0.1)),
        delay=rng.choice((0.01, 0.05, 0.6, 1.2)),
        slow=rng.choice((0.0, 0.1, 0.3)),
        partitions=rng.randint(0, 2),
        crashes=rng.randint(0, 4) + (wiped is not None),
        edge_crashes=rng.choice((0, 0, 1, 2)),
        edge_partitions=rng.choice((0.0, 0.0, 0.5)),
        held_back=rng.choice((0, 0, 0, 1, 3)),
        wiped=wiped,
        skews=tuple(skews),
        rates=tuple(rng.uniform(0.9, 1.1) for _ in range(nodes)),
        execution=rng.choice((0.0, 0.01, 0.01, 0.8)),
        transactions=rng.randint(3, 6),
        heights=HEIGHTS,
    )


def _attackers(rng: random.Random, stakes: list[int]) -> list[int]:
    """As many as have less than a third of the first set, and some that join later."""
    if rng.random() > 0.9:
        return []
    order = [number for number, weight in enumerate(stakes) if weight]
    order.sort(key=lambda number: (stakes[number], rng.random()))
    if rng.random() < 0.6:
        rng.shuffle(order)
    found: list[int] = []
    taken, total = 0, sum(stakes)
    for number in order:
        if 3 * (taken + stakes[number]) < total:
            found.append(number)
            taken += stakes[number]
    found += [n for n, weight in enumerate(stakes) if not weight and rng.random() < 0.4]
    return sorted(found)
