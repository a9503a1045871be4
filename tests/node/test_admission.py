"""The door of the pool: what strangers cannot make us do, and what may be tried again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.mempool import Mempool, PoolLimits
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Ask,
    Transaction,
    Transfer,
    decode_transaction,
    sign_transaction,
)
from tdmld.node import admission
from tdmld.node.admission import MAX_QUEUED_BYTES, MAX_WAITING_EACH, Admission, has_backing
from tdmld.node.finality import Finality
from tdmld.node.store import ChainStore
from tests.node.chainkit import CHAIN, GENESIS, KEYS, OWNERS, next_block, transfer

NOBODY = KeyPair(bytes([99]) * 32)


class Door:
    """An admission without network; what it would spread is kept."""

    def __init__(self, store: ChainStore) -> None:
        self.store = store
        self.spread: list[bytes] = []
        self.admission = Admission(Finality(store), Mempool(GENESIS), self._spread, lambda: None)

    async def _spread(self, raws: Sequence[bytes]) -> None:
        self.spread += raws

    def waiting(self) -> int:
        return len(self.admission.pool)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with ChainStore(tmp_path / "chain", GENESIS) as store:
        yield Door(store)


def from_nobody(number: int) -> bytes:
    return sign_transaction(NOBODY, CHAIN, Transfer(OWNERS[0].public, number), fee=10)


def ask(node: KeyPair) -> bytes:
    return sign_transaction(node, CHAIN, Ask(bytes(32), "cpu", 1, 1, 1, 1, 100))


@pytest.mark.parametrize(
    ("raw", "backed"),
    [
        (transfer(0, 0), True),
        (transfer(0, 3), True),
        (from_nobody(1), False),
        (sign_transaction(OWNERS[0], CHAIN, Transfer(OWNERS[1].public, 1), fee=9), False),
        (sign_transaction(OWNERS[0], CHAIN, Transfer(OWNERS[1].public, 1), fee=1001), False),
        (ask(KEYS[0]), True),
        (ask(NOBODY), False),
    ],
)
def test_somebody_must_stand_behind_a_transaction(door: Door, raw: bytes, backed: bool) -> None:
    state = State(door.store.get)
    assert has_backing(decode_transaction(raw, CHAIN), state, GENESIS.parameters) is backed


def test_a_nonce_that_was_used_backs_nothing(door: Door) -> None:
    door.store.apply(next_block(door.store, [transfer(0, 0)]), None)
    state = State(door.store.get)
    again = decode_transaction(transfer(0, 0, amount=6), CHAIN)
    assert not has_backing(again, state, GENESIS.parameters)


async def test_no_signature_is_checked_for_strangers_without_money(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    real = admission.verify_transaction

    def verify(transaction: Transaction, chain_id: bytes) -> bool:
        checked.append(transaction.nonce)
        return real(transaction, chain_id)

    monkeypatch.setattr(admission, "verify_transaction", verify)
    junk = [from_nobody(number) for number in range(1, 64)]
    await door.admission.receive(junk, spread=True, source="stranger")
    await door.admission.receive([*junk, transfer(0, 0)], spread=True, source="stranger")
    assert checked == [0]
    assert door.waiting() == 1


async def test_a_good_signature_is_checked_once(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = decode_transaction(transfer(0, 0), CHAIN)
    bad = decode_transaction(bytes(64) + transfer(1, 0)[64:], CHAIN)
    assert await door.admission.verified([good, bad]) == [True, False]
    checked: list[Transaction] = []
    monkeypatch.setattr(
        admission, "verify_transaction", lambda transaction, _: checked.append(transaction)
    )
    assert await door.admission.verified([good, bad]) == [True, False]
    assert checked == [bad]


async def test_one_peer_takes_no_more_than_its_places(door: Door) -> None:
    async with trio.open_nursery() as nursery, door.admission.turns.of("somebody"):
        for number in range(3 * MAX_WAITING_EACH):
            raws = [transfer(0, number)]
            nursery.start_soon(lambda r=raws: door.admission.receive(r, spread=False, source="x"))
            await trio.testing.wait_all_tasks_blocked()
        assert door.admission._waiting["x"] == MAX_WAITING_EACH
        raws = [transfer(1, 0)]
        nursery.start_soon(lambda: door.admission.receive(raws, spread=False, source="y"))
        await trio.testing.wait_all_tasks_blocked()
        assert door.admission._waiting["y"] == 1
    assert door.waiting() == MAX_WAITING_EACH + 1
    assert not door.admission._waiting


async def test_what_one_validator_floods_takes_no_room_from_another(door: Door) -> None:
    flood: list[Sequence[bytes]] = [(), (b"",) * 64, (bytes(8000),) * 64]
    for number in range(200_000):
        door.admission.enqueue(flood[number % 3], 1)
    assert door.admission._queued_bytes[1] <= MAX_QUEUED_BYTES
    assert len(door.admission._queues[1]) <= MAX_QUEUED_BYTES // 64
    door.admission.enqueue([transfer(0, 0)], 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.admission.run_queue)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert door.waiting() == 1
    assert door.admission._queued_bytes.total() == 0


async def test_what_came_too_early_into_a_block_may_be_submitted_again(door: Door) -> None:
    late = transfer(0, 1)
    door.store.apply(next_block(door.store, [late]), None)
    with pytest.raises(InvalidTransaction, match="nonce"):
        await door.admission.submit(late)
    door.store.apply(next_block(door.store, [transfer(0, 0)]), None)
    await door.admission.submit(late)
    assert door.waiting() == 1


async def test_what_paid_for_its_failure_or_succeeded_is_not_tried_again(door: Door) -> None:
    good, poor = transfer(0, 0), transfer(1, 0, amount=10_000)
    door.store.apply(next_block(door.store, [good, poor]), None)
    for raw in (good, poor):
        await door.admission.submit(raw)
    assert door.waiting() == 0


# ---- floods --------------------------------------------------------------------------------------


def forged(number: int) -> bytes:
    """Somebody rich stands behind it, who has never seen it."""
    return number.to_bytes(64, "big") + transfer(0, number % 16, amount=1 + number)[64:]


async def test_who_sends_forgeries_is_soon_not_looked_at(
    door: Door, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    checked: list[int] = []
    real = admission.verify_transaction

    def verify(transaction: Transaction, chain_id: bytes) -> bool:
        checked.append(transaction.nonce)
        return real(transaction, chain_id)

    monkeypatch.setattr(admission, "verify_transaction", verify)
    for round in range(50):
        raws = [forged(64 * round + number) for number in range(0, 1024, 16)]
        await door.admission.receive(raws, spread=True, source="mallory")
    assert len(checked) < 30
    await trio.sleep(10)
    before = len(checked)
    await door.admission.receive([forged(n) for n in range(0, 1024, 16)], spread=True, source="m")
    await door.admission.receive([transfer(1, 0)], spread=True, source="mallory")
    assert len(checked) - before < 30
    assert door.waiting() == 1, "it is heard again"


async def test_refused_transactions_cost_more_than_good_ones(door: Door) -> None:
    good = [transfer(number % 4, number // 4) for number in range(32)]
    await door.admission.receive(good, spread=False, source="good")
    bad = [transfer(number % 4, 9 + number // 4) for number in range(32)]  # gaps
    await door.admission.receive(bad, spread=False, source="bad")
    left = {name: account.work for name, account in door.admission.peers._accounts.items()}
    full = admission.PEERS.work * admission.PEERS.burst
    assert 0 < full - left["good"] < full - left["bad"]


async def test_a_hopeless_transaction_costs_no_signature(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    await door.admission.receive([transfer(0, 0)], spread=False, source="a")
    monkeypatch.setattr(admission, "verify_transaction", lambda *_: pytest.fail("checked"))
    gap, rival = transfer(0, 5), transfer(0, 0, amount=9)
    await door.admission.receive([gap, rival], spread=False, source="a")
    for raw, cause in ((gap, "next one is 1"), (rival, "pay at least 20")):
        with pytest.raises(InvalidTransaction, match=cause):
            await door.admission.submit(raw)


async def test_one_who_replaces_a_final_transaction_is_told_to_use_the_next_nonce(
    door: Door,
) -> None:
    first = transfer(0, 0)
    await door.admission.submit(first)
    door.admission._finality.limbo.add(sha256(first))
    higher = sign_transaction(OWNERS[0], CHAIN, Transfer(OWNERS[1].public, 1), fee=100)
    with pytest.raises(InvalidTransaction, match="use the next one"):
        await door.admission.submit(higher)


@pytest.mark.parametrize("junk", ["forged", "gaps", "nobody", "noise"])
async def test_a_flood_of_many_peers_keeps_nobody_out(
    door: Door, junk: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Twenty peers offer more than fits, all the time; an honest peer and a client of ours get
    everything in."""
    make = {
        "forged": forged,
        "gaps": lambda n: transfer(0, 1 + n % 15, amount=1 + n),
        "nobody": from_nobody,
        "noise": lambda n: n.to_bytes(200, "big"),
    }[junk]
    batch = [make(1 + number) for number in range(64)]

    async def flood(source: str) -> None:
        while True:
            await door.admission.receive(batch, spread=False, source=source)
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(flood, f"mallory {number % 20}")
        await trio.sleep(0.05)
        for nonce in range(8):
            raws = [transfer(1, nonce)]
            await door.admission.receive(raws, spread=True, source="alice")
            await door.admission.submit(transfer(2, nonce))
            await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert door.waiting() == 16


async def test_who_pays_for_its_flood_is_outbid(door: Door) -> None:
    """A full pool: the flood pays the floor, an honest peer a little more."""
    door.admission.pool = Mempool(GENESIS, PoolLimits(count=16))
    flood = [transfer(sender, nonce) for nonce in range(8) for sender in (0, 1)]
    await door.admission.receive(flood, spread=False, source="mallory")
    assert door.waiting() == 16
    honest = sign_transaction(OWNERS[2], CHAIN, Transfer(OWNERS[1].public, 1), fee=11)
    await door.admission.receive([honest], spread=False, source="alice")
    assert door.admission.select(())[0].raw == honest
    with pytest.raises(InvalidTransaction, match="a fee of 11 or more may find a place"):
        await door.admission.submit(transfer(3, 0))


async def test_what_a_peer_costs_is_told(door: Door) -> None:
    told = dict[str, float]()
    door.admission.spent = told.__setitem__
    await door.admission.receive([from_nobody(1), b"garbage"], spread=False, source="peer")
    assert told["peer"] > 0
    await door.admission.receive([from_nobody(2)], spread=False)
    assert list(told) == ["peer"]
