"""The consensus of the product in a seeded world: 300 schedules, every rule's mutants, and what the
world itself must be to prove anything."""

import re

import pytest

import tdmld.chain.consensus
import tdmld.chain.pacing
import tdmld.node.validator
from tdmld.chain.consensus import Simplex
from tdmld.chain.pacing import Pacing
from tdmld.chain.pending import BlockTree
from tests.simulation import traces
from tests.simulation.invariants import Stuck, Violation, Watcher
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.mutants_core import ThirdQuorum
from tests.simulation.node import Node
from tests.simulation.plan import HEIGHTS, STRATEGIES, random_plan
from tests.simulation.runner import FLOORS, Summary, run_many
from tests.simulation.world import POINTS, run_seed

SEEDS = 300


@pytest.fixture(scope="module")
def summary() -> Summary:
    made = Summary()
    for outcome in run_many(0, SEEDS):
        made.add(outcome)
    return made


def test_no_disagreement_no_double_sign_nobody_stuck(summary: Summary) -> None:
    again = "scripts/sim consensus --seeds 1 --first-seed"
    assert [f"{again} {o.seed}: {o.found}" for o in summary.findings] == []
    assert summary.seeds == SEEDS


def test_schedules_contain_what_they_are_for(summary: Summary) -> None:
    assert summary.below_floor() == [], f"{summary.per_schedule()}, floors {FLOORS}"
    assert summary.least_height is not None
    assert summary.least_height >= HEIGHTS


def test_every_attacker_and_every_crash_point_occurs(summary: Summary) -> None:
    assert set(summary.strategies) == set(STRATEGIES)
    assert set(summary.points) == set(POINTS)


def test_attackers_have_less_than_a_third_and_stakes_are_unequal() -> None:
    for seed in range(SEEDS):
        plan = random_plan(seed)
        assert plan.attacker_stake * 3 < 1
        assert len(set(plan.stakes)) > 1


def test_one_seed_is_one_history() -> None:
    first, second = run_seed(7), run_seed(7)
    assert (first.events, first.watcher.ids) == (second.events, second.watcher.ids)


def test_the_simulator_runs_the_product() -> None:
    assert (Node.simplex, Node.pacing_type, Node.tree_type) == (Simplex, Pacing, BlockTree)


# ---- mutants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.rule}-{m.name}")
def test_a_mutant_is_killed(mutant: Mutant) -> None:
    assert mutant.killed(), "it survives: scripts/sim mutants looks for another seed"


def test_what_kills_mutants_spares_the_product() -> None:
    for killer in {mutant.killer for mutant in MUTANTS}:
        assert Mutant("", Node, killer).killed() == "", killer


def test_every_numbered_rule_has_a_mutant() -> None:
    """As the heads of the modules number them. The simulated chain is one epoch and has no
    ledger: N7 and N8 are held by tests/node/test_epoch_edge.py, N9 by test_return.py there, without
    mutants."""
    named: set[str] = set()
    for module in (tdmld.chain.consensus, tdmld.chain.pacing, tdmld.node.validator):
        named |= set(re.findall(r"^  ([SPN]\d+) ", module.__doc__ or "", re.MULTILINE))
    assert len(named) >= 25
    assert {mutant.rule for mutant in MUTANTS} == named - {"N7", "N8", "N9"}


def test_a_wrong_quorum_splits_the_chain_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """S1 is killed by disagreement too, not only by the watcher of certificates."""
    for watching in ("certified", "voted", "stored", "sent", "rejected", "_validate"):
        monkeypatch.setattr(Watcher, watching, lambda *_: None)
    node = Mutant("S1", ThirdQuorum, 0).node

    def splits(seed: int) -> bool:
        try:
            run_seed(seed, node)
        except Violation as broken:
            return "disagreement" in str(broken)
        except AssertionError:
            return False
        return False

    assert any(splits(seed) for seed in range(100))


# ---- small worlds ----------------------------------------------------------------------------


def test_the_chain_comes_to_rest_after_chaos() -> None:
    for seed in (seed for seed in range(60) if not random_plan(seed).attackers):
        world = run_seed(seed)
        world.run_until(world.now + 20.0)
        made = len(world.watcher.ids)
        world.run_until(world.now + 8.0)
        assert len(world.watcher.ids) - made <= 1, f"seed {seed}"  # at most the heartbeat
        traces.tell(world, 1000 + seed)
        world.run_until(world.now + 5.0)
        assert all(b"transaction %d" % (1000 + seed) in n.done for n in world.nodes), f"seed {seed}"


def test_a_node_that_spins_is_seen() -> None:
    class Spinning(Node):
        def tick(self) -> float:
            self.woken = True
            return super().tick()

    with pytest.raises(Stuck, match="spins"):
        traces.rests(Spinning)
