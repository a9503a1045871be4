"""The consensus core in a seeded world: 300 schedules, and mutants that the schedules must kill."""

import pytest

from tdmld.chain.blocks import Block, Certificate, Kind, Vote
from tdmld.chain.consensus import CastVote, Effect, Simplex
from tests.chain import simulator
from tests.chain.simulator import (
    Node,
    Plan,
    Stuck,
    Violation,
    World,
    run_power_failure,
    run_seed,
)

SEEDS = 300


def first_killer(node: type[Node], seeds: int = SEEDS) -> int | None:
    """The first schedule in which a mutant breaks a rule."""
    for seed in range(seeds):
        try:
            run_seed(seed, node)
        except AssertionError:
            return seed
    return None


def test_no_disagreement_no_double_sign_nobody_stuck() -> None:
    blocks = crashes = twins = 0
    for seed in range(SEEDS):
        world = run_seed(seed)
        blocks += len(world.agreed)
        crashes += world.plan.crashes
        twins += world.plan.twin is not None
    assert blocks > SEEDS * 2
    assert crashes > SEEDS
    assert twins > SEEDS / 10


def test_a_power_failure_after_which_one_stays_away_stops_nobody() -> None:
    """What it signed is gone with it; the certificates are not."""
    blocks = sum(len(run_power_failure(seed).agreed) for seed in range(SEEDS // 2))
    assert blocks > SEEDS


def test_one_seed_is_one_history() -> None:
    first, second = run_seed(7), run_seed(7)
    assert (first.events, first.agreed) == (second.events, second.agreed)


class HalfQuorum(Simplex):
    """S1 broken."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._quorum = sum(self._stakes) // 2


class FinalizeAfterNullify(Simplex):
    """S4 broken."""

    def _cast_vote(self, kind: Kind, view: int, block: bytes, out: list[Effect]) -> None:
        if kind is Kind.FINALIZE and self.cast(Kind.NULLIFY, view) and not self.cast(kind, view):
            self._cast[kind, view] = block
            out.append(CastVote(kind, view, block))
            return
        super()._cast_vote(kind, view, block, out)


class Amnesiac(Node):
    """S9 broken: a restart forgets its votes."""

    def stored_votes(self) -> list[Vote]:
        return []


class NodeWithHalfQuorum(Node):
    simplex = HalfQuorum


class NodeFinalizingAfterNullify(Node):
    simplex = FinalizeAfterNullify


class ForgetsCertificates(Node):
    """S9 broken: a restart forgets what its votes rest on."""

    def stored_certificates(self) -> list[Certificate]:
        return []


def test_a_mutant_that_forgets_certificates_gets_stuck() -> None:
    def gets_stuck(seed: int) -> bool:
        try:
            run_power_failure(seed, ForgetsCertificates)
        except Stuck:
            return True
        return False

    assert any(gets_stuck(seed) for seed in range(SEEDS))


@pytest.mark.parametrize("mutant", [NodeWithHalfQuorum, NodeFinalizingAfterNullify, Amnesiac])
def test_a_mutant_is_killed(mutant: type[Node]) -> None:
    assert first_killer(mutant) is not None


def test_a_mutant_without_the_sign_check_still_splits_the_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S1 is killed by disagreement itself, not by the watcher of signatures."""
    monkeypatch.setattr(World, "published", lambda *_: None)

    def splits(seed: int) -> bool:
        try:
            run_seed(seed, NodeWithHalfQuorum)
        except Violation as broken:
            return "two blocks" in str(broken)
        except AssertionError:
            return False
        return False

    assert any(splits(seed) for seed in range(100))


def resting_world(count: int = 4) -> World:
    world = World(Plan((1,) * count, transactions=0), 1)
    world.calm = True
    for node in world.nodes:
        node.tick()
    return world


def blocks_and_timeouts(world: World) -> tuple[int, int]:
    return world.blocks_made, world.timeouts


def test_a_chain_without_demand_rests() -> None:
    world = resting_world()
    world.run_until(25.0)
    assert blocks_and_timeouts(world) == (0, 0)


def test_the_heartbeat_makes_one_block() -> None:
    world = resting_world()
    world.run_until(40.0)
    assert blocks_and_timeouts(world) == (1, 0)


def test_after_a_long_rest_one_transaction_costs_one_block_and_no_nullify() -> None:
    """The timer of the resting view was disarmed (P4), though the rest outlasted the time-out."""
    world = resting_world()
    for number, start in enumerate((1.0, 6.0, 11.0, 24.0)):
        world.run_until(start)
        world.submit(number)
        world.run_until(start + 0.4)
        assert blocks_and_timeouts(world) == (number + 1, 0)
        assert {len(node.chain) for node in world.nodes} == {number + 1}


def test_an_absent_leader_costs_a_third_of_a_second() -> None:
    world = resting_world()
    leader = world.leader(1)
    world.nodes[leader].up = False
    world.now = 1.0
    world.plan.transactions = 1
    raw = b"tx0"
    for node in world.nodes:
        if node.up:
            node.pool[raw] = None
            node.tick()
    world.run_until(1.0 + 0.3 + 0.3)
    assert all(len(node.chain) == 1 for node in world.nodes if node.up)


def test_without_a_quorum_nothing_is_said() -> None:
    world = resting_world()
    for node in world.nodes[:2]:
        node.up = False
    for node in world.nodes[2:]:
        node.pool[b"tx0"] = None
        node.tick()
    world.run_until(100.0)
    assert blocks_and_timeouts(world) == (0, 0)


def test_the_world_comes_to_rest_after_chaos() -> None:
    for seed in range(20):
        world = run_seed(seed)
        world.run_until(world.now + 20.0)
        made = len(world.agreed)
        world.run_until(world.now + 8.0)
        idle = {node.core.view for node in world.nodes if node.honest}
        assert len(world.agreed) - made <= 1, f"seed {seed}"  # at most the heartbeat
        assert len(idle) == 1, f"seed {seed}"


def test_the_simulator_uses_the_production_core() -> None:
    assert simulator.Node.simplex is Simplex


def test_a_body_that_is_lost_is_asked_for_after_its_certificate() -> None:
    """Three of four finish without the fourth; nobody nullifies, and it has the block at once."""
    world = resting_world()
    victim = world.nodes[3]
    assert world.leader(1) != victim.index
    transmit = world._transmit

    def lossy(source: Node, target: Node, message: object) -> None:
        pushed = source.index == world.leader(1) and not victim.chain and not victim.want
        if not (isinstance(message, Block) and target is victim and pushed):
            transmit(source, target, message)

    world._transmit = lossy  # type: ignore[method-assign]
    world.run_until(1.0)
    world.submit(0)
    world.run_until(1.5)
    assert blocks_and_timeouts(world) == (1, 0)
    assert [len(node.chain) for node in world.nodes] == [1, 1, 1, 1]
