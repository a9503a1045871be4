"""The consensus of the product in a seeded world: 300 schedules over changes of validators, every
rule's mutants, and what the world itself must be to prove anything."""

import inspect
import os
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

import tdmld.chain.consensus
import tdmld.chain.pacing
import tdmld.node.validator
from tdmld.chain.consensus import Simplex
from tdmld.chain.pacing import Pacing
from tdmld.chain.pending import BlockTree
from tdmld.node.succession import Succession
from tdmld.node.validator import Validator
from tests.simulation.directed import core, epochs, pacing, shell
from tests.simulation.directed.base import tell
from tests.simulation.elections import Elections, total, weight
from tests.simulation.facts import stand_ins
from tests.simulation.invariants import Stuck, Violation, Watcher
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.mutants_core import ThirdQuorum
from tests.simulation.node import Node
from tests.simulation.parts import Eyes
from tests.simulation.plan import HEIGHTS, STRATEGIES, random_plan
from tests.simulation.runner import CHUNK, FLOORS, Outcome, Summary, WorkerDied, run_many
from tests.simulation.world import POINTS, World, run_seed

SEEDS = 300


@pytest.fixture(autouse=True)
def standing_in() -> Iterator[None]:
    with stand_ins():
        yield


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
    assert summary.changed >= 0.97 * SEEDS


def test_every_attacker_and_every_crash_point_occurs(summary: Summary) -> None:
    assert set(summary.strategies) == set(STRATEGIES)
    assert set(summary.points) == set(POINTS)


def test_stakes_are_unequal() -> None:
    for seed in range(SEEDS):
        assert len({stake for stake in random_plan(seed).stakes if stake}) > 1


def test_who_may_misbehave_has_less_than_a_third_of_every_set() -> None:
    """And less than a third of a set changes (EPOCH-4)."""
    for seed in range(SEEDS):
        plan = random_plan(seed)
        elections = Elections(plan)
        faulty = plan.weak.union(number for number, _ in plan.attackers)
        now = elections.first[0]
        for block in range(6):
            assert 3 * weight(now.seats, faulty) < total(now.seats), f"seed {seed}"
            after = elections.after(now, block.to_bytes(32, "big"))
            old = {seat.node: seat.weight for seat in now.seats}
            new = {seat.node: seat.weight for seat in after.seats}
            gone = sum(max(0, old[node] - new.get(node, 0)) for node in old)
            come = sum(max(0, new[node] - old.get(node, 0)) for node in new)
            assert 3 * (gone + come) < total(now.seats), f"seed {seed}"
            now = after


def test_one_seed_is_one_history() -> None:
    first, second = run_seed(7), run_seed(7)
    assert (first.events, first.watcher.ids) == (second.events, second.watcher.ids)


def test_the_simulator_runs_the_product() -> None:
    assert (Node.simplex, Node.pacing_type, Node.tree_type) == (Simplex, Pacing, BlockTree)
    assert issubclass(Node.validator_type, Validator)
    assert issubclass(Node.succession_type, Succession)
    watched = {"_act", "_adopt", "_count", "_post", "_publish", "_tick"}  # and then the product's
    own = {name for name in vars(Eyes) if name in vars(Validator)}
    assert own <= watched | {"__init__", "__doc__", "__module__"}


# ---- mutants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.rule}-{m.name}")
def test_a_mutant_is_killed(mutant: Mutant) -> None:
    assert mutant.killed(), "it survives: scripts/sim mutants looks for another seed"


def test_what_kills_mutants_spares_the_product() -> None:
    for killer in {mutant.killer for mutant in MUTANTS}:
        assert Mutant("", Node, killer).killed() == "", killer


@pytest.mark.parametrize("room", [core, epochs, pacing, shell])
def test_every_trace_passes_with_the_product(room: ModuleType) -> None:
    """Those that no mutant needs too."""
    for name, trace in vars(room).items():
        mine = inspect.isfunction(trace) and trace.__module__ == room.__name__
        if mine and list(inspect.signature(trace).parameters) == ["node"]:
            assert Mutant("", Node, trace).killed() == "", name


def test_every_numbered_rule_has_a_mutant() -> None:
    """As the heads of the modules number them; and what the specification says of epochs that is
    consensus' part, and what `succession` and `chainlinks` keep without a number."""
    named: set[str] = set()
    for module in (tdmld.chain.consensus, tdmld.chain.pacing, tdmld.node.validator):
        named |= set(re.findall(r"^  ([SPN]\d+) ", module.__doc__ or "", re.MULTILINE))
    assert len(named) >= 25
    others = {"EPOCH-1", "EPOCH-2", "EPOCH-5", "EPOCH-6", "early", "late", "links"}
    assert {mutant.rule for mutant in MUTANTS} == named | others


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
        tell(world, 1000 + seed)
        world.run_until(world.now + 5.0)
        assert all(n.knows(b"transaction %d" % (1000 + seed)) for n in world.nodes), f"seed {seed}"


def test_a_node_that_spins_is_seen() -> None:
    class Spinning(Eyes):
        def _tick(self) -> float:
            self.wake()
            return super()._tick()

    with pytest.raises(Stuck, match="spins"):
        pacing.rests(Mutant("", Spinning, 0).node)


def test_a_world_needs_its_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulation.facts._depth", 0)
    with pytest.raises(RuntimeError, match="stand_ins"):
        World(random_plan(0), 0)


def dies(seeds: range, _: int | None) -> list[Outcome]:
    if CHUNK in seeds:
        os._exit(9)
    return []


def test_a_dead_process_is_an_error_that_names_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(WorkerDied) as died:
        list(run_many(0, 4 * CHUNK, None, dies))
    assert died.value.first <= CHUNK <= died.value.last < 4 * CHUNK
