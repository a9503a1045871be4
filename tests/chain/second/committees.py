"""The second ledger's committees: views, turns, elections (EPOCH, JAIL-2, JAIL-3, LEAD)."""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

VIEWS = 1 << 32
JAIL_MISSES = 3

Weighed = dict[bytes, tuple[bytes, int]]
"""Node -> its owner and its weight."""


# -- views


def epoch_of(height: int, epoch_blocks: int) -> int:
    """EPOCH-1."""
    return (height - 1) // epoch_blocks


def tainted(parent_view: int, view: int) -> bool:
    """BEACON-5, EPOCH-5."""
    first = view % VIEWS == 1 and view // VIEWS > parent_view // VIEWS
    return not (first or view == parent_view + 1)


def passed_over(parent_view: int, view: int) -> range:
    """JAIL-1: the numbers of the views of the block's epoch that nobody's block was made in."""
    begin = parent_view % VIEWS if parent_view // VIEWS == view // VIEWS else 0
    return range(begin + 1, view % VIEWS)


# -- leaders


def turns(seats: Sequence[tuple[int, bool]]) -> list[int]:
    """LEAD-1 of (weight, leads) in the committee's order."""
    leading = [index for index, (_, leads) in enumerate(seats) if leads]
    weights = [seats[index][0] for index in leading]
    divisor = math.gcd(*weights)
    shares = [weight // divisor for weight in weights]
    total = sum(shares)
    if total > 4096:
        spare = max(0, 4096 - len(shares))
        rests = [share * spare % total for share in shares]
        shares = [1 + share * spare // total for share in shares]
        largest = sorted(range(len(shares)), key=lambda i: (-rests[i], i))
        for place in largest[: max(0, 4096 - sum(shares))]:
            shares[place] += 1
    found = [0] * len(seats)
    for index, share in zip(leading, shares, strict=True):
        found[index] = share
    return found


@lru_cache(maxsize=64)
def table(seats: tuple[tuple[int, bool], ...]) -> tuple[int, ...]:
    """LEAD-2; view number n is led by entry `n mod length` (LEAD-3)."""
    each = turns(seats)
    entries, priority = [], [0] * len(each)
    for _ in range(sum(each)):
        priority = [old + more for old, more in zip(priority, each, strict=True)]
        leader = priority.index(max(priority))
        priority[leader] -= sum(each)
        entries.append(leader)
    return tuple(entries)


# -- elections


def elect(old: Weighed, wanted: Weighed, most: int) -> Weighed:
    """EPOCH-4."""
    now = dict(old)
    left = (sum(weight for _, weight in old.values()) - 1) // 3
    for node, (owner, weight) in sorted(old.items()):
        less = min(max(0, weight - wanted.get(node, (owner, 0))[1]), left)
        now[node], left = (owner, weight - less), left - less
        if weight == less:
            del now[node]
    for node, (owner, weight) in sorted(wanted.items(), key=lambda row: (-row[1][1], row[0])):
        if node not in now and len(now) >= most:
            continue
        before = now.get(node, (owner, 0))[1]
        more = min(max(0, weight - before), left)
        if more:
            now[node], left = (owner, before + more), left - more
    return now


def absent(seats: Sequence[tuple[int, bool]], missed: Sequence[int], views: int) -> list[int]:
    """JAIL-2: the seats whose nodes are jailed, of an epoch whose last block has view `views`."""
    entries = table(tuple(seats))
    away = [
        index
        for index, count in enumerate(missed)
        if count >= JAIL_MISSES and 3 * count * len(entries) >= views * entries.count(index)
    ]
    total = sum(weight for weight, _ in seats)
    return away if 3 * sum(seats[index][0] for index in away) < total else []


def who_leads(weights: Mapping[bytes, int], jailed: Collection[bytes]) -> dict[bytes, bool]:
    """JAIL-3."""
    away = sum(weight for node, weight in weights.items() if node in jailed)
    everybody = 3 * away >= sum(weights.values())
    return {node: everybody or node not in jailed for node in weights}
