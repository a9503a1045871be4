"""Stake on its way back: both windows, what votes longer waits longer, money is conserved."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain.blocks import Kind, sign_vote
from tdmld.chain.ledger import recount
from tdmld.chain.limits import UNBONDINGS
from tdmld.chain.slashing import from_votes
from tdmld.chain.transactions import (
    Bond,
    Nominate,
    Payload,
    Revoke,
    Transfer,
    Unbond,
    VoteEvidence,
    Withdraw,
)
from tests.chain.world import BALANCE, FEE, STAKE, World, make_genesis, node_key, owner_key

EPOCH = 10
BLOCKS = 25


def world(seconds: int = 1, **parameters: Any) -> World:
    return World(make_genesis(7, 4, epoch_blocks=EPOCH, unbonding=[BLOCKS, seconds], **parameters))


def test_stake_leaves_its_bucket_at_once_and_returns_after_the_windows() -> None:
    made = world()
    made.do(owner_key(2), Unbond("vote", 500))
    account = made.state.account(owner_key(2).public)
    assert (account.balance, account.vote_stake) == (BALANCE - FEE, 502)
    assert made.state.supply.unbonding == 500
    made.wait(2 * EPOCH + BLOCKS - 1 - made.height)
    assert "not over" in made.refused(owner_key(2), Withdraw())
    made.do(owner_key(2), Withdraw())
    assert made.state.account(owner_key(2).public).balance == BALANCE - 3 * FEE + 500
    assert made.state.supply.unbonding == 0
    assert "nothing" in made.refused(owner_key(2), Withdraw())


def test_blocks_alone_do_not_do() -> None:
    """A header's time must have passed too: blocks can be made fast. 500 ms a block here."""
    made = world(seconds=60)
    made.do(owner_key(2), Unbond("vote", 500))
    made.wait(2 * EPOCH + 119 - made.height)
    assert "not over" in made.refused(owner_key(2), Withdraw())
    made.do(owner_key(2), Withdraw())


def test_work_stake_unbinds_too_and_buckets_are_kept_apart() -> None:
    made = world()
    made.do(owner_key(2), Unbond("work", STAKE))
    made.do(owner_key(2), Unbond("vote", 2))
    entries = made.state.unbondings(owner_key(2).public).entries
    assert [(e.bucket, e.amount, e.epoch) for e in entries] == [("vote", 2, 2), ("work", STAKE, 2)]


def test_what_is_asked_for_is_checked() -> None:
    made = world()
    assert "greater than 0" in made.refused(owner_key(2), Unbond("vote", 0))
    assert "short" in made.refused(owner_key(2), Unbond("vote", 1003))
    assert "vote or work" in made.refused(owner_key(2), Unbond("other", 1))
    assert "nothing" in made.refused(owner_key(6), Withdraw())


def test_amounts_of_one_epoch_are_one_entry_and_entries_are_bounded() -> None:
    made = world()
    for _ in range(3):
        made.do(owner_key(2), Unbond("vote", 1))
    assert len(made.state.unbondings(owner_key(2).public).entries) == 1
    while len(made.state.unbondings(owner_key(2).public).entries) < UNBONDINGS:
        made.do(owner_key(2), Unbond("vote", 1))
        made.wait(EPOCH - 1)
    made.wait(1)
    assert "unbind already" in made.refused(owner_key(2), Unbond("vote", 1))
    made.do(owner_key(2), Withdraw())
    made.do(owner_key(2), Unbond("vote", 1))


def test_stake_whose_weight_stays_in_the_set_waits_with_it() -> None:
    """Owner 0 has nearly all the weight: less than a third of it may go in one epoch."""
    made = World(make_genesis(7, 1, epoch_blocks=EPOCH, unbonding=[BLOCKS, 1]))
    made.do(owner_key(0), Unbond("vote", 900))
    made.wait(EPOCH - made.height)
    (entry,) = made.state.unbondings(owner_key(0).public).entries
    chosen = made.state.validator_set(2)
    assert chosen is not None
    assert chosen.seats[0].weight == 1000 - 333
    assert entry.epoch == 3
    epoch = 3
    while chosen.seats[0].weight > 100:
        made.wait(EPOCH)
        chosen = made.state.validator_set(epoch)
        assert chosen is not None
        epoch += 1
    (entry,) = made.state.unbondings(owner_key(0).public).entries
    assert entry.epoch == chosen.epoch


def slash(world: World, index: int, view: int) -> VoteEvidence:
    key, chain = node_key(index), world.chain_id
    votes = [sign_vote(key, chain, Kind.NOTARIZE, view, bytes([i]) * 32, 0) for i in (1, 2)]
    return from_votes(key.public, *votes)


def payload(world: World, data: st.DataObject) -> tuple[int, Payload]:
    index = data.draw(st.integers(0, 5))
    amount = data.draw(st.sampled_from([1, 7, 400, 1002, 10**8]))
    bucket = data.draw(st.sampled_from(["vote", "work"]))
    wanted: tuple[Payload, ...] = (
        Bond(bucket, amount),
        Unbond(bucket, amount),
        Unbond(bucket, amount),
        Withdraw(),
        Nominate(node_key(index).public),
        Revoke(node_key(index).public),
        Transfer(owner_key(index + 1).public, amount),
        slash(world, index, data.draw(st.integers(0, 3)) * 2**32 + 1),
    )
    return index, wanted[data.draw(st.integers(0, len(wanted) - 1))]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_bound_unbound_and_burned_money_is_conserved(data: st.DataObject) -> None:
    """`World.block` counts everything after each block; every epoch has validators."""
    made = World(make_genesis(7, 4, epoch_blocks=3, unbonding=[4, 1]))
    before = made.state.supply.genesis
    for _ in range(data.draw(st.integers(5, 40))):
        index, wanted = payload(made, data)
        key = node_key(6) if isinstance(wanted, VoteEvidence) else owner_key(index)
        made.block(made.sign(key, wanted))
    counted = recount(made.store.items())
    assert counted.genesis == before
    for epoch in range(made.height // 3 + 2):
        chosen = made.state.validator_set(epoch)
        assert chosen is not None
        assert chosen.seats
        assert min(seat.weight for seat in chosen.seats) > 0
    for index in range(7):
        assert made.state.account(owner_key(index).public).balance >= 0
