"""What the rules leave to somebody who knows a draw's mix early (docs/spec/chain.md, section 8)."""

from collections import Counter
from fractions import Fraction
from math import log2

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tdmld.chain import audits
from tdmld.chain.crypto import sha256
from tdmld.chain.execution import Execution
from tdmld.chain.ledger import BlockContext
from tests.chain.test_jobs import active
from tests.chain.world import World, mark, node_key, owner_key


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
