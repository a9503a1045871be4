"""Who pays more goes first, may take another's place, and pays for what the network did in vain."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.mempool import Mempool, PoolLimits
from tdmld.chain.poolorder import Line, Package, Room, Waiting, beats, fee_to_beat
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import Payload, Return, Transaction, Transfer, decode_transaction
from tests.chain.test_jobs import active, worker
from tests.chain.test_mempool import admit, pay, tx
from tests.chain.world import BALANCE, FEE, World, make_genesis, node_key, owner_key

ALICE, BOB, CAROL = (owner_key(index) for index in range(3))
FLOOR = FEE


def of(world: World, index: int, nonce: int = 0, fee: int = FEE, amount: int = 1) -> Transaction:
    return tx(world, Transfer(owner_key(6).public, amount), index, nonce=nonce, fee=fee)


def selected(pool: Mempool, count: int = 99) -> tuple[Transaction, ...]:
    return pool.select(10**6, count)


# ---- order ---------------------------------------------------------------------------------------


def test_who_pays_more_is_proposed_first_and_equals_in_order_of_arrival() -> None:
    world = World()
    pool = Mempool(world.genesis)
    cheap, dear, same = of(world, 0), of(world, 1, fee=30), of(world, 2)
    admit(pool, world, cheap, same, dear)
    assert selected(pool) == (dear, cheap, same)
    assert selected(pool, 1) == (dear,)


def test_what_pays_well_lifts_those_of_its_sender_that_it_needs() -> None:
    world = World()
    pool = Mempool(world.genesis)
    other = of(world, 1, fee=20)
    first, second, third = of(world, 0), of(world, 0, 1, fee=50), of(world, 0, 2)
    admit(pool, world, other, first, second, third)
    assert selected(pool) == (first, second, other, third)


def test_a_large_transaction_pays_for_its_share_of_a_block() -> None:
    world = World()
    pool = Mempool(world.genesis)
    offer, transfer = tx(world, world.offer(), 0, fee=FEE + 1), of(world, 1)
    assert len(offer.raw) > len(transfer.raw)
    admit(pool, world, offer, transfer)
    assert selected(pool) == (transfer, offer)


def weigh(line: Line, bids: list[tuple[int, int]]) -> None:
    for number, (fee, weight) in enumerate(bids):
        line.append(Waiting(None, line, fee, weight, 0, True, number, 0))  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 5)), min_size=1, max_size=16))
def test_packages_are_the_best_averages_of_what_is_next(bids: list[tuple[int, int]]) -> None:
    line = Line(b"", Room(99, 99))
    weigh(line, bids)
    place = 0
    for package in line.packages:
        averages = [
            Fraction(sum(fee for fee, _ in part), sum(weight for _, weight in part))
            for end in range(place + 1, len(bids) + 1)
            if (part := bids[place:end])
        ]
        assert package.rate == (max(averages).numerator << 32) // max(averages).denominator
        place += package.members
    ranks = [waiting.rank for waiting in line.waiting]
    assert ranks == sorted(ranks), "nothing overtakes in its line"
    rates = [package.rate for package in line.packages]
    assert rates == sorted(rates, reverse=True)


@given(st.integers(0, 1 << 60), st.integers(1, 8192))
def test_the_fee_that_is_asked_for_is_the_least_that_beats(rate: int, weight: int) -> None:
    fee = fee_to_beat(rate, weight)
    assert beats(Package.of(fee, weight, 1).rate, rate)
    assert fee == 0 or not beats(Package.of(fee - 1, weight, 1).rate, rate)


# ---- rooms ---------------------------------------------------------------------------------------


def commits(world: World, job_id: bytes, count: int) -> list[Transaction]:
    job, mine = world.job(job_id), worker(world, job_id, 0)
    raws = [
        world.sign(world.keys[mine], world.true_commit(job, 0, number, mine))
        for number in range(count)
    ]
    return [decode_transaction(raw, world.chain_id) for raw in raws]


def test_owners_and_nodes_do_not_take_each_others_room() -> None:
    world, job = active(audit_rate=0, rounds=8)
    pool = Mempool(world.genesis, PoolLimits(count=2, node_count=3))
    flood = [of(world, index, fee=10**6) for index in range(3, 5)]
    admit(pool, world, *flood)
    answers = commits(world, job, 4)
    admit(pool, world, *answers[:3])
    with pytest.raises(InvalidTransaction, match="pool is full"):
        admit(pool, world, answers[3])
    with pytest.raises(InvalidTransaction, match="pool is full"):
        admit(pool, world, of(world, 5, fee=10**6))


def test_half_of_a_block_is_for_nodes_first_and_what_is_left_for_anybody() -> None:
    world, job = active(audit_rate=0, rounds=8)
    pool = Mempool(world.genesis)
    owners = [of(world, 3, nonce, fee=10**5) for nonce in range(4)]
    nodes = commits(world, job, 4)
    admit(pool, world, *owners, *nodes)
    assert selected(pool, 4) == (*nodes[:2], *owners[:2])
    assert selected(pool, 6) == (*nodes[:3], *owners[:3])
    pool.remove([owner.id for owner in owners])
    assert selected(pool, 4) == tuple(nodes)
    admit(pool, world, owners[0])
    assert selected(pool, 4) == (*nodes[:2], owners[0], nodes[2])


def test_what_is_free_gives_its_place_to_what_a_job_pays_for() -> None:
    world = World(make_genesis(nodes=9))
    world.all_ask()
    job = world.submit(audit_rate=0)
    world.play_until(job, JobStatus.ACTIVE)
    pool = Mempool(world.genesis, PoolLimits(node_count=2))
    asks = [world.ask(index) for index in (7, 8)]
    free = [decode_transaction(raw, world.chain_id) for raw in asks]
    admit(pool, world, *free)
    (answer,) = commits(world, job, 1)
    admit(pool, world, answer)
    assert selected(pool) == (answer, free[0])


def test_free_transactions_of_a_node_wait_one_of_a_kind() -> None:
    world = World()
    pool = Mempool(world.genesis)
    admit(pool, world, decode_transaction(world.ask(1), world.chain_id))
    back = decode_transaction(world.sign(node_key(1), Return(7)), world.chain_id)
    with pytest.raises(InvalidTransaction, match="jailed"):
        admit(pool, world, back)


# ---- a full pool ---------------------------------------------------------------------------------


def test_a_full_pool_lets_the_worst_go_for_what_pays_a_tenth_more() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(count=3))
    waiting = [of(world, 0, fee=100), of(world, 1, fee=100), of(world, 2, fee=120)]
    admit(pool, world, *waiting)
    with pytest.raises(InvalidTransaction, match="a fee of 110 or more may find a place; or try"):
        admit(pool, world, of(world, 3, fee=109))
    better = of(world, 3, fee=110)
    admit(pool, world, better)
    assert selected(pool) == (waiting[2], better, waiting[0]), "of equals the youngest goes"


def test_a_sender_loses_its_last_ones_and_never_those_that_they_need() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(count=4))
    mine = [of(world, 0, nonce, fee=20) for nonce in range(3)]
    admit(pool, world, *mine, of(world, 1, fee=1000))
    rich = [of(world, 2, 0, fee=50), of(world, 3, 0, fee=60)]
    admit(pool, world, *rich)
    assert [t.signer for t in selected(pool)].count(ALICE.public) == 1
    assert mine[0].id in pool
    assert mine[1].id not in pool


def test_nobody_pushes_out_what_it_stands_behind() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(count=2))
    admit(pool, world, of(world, 0), of(world, 0, 1))
    with pytest.raises(InvalidTransaction, match="pool is full"):
        admit(pool, world, of(world, 0, 2, fee=10**6))


def test_a_dear_one_behind_a_cheap_one_counts_as_their_average() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(count=3))
    admit(pool, world, of(world, 0), of(world, 1, fee=100), of(world, 2, fee=100))
    with pytest.raises(InvalidTransaction, match="pool is full"):
        admit(pool, world, of(world, 0, 1, fee=190))
    admit(pool, world, of(world, 0, 1, fee=220))
    assert len(pool) == 3


def test_a_large_one_that_beats_some_but_not_enough_lets_nobody_go() -> None:
    world = World()
    small = [of(world, index, fee=fee) for index, fee in ((1, 10), (2, 100_000))]
    pool = Mempool(world.genesis, PoolLimits(size_bytes=sum(len(t.raw) for t in small)))
    admit(pool, world, *small)
    offer = tx(world, world.offer(), 0, fee=1000)
    with pytest.raises(InvalidTransaction, match="pool is full"):
        admit(pool, world, offer)
    assert selected(pool) == (small[1], small[0])


# ---- replacement ---------------------------------------------------------------------------------


def test_a_tenth_and_a_floor_more_takes_the_place_of_the_same_nonce() -> None:
    world = World()
    pool = Mempool(world.genesis)
    first, behind = of(world, 0, fee=200), of(world, 0, 1)
    admit(pool, world, first, behind)
    for fee in (200, 219):
        with pytest.raises(InvalidTransaction, match="pay at least 220"):
            admit(pool, world, of(world, 0, fee=fee, amount=2))
    second = of(world, 0, fee=220, amount=2)
    assert pool.rival(second) == first
    admit(pool, world, second)
    assert selected(pool) == (second, behind)
    assert first.id not in pool
    assert pool.rival(second) is None
    receipts = world.block(*(t.raw for t in selected(pool))).receipts
    assert all(receipt.ok for receipt in receipts)


def test_cheap_ones_are_not_told_to_everybody_again_and_again_for_a_unit_more() -> None:
    world = World()
    pool = Mempool(world.genesis)
    admit(pool, world, of(world, 0, fee=FLOOR))
    told = 0
    for fee in range(FLOOR + 1, 100):
        try:
            admit(pool, world, of(world, 0, fee=fee, amount=fee))
        except InvalidTransaction:
            continue
        told += 1
    (last,) = selected(pool)
    assert told * FLOOR <= last.fee, "each of them is paid for by the last"


def test_what_fails_behind_a_replacement_goes_and_is_paid_for() -> None:
    world = World()
    pool = Mempool(world.genesis)
    line = [of(world, 0, nonce, fee=100, amount=1000) for nonce in range(4)]
    admit(pool, world, *line)
    drain = BALANCE - 2 * 1100 - 110 - 500
    with pytest.raises(InvalidTransaction, match="takes a fee of 210") as refused:
        admit(pool, world, of(world, 0, 1, fee=110, amount=drain))
    assert "lets 1 behind that fail" in str(refused.value)
    assert selected(pool) == tuple(line)
    admit(pool, world, of(world, 0, 1, fee=210, amount=drain))
    assert [t.nonce for t in selected(pool)] == [0, 1, 2]
    assert [t.fee for t in selected(pool)] == [100, 210, 100]


def test_a_replacement_that_would_fail_changes_nothing() -> None:
    world = World()
    pool = Mempool(world.genesis)
    line = [of(world, 0, nonce) for nonce in range(3)]
    admit(pool, world, *line)
    with pytest.raises(InvalidTransaction, match="balance"):
        admit(pool, world, of(world, 0, 1, fee=100, amount=BALANCE))
    with pytest.raises(InvalidTransaction, match="greater than 0"):
        admit(pool, world, of(world, 0, 1, fee=100, amount=0))
    assert selected(pool) == tuple(line)


# ---- at any time ---------------------------------------------------------------------------------


moves = st.lists(
    st.tuples(
        st.integers(0, 4),  # who
        st.integers(0, 5),  # nonce, from its account's on
        st.sampled_from([10, 11, 20, 22, 50, 100, 1000]),  # fee
        st.sampled_from([1, BALANCE // 3, BALANCE // 2]),  # amount
        st.sampled_from(["", "", "", "", "block", "empty block", "elsewhere"]),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(moves)
def test_whatever_comes_the_pool_is_bounded_and_what_it_proposes_succeeds(
    steps: list[tuple[int, int, int, int, str]],
) -> None:
    world = World()
    limits = PoolLimits(count=7, per_owner=4)
    pool = Mempool(world.genesis, limits)
    for who, ahead, fee, amount, then in steps:
        nonce = world.state.account(owner_key(who).public).nonce + ahead
        payload: Payload = Transfer(owner_key(6).public, amount)
        transaction = tx(world, payload, who, nonce=nonce, fee=fee)
        try:
            pool.glance(transaction, world.state)
        except InvalidTransaction:
            with pytest.raises(InvalidTransaction):
                admit(pool, world, transaction)
        else:
            try:
                admit(pool, world, transaction)
            except InvalidTransaction:
                assert transaction.id not in pool
        assert len(pool) <= limits.count
        proposed = selected(pool)
        assert len(proposed) == len(pool)
        if then:
            body = {"block": proposed, "empty block": (), "elsewhere": (transaction,)}[then]
            receipts = world.block(*(t.raw for t in body)).receipts
            assert then == "elsewhere" or all(receipt.ok for receipt in receipts)
            pool.remove([t.id for t in body])
            pool.refresh(world.state, world.height, {t.signer for t in body})
    receipts = world.block(*(t.raw for t in selected(pool))).receipts
    assert all(receipt.ok for receipt in receipts)


def test_a_payment_is_not_lost_to_one_who_fills_every_place() -> None:
    world = World()
    pool = Mempool(world.genesis, PoolLimits(count=16))
    flood = [of(world, index, nonce) for nonce in range(4) for index in range(2, 6)]
    admit(pool, world, *flood)
    mine = pay(world, 0, fee=FEE + 1)
    admit(pool, world, mine)
    assert selected(pool, 1) == (mine,)
    assert len(pool) == 16
