"""The beacon under a coalition that aims: what turns, withheld or not, can do to a draw.

A trial is one draw, some blocks after what it draws over. Leaders follow the product's rotation,
epochs and taint its rules, mixes its formula; who wins is asked of its draws (`beacon_aims`).
Leaders outside the coalition publish, at once. The coalition knows the mixes that its own turns on
end would make, and plays perfectly: it tries every way to publish and withhold them (`futures`);
where none of those reaches the draw well, it leaves by the exit that is worth most, by exact
expectation (`Game.value`). So what is measured must come out as what is computed (`as_computed`).

A VRF output is drawn here as a hash of key and input (`Hashed`): uniform, unique, known to its
holder alone, which is all that the game uses of it. `Proven` makes the same mixes with real keys
and headers; tests/chain/test_beacon_bias.py plays both.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import count
from typing import Protocol

import msgspec

from tdmld.chain import blocks, vrf
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.leader import Rotation
from tests.simulation.beacon_aims import Aim

EPOCH = 500
"""Blocks of an epoch, as genesis has by default."""
SIGMAS = 5

# ---- mixes -------------------------------------------------------------------------------------


class Mixer(Protocol):
    def mix(self, leader: int, before: bytes, height: int) -> bytes:
        """The mix of a height that this validator leads."""
        ...


class Hashed:
    """The stand-in: SHA-512 of who and what instead of a VRF output."""

    chain = sha256(b"beacon simulation")

    def mix(self, leader: int, before: bytes, height: int) -> bytes:
        alpha = blocks.beacon_input(self.chain, before, height)
        return sha256(before, hashlib.sha512(leader.to_bytes(4, "big") + alpha).digest())


class Proven:
    """Real keys, real proofs, the mix as voters compute it from a header."""

    chain = sha256(b"beacon simulation")

    def __init__(self, validators: int) -> None:
        self.keys = [KeyPair(sha256(b"beacon", bytes([index]))) for index in range(validators)]

    def mix(self, leader: int, before: bytes, height: int) -> bytes:
        key = self.keys[leader]
        proof = vrf.prove(key.seed, blocks.beacon_input(self.chain, before, height))
        empty = blocks.first_header(self.chain, 1, 0, bytes(32))
        header = msgspec.structs.replace(empty, height=height, proposer=key.public, proof=proof)
        return blocks.beacon_mix(self.chain, before, header)


# ---- who leads ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Validators, and the coalition among them that the rotation favours most."""

    name: str
    stakes: tuple[int, ...]
    limit_ppm: int = 333_333

    @cached_property
    def rotation(self) -> Rotation:
        return Rotation(self.stakes)

    def allows(self, weight: int) -> bool:
        """Whether a coalition of this weight is below a third, and within the limit."""
        total = sum(self.stakes)
        return 3 * weight < total and weight * 10**6 <= self.limit_ppm * total

    @cached_property
    def coalition(self) -> frozenset[int]:
        """Those who lead the longest run of turns together, of equals those with the longest run
        at the begin of an epoch; then the heaviest others that fit."""
        runs = [self._run_from(start) for start in range(self.rotation.period)]
        longest = max(length for _, length in runs)
        found = sorted({self._filled(members) for members, n in runs if n == longest}, key=sorted)
        return max(found, key=lambda members: self.head(members))

    def _filled(self, members: frozenset[int]) -> frozenset[int]:
        chosen = set(members)
        for index in sorted(range(len(self.stakes)), key=lambda i: -self.stakes[i]):
            if index not in chosen and self.allows(self.weight([*chosen, index])):
                chosen.add(index)
        return frozenset(chosen)

    def _run_from(self, start: int) -> tuple[frozenset[int], int]:
        members: set[int] = set()
        for length in count():
            leader = self.rotation.leader(start + length)
            if leader not in members and not self.allows(self.weight([*members, leader])):
                return frozenset(members), length
            members.add(leader)
        raise AssertionError("a third of the stake never leads alone")

    def weight(self, members: Sequence[int] | frozenset[int]) -> int:
        return sum(self.stakes[index] for index in members)

    def bad(self, view: int) -> bool:
        """Whether the coalition leads a view."""
        return self.rotation.leader(blocks.turn(view)) in self.coalition

    def run_at(self, number: int) -> int:
        """How many turns on end are the coalition's, from this view number on."""
        return next(length for length in count() if not self.bad(number + length))

    def head(self, members: frozenset[int]) -> int:
        """How many turns these lead at the begin of an epoch."""
        return next(n for n in count() if self.rotation.leader(1 + n) not in members)

    @cached_property
    def run(self) -> int:
        """J: its longest run inside an epoch."""
        return max(self.run_at(number) for number in range(1, self.rotation.period + 1))

    @cached_property
    def edge_run(self) -> int:
        """Its longest run over the edge of an epoch: any may end one, view 1 begins the next."""
        return self.run + self.head(self.coalition)

    @cached_property
    def safe_window(self) -> int:
        """R: in every R turns on end at least a third of the stake leads, whoever is bad."""
        period, worst = self.rotation.period, 0
        for start in range(period):
            seen: set[int] = set()
            for length in range(1, period + 1):
                seen.add(self.rotation.leader(start + length))
                if 3 * self.weight(frozenset(seen)) >= sum(self.stakes):
                    worst = max(worst, length)
                    break
        return worst


# ---- the game ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """A view about to be led, over a parent, for a height. `linked`: the height whose block holds
    what is drawn over, at most one below. `gap`: a height since then is tainted."""

    view: int
    parent_view: int
    height: int
    linked: int
    gap: bool = False

    @property
    def tainted(self) -> bool:
        return not blocks.follows(self.parent_view, self.view)

    def published(self) -> "Spot":
        after = blocks.start_view(self.height, self.view, EPOCH)
        gap = self.gap or (self.tainted and self.height > self.linked)
        return Spot(after + 1, self.view, self.height + 1, self.linked, gap)

    def withheld(self) -> "Spot":
        return replace(self, view=self.view + 1)


@dataclass(frozen=True)
class Way:
    """Through a run of the coalition's turns: who publishes, how many turns are withheld, and where
    it ends: at the target's height (`tainted`), or at another leader's view (`exit`)."""

    leaders: tuple[int, ...]
    withheld: int
    tainted: bool = False
    exit: Spot | None = None


class Taint(StrEnum):
    """When a draw is certain. All but the first are mutants, which the bound must notice."""

    RULE = "a height since what is drawn over"
    NARROW = "the drawing height"
    NONE = "never"


@dataclass
class Game:
    """One coalition, one aim."""

    network: Network
    aim: Aim
    mixer: Mixer = field(default_factory=Hashed)
    taint: Taint = Taint.RULE
    _values: dict[Spot, float] = field(default_factory=dict)

    def certain(self, spot: Spot) -> bool:
        """BEACON-6, of the height that draws."""
        wide = spot.gap and self.taint is Taint.RULE
        return wide or (spot.tainted and self.taint is not Taint.NONE)

    def target(self, spot: Spot) -> int:
        return spot.linked + self.aim.delay

    def futures(self, spot: Spot) -> list[Way]:
        """All ways through the run of turns that begins at `spot`, those that reach the target
        first, each mix once; fewest withheld turns first."""
        ends: dict[tuple[int, ...], Way] = {}
        exits: dict[Spot, Way] = {}
        for way in self._ways(spot, (), 0):
            if way.exit is not None:
                exits.setdefault(way.exit, way)
                continue
            known = ends.get(way.leaders)
            if known is None or (way.tainted, way.withheld) < (known.tainted, known.withheld):
                ends[way.leaders] = way

        def order(way: Way) -> tuple[bool, int]:
            return way.tainted, way.withheld

        return [*sorted(ends.values(), key=order), *sorted(exits.values(), key=order)]

    def _ways(self, spot: Spot, leaders: tuple[int, ...], withheld: int) -> Iterator[Way]:
        if not self.network.bad(spot.view):
            yield Way(leaders, withheld, exit=spot)
            return
        more = (*leaders, self.network.rotation.leader(blocks.turn(spot.view)))
        if spot.height == self.target(spot):
            yield Way(more, withheld, tainted=self.certain(spot))
        else:
            yield from self._ways(spot.published(), more, withheld)
        yield from self._ways(spot.withheld(), leaders, withheld + 1)

    def value(self, spot: Spot) -> float:
        """The least probability, over everything the coalition can do, that it loses."""
        if spot not in self._values:
            self._values[spot] = self._value(spot)
        return self._values[spot]

    def _value(self, spot: Spot) -> float:
        if not self.network.bad(spot.view):
            if spot.height == self.target(spot):
                return self.aim.chance(self.certain(spot))
            return self.value(spot.published())
        lost, exits = 1.0, [1.0]
        for way in self.futures(spot):
            if way.exit is None:
                lost *= self.aim.chance(way.tainted)
            else:
                exits.append(self.value(way.exit))
        return lost * min(exits)

    def play(self, spot: Spot, mix: bytes, trial: int, policy: str) -> tuple[bool, int]:
        """(whether the coalition lost, turns that it withheld). Policies: `honest`; `last`, which
        withholds the drawing block when it does not like it; `aim`, which plays perfectly."""
        withheld = 0
        while True:
            if policy == "aim" and self.network.bad(spot.view):
                way = self._choose(spot, mix, trial)
                withheld += way.withheld
                if way.exit is None:
                    return self._lost(way, spot, mix, trial), withheld
                mix, spot = self._follow(way, spot, mix), way.exit
                continue
            leader = self.network.rotation.leader(blocks.turn(spot.view))
            after = self.mixer.mix(leader, mix, spot.height)
            if spot.height == self.target(spot):
                lost = self.aim.lost(after, self.certain(spot), trial)
                if policy != "last" or not lost or not self.network.bad(spot.view):
                    return lost, withheld
                spot, withheld = spot.withheld(), withheld + 1
            else:
                spot, mix = spot.published(), after

    def _choose(self, spot: Spot, mix: bytes, trial: int) -> Way:
        ways = self.futures(spot)
        for way in ways:
            if way.exit is None and not self._lost(way, spot, mix, trial):
                return way
        exits = [(self.value(way.exit), way) for way in ways if way.exit is not None]
        return min(exits, key=lambda row: (row[0], row[1].withheld))[1]

    def _follow(self, way: Way, spot: Spot, mix: bytes) -> bytes:
        for place, leader in enumerate(way.leaders):
            mix = self.mixer.mix(leader, mix, spot.height + place)
        return mix

    def _lost(self, way: Way, spot: Spot, mix: bytes, trial: int) -> bool:
        return self.aim.lost(self._follow(way, spot, mix), way.tainted, trial)

    # -- where a trial begins

    def spots(self, start: str) -> list[Spot]:
        """`any`: after a block that holds what is drawn over, everywhere inside an epoch. `timed`:
        where the coalition loses least, for it may choose when it sends that. `own`: the same where
        the coalition leads that block too. `edge`: where the draw lies beyond the edge of an epoch,
        whose last view the coalition may shift by turns that it withheld before."""
        period = self.network.rotation.period
        if start == "edge":
            found = [
                Spot(height + shift, height + shift - 1, height, height - 1)
                for height in range(EPOCH - self.aim.delay + 2, EPOCH + 1)
                for shift in range(period)
            ]
        else:
            linked = 50 if start == "own" else 49
            found = [Spot(n, n - 1, 50, linked) for n in range(2, period + 2)]
        if start == "own":
            found = [spot for spot in found if self.network.bad(spot.view)]
        return found if start == "any" else [min(found, key=self.value)]


# ---- the documented bound (docs/spec/chain.md, section 8) ---------------------------------------


def mixes(run: int, delay: int) -> int:
    """B4, B5: among how many mixes a coalition with runs of `run` turns may choose at most."""
    return 1 + sum(math.comb(run, m) for m in range(1, min(run, delay) + 1))


def bound(aim: Aim, run: int, start: str) -> float:
    """A coalition loses at least so often: B3 to B5. 0 where the page has no bound: a block of its
    own run, and the run goes on beyond the draw (B2)."""
    if start == "own" and run > aim.delay:
        return 0.0
    certain = aim.chance(True)
    rate = aim.chance(False) / certain
    return rate * float(certain ** mixes(run, aim.delay))


# ---- rows ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """What one strategy reached on one network. The coalition's losses are counted: a segment that
    is audited, a place that it does not get."""

    network: str
    aim: str
    policy: str
    start: str
    bound: float
    trials: int = 0
    lost: int = 0
    withheld: int = 0
    expected: float = 0.0
    """Sum over trials of the exact value of this play; perfect play's, for the policy `last`."""

    @property
    def measured(self) -> float:
        return self.lost / self.trials

    def interval(self, sigmas: float = 1.96) -> tuple[float, float]:
        """Wilson's, for the probability that the coalition loses."""
        n, p, z = self.trials, self.measured, sigmas
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)

    @property
    def holds(self) -> bool:
        """Whether the documented bound is within SIGMAS of what was measured, or below it."""
        return self.interval(SIGMAS)[1] >= self.bound

    @property
    def as_computed(self) -> bool:
        """Whether the game came out as its exact value, from which the bound is derived."""
        low, high = self.interval(SIGMAS)
        mean = self.expected / self.trials
        return mean <= high and (low <= mean or self.policy == "last") and mean > self.bound - 1e-12


PLANS = (
    ("honest", "any"),
    ("last", "any"),
    ("aim", "any"),
    ("aim", "timed"),
    ("aim", "own"),
    ("aim", "edge"),
)


def play_all(game: Game, seeds: int) -> list[Row]:
    """All strategies of one aim on one network, one trial a seed."""
    return [play(game, policy, start, seeds) for policy, start in PLANS]


def play(game: Game, policy: str, start: str, seeds: int) -> Row:
    network, aim = game.network, game.aim
    reach = network.edge_run if start == "edge" else network.run
    row = Row(network.name, aim.name, policy, start, bound(aim, reach, start))
    spots = game.spots(start)
    for trial in range(seeds):
        source = random.Random(f"{network.name} {aim.name} {policy} {start} {trial}")
        spot, mix = source.choice(spots), source.randbytes(32)
        lost, withheld = game.play(spot, mix, trial, policy)
        row.trials += 1
        row.lost += lost
        row.withheld += withheld
        row.expected += aim.chance(False) if policy == "honest" else game.value(spot)
    return row


NETWORKS = (
    ("4 equal", (1,) * 4),
    ("6 equal", (1,) * 6),
    ("8 unequal", (30, 20, 15, 10, 9, 7, 5, 4)),
    ("9 equal", (1,) * 9),
    ("12 equal", (1,) * 12),
    ("10 large, 20 small", (12,) * 10 + (1,) * 20),
)
"""Validators by stake; who of them is bad, the rotation says (`Network.coalition`)."""
