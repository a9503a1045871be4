"""Who validates: nominations, elections, the bound on change, what headers name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdmld.chain import epochs
from tdmld.chain.accounts import (
    Seat,
    ValidatorSet,
)
from tdmld.chain.blocks import (
    EPOCH_VIEWS,
    Committee,
    ends_epoch,
    epoch_of,
    follows,
    start_view,
    turn,
    view_epoch,
)
from tdmld.chain.transactions import (
    Bond,
    Nominate,
    Register,
    Revoke,
    Transfer,
    Unbond,
    sign_registration,
)
from tests.chain.world import World, make_genesis, mark, node_key, owner_key

EPOCH = 10


def world(**parameters: int) -> World:
    return World(make_genesis(7, 4, epoch_blocks=EPOCH, **parameters))


def to_epoch(world: World, epoch: int) -> None:
    """Up to the last block before `epoch`."""
    world.wait(epoch * EPOCH - world.height)


def chosen(world: World, epoch: int) -> ValidatorSet:
    found = world.state.validator_set(epoch)
    assert found is not None
    return found


def weights(world: World, epoch: int) -> dict[int, int]:
    """Weight by index of the owner; its node must be the owner's."""
    names = {owner_key(i).public: i for i in range(20)}
    return {names[seat.owner]: seat.weight for seat in chosen(world, epoch).seats}


# ---- arithmetic of heights and views ---------------------------------------------------------


def test_heights_and_views_belong_to_epochs() -> None:
    assert [epoch_of(height, 10) for height in (1, 10, 11, 20, 21)] == [0, 0, 1, 1, 2]
    assert [height for height in range(31) if ends_epoch(height, 10)] == [10, 20, 30]
    assert start_view(9, 17, 10) == 17
    assert start_view(10, 17, 10) == EPOCH_VIEWS
    assert start_view(0, 0, 10) == 0
    assert (view_epoch(EPOCH_VIEWS + 3), turn(EPOCH_VIEWS + 3)) == (1, 3)


def test_a_first_view_of_an_epoch_is_untainted_whatever_came_before() -> None:
    assert follows(4, 5)
    assert not follows(4, 6)
    assert follows(4, EPOCH_VIEWS + 1)
    assert not follows(4, EPOCH_VIEWS + 2)
    assert not follows(EPOCH_VIEWS + 1, EPOCH_VIEWS + 1)


# ---- elections -------------------------------------------------------------------------------


def test_genesis_validates_the_first_two_epochs() -> None:
    made = world()
    assert weights(made, 0) == weights(made, 1) == {i: 1000 + i for i in range(4)}
    assert chosen(made, 0).epoch == 0
    assert made.state.validator_set(2) is None


def test_a_set_is_fixed_one_epoch_ahead_and_stored_in_the_state() -> None:
    made = world()
    made.wait(EPOCH - 1)
    assert made.state.validator_set(2) is None
    made.wait(1)
    assert weights(made, 2) == weights(made, 1)
    start = made.state.epoch_start(1)
    assert start is not None
    assert start.height == EPOCH
    assert epochs.set_id(chosen(made, 1)) != epochs.set_id(chosen(made, 2))


def test_a_newcomer_joins_two_epochs_later_at_a_bounded_pace() -> None:
    made = world()
    made.do(owner_key(5), Bond("vote", 5000))
    made.do(owner_key(5), Nominate(node_key(5).public))
    to_epoch(made, 1)
    assert 5 not in weights(made, 1)
    total = sum(weights(made, 1).values())
    assert weights(made, 2)[5] == (total - 1) // 3
    to_epoch(made, 4)
    assert weights(made, 5)[5] == 5000


def test_stake_without_a_nomination_does_not_vote() -> None:
    made = world()
    made.do(owner_key(5), Bond("vote", 500))
    to_epoch(made, 2)
    assert 5 not in weights(made, 3)


def test_who_unbinds_leaves() -> None:
    made = world()
    made.do(owner_key(3), Unbond("vote", 1003))
    to_epoch(made, 1)
    assert set(weights(made, 1)) == {0, 1, 2, 3}
    assert set(weights(made, 2)) == {0, 1, 2}


def test_the_last_weight_never_leaves_so_the_chain_has_somebody() -> None:
    made = World(make_genesis(7, 1, epoch_blocks=2))
    made.do(owner_key(0), Unbond("vote", 1000))
    made.wait(60)
    assert weights(made, 31)[0] in range(1, 4)


def test_only_as_many_as_there_are_seats_those_with_most_stake() -> None:
    made = world(validators_max=4)
    made.do(owner_key(5), Bond("vote", 1500))
    made.do(owner_key(5), Nominate(node_key(5).public))
    to_epoch(made, 6)
    assert set(weights(made, 7)) == {1, 2, 3, 5}


def test_a_stake_below_the_minimum_gets_no_seat() -> None:
    made = world(vote_stake_min=1002)
    made.do(owner_key(5), Bond("vote", 900))
    assert "at least 1002" in made.refused(owner_key(5), Nominate(node_key(5).public))
    to_epoch(made, 6)
    assert set(weights(made, 7)) == {2, 3}


def test_another_node_of_the_same_owner_takes_over() -> None:
    """Register, Nominate, Revoke: how a node key is replaced."""
    made = world()
    new = node_key(12)
    proof = sign_registration(new, made.chain_id, owner_key(1).public, made.height + 2)
    made.do(owner_key(1), Register(new.public, made.height + 2, proof))
    made.do(owner_key(1), Nominate(new.public))
    made.do(owner_key(1), Revoke(node_key(1).public))
    to_epoch(made, 5)
    nodes = {seat.node: seat.weight for seat in chosen(made, 6).seats}
    assert node_key(1).public not in nodes
    assert nodes[new.public] == 1001


def test_nominations_are_checked() -> None:
    made = world()
    assert "not registered" in made.refused(owner_key(1), Nominate(node_key(2).public))
    assert "not registered" in made.refused(owner_key(1), Nominate(node_key(15).public))
    made.do(owner_key(1), Revoke(node_key(1).public))
    assert "revoked" in made.refused(owner_key(1), Nominate(node_key(1).public))


# ---- revocation ------------------------------------------------------------------------------


def test_a_revoked_key_does_nothing_from_the_next_block_on() -> None:
    made = world()
    made.block(made.ask(5, until_height=made.height + EPOCH))
    assert made.state.ask(node_key(5).public) is not None
    made.do(owner_key(5), Revoke(node_key(5).public))
    assert made.state.ask(node_key(5).public) is None
    (receipt,) = made.block(made.ask(5, until_height=made.height + EPOCH)).receipts
    assert not receipt.ok
    assert "revoked" in receipt.reason
    assert "already" in made.refused(owner_key(5), Revoke(node_key(5).public))
    assert "not registered" in made.refused(owner_key(5), Revoke(node_key(6).public))


def test_a_revoked_validator_votes_until_the_fixed_epochs_are_over() -> None:
    made = world()
    made.do(owner_key(0), Revoke(node_key(0).public))
    to_epoch(made, 1)
    assert 0 in weights(made, 1)
    assert 0 not in weights(made, 2)


# ---- the bound on change ---------------------------------------------------------------------

sets = st.dictionaries(st.integers(0, 12), st.integers(1, 10_000), min_size=1, max_size=9)


def seats(rows: dict[int, int]) -> list[Seat]:
    return [Seat(mark("n", i), mark("o", i), weight) for i, weight in sorted(rows.items())]


def moved(old: tuple[Seat, ...], new: tuple[Seat, ...]) -> int:
    before = {seat.node: seat.weight for seat in old}
    after = {seat.node: seat.weight for seat in new}
    return sum(abs(before.get(n, 0) - after.get(n, 0)) for n in before.keys() | after.keys())


@given(old=sets, wanted=sets)
def test_less_than_a_third_moves_and_it_moves_towards_what_is_wanted(
    old: dict[int, int], wanted: dict[int, int]
) -> None:
    before, target = tuple(seats(old)), tuple(seats(wanted))
    after = epochs.elect(before, target, 100)
    assert 3 * moved(before, after) < sum(old.values())
    assert moved(after, target) == moved(before, target) - moved(before, after)
    assert [seat.node for seat in after] == sorted(seat.node for seat in after)
    Committee.of(bytes(32), [(seat.node, seat.weight) for seat in after])


@given(old=sets, wanted=sets)
def test_what_is_wanted_is_reached_when_there_is_weight_to_move(
    old: dict[int, int], wanted: dict[int, int]
) -> None:
    now, target = tuple(seats({**old, 20: 100})), tuple(seats({**wanted, 20: 100}))
    for _ in range(100):
        now = epochs.elect(now, target, 100)
    assert sorted(now, key=lambda seat: seat.node) == sorted(target, key=lambda seat: seat.node)


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_a_set_of_almost_nothing_never_changes(weight: int) -> None:
    old = tuple(seats({1: weight}))
    assert epochs.elect(old, (), 100) == old


def test_transfers_go_on_over_the_edge_of_an_epoch() -> None:
    made = world()
    for _ in range(3 * EPOCH):
        made.do(owner_key(0), Transfer(owner_key(1).public, 1))
    assert made.height == 3 * EPOCH
