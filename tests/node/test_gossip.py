"""What is passed on: true things, once or twice, that nobody can make for nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from tdmld.chain.blocks import Block, Certificate, Kind
from tdmld.chain.codec import encode
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.mempool import PER_OWNER, Mempool
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Accept,
    Ask,
    Offer,
    Stage,
    Sworn,
    Transfer,
    VoteEvidence,
    decode_transaction,
    sign_transaction,
)
from tdmld.node.admission import Admission
from tdmld.node.chainwire import Announcement, OfferNotice, Transactions
from tdmld.node.finality import Finality
from tdmld.node.gossip import COPIES, GossipDoor
from tdmld.node.specs import Specs
from tdmld.node.store import ChainStore
from tests.node.chainkit import (
    CHAIN,
    GENESIS,
    KEYS,
    OWNERS,
    certificate,
    next_block,
    transfer,
)

SOURCE = "12D3KooW"
NOBODY = KeyPair(bytes([99]) * 32)


class Clock:
    """Time as the door sees it, outside of trio."""

    now = 0.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(trio, "current_time", lambda: clock.now)
    return clock


def paying(sender: int, nonce: int, fee: int, expiry: int = 0) -> bytes:
    payload = Transfer(OWNERS[1].public, fee)
    return sign_transaction(OWNERS[sender], CHAIN, payload, nonce=nonce, fee=fee, expiry=expiry)


class Gate:
    """A door over a store of its own."""

    def __init__(self, store: ChainStore) -> None:
        self.store = store
        self.finality = Finality(store)
        self.pool = Mempool(GENESIS)
        self.specs = Specs(store)
        admission = Admission(self.finality, self.pool, self._nowhere, lambda: None)
        self.door = GossipDoor(self.finality, admission, self.specs)

    async def _nowhere(self, _: Sequence[bytes]) -> None: ...

    def announced(self, block: Block, proof: Certificate, **changes: object) -> bool | None:
        notice = Announcement(block.header, block.signature, proof, block.transactions)
        raw = encode(msgspec.structs.replace(notice, **changes))
        return self.door.announcement(SOURCE, raw)

    def sent(self, *raws: bytes) -> bool | None:
        return self.door.transactions(SOURCE, encode(Transactions(raws)))

    def offered(self, offer: bytes, spec: bytes) -> bool | None:
        return self.door.offer(SOURCE, encode(OfferNotice(offer, spec)))


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with ChainStore(tmp_path / "chain", GENESIS) as store:
        yield Gate(store)


# ---- blocks --------------------------------------------------------------------------------------


def test_a_final_block_is_passed_on_with_and_without_its_body(gate: Gate) -> None:
    block = next_block(gate.store, [transfer(0, 0)])
    assert gate.announced(block, certificate(Kind.FINALIZE, block))
    assert gate.announced(block, certificate(Kind.FINALIZE, block), transactions=None)


def test_an_announcement_with_anything_false_in_it_is_not(gate: Gate) -> None:
    block = next_block(gate.store, [transfer(0, 0)])
    final = certificate(Kind.FINALIZE, block)
    foreign = next(key for key in KEYS if key.public != block.header.proposer)
    other = next_block(gate.store, proposer=foreign.public)
    for changes in (
        {"transactions": ()},
        {"transactions": (transfer(0, 0), b"junk")},
        {"signature": bytes(64)},
        {"certificate": certificate(Kind.NOTARIZE, block)},
        {"certificate": certificate(Kind.FINALIZE, block, (0, 1))},
        {"certificate": certificate(Kind.FINALIZE, other)},
        {"header": other.header},
    ):
        assert not gate.announced(block, final, **changes)
    assert not gate.announced(other, certificate(Kind.FINALIZE, other)), "not by its leader"
    assert not gate.door.announcement(SOURCE, b"\x00")
    assert gate.announced(block, final), "none of these took its place"


def test_one_block_is_not_passed_on_in_many_versions(gate: Gate) -> None:
    block = next_block(gate.store)
    voters = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)]
    proofs = [certificate(Kind.FINALIZE, block, some) for some in voters]
    assert [gate.announced(block, proof) for proof in proofs].count(True) == COPIES


def test_only_what_no_honest_node_passes_on_is_its_forwarders_fault(gate: Gate) -> None:
    """What hangs on what one has seen, or on what somebody can still pay, is nobody's."""
    block = next_block(gate.store, [transfer(0, 0)])
    final = certificate(Kind.FINALIZE, block)
    assert gate.door.announcement(SOURCE, b"\x00") is False
    assert gate.announced(block, final, signature=bytes(64)) is False
    assert [gate.announced(block, final) for _ in range(COPIES + 1)] == [True] * COPIES + [None]
    assert gate.door.transactions("mallory", b"\x00") is False
    assert gate.sent(transfer(0, 10_000)) is None
    assert gate.sent(bytes(64) + transfer(0, 0)[64:]) is False
    assert gate.door.offer("mallory", b"\x00") is False
    assert gate.offered(transfer(0, 0), b"{}") is None
    while gate.door._admission.peers.charge("mallory", 1.0):
        pass
    assert gate.door.transactions("mallory", b"\x00") is None


# ---- transactions --------------------------------------------------------------------------------


def test_transactions_are_passed_on_when_somebody_can_pay_for_them(gate: Gate) -> None:
    assert gate.sent(transfer(0, 0), transfer(1, 0), transfer(0, 1))
    nobody = sign_transaction(NOBODY, CHAIN, Transfer(OWNERS[0].public, 1), fee=10)
    assert not gate.sent(nobody)
    assert not gate.sent(transfer(0, 0), nobody)
    assert not gate.sent(transfer(0, 0)[:-1] + b"\x00")
    assert not gate.sent(transfer(0, 10_000))


def test_one_fee_does_not_pay_for_many_versions(gate: Gate) -> None:
    first = transfer(0, 0)
    state = State(gate.store.get)
    gate.pool.admit(decode_transaction(first, CHAIN), state, 0)
    assert gate.sent(first)
    assert not gate.sent(transfer(0, 0, amount=6))
    assert not gate.sent(paying(0, 0, 19))
    assert gate.sent(paying(0, 0, 20))
    assert gate.sent(transfer(0, 1, amount=6))


def test_versions_pay_for_each_other_also_before_the_pool_has_one(gate: Gate) -> None:
    assert gate.sent(transfer(0, 3))
    assert gate.sent(transfer(0, 3)), "in another batch"
    assert not gate.sent(transfer(0, 3, amount=6))
    assert gate.sent(paying(0, 3, 20))
    assert not gate.sent(paying(0, 3, 25))


def test_a_version_that_expired_is_in_nobodys_way(gate: Gate) -> None:
    assert gate.sent(paying(0, 0, 10, expiry=1))
    assert not gate.sent(transfer(0, 0))
    gate.store.apply(next_block(gate.store), None)
    assert gate.sent(transfer(0, 0))


def test_a_nodes_transactions_are_passed_on_unproven_a_few_times_only(gate: Gate) -> None:
    node = KEYS[0]
    early = [
        sign_transaction(node, CHAIN, Accept(bytes([n]) * 32, 0, 0, bytes(32))) for n in range(40)
    ]
    assert [gate.sent(raw) for raw in early].count(True) == 16
    other = sign_transaction(KEYS[1], CHAIN, Accept(bytes(32), 0, 0, bytes(32)))
    assert gate.sent(other), "another node's"
    ask = sign_transaction(node, CHAIN, Ask(bytes(32), "cpu", 1, 1, 1, 1, 100))
    assert gate.sent(ask), "it succeeds here"


def test_evidence_is_passed_on_when_it_holds(gate: Gate) -> None:
    sworn = (Sworn(Kind.NOTARIZE, bytes(32), bytes(64)), Sworn(Kind.NOTARIZE, b"x" * 32, bytes(64)))
    false = VoteEvidence(KEYS[1].public, 1, *sworn)
    assert not gate.sent(sign_transaction(KEYS[0], CHAIN, false))


def test_who_forwards_forgeries_is_not_heard_for_a_while_and_nobody_else_suffers(
    gate: Gate, clock: Clock
) -> None:
    forged = [bytes(64) + transfer(0, nonce)[64:] for nonce in range(16)]
    heard = gate.door._admission.peers
    for raw in forged * 4:
        gate.door.transactions("mallory", encode(Transactions((raw,))))
    assert not heard.charge("mallory", 0)
    assert not gate.door.transactions("mallory", encode(Transactions((transfer(0, 0),))))
    assert gate.door.transactions("alice", encode(Transactions((transfer(0, 0),))))
    clock.now += 60
    assert gate.door.transactions("mallory", encode(Transactions((transfer(1, 0),))))


# ---- offers --------------------------------------------------------------------------------------


def offer(owner: KeyPair, spec: bytes, nonce: int = 0, price: int = 1) -> bytes:
    wanted = Offer(
        spec_id=sha256(spec),
        spec_bytes=len(spec),
        stages=(Stage(1, 1),),
        lanes=1,
        rounds=1,
        segment_steps=1,
        unsettled=2,
        state_every=1,
        tokens=1,
        class_id="any",
        privacy="open",
        slot_price_max=price,
        standby_price=0,
        audit_rate=0,
        audit_price=0,
        audit_budget=0,
        deadline=100,
        source=KEYS[0].public,
        session=bytes(32),
    )
    return sign_transaction(owner, CHAIN, wanted, nonce=nonce, fee=10)


def test_a_spec_is_remembered_when_its_offer_could_be_paid_for(gate: Gate) -> None:
    for refused in (
        offer(NOBODY, b"spec"),
        offer(OWNERS[0], b"another"),
        offer(OWNERS[0], b"spec", price=950),
        offer(OWNERS[0], b"spec", nonce=99),
        offer(OWNERS[0], b"spec")[:-1] + b"\x02",
        transfer(0, 0),
        b"junk",
    ):
        assert not gate.offered(refused, b"spec")
    assert gate.specs.get(sha256(b"spec")) is None
    assert gate.offered(offer(OWNERS[0], b"spec"), b"spec")
    assert gate.specs.get(sha256(b"spec")) == b"spec"


def test_one_deposit_does_not_fill_the_memory_of_specs(gate: Gate) -> None:
    specs = [bytes([number]) for number in range(40)]
    heard = [gate.offered(offer(OWNERS[0], spec, nonce=spec[0] % 20), spec) for spec in specs]
    assert heard.count(True) == PER_OWNER
    assert gate.offered(offer(OWNERS[1], b"other"), b"other")


def test_a_spec_reaches_the_disk_when_its_offer_has_succeeded(gate: Gate) -> None:
    good, failed = offer(OWNERS[0], b"good"), offer(OWNERS[1], b"failed")
    assert gate.offered(good, b"good")
    assert gate.offered(failed, b"failed")
    body = [transfer(1, 0, amount=900), good, offer(OWNERS[1], b"failed", nonce=1)]
    gate.specs.executed(gate.store.apply(next_block(gate.store, body), None))
    assert gate.store.get_spec(sha256(b"good")) == b"good"
    assert gate.store.get_spec(sha256(b"failed")) is None
