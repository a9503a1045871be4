"""Absent leaders lose their turns, never their votes (JAIL-1 to JAIL-4, LEAD-1)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain.accounts import (
    ValidatorSet,
)
from tdmld.chain.blocks import EPOCH_VIEWS, Committee, Kind, sign_vote, turn
from tdmld.chain.epochs import committee
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.events import Jailed, Returned
from tdmld.chain.limits import ABSENCES, JAIL_MISSES
from tdmld.chain.mempool import Mempool
from tdmld.chain.slashing import from_votes
from tdmld.chain.transactions import (
    Bond,
    Nominate,
    Payload,
    Return,
    Revoke,
    Unbond,
    decode_transaction,
)
from tests.chain.world import World, make_genesis, mark, node_key, owner_key

EPOCH = 20
FOUR = {i: 1000 + i for i in range(4)}
"""Weights by index; each is more than a fifth and less than a third."""


def world(epoch_blocks: int = EPOCH, validators: int = 4) -> World:
    return World(make_genesis(6, validators, epoch_blocks=epoch_blocks))


def away(made: World, *who: int) -> None:
    """From now on these nodes do not lead their views."""
    made.away = frozenset(node_key(index).public for index in who)


def to_epoch(made: World, epoch: int) -> None:
    """Up to the last block before `epoch`."""
    made.wait(epoch * made.parameters.epoch_blocks - made.height)


def chosen(made: World, epoch: int) -> ValidatorSet:
    found = made.state.validator_set(epoch)
    assert found is not None
    return found


def members(made: World, epoch: int) -> Committee:
    return committee(made.chain_id, chosen(made, epoch))


def index_of(node: bytes) -> int:
    return next(i for i in range(20) if node_key(i).public == node)


def idle(made: World, epoch: int) -> set[int]:
    """Who has no turns in an epoch, by index."""
    return {index_of(seat.node) for seat in chosen(made, epoch).seats if not seat.leads}


def weights(made: World, epoch: int) -> dict[int, int]:
    return {index_of(seat.node): seat.weight for seat in chosen(made, epoch).seats}


def jailed(made: World) -> dict[int, int]:
    """Who is jailed, and since when."""
    found = {i: made.state.node(node_key(i).public) for i in range(6)}
    return {i: node.jailed for i, node in found.items() if node is not None and node.jailed}


def missed(made: World, epoch: int) -> dict[int, int]:
    """Counted misses by index, without zeros."""
    found = made.state.absences(epoch)
    if found is None:
        return {}
    rows = zip(chosen(made, epoch).seats, found.missed, strict=True)
    return {index_of(seat.node): count for seat, count in rows if count}


def leaders(made: World, epoch: int, *numbers: int) -> list[int]:
    found = members(made, epoch)
    return [index_of(found.nodes[found.leader(epoch * EPOCH_VIEWS + n)]) for n in numbers]


# ---- counting (JAIL-1) -----------------------------------------------------------------------


def test_jail_1_a_view_that_was_passed_over_counts_against_its_leader() -> None:
    made = world()
    made.wait(3)
    (late,) = leaders(made, 0, turn(made.view) + 1)
    made.block(passed=1)
    assert missed(made, 0) == {late: 1}


def test_jail_1_nothing_is_put_where_nothing_was_passed_over() -> None:
    made = world()
    made.wait(EPOCH + 3)
    assert not any(key[:1] == b"m" for key in made.store)


def test_jail_1_views_of_another_epoch_do_not_count() -> None:
    made = world()
    made.wait(EPOCH)
    assert made.view == EPOCH
    expected = leaders(made, 1, 1, 2)
    made.block(passed=2)
    assert made.view == EPOCH_VIEWS + 3
    assert missed(made, 1) == dict.fromkeys(expected, 1)
    assert missed(made, 0) == {}


def test_jail_1_counts_are_bounded_by_the_last_views_of_a_gap() -> None:
    made = world()
    first, *rest = leaders(made, 0, *range(1, ABSENCES + 2))
    made.block(passed=ABSENCES + 1)
    found = missed(made, 0)
    assert sum(found.values()) == ABSENCES
    assert found == {i: rest.count(i) for i in FOUR}
    assert first in found


# ---- judging (JAIL-2) ------------------------------------------------------------------------


def test_jail_2_who_was_absent_is_jailed_at_the_end_of_the_epoch() -> None:
    made = world()
    away(made, 2)
    made.wait(EPOCH - 1)
    assert missed(made, 0)[2] >= JAIL_MISSES
    assert jailed(made) == {}
    turns = missed(made, 0)[2]
    made.block()
    assert jailed(made) == {2: EPOCH}
    (event,) = [found for found in made.events if isinstance(found, Jailed)]
    assert (index_of(event.node), event.epoch) == (2, 0)
    assert event.missed in (turns, turns + 1)
    assert missed(made, 0) == {}


def test_jail_2_a_few_missed_turns_are_no_absence() -> None:
    """Below JAIL_MISSES nobody is jailed, however short the epoch."""
    made = world(epoch_blocks=6)
    away(made, 1)
    to_epoch(made, 3)
    assert jailed(made) == {}
    assert idle(made, 4) == set()


def test_jail_2_a_third_of_its_turns_must_be_missed() -> None:
    """Of the turns that it had in the views of the epoch: one side of the bound, and the other."""
    for blocks, expected in ((30, {0: 30}), (80, {})):
        made = world(epoch_blocks=blocks)
        away(made, 0)
        while missed(made, 0).get(0, 0) < JAIL_MISSES:
            made.block()
        away(made)
        to_epoch(made, 1)
        views, total = turn(made.view), sum(FOUR.values())
        assert (3 * JAIL_MISSES * total >= views * FOUR[0]) is bool(expected)
        assert jailed(made) == expected


@pytest.mark.parametrize("who", [(0, 1), (1, 2, 3), (0, 1, 2)])
def test_jail_2_when_a_third_is_away_nobody_is_jailed(who: tuple[int, ...]) -> None:
    made = world()
    away(made, *who)
    to_epoch(made, 1)
    assert missed(made, 0) == {}
    assert jailed(made) == {}
    assert idle(made, 2) == set()


def test_jail_2_a_partition_of_everybody_jails_nobody() -> None:
    made = world()
    for _ in range(EPOCH):
        made.block(passed=9)
    assert jailed(made) == {}


def test_jail_2_exactly_a_third_is_too_much() -> None:
    """Three equal validators: one of them is a third."""
    made = World(make_genesis(3, 3, epoch_blocks=EPOCH))
    for index, more in ((0, 2), (1, 1)):  # 1000, 1001, 1002 become equal
        made.do(owner_key(index), Bond("vote", more))
    to_epoch(made, 2)
    assert len(set(weights(made, 3).values())) == 1
    to_epoch(made, 3)
    away(made, 1)
    to_epoch(made, 4)
    assert jailed(made) == {}


def test_jail_2_who_is_jailed_stays_jailed_since_then() -> None:
    made = world()
    away(made, 2)
    to_epoch(made, 2)
    assert jailed(made) == {2: EPOCH}


# ---- leading (JAIL-3, LEAD-1) ----------------------------------------------------------------


def test_jail_3_who_is_jailed_has_no_turns_in_the_sets_that_follow() -> None:
    made = world()
    away(made, 2)
    to_epoch(made, 1)
    assert idle(made, 1) == set()
    assert idle(made, 2) == {2}
    to_epoch(made, 2)
    passed = made.view
    made.wait(EPOCH - 1)
    assert passed < made.view == 2 * EPOCH_VIEWS + EPOCH - 1, "no view was passed over"
    assert 2 not in leaders(made, 2, *range(1, 5000))
    assert members(made, 2).rotation.turns.count(0) == 1


def test_jail_3_weights_and_the_quorum_stay() -> None:
    made, other = world(), world()
    away(made, 2)
    to_epoch(made, 3)
    to_epoch(other, 3)
    assert idle(made, 4) == {2}
    assert weights(made, 4) == weights(other, 4) == FOUR
    assert members(made, 4).quorum == members(other, 4).quorum


def test_jail_3_when_a_third_would_not_lead_all_do() -> None:
    """One after the other: neither epoch lost a third."""
    made = world()
    away(made, 2)
    to_epoch(made, 2)
    assert idle(made, 3) == {2}
    away(made, 1)
    to_epoch(made, 3)
    assert jailed(made) == {2: EPOCH, 1: 3 * EPOCH}
    assert idle(made, 3) == {2}
    assert idle(made, 4) == set()
    made.do(node_key(1), Return(3 * EPOCH))
    away(made)
    to_epoch(made, 4)
    assert idle(made, 5) == {2}


def test_jail_3_another_node_of_its_owner_is_not_jailed() -> None:
    made = world()
    away(made, 2)
    to_epoch(made, 1)
    made.do(owner_key(5), Bond("vote", 600))
    made.do(owner_key(5), Nominate(node_key(5).public))
    to_epoch(made, 2)
    assert idle(made, 3) == {2}
    assert 5 in weights(made, 3)


def test_jail_3_who_leaves_and_comes_back_is_still_jailed() -> None:
    made = world()
    away(made, 2)
    to_epoch(made, 1)
    made.do(owner_key(2), Unbond("vote", 1002))
    to_epoch(made, 3)
    assert 2 not in weights(made, 4)
    made.do(owner_key(2), Bond("vote", 1002))
    made.do(owner_key(2), Nominate(node_key(2).public))
    to_epoch(made, 5)
    assert idle(made, 6) == {2}


# ---- returning (JAIL-4) ----------------------------------------------------------------------


def captive() -> World:
    """Node 2 is jailed, and back at work."""
    made = world()
    away(made, 2)
    to_epoch(made, 1)
    away(made)
    return made


def test_jail_4_it_leads_again_from_the_next_set_on() -> None:
    made = captive()
    made.do(node_key(2), Return(EPOCH))
    assert jailed(made) == {}
    assert Returned(node_key(2).public) in made.events
    to_epoch(made, 2)
    assert idle(made, 2) == {2}
    assert idle(made, 3) == set()
    to_epoch(made, 3)
    assert jailed(made) == {}


def test_jail_4_a_return_answers_one_jailing() -> None:
    made = captive()
    said = made.sign(node_key(2), Return(EPOCH))
    assert made.block(said).receipts[0].ok
    (again,) = made.block(said).receipts
    assert "not jailed" in again.reason
    to_epoch(made, 3)
    away(made, 2)
    to_epoch(made, 4)
    assert jailed(made) == {2: 4 * EPOCH}
    (replayed,) = made.block(said).receipts
    assert f"jailed at height {4 * EPOCH}" in replayed.reason
    assert jailed(made) == {2: 4 * EPOCH}


def test_jail_4_nobody_else_can_say_it() -> None:
    made = captive()
    assert "not jailed" in made.refused(node_key(1), Return(EPOCH))
    assert "not jailed" in made.refused(node_key(1), Return(0))
    for key in (owner_key(2), node_key(15)):
        assert "no registered node" in made.refused(key, Return(EPOCH))
    assert jailed(made) == {2: EPOCH}


def test_jail_4_a_revoked_node_does_not_return() -> None:
    made = captive()
    made.do(owner_key(2), Revoke(node_key(2).public))
    assert "revoked" in made.refused(node_key(2), Return(EPOCH))


def test_jail_4_a_convicted_node_does_not_return() -> None:
    made = captive()
    votes = [sign_vote(node_key(2), made.chain_id, Kind.NOTARIZE, 5, mark(n), 2) for n in range(2)]
    made.do(node_key(9), from_votes(node_key(2).public, *votes))
    assert "voted twice" in made.refused(node_key(2), Return(EPOCH))


def test_jail_4_it_is_free_and_carries_no_nonce() -> None:
    made = captive()
    supply = made.state.supply
    assert "nonce 0" in made.refused(node_key(2), Return(EPOCH), nonce=1)
    assert "fee 0" in made.refused(node_key(2), Return(EPOCH), fee=10)
    made.do(node_key(2), Return(EPOCH))
    assert made.state.supply == supply


def test_a_pool_holds_one_return_of_a_jailed_node_beside_its_ask() -> None:
    made = captive()
    pool = Mempool(made.genesis)

    def admit(payload: Payload, by: int = 2, **header: int) -> None:
        raw = made.sign(node_key(by), payload, **header)
        pool.admit(decode_transaction(raw, made.chain_id), made.state, made.height)

    with pytest.raises(InvalidTransaction, match="not jailed"):
        admit(Return(EPOCH), by=1)
    ask = decode_transaction(made.ask(2, until_height=made.height + 9), made.chain_id)
    pool.admit(ask, made.state, made.height)
    admit(Return(EPOCH))
    with pytest.raises(InvalidTransaction, match="wait"):
        admit(Return(EPOCH), expiry=EPOCH + 9)
    assert len(pool) == 2
    made.do(node_key(2), Return(EPOCH))
    assert pool.refresh(made.state, made.height) == ()
    assert [type(one.payload) for one in pool.select(9999, 9)] == [type(ask.payload)]


# ---- whatever happens ------------------------------------------------------------------------

schedules = st.lists(
    st.tuples(st.frozensets(st.integers(0, 4), max_size=3), st.integers(0, 12), st.booleans()),
    min_size=1,
    max_size=8,
)
"""By stretch of blocks: who is away, how many views fail besides at its begin, whether those who
are jailed and at work return."""


@settings(max_examples=60, deadline=None)
@given(schedule=schedules)
def test_somebody_always_leads_and_every_vote_counts(
    schedule: list[tuple[frozenset[int], int, bool]],
) -> None:
    blocks = 8
    made, calm = (World(make_genesis(5, 5, epoch_blocks=blocks)) for _ in range(2))
    for who, failed, returns in schedule:
        away(made, *who)
        for step in range(blocks // 2 + 1):
            back = [
                made.sign(node_key(index), Return(height))
                for index, height in jailed(made).items()
                if returns and index not in who
            ]
            before = made.view if turn(made.view) else 0
            made.block(*back, passed=failed if step == 0 else 0)
            assert [key[1:] for key in made.store if key[:1] == b"m"] in (
                [],
                [(made.view // EPOCH_VIEWS).to_bytes(8, "big")],
            ), "absences are forgotten with their epoch"
            assert made.view > before
    calm.wait(made.height)
    for epoch in range((made.height - 1) // blocks + 2):
        seats = chosen(made, epoch).seats
        led = sum(seat.weight for seat in seats if seat.leads)
        assert 3 * led > 2 * sum(seat.weight for seat in seats)
        assert weights(made, epoch) == weights(calm, epoch)
        assert members(made, epoch).quorum == members(calm, epoch).quorum


@settings(max_examples=40, deadline=None)
@given(who=st.sets(st.integers(0, 4)), passed=st.lists(st.integers(0, 3), min_size=24, max_size=24))
def test_who_leads_every_turn_is_never_jailed(who: set[int], passed: list[int]) -> None:
    """Whatever the others do: misses are counted against leaders of failed views alone."""
    made = World(make_genesis(5, 5, epoch_blocks=24))
    failed = set[int]()
    for count in passed:
        gap = leaders(made, 0, *range(turn(made.view) + 1, turn(made.view) + 1 + count))
        gap = gap[: next((n for n, index in enumerate(gap) if index not in who), count)]
        failed |= set(gap)
        made.block(passed=len(gap))
    assert set(jailed(made)) <= failed <= who
