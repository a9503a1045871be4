"""What the RPC says of stakes, seats and keys, from a real ledger."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from tdmld.chain.crypto import KeyPair, address, public_key
from tdmld.chain.records import StandingAsk
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Bond,
    Nominate,
    Register,
    Revoke,
    Unbond,
    Withdraw,
    sign_registration,
)
from tdmld.node import stakes, views
from tdmld.node.api import Api
from tdmld.node.store import ChainStore
from tdmld.rpc.errors import NotFound
from tdmld.rpc.staketypes import NodeKeyInfo, StakeInfo, ValidatorSetInfo
from tests.chain.test_slashing import STRANGER, twice
from tests.chain.world import World, make_genesis, node_key, owner_key
from tests.node import chainkit

EPOCH, BLOCKS = 10, 5
NEWCOMER = KeyPair(b"\x31" * 32)


@pytest.fixture
def world() -> World:
    return World(make_genesis(7, 4, epoch_blocks=EPOCH, unbonding=[BLOCKS, 3]))


def stake(world: World, index: int) -> StakeInfo:
    owner = owner_key(index).public
    prefix = stakes.offences_of(owner)
    proven = sorted(row for row in world.store.items() if row[0].startswith(prefix))
    return stakes.stake(world.state, world.genesis, owner, world.height, world.height * 500, proven)


def keys(world: World, index: int) -> tuple[NodeKeyInfo, ...]:
    owner, prefix = owner_key(index).public, stakes.NODES
    nodes = [
        key[1:]
        for key, raw in sorted(world.store.items())
        if key.startswith(prefix) and stakes.owned_by(owner, raw)
    ]
    return stakes.keys(world.state, world.genesis, owner, world.height, nodes)


def validators(world: World, epoch: int) -> ValidatorSetInfo:
    found = stakes.validator_set(world.state, world.genesis, epoch, world.height)
    assert found is not None
    return found


def test_an_owner_of_genesis_has_a_seat_in_two_epochs() -> None:
    world = World(make_genesis(7, 4, epoch_blocks=EPOCH))
    found = stake(world, 2)
    assert (found.vote_stake, found.epoch, found.epoch_end) == ("1002", 0, EPOCH)
    assert found.nominee == node_key(2).address
    assert [(seat.epoch, seat.weight, seat.total) for seat in found.seats] == [
        (0, "1002", "4006"),
        (1, "1002", "4006"),
    ]
    assert stakes.weights(world.state, node_key(2).public, 0) == (1002, 1002, 4006)
    assert stakes.weights(world.state, node_key(5).public, 0) == (0, 0, 4006)


def test_an_unbonding_says_when_it_is_over_and_then_it_is() -> None:
    """STAKE-2: the first block in which a withdrawal succeeds is the one that was told."""
    world = World(make_genesis(7, 4, epoch_blocks=EPOCH, unbonding=[BLOCKS, 1]))
    world.do(owner_key(1), Unbond("vote", 400))
    (entry,) = stake(world, 1).unbonding
    assert (entry.bucket, entry.amount, entry.epoch) == ("vote", "400", 2)
    assert (entry.from_height, entry.after, entry.ready) == (2 * EPOCH + BLOCKS + 1, "", False)
    assert views.account(world.state, owner_key(1).public, world.height).unbonding == "400"
    world.wait(2 * EPOCH - world.height)
    (entry,) = stake(world, 1).unbonding
    begin_ms, seconds = 2 * EPOCH * 500, 1
    assert entry.after == f"1970-01-01T00:00:{begin_ms // 1000 + seconds}.000Z"
    while not stake(world, 1).unbonding[0].ready:
        assert "not over" in world.refused(owner_key(1), Withdraw())
    assert world.height + 1 == entry.from_height
    world.do(owner_key(1), Withdraw())
    assert stake(world, 1).unbonding == ()
    assert views.account(world.state, owner_key(1).public, world.height).unbonding == "0"


def test_both_windows_count(world: World) -> None:
    """The blocks are over before the seconds here: `ready` waits for both."""
    world.do(owner_key(1), Unbond("work", 5))
    world.wait(2 * EPOCH + BLOCKS - world.height)
    (entry,) = stake(world, 1).unbonding
    assert world.height + 1 == entry.from_height
    assert not entry.ready
    assert "not over" in world.refused(owner_key(1), Withdraw())


def test_an_offence_is_shown_with_what_it_burned(world: World) -> None:
    world.do(STRANGER, twice(world))
    found = stake(world, 1)
    assert [(one.node, one.epoch, one.height, one.burned) for one in found.offences] == [
        (node_key(1).address, 0, 1, "51")
    ]
    assert found.vote_stake == "950"
    assert keys(world, 1)[0].convicted == 1
    assert stake(world, 2).offences == ()


def test_a_key_is_replaced_step_by_step(world: World) -> None:
    owner, old = owner_key(1), node_key(1)
    proof = sign_registration(NEWCOMER, world.chain_id, owner.public, world.height + 5)
    world.do(owner, Register(NEWCOMER.public, world.height + 5, proof))
    assert {key.node: key.nominated for key in keys(world, 1)} == {
        old.address: True,
        NEWCOMER.address: False,
    }
    world.do(owner, Nominate(NEWCOMER.public))
    world.do(owner, Revoke(old.public))
    first, last = keys(world, 1)
    assert (first.node, first.nominated, first.epochs) == (NEWCOMER.address, True, ())
    assert (last.node, last.revoked, last.epochs) == (old.address, world.height, (0, 1))
    world.wait(EPOCH)
    assert keys(world, 1)[0].epochs == (2,)
    assert keys(world, 0)[0].node == node_key(0).address


def test_sets_of_past_present_and_next_epoch(world: World) -> None:
    world.do(owner_key(5), Bond("vote", 900))
    world.do(owner_key(5), Nominate(node_key(5).public))
    world.wait(EPOCH - world.height)
    assert len(validators(world, 0).validators) == len(validators(world, 1).validators) == 4
    chosen = validators(world, 2)
    assert (chosen.first, chosen.last) == (2 * EPOCH + 1, 3 * EPOCH)
    assert (chosen.total, chosen.quorum) == (str(4006 + 900), str(4906 * 2 // 3 + 1))
    assert node_key(5).address in {row.node for row in chosen.validators}
    assert stakes.validator_set(world.state, world.genesis, 3, world.height) is None


def test_a_record_of_another_owner_is_not_ones_own(world: World) -> None:
    """The bytes of a key may stand in a record without being its owner."""
    raws = {key: raw for key, raw in world.store.items() if key[:1] == stakes.NODES}
    owner = owner_key(3).public
    own = [address(key[1:]) for key, raw in raws.items() if stakes.owned_by(owner, raw)]
    assert own == [node_key(3).address]
    assert not stakes.owned_by(owner[:31] + b"\x00", next(iter(raws.values())))


async def test_the_answers_of_a_node_with_a_store(tmp_path: Path) -> None:
    """Records are found by the beginning of their key, those of others are left out."""
    with ChainStore(tmp_path / "chain", chainkit.GENESIS) as store:
        found = dict(store.state_items(stakes.NODES))
        assert found == {key: raw for key, raw in store.state_items() if key[:1] == b"n"}
        assert len(found) == 4
        chain = SimpleNamespace(
            state=lambda: State(store.get), height=0, committee=SimpleNamespace(epoch=0)
        )
        api = Api(
            key=chainkit.KEYS[0],
            genesis=chainkit.GENESIS,
            host=None,  # type: ignore[arg-type]
            chain=chain,  # type: ignore[arg-type]
            store=store,
            machine=None,  # type: ignore[arg-type]
            agent=SimpleNamespace(progress={}),  # type: ignore[arg-type]
            peers=SimpleNamespace(now_ms=lambda: 0),  # type: ignore[arg-type]
            reach=None,  # type: ignore[arg-type]
            data_dir=tmp_path,
            stop=trio.Event(),
        )
        owner, (key,) = chainkit.OWNERS[1], await api.chain_keys(chainkit.OWNERS[1].address)
        assert key.nominated
        assert State(store.get).owner_of(public_key(key.node)) == owner.public
        assert [seat.node for seat in (await api.chain_stake(owner.address)).seats] == [
            key.node
        ] * 2
        assert (await api.chain_validators()).epoch == 0
        assert (await api.chain_validators(1)).total == "40"
        for epoch in (-2, 2, 10**9):
            with pytest.raises(NotFound, match="fixed up to epoch 1"):
                await api.chain_validators(epoch)


def test_asks_in_force_are_told_the_cheapest_first(world: World) -> None:
    state = world.state
    first, second, over = (node_key(n).public for n in range(3))
    for node, price, until in ((first, 9, 50), (second, 4, 7), (over, 1, 6)):
        state.put_ask(node, StandingAsk(node, "any", 5, price, 1, 1, until, 0, (), 1))
    found = stakes.asks(state, 7)
    assert [(row.node, row.price, row.until) for row in found] == [
        (address(second), "4", 7),
        (address(first), "9", 50),
    ]
