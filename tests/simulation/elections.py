"""Who validates in which epoch of a simulated chain.

The sets of the first two epochs are the plan's. After that the last block of an epoch decides the
set after the next one, as the chain's own elections do (EPOCH-2): the stakes that are wanted come
out of that block's id, and `epochs.elect`, the product's, moves as much as EPOCH-4 allows. Those
who may misbehave never get a third of a set: consensus promises nothing beyond that.
"""

import random

from msgspec.structs import replace

from tdmld.chain.accounts import (
    Seat,
    ValidatorSet,
)
from tdmld.chain.blocks import Committee
from tdmld.chain.epochs import committee, elect, set_id
from tests.simulation.facts import CHAIN_ID, Key, number_of
from tests.simulation.plan import Plan, Weights

DRAWS, ENOUGH = 40, 4
"""Stakes that are tried for a set, until so many would do; when none does, the set stays."""
LEAST = 4
"""Validators of a set; and none has half of it."""
WEIGHTS = (1, 1, 2, 3, 5, 8)


def seats(weights: Weights) -> tuple[Seat, ...]:
    """A set from (node, weight) pairs; who has no weight is no member."""
    rows = sorted((Key(number).public, weight) for number, weight in weights if weight)
    return tuple(Seat(node, node, weight) for node, weight in rows)


def weight(chosen: tuple[Seat, ...], numbers: frozenset[int]) -> int:
    """What these nodes have in a set."""
    return sum(seat.weight for seat in chosen if number_of(seat.node) in numbers)


def total(chosen: tuple[Seat, ...]) -> int:
    return sum(seat.weight for seat in chosen)


class Elections:
    """The sets of one world; a function of the plan and the blocks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._committees: dict[bytes, Committee] = {}
        self._decided: dict[tuple[bytes, bytes], ValidatorSet] = {}
        rows = [seats(tuple(enumerate(plan.stakes))), *map(seats, plan.sets)]
        if len(rows) == 1:
            rng = random.Random(repr(plan.stakes))
            rows.append(next_seats(rng, rows[0], plan) if plan.churn else rows[0])
        self._given = [ValidatorSet(epoch, row) for epoch, row in enumerate(rows)]
        self.first = self._given[:2]

    def committee(self, chosen: ValidatorSet) -> Committee:
        """One object for one set, for its rotation is a table."""
        key = set_id(chosen)
        known = self._committees.get(key)
        if known is None:
            known = self._committees[key] = committee(CHAIN_ID, chosen)
        return known

    def after(self, now: ValidatorSet, block: bytes) -> ValidatorSet:
        """The set that follows `now`, decided by the id of the block before `now` begins."""
        key = set_id(now), block
        known = self._decided.get(key)
        if known is None:
            known = self._decided[key] = self._decide(now, block)
        return known

    def _decide(self, now: ValidatorSet, block: bytes) -> ValidatorSet:
        epoch = now.epoch + 1
        if epoch < len(self._given):
            return self._given[epoch]
        if not self._plan.churn:
            return replace(now, epoch=epoch)
        rng = random.Random(block)
        return ValidatorSet(epoch, next_seats(rng, now.seats, self._plan))


def next_seats(rng: random.Random, now: tuple[Seat, ...], plan: Plan) -> tuple[Seat, ...]:
    """Some leave, some come, some weights change, some seats do not lead (JAIL-3). Of a few draws
    mostly the one that gives attackers the most."""
    attackers = frozenset(number for number, _ in plan.attackers)
    faulty = attackers | plan.weak
    found = []
    for _ in range(DRAWS):
        wanted = {number_of(seat.node): seat.weight for seat in now}
        for number in range(len(plan.stakes)):
            roll = rng.random()
            if roll < 0.25:
                wanted[number] = 0
            elif roll < 0.6 or number in attackers:
                wanted[number] = rng.choice(WEIGHTS)
        bare = tuple(replace(seat, leads=True) for seat in now)
        chosen = elect(bare, seats(tuple(wanted.items())), len(plan.stakes))
        whole = total(chosen)
        balanced = len(chosen) >= LEAST and 2 * max(seat.weight for seat in chosen) < whole
        if balanced and chosen != bare and 3 * weight(chosen, faulty) < whole:
            found.append(chosen)
            if len(found) == ENOUGH:
                break
    if not found:
        return now
    best = max(found, key=lambda chosen: weight(chosen, attackers) / total(chosen))
    chosen = best if rng.random() < 0.7 else found[0]
    if rng.random() < 0.3:
        mute = rng.choice(chosen)
        if 3 * mute.weight < total(chosen):
            chosen = tuple(replace(seat, leads=seat is not mute) for seat in chosen)
    return chosen
