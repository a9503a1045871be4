"""What the rules leave to somebody who knows a draw's mix early (docs/spec/chain.md, section 8)."""

from collections import Counter
from fractions import Fraction
from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tdmld.chain import audits, vrf
from tdmld.chain.blocks import beacon_input
from tdmld.chain.crypto import sha256
from tdmld.chain.execution import Execution
from tdmld.chain.ledger import BlockContext
from tdmld.chain.limits import RATE_ONE
from tdmld.chain.records import SegmentStatus
from tests.chain.test_jobs import active
from tests.chain.world import World, mark, node_key, owner_key
from tests.simulation.beacon import NETWORKS, Game, Hashed, Network, Proven, Taint, play, play_all
from tests.simulation.beacon_aims import AIMS, RATE, Unaudited


def chosen(world: World, job_id: bytes, beacon: bytes, **stakes: int) -> bytes | None:
    """The owner of the auditor of segment 0, with other work stakes (o3=7: owner 3 has 7)."""
    run = Execution(world.state, world.genesis, BlockContext(world.height, 1, 0, 0, b"", beacon))
    for name, stake in stakes.items():
        owner = owner_key(int(name[1:])).public
        run.state.put_account(owner, replace(run.state.account(owner), work_stake=stake))
    found = audits.choose(run, world.job(job_id), 0, 0, 0, ())
    return None if found is None else found[1]


def others(world: World, job_id: bytes) -> list[int]:
    """Owners that may audit and do not hold the state."""
    job = world.job(job_id)
    assert job.standby is not None
    party = {job.submitter, job.standby.owner}
    for slot in range(job.slots):
        found = world.state.slot(job_id, slot)
        assert found is not None
        party.add(found.worker.owner)
    return [index for index in range(7) if owner_key(index).public not in party]


WORLD, JOB = active()
FREE = others(WORLD, JOB)
OWNERS = {index: owner_key(index).public for index in FREE}


@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 2**62), min_size=2, max_size=2))
@settings(max_examples=60, deadline=None)
def test_moving_ones_stake_makes_nobody_else_win(beacon: bytes, stakes: list[int]) -> None:
    """AUDIT-7: whatever an owner bonds or unbonds, the choice stays, comes to it, or leaves it."""
    me = FREE[0]
    one, two = (chosen(WORLD, JOB, beacon, **{f"o{me}": stake}) for stake in stakes)
    assert one == two or OWNERS[me] in (one, two)
    if one != two:
        assert (two == OWNERS[me]) is (stakes[1] > stakes[0])


@given(st.binary(min_size=32, max_size=32), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_ask_that_comes_or_goes_makes_nobody_else_win(beacon: bytes, busy: bool) -> None:
    """AUDIT-6, AUDIT-7: neither an absent nor a busy node moves the choice among the others."""
    me = FREE[-1]
    key, before = node_key(me).public, chosen(WORLD, JOB, beacon)
    run = Execution(WORLD.state, WORLD.genesis, BlockContext(WORLD.height, 1, 0, 0, b"", beacon))
    if busy:
        record = run.state.node(key)
        assert record is not None
        run.state.put_node(key, replace(record, audits_open=1000))
    else:
        run.state.put_ask(key, None)
    found = audits.choose(run, WORLD.job(JOB), 0, 0, 0, ())
    assert found is not None
    assert before in (found[1], OWNERS[me])


def test_a_walk_over_sums_would_have_let_it() -> None:
    """The rule before: one unit more, of anybody, names another auditor."""
    named = set()
    for extra in range(60):
        weights = {owner: 50_000 + (index == FREE[0]) * extra for index, owner in OWNERS.items()}
        point = int.from_bytes(mark("lots"), "big") % sum(weights.values())
        for owner in sorted(weights):
            point -= weights[owner]
            if point < 0:
                named.add(owner)
                break
    assert len(named) > 1


def test_the_wait_is_the_logarithm_of_the_lot() -> None:
    for number in range(300):
        lots, owner = mark("lots", number), mark("owner", number)
        lot = int.from_bytes(sha256(lots, owner)[:8], "big") + 1
        wait = audits._wait_of(lots, owner)
        assert 0 <= wait <= 64 << 32
        assert abs(wait / 2**32 - (64 - log2(lot))) < 2**-30


def test_owners_are_chosen_by_the_share_of_their_weight() -> None:
    weights = {mark("owner", number): number * 10**17 for number in (1, 2, 3, 4)}
    counts: Counter[bytes] = Counter()
    for number in range(4000):
        lots = mark("lots", number)
        counts[min(weights, key=lambda o: Fraction(audits._wait_of(lots, o), weights[o]))] += 1
    for number, owner in enumerate(weights, 1):
        share = number / 10
        assert abs(counts[owner] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


# ---- BEACON-6: which taint makes a draw certain ------------------------------------------------


def linked(**offer: object) -> tuple[World, bytes]:
    """A job whose segments 0 were linked by the last block; they are never drawn by luck."""
    world, job_id = active(audit_rate=1, audit_budget=7_000 * 8, **offer)
    world.play(job_id)
    segment = world.state.segment(job_id, 0, 0)
    assert segment is not None
    assert segment.linked == world.height
    return world, job_id


def status(world: World, job_id: bytes) -> SegmentStatus:
    segment = world.state.segment(job_id, 0, 0)
    assert segment is not None
    return segment.status


@pytest.mark.parametrize("taints", [(True, False), (False, True), (True, True)])
def test_a_taint_at_any_height_since_it_was_linked_draws_a_segment(taints: tuple[bool]) -> None:
    """BEACON-6, AUDIT-1: also one before the height that draws."""
    world, job_id = linked()
    for tainted in taints:
        world.block(tainted=tainted)
    assert status(world, job_id) is SegmentStatus.DRAWN


def test_an_older_taint_draws_nothing() -> None:
    world, job_id = active(audit_rate=1, audit_budget=7_000 * 8)
    world.play(job_id, tainted=True)  # the block that links
    world.wait(2)
    assert status(world, job_id) is SegmentStatus.UNDRAWN


def test_the_last_tainted_height_stands_in_the_state() -> None:
    world = World()
    world.block()
    assert world.state.last_tainted == 0
    world.block(tainted=True)
    world.wait(3)
    assert world.state.last_tainted == 2
    world.block(passed=4)
    assert world.state.last_tainted == 6


# ---- B1 to B6: a coalition that aims, against the documented bound -----------------------------

SEEDS = 300


@pytest.mark.parametrize(("name", "stakes"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_no_strategy_does_better_than_the_documented_bound(name: str, stakes: tuple[int]) -> None:
    network = Network(name, stakes)
    for aim in AIMS:
        for row in play_all(Game(network, aim), SEEDS):
            assert row.holds, row
            assert row.as_computed, row


@pytest.mark.parametrize("taint", [Taint.NARROW, Taint.NONE])
def test_the_bound_notices_a_weaker_rule_of_taint(taint: Taint) -> None:
    """Two turns on end: the coalition exchanges the mix before the one that it does not like."""
    game = Game(Network("9 equal", (1,) * 9), AIMS[0], taint=taint)
    assert not play(game, "aim", "timed", SEEDS).holds
    assert play(Game(game.network, AIMS[0]), "aim", "timed", SEEDS).holds


def test_withholding_gains_no_lighter_audit_and_costs_turns() -> None:
    """B3, B4: exactly the rate; with an auditor of its own in reach it pays with certain audits."""
    network = Network("4 equal", (1,) * 4)
    assert network.run == 1
    assert all(
        Game(network, AIMS[0]).value(spot) == pytest.approx(RATE / RATE_ONE)
        for start in ("any", "timed", "own", "edge")
        for spot in Game(network, AIMS[0]).spots(start)
    )
    aimed = play(Game(network, AIMS[1]), "aim", "timed", SEEDS)
    assert aimed.withheld > 0
    assert aimed.expected / SEEDS == pytest.approx(aimed.bound)


def test_runs_are_below_the_safe_window_and_edges_join_two() -> None:
    """B1, B2: what a coalition can lead on end, whatever keys it makes."""
    for name, stakes in NETWORKS:
        network = Network(name, stakes)
        assert 3 * network.weight(network.coalition) < sum(stakes)
        assert 1 <= network.run < network.safe_window
        assert network.run <= network.edge_run <= 2 * (network.safe_window - 1)
        for number in range(1, network.rotation.period + 1):
            assert network.run_at(number) <= network.run
    for count in range(4, 31):
        network = Network("equal", (1,) * count)
        assert network.safe_window == -(-count // 3)
        assert network.run == network.safe_window - 1


def test_whoever_leads_from_the_block_to_its_draw_cheats_unseen() -> None:
    """B2: with more turns on end than `draw_delay`, and no longer when it is raised."""
    network = Network("12 equal", (1,) * 12)
    short, long = Unaudited(), Unaudited(delay=network.safe_window - 1)
    assert network.run > short.delay
    assert play(Game(network, short), "aim", "own", SEEDS).measured < RATE / RATE_ONE / 2
    assert play(Game(network, long), "aim", "own", SEEDS).bound == RATE / RATE_ONE
    assert play(Game(network, long), "aim", "own", SEEDS).holds


def test_real_proofs_play_like_the_stand_in() -> None:
    """The same games with VRF proofs by real keys, mixes taken from headers by `beacon_mix`."""
    network = Network("9 equal", (1,) * 9)
    for aim, policy in ((AIMS[1], "aim"), (AIMS[2], "aim"), (AIMS[2], "honest")):
        row = play(Game(network, aim, Proven(9)), policy, "timed", 60)
        assert row.holds
        assert row.as_computed


def test_both_mixers_depend_on_the_leader_the_parent_and_the_height_alone() -> None:
    """BEACON-2, BEACON-3: one mix for each, in whichever view."""
    for mixer in (Hashed(), Proven(3)):
        first = mixer.mix(1, mark("parent"), 7)
        assert first == mixer.mix(1, mark("parent"), 7)
        others = {
            mixer.mix(2, mark("parent"), 7),
            mixer.mix(1, mark("other"), 7),
            mixer.mix(1, mark("parent"), 8),
        }
        assert len(others | {first}) == 4
    key, before = Proven(3).keys[1], mark("parent")
    proof = vrf.prove(key.seed, beacon_input(Proven.chain, before, 7))
    output = vrf.verify(key.public, beacon_input(Proven.chain, before, 7), proof)
    assert output is not None
    assert Proven(3).mix(1, before, 7) == sha256(before, output)
