"""The pool is bounded, admits what would succeed, and proposes in an order that works."""

import pytest

from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.mempool import Mempool, PoolLimits, debit
from tdmld.chain.parking import PARKED_BLOCKS
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import (
    Accept,
    Bond,
    Payload,
    Transaction,
    Transfer,
    decode_transaction,
)
from tests.chain.test_jobs import active, worker
from tests.chain.world import BALANCE, FEE, World, mark, node_key, owner_key

ALICE, BOB = owner_key(0), owner_key(1)


def tx(world: World, payload: Payload, index: int = 0, **header: int) -> Transaction:
    return decode_transaction(world.sign(owner_key(index), payload, **header), world.chain_id)


def pay(world: World, nonce: int, amount: int = 1, **header: int) -> Transaction:
    return tx(world, Transfer(BOB.public, amount), nonce=nonce, **header)


def admit(pool: Mempool, world: World, *transactions: Transaction) -> None:
    for transaction in transactions:
        pool.admit(transaction, world.state, world.height)


def test_contiguous_nonces_are_admitted_and_proposed_in_order() -> None:
    world = World()
    pool = Mempool(world.genesis)
    chain = [pay(world, nonce) for nonce in range(4)]
    admit(pool, world, *chain)
    assert pool.select(10**6, 100) == tuple(chain)
    assert len(pool) == 4
    assert chain[2].id in pool
    assert pool.get(chain[2].id) == chain[2]


def test_a_gap_or_a_used_nonce_is_refused() -> None:
    world = World()
    pool = Mempool(world.genesis)
    with pytest.raises(InvalidTransaction, match="next one is 0"):
        admit(pool, world, pay(world, 1))
    admit(pool, world, pay(world, 0))
    with pytest.raises(InvalidTransaction, match="next one is 1"):
        admit(pool, world, pay(world, 2))
    world.block(pay(world, 0).raw)
    with pytest.raises(InvalidTransaction, match="next one is 1"):
        admit(Mempool(world.genesis), world, pay(world, 0, amount=2))


def test_the_same_transaction_twice_is_one() -> None:
    world = World()
    pool = Mempool(world.genesis)
    one = pay(world, 0)
    admit(pool, world, one, one)
    assert len(pool) == 1


def test_a_rule_that_would_fail_in_a_block_is_said_at_once() -> None:
    world = World()
    pool = Mempool(world.genesis)
    with pytest.raises(InvalidTransaction, match="at least 10"):
        admit(pool, world, pay(world, 0, fee=1))
    with pytest.raises(InvalidTransaction, match="must be vote or work"):
        admit(pool, world, tx(world, Bond("x", 1)))
    world.wait(3)
    with pytest.raises(InvalidTransaction, match="expired"):
        admit(pool, world, pay(world, 0, expiry=3))
    assert len(pool) == 0


def test_all_that_waits_together_never_exceeds_the_balance() -> None:
    world = World()
    pool = Mempool(world.genesis)
    admit(pool, world, pay(world, 0, amount=BALANCE - 3 * FEE))
    with pytest.raises(InvalidTransaction, match="1 more than the balance"):
        admit(pool, world, pay(world, 1, amount=FEE + 1))
    admit(pool, world, pay(world, 1, amount=FEE))
    offer = tx(world, world.offer(), 1)
    assert debit(offer, world.parameters) > FEE + offer.payload.audit_budget  # type: ignore[union-attr]


def test_each_sender_and_the_pool_are_bounded() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(per_owner=2, count=3))
    admit(pool, world, pay(world, 0), pay(world, 1))
    with pytest.raises(InvalidTransaction, match="2 transactions of this sender"):
        admit(pool, world, pay(world, 2))
    admit(pool, world, tx(world, Transfer(ALICE.public, 1), 1))
    with pytest.raises(InvalidTransaction, match="pool is full"):
        admit(pool, world, tx(world, Transfer(ALICE.public, 1), 2))
    small = Mempool(world.genesis, PoolLimits(size_bytes=len(pay(world, 0).raw)))
    admit(small, world, pay(world, 0))
    with pytest.raises(InvalidTransaction, match="pool is full"):
        admit(small, world, tx(world, Transfer(ALICE.public, 1), 2))


def test_a_selection_respects_count_bytes_exclusions_and_order() -> None:
    world = World()
    pool = Mempool(world.genesis)
    first, second = pay(world, 0), pay(world, 1)
    other = tx(world, Transfer(ALICE.public, 1), 1)
    admit(pool, world, first, second, other)
    assert pool.select(10**6, 1) == (first,)
    assert pool.select(len(first.raw) * 2, 9)[:1] == (first,)
    assert pool.select(10**6, 9, exclude={first.id}) == (second, other)
    assert pool.select(0, 9) == ()


def test_nothing_of_a_sender_overtakes_what_did_not_fit() -> None:
    world = World()
    pool = Mempool(world.genesis)
    large = tx(world, world.offer())
    after = pay(world, 1)
    other = tx(world, Transfer(ALICE.public, 1), 1)
    admit(pool, world, large, after, other)
    assert pool.select(len(large.raw) - 1, 9) == (other,)


def test_after_a_block_the_rest_is_still_good_and_stale_ones_go() -> None:
    world = World()
    pool = Mempool(world.genesis)
    chain = [pay(world, nonce) for nonce in range(3)]
    admit(pool, world, *chain)
    world.block(chain[0].raw)
    pool.remove([chain[0].id])
    pool.refresh(world.state, world.height)
    assert pool.select(10**6, 9) == tuple(chain[1:])
    world.block(pay(world, 1, amount=BALANCE - 100).raw)  # another one, at another node
    pool.refresh(world.state, world.height)
    assert pool.select(10**6, 9) == (chain[2],)
    world.block(pay(world, 2, amount=79 - FEE).raw)  # nothing is left for it to pay with
    pool.refresh(world.state, world.height)
    assert len(pool) == 0


def test_what_expired_or_waits_too_long_is_forgotten() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(age_blocks=5))
    admit(pool, world, pay(world, 0, expiry=2), tx(world, Transfer(ALICE.public, 1), 1))
    pool.expire(1)
    assert len(pool) == 2
    pool.expire(2)
    assert len(pool) == 1
    pool.expire(6)
    assert len(pool) == 0


def test_one_ask_of_a_node_waits_at_a_time() -> None:
    world = World()
    pool = Mempool(world.genesis)
    first = decode_transaction(world.ask(1), world.chain_id)
    later = decode_transaction(world.ask(1, until_height=901), world.chain_id)
    admit(pool, world, first)
    with pytest.raises(InvalidTransaction, match="1 transactions of this sender"):
        admit(pool, world, later)


def test_a_nodes_transactions_of_a_job_are_admitted_in_sequence_and_once() -> None:
    world, job_id = active(audit_rate=0, rounds=8)
    pool = Mempool(world.genesis)
    job, mine = world.job(job_id), worker(world, job_id, 0)
    commits = [
        decode_transaction(
            world.sign(world.keys[mine], world.true_commit(job, 0, number, mine)), world.chain_id
        )
        for number in range(5)
    ]
    admit(pool, world, *commits[:4])
    with pytest.raises(InvalidTransaction, match="wait for a settlement"):
        admit(pool, world, commits[4])
    again = world.sign(world.keys[mine], world.true_commit(job, 0, 0, mine), expiry=999)
    with pytest.raises(InvalidTransaction, match="not the next one"):
        admit(pool, world, decode_transaction(again, world.chain_id))
    receipts = world.block(*(t.raw for t in pool.select(10**6, 99))).receipts
    assert [receipt.ok for receipt in receipts] == [True] * 4


def early_answer(world: World) -> Transaction:
    """An Accept as a node sends it that has executed one block more than this pool's node."""
    job = world.submit()
    world.wait(world.parameters.match_delay)
    matched = world.state.slot(job, 0)
    assert matched is not None
    payload = Accept(job, 0, 0, mark("session"))
    raw = world.sign(world.keys[matched.worker.node], payload)
    return decode_transaction(raw, world.chain_id)


def test_a_nodes_transaction_that_is_early_is_parked_and_admitted_later() -> None:
    world, behind = World(), World()
    for each in (world, behind):
        each.all_ask()
    answer = early_answer(world)
    pool = Mempool(world.genesis)
    with pytest.raises(InvalidTransaction, match="no job"):
        pool.admit(answer, behind.state, behind.height)
    assert len(pool) == 0
    assert pool.refresh(world.state, world.height) == (answer,)
    assert pool.select(10**6, 9) == (answer,)
    world.block(answer.raw)
    pool.remove([answer.id])
    assert pool.refresh(world.state, world.height) == ()
    assert world.state.active_jobs()
    assert world.job(world.state.active_jobs()[0]).status is JobStatus.MATCHED


def test_parking_is_bounded_in_number_time_and_to_registered_nodes() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(parked=3, parked_per_node=2))
    answers = [
        decode_transaction(
            world.sign(node_key(index), Accept(mark(n), 0, 0, mark("s"))), world.chain_id
        )
        for index in (1, 2, 15)
        for n in range(3)
    ]
    for answer in answers:
        with pytest.raises(InvalidTransaction):
            pool.admit(answer, world.state, world.height)
    assert len(pool._parking) == 3
    pool.expire(PARKED_BLOCKS + 1)
    assert len(pool._parking) == 0
    with pytest.raises(InvalidTransaction):
        pool.admit(answers[-1], world.state, world.height)
    assert len(pool._parking) == 0


def test_only_the_transfers_of_owners_that_a_block_touched_are_tried_again() -> None:
    world = World()
    pool = Mempool(world.genesis)
    admit(pool, world, pay(world, 0), tx(world, Transfer(ALICE.public, 1), 1))
    world.block(pay(world, 0, amount=2).raw)  # Alice's other one, at another node
    pool.refresh(world.state, world.height, touched={BOB.public})
    assert len(pool) == 2
    pool.refresh(world.state, world.height, touched={ALICE.public, BOB.public})
    assert [waiting.signer for waiting in pool.select(10**6, 9)] == [BOB.public]


def test_what_waits_besides_others_is_known_without_selecting() -> None:
    world = World()
    pool = Mempool(world.genesis)
    first, second = pay(world, 0), pay(world, 1)
    assert not pool.waits_besides()
    admit(pool, world, first, second)
    assert pool.waits_besides({first.id}, {b"another"})
    assert not pool.waits_besides({first.id}, {second.id, b"another"})
