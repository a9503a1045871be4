"""One component is asserted, not hoped for: hundreds of nodes, each of which keeps few others and
sees only its own book."""

import hashlib
import random
from collections.abc import Callable

import pytest

from tdmld.node import neighbours
from tdmld.node.neighbours import PROBES, SUCCESSORS, choose
from tdmld.node.peers import MAX_KEPT_PEERS

FEW = SUCCESSORS + PROBES
"""Places for the ring and the probes alone."""


def node(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


class World:
    """Nodes with their books; a round is a minute: dial, exchange, and see who is away."""

    def __init__(self, count: int, most: int, bootstrap: int = 2) -> None:
        self.nodes = [node(number) for number in range(count)]
        self.most = most
        self.bootstrap = set(self.nodes[:bootstrap])
        self.books = {me: {me} | self.bootstrap for me in self.nodes}
        self.away: dict[bytes, set[bytes]] = {me: set() for me in self.nodes}
        self.kept: dict[bytes, set[bytes]] = {me: set() for me in self.nodes}
        self.live = set(self.nodes)
        self.hidden: set[bytes] = set()
        """Nodes that can dial and cannot be dialled."""
        self.side: Callable[[bytes], object] = lambda node: 0
        self.turn = 0

    def links(self, me: bytes) -> set[bytes]:
        """Whom `me` reaches of those that it keeps."""
        kept = (self.kept[me] | self.bootstrap) & self.live - self.hidden
        return {other for other in kept if self.side(other) == self.side(me)}

    def components(self) -> list[set[bytes]]:
        near: dict[bytes, set[bytes]] = {me: set() for me in self.live}
        for me in self.live:
            for other in self.links(me):
                near[me].add(other)
                near[other].add(me)
        found, seen = [], set[bytes]()
        for start in self.live:
            if start in seen:
                continue
            component, waiting = {start}, [start]
            while waiting:
                for other in near[waiting.pop()] - component:
                    component.add(other)
                    waiting.append(other)
            seen |= component
            found.append(component)
        return found

    def round(self) -> None:
        self.turn += 1
        for me in self.live:
            dialled = self.books[me] - self.hidden
            self.kept[me] = choose(me, dialled, self.away[me], most=self.most, turn=self.turn)
        for component in self.components():
            book = set().union(*(self.books[me] for me in component))
            for me in component:
                self.books[me] = set(book)
        for me in self.live:
            reached = self.links(me)
            self.away[me] |= self.kept[me] - reached
            self.away[me] -= reached

    def rounds_until_one(self, most: int) -> int:
        for number in range(1, most + 1):
            self.round()
            if len(self.components()) == 1:
                return number
        raise AssertionError(f"{len(self.components())} components after {most} rounds")


@pytest.mark.parametrize("most", [FEW, MAX_KEPT_PEERS])
def test_hundreds_of_nodes_that_know_a_bootstrap_node_are_one_component(most: int) -> None:
    world = World(300, most)
    assert world.rounds_until_one(2) <= 2
    assert all(len(kept) <= most for kept in world.kept.values())


@pytest.mark.parametrize("most", [FEW, MAX_KEPT_PEERS])
@pytest.mark.parametrize("dead", [0.3, 0.6, 0.9])
def test_those_who_are_left_are_one_component_whoever_died(most: int, dead: float) -> None:
    """The bootstrap nodes too; their records stay in all books."""
    world = World(300, most)
    world.rounds_until_one(2)
    world.round()
    others = random.Random(1).sample(world.nodes[2:], int(dead * 300))
    world.live -= set(others) | world.bootstrap
    assert world.rounds_until_one(60) <= 60
    for _ in range(5):
        world.round()
        assert len(world.components()) == 1


def test_a_row_of_dead_nodes_on_the_ring_is_passed() -> None:
    world = World(300, FEW, bootstrap=1)
    world.rounds_until_one(2)
    ring = sorted(world.nodes, key=neighbours._place)
    world.live -= set(ring[10:60]) | world.bootstrap
    assert world.rounds_until_one(60) <= 60


@pytest.mark.parametrize("most", [FEW, MAX_KEPT_PEERS])
def test_a_network_that_was_cut_is_whole_in_itself_and_grows_together(most: int) -> None:
    world = World(200, most)
    world.rounds_until_one(2)
    world.round()
    left = set(world.nodes[2:90])
    world.side = lambda node: node in left
    for _ in range(40):
        world.round()
    assert len(world.components()) == 2
    world.live -= world.bootstrap
    world.side = lambda node: 0
    assert world.rounds_until_one(10) <= 10


def test_who_cannot_be_dialled_hangs_on_by_itself() -> None:
    world = World(200, FEW)
    world.hidden = set(world.nodes[50:150])
    world.rounds_until_one(2)
    world.live -= world.bootstrap
    assert world.rounds_until_one(20) <= 20


def test_whoever_is_kept_stays_so_when_others_are_heard_of() -> None:
    """Else every new record would change connections."""
    known = [node(number) for number in range(1, 200)]
    before = choose(node(0), known, (), most=48, turn=1)
    after = choose(node(0), [*known, node(200), node(201)], (), most=48, turn=2)
    assert len(before - after) <= 2


def test_two_nodes_keep_different_others() -> None:
    known = [node(number) for number in range(2, 500)]
    mine, yours = (choose(node(me), known, (), most=48, turn=1) for me in (0, 1))
    assert len(mine & yours) < 24


def test_a_small_network_is_kept_whole() -> None:
    known = [node(number) for number in range(20)]
    assert choose(known[0], known, known[1:10], most=19, turn=1) == set(known[1:])


def test_all_that_are_away_are_tried_in_time() -> None:
    known = [node(number) for number in range(1, 200)]
    tried: set[bytes] = set()
    for turn in range(300):
        tried |= choose(node(0), known, known[:150], most=20, turn=turn)
    assert tried >= set(known[:150])
