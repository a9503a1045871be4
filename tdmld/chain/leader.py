"""Who leads a view: a stake-weighted rotation, in integers, begun anew in every epoch.

Smooth weighted round robin: before each turn everybody gains its weight; the highest priority
leads (the lower index wins a tie) and pays the sum of all weights. In every period each validator
leads exactly its weight's share, spread as evenly as integers allow. The sequence is periodic, so
one table per validator set answers for any view, however far, without history.

A validator that does not lead (jailed, see `jail`) has no turns; the others share them as if it
were not there.

Stakes are first divided by their greatest common divisor; when the period would still exceed
`MAX_PERIOD` they are apportioned to that many seats (largest remainder, everybody at least one).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

MAX_PERIOD = 4096
"""Longest table. At 100 validators it takes about 0.1 s to build, once."""


class Rotation:
    """The leaders of every view for one validator set. `leads`: by validator, whether it has turns;
    somebody must. By default all do."""

    __slots__ = ("_table", "turns")

    def __init__(self, stakes: Sequence[int], leads: Sequence[bool] = ()) -> None:
        if not stakes or min(stakes) <= 0 or (leads and len(leads) != len(stakes)):
            raise ValueError("a rotation needs validators with stake > 0")
        leading = [index for index in range(len(stakes)) if not leads or leads[index]]
        if not leading:
            raise ValueError("a rotation needs a validator that leads")
        turns = [0] * len(stakes)
        for index, count in zip(leading, seats([stakes[i] for i in leading]), strict=True):
            turns[index] = count
        self.turns = tuple(turns)
        """Entries of each validator in the table."""
        self._table = _table(self.turns)

    @property
    def period(self) -> int:
        return len(self._table)

    def leader(self, view: int) -> int:
        """The index of the validator that leads the view with this number in its epoch."""
        return self._table[view % len(self._table)]


def seats(stakes: Sequence[int]) -> list[int]:
    """Turns of each validator in one period, proportional to stake; at most MAX_PERIOD in all.

    More validators than MAX_PERIOD get one seat each.
    """
    divisor = gcd(*stakes)
    exact = [stake // divisor for stake in stakes]
    total = sum(exact)
    if total <= MAX_PERIOD:
        return exact
    spare = max(0, MAX_PERIOD - len(exact))
    result = [1 + stake * spare // total for stake in exact]
    left = max(0, MAX_PERIOD - sum(result))
    by_remainder = sorted(range(len(exact)), key=lambda i: (-(exact[i] * spare % total), i))
    for index in by_remainder[:left]:
        result[index] += 1
    return result


@lru_cache(maxsize=16)
def _table(weights: tuple[int, ...]) -> tuple[int, ...]:
    total = sum(weights)
    priority = [0] * len(weights)
    table = []
    leading = [index for index, weight in enumerate(weights) if weight]
    for _ in range(total):
        for index in leading:
            priority[index] += weights[index]
        best = max(leading, key=lambda index: (priority[index], -index))
        priority[best] -= total
        table.append(best)
    return tuple(table)
