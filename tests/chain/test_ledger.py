"""The state transition: fees, nonces, money, nodes; the same everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from tdmld.chain.codec import encode
from tdmld.chain.errors import DecodeError, InvalidTransaction, InvariantViolation
from tdmld.chain.ledger import (
    BlockContext,
    apply_block,
    check_transaction,
    genesis_changes,
    recount,
)
from tdmld.chain.records import JobStatus
from tdmld.chain.state import SUPPLY_KEY, State
from tdmld.chain.transactions import (
    Ask,
    Bond,
    Register,
    Transfer,
    decode_transaction,
    sign_registration,
)
from tests.chain.world import (
    BALANCE,
    FEE,
    STAKE,
    World,
    make_genesis,
    mark,
    node_key,
    owner_key,
)

ALICE, BOB = owner_key(0), owner_key(1)


def test_genesis_puts_all_money_and_nodes_in_place() -> None:
    world = World(make_genesis(nodes=5, validators=3))
    account = world.state.account(ALICE.public)
    assert (account.balance, account.vote_stake, account.work_stake) == (BALANCE, 1000, STAKE)
    assert world.state.account(owner_key(4).public).vote_stake == 0
    assert all(world.state.owner_of(node_key(i).public) == owner_key(i).public for i in range(5))
    supply = recount(world.store.items())
    assert supply.genesis == 5 * BALANCE + 5 * STAKE + 1000 + 1001 + 1002
    assert supply.burned == 0


def test_a_transfer_moves_money_and_burns_the_fee() -> None:
    world = World()
    world.do(ALICE, Transfer(BOB.public, 700))
    assert world.balance(0) == BALANCE - 700 - FEE
    assert world.balance(1) == BALANCE + 700
    assert world.state.supply.burned == FEE


def test_a_transfer_to_oneself_costs_only_the_fee() -> None:
    world = World()
    world.do(ALICE, Transfer(ALICE.public, 700))
    assert world.balance(0) == BALANCE - FEE


def test_a_failing_transaction_pays_its_fee_and_uses_its_nonce() -> None:
    world = World()
    reason = world.refused(ALICE, Transfer(BOB.public, BALANCE))
    assert f"{FEE} short" in reason
    account = world.state.account(ALICE.public)
    assert (account.balance, account.nonce) == (BALANCE - FEE, 1)
    assert world.balance(1) == BALANCE


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        ({"nonce": 1}, "next one is 0"),
        ({"fee": 9}, "at least 10"),
        ({"fee": BALANCE + 1}, "does not cover the fee"),
        ({"expiry": 1}, "expired at height 1"),
    ],
)
def test_what_cannot_be_charged_does_nothing_at_all(header: dict[str, int], rule: str) -> None:
    world = World()
    world.block()
    before = world.store.copy()
    assert rule in world.refused(ALICE, Transfer(BOB.public, 1), **header)
    assert world.store == before


def test_a_transaction_works_up_to_its_expiry_height_and_only_once() -> None:
    world = World()
    raw = world.sign(ALICE, Transfer(BOB.public, 1), expiry=1)
    first, again = world.block(raw, raw).receipts
    assert first.ok
    assert "next one is 1" in again.reason
    assert world.balance(1) == BALANCE + 1


def test_transactions_of_one_block_see_each_other_in_order() -> None:
    world = World()
    newcomer = owner_key(99)
    result = world.block(
        world.sign(newcomer, Transfer(BOB.public, 1)),
        world.sign(ALICE, Transfer(newcomer.public, 1000)),
        world.sign(newcomer, Transfer(BOB.public, 900)),
    )
    assert [receipt.ok for receipt in result.receipts] == [False, True, True]
    assert world.state.account(newcomer.public).balance == 1000 - 900 - FEE


@pytest.mark.parametrize("amount", [0, BALANCE + 1])
def test_a_transfer_of_nothing_or_of_too_much_fails(amount: int) -> None:
    assert World().refused(ALICE, Transfer(BOB.public, amount))


def test_bond_moves_money_into_the_named_bucket() -> None:
    world = World()
    world.do(ALICE, Bond("vote", 300))
    world.do(ALICE, Bond("work", 200))
    account = world.state.account(ALICE.public)
    assert (account.vote_stake, account.work_stake) == (1300, STAKE + 200)
    assert account.balance == BALANCE - 500 - 2 * FEE
    assert "must be vote or work" in world.refused(ALICE, Bond("rest", 1))
    assert "short" in world.refused(ALICE, Bond("work", BALANCE))
    assert "greater than 0" in world.refused(ALICE, Bond("work", 0))


def registration(world: World, *, owner: int = 0, node: int = 9, signer: int = 9) -> Register:
    height = world.height + 5
    proof = sign_registration(node_key(signer), world.chain_id, owner_key(owner).public, height)
    return Register(node_key(node).public, height, proof)


def test_a_registered_node_works_from_its_height_on() -> None:
    world = World()
    wanted = registration(world)
    world.do(ALICE, wanted)
    assert world.state.owner_of(wanted.node) == ALICE.public
    (early,) = world.block(world.ask(9)).receipts
    assert "from height 5" in early.reason
    world.wait(3)
    (later,) = world.block(world.ask(9)).receipts
    assert later.ok


def test_a_node_key_is_bound_once_by_itself_and_for_good() -> None:
    world = World()
    assert "not the node key's" in world.refused(ALICE, registration(world, signer=8))
    assert "not the node key's" in world.refused(BOB, registration(world))
    world.do(ALICE, registration(world))
    assert "bound already" in world.refused(ALICE, registration(world))
    proof = sign_registration(ALICE, world.chain_id, ALICE.public, world.height + 5)
    own = Register(ALICE.public, world.height + 5, proof)
    assert "another key than the owner's" in world.refused(ALICE, own)
    taken = registration(world, owner=1)
    assert "bound already" in world.refused(BOB, taken)
    past = replace(
        registration(world, node=10),
        from_height=1,
        proof=sign_registration(node_key(10), world.chain_id, ALICE.public, 1),
    )
    assert "must lie between" in world.refused(ALICE, past)


def test_a_nodes_transaction_has_neither_fee_nor_nonce() -> None:
    world = World()
    (receipt,) = world.block(world.ask(1)).receipts
    assert receipt.ok
    ask = Ask(mark(1), "cpu", 1, 1, 1, 1, 500)
    assert "nonce 0 and fee 0" in world.refused(node_key(2), ask, fee=10)
    assert "nonce 0 and fee 0" in world.refused(node_key(2), ask, nonce=1)
    assert "expired" in world.refused(node_key(2), ask, expiry=1)


def test_trying_a_transaction_changes_nothing() -> None:
    world = World()
    state = world.state
    raw = world.sign(ALICE, Transfer(BOB.public, 5))
    tried = check_transaction(state, world.genesis, 1, decode_transaction(raw, world.chain_id))
    assert tried.account(BOB.public).balance == BALANCE + 5
    assert state.account(BOB.public).balance == BALANCE
    assert state.changes == {}
    bad = decode_transaction(world.sign(ALICE, Transfer(BOB.public, BALANCE)), world.chain_id)
    with pytest.raises(InvalidTransaction, match="short"):
        check_transaction(state, world.genesis, 1, bad)


def test_an_empty_block_changes_nothing() -> None:
    assert World().block().changes == {}


def test_money_from_nowhere_stops_the_node() -> None:
    world = World()
    supply = world.state.supply
    world.store[SUPPLY_KEY] = encode(replace(supply, balances=supply.balances + 1))
    with pytest.raises(InvariantViolation, match="not conserved"):
        world.block()
    with pytest.raises(InvariantViolation, match="counted"):
        recount(world.store.items())


def test_a_corrupt_record_is_an_error_and_not_a_default() -> None:
    world = World()
    world.store[b"a" + ALICE.public] = b"\xff"
    with pytest.raises(DecodeError):
        world.block(world.sign(BOB, Transfer(ALICE.public, 1)))


def test_a_fork_is_merged_only_into_what_it_came_from() -> None:
    state = World().state
    with pytest.raises(ValueError, match="not a fork"):
        World().state.merge(state.fork())


def test_due_entries_beyond_the_bound_slide_to_the_next_block() -> None:
    world = World(make_genesis(due_per_block=2))
    jobs = [world.sign(ALICE, world.offer(rounds=4 + n), nonce=n) for n in range(5)]
    ids = [receipt.id for receipt in world.block(*jobs).receipts]
    world.wait(world.parameters.match_delay)
    ended = [sum(world.job(job).final for job in ids)]
    for _ in range(2):
        world.block()
        ended.append(sum(world.job(job).final for job in ids))
    assert ended == [2, 4, 5]


def test_due_entries_come_before_the_transactions_of_a_block() -> None:
    """An ask in the very block of the matching is too late: its leader knows the beacon."""
    world = World()
    world.block(*(world.ask(index) for index in range(1, 3)))
    job = world.submit()
    world.wait(world.parameters.match_delay - 1)
    world.block(*(world.ask(index) for index in range(3, 6)))
    assert world.job(job).status is JobStatus.EXPIRED


_SCRIPT = """
from tdmld.chain.codec import encode
from tdmld.chain.crypto import sha256
from tests.chain.world import Vice, World
world = World()
world.all_ask()
job = world.submit(audit_rate=1_000_000)
world.play_until(job)
bad = world.submit(class_id="cpu", rounds=6)
world.vices = {node: frozenset({Vice.LIES}) for node in world.keys}
world.play_until(bad)
text = sha256(*(key + value for key, value in sorted(world.store.items())))
print(text.hex(), sha256(encode(world.events)).hex(), world.height)
"""


def test_two_processes_with_different_hash_seeds_reach_the_same_bytes() -> None:
    root = Path(__file__).parents[2]
    answers = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(answers) == 1
    assert len(answers.pop().split()) == 3


def test_replaying_from_genesis_with_a_cold_cache_gives_the_same_changes() -> None:
    world = World()
    raw = world.sign(ALICE, Transfer(BOB.public, 5))
    context = BlockContext(1, 1, 0, 0, bytes(32), mark("beacon"))
    transaction = decode_transaction(raw, world.chain_id)
    warm = State(world.store.get)
    warm.account(ALICE.public)
    results = [
        apply_block(get, world.genesis, context, [transaction])
        for get in (world.store.get, genesis_changes(world.genesis).get)
    ]
    assert results[0] == results[1]
    assert list(results[0].changes) == sorted(results[0].changes)
