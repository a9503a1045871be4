"""A light client over changing validators (spec PROOF-1 to PROOF-7): from a checkpoint three epochs
old to a payment of now, and what it refuses on the way."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from tdmld.chain import light, turns
from tdmld.chain.accounts import (
    Account,
    ValidatorSet,
)
from tdmld.chain.blocks import block_hash, ends_epoch, epoch_of
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import ZERO_HASH, encode
from tdmld.chain.crypto import address, sha256
from tdmld.chain.epochs import genesis_set, set_id
from tdmld.chain.errors import ProofRefused
from tdmld.chain.ledger import BlockResult
from tdmld.chain.light import (
    Ancestor,
    Anchor,
    BlockClaim,
    Bundle,
    Proven,
    StateClaim,
    TransactionClaim,
    bundle_bytes,
    check_bundle,
    read_bundle,
    record_of,
)
from tdmld.chain.records import (
    JobStatus,
)
from tdmld.chain.transactions import Bond
from tdmld.node.chainerrors import NotProvable
from tdmld.node.store import ChainStore
from tests.chain.chainworld import SHORT, ChainWorld
from tests.chain.world import make_genesis as make_market
from tests.chain.world import owner_key
from tests.node.lightforgeries import CHAIN, EPOCH, FORGERIES, OLD, TOP, Made
from tests.node.lonechain import CHANGING, certify, churn, extend, grow, make_genesis, pay

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with ChainStore(tmp_path_factory.mktemp("turns") / "chain", CHANGING) as store:
        grow(store, TOP)
        yield Made(store)


def check(bundle: Bundle, checkpoint: Checkpoint | None) -> Proven:
    return check_bundle(read_bundle(bundle_bytes(bundle)), CHANGING, checkpoint)


# ---- what holds ----------------------------------------------------------------------------------


def test_the_validators_of_this_chain_change_in_every_epoch(made: Made) -> None:
    seats = [made.set(epoch).seats for epoch in range(epoch_of(TOP, EPOCH) + 2)]
    assert seats[0] == seats[1] == genesis_set(CHANGING, 0).seats
    members = [{seat.node for seat in one} for one in seats]
    for before, after in pairwise(seats[1:]):
        assert before != after
    assert len(set(map(frozenset, members[2:]))) > 3, "not only weights: members change"
    for epoch in (0, 1):
        assert genesis_set(CHANGING, epoch) == made.set(epoch)


def test_a_payment_is_proven_from_a_checkpoint_three_epochs_old(made: Made) -> None:
    bundle = made.paid()
    proven = check(bundle, made.checkpoint())
    assert isinstance(proven.claim, StateClaim)
    account = record_of(proven.claim)
    assert isinstance(account, Account)
    assert account.balance > 0
    assert proven.trusted is not None
    assert (proven.trusted.height, proven.final.height) == (OLD, TOP)
    assert [epoch_of(turn.header.height, EPOCH) for turn in bundle.turns] == [4, 5]
    late = [turn.certificate.view > turn.header.view for turn in bundle.turns]
    assert late == [False, True], "an epoch may end with a view later than its last block's"
    raw = pay(7, CHAIN)
    other = check(made.prove("transaction", sha256(raw).hex()), made.checkpoint())
    assert isinstance(other.claim, TransactionClaim)
    assert (other.claim.ok, other.height) == (True, 8)


def test_a_payment_is_proven_from_genesis_over_every_epoch(made: Made) -> None:
    bundle = made.paid(0)
    assert check(bundle, None).trusted is None
    assert len(bundle.turns) == 5


@pytest.mark.parametrize("height", range(1, TOP + 1))
def test_every_block_can_be_the_checkpoint(made: Made, height: int) -> None:
    bundle = made.paid(height)
    proven = check(bundle, made.checkpoint(height))
    assert proven.trusted is not None
    assert proven.trusted.height == height
    now, then = epoch_of(TOP, EPOCH), epoch_of(height, EPOCH)
    assert len(bundle.turns) == max(now - then - 1, 0)


@pytest.mark.parametrize("top", [1, 2, 4, 6, 7, 9, 11, 12, 14, 16])
def test_every_height_can_be_where_the_chain_stands(tmp_path: Path, top: int) -> None:
    with ChainStore(tmp_path / "chain", CHANGING) as store:
        grow(store, top)
        one = Made(store)
        assert check(one.paid(0), None).final.height == top
        for height in {1, top // 2, top} - {0}:
            check(one.paid(height), one.checkpoint(height))


class Restless(ChainWorld):
    """In every epoch a validator binds more stake."""

    def block(self, *raws: bytes, tainted: bool = False, passed: int = 0) -> BlockResult:
        if self.chain.height % self.parameters.epoch_blocks == 0:
            super().block(self.sign(owner_key(3), Bond("vote", 7)))
        return super().block(*raws, tainted=tainted, passed=passed)


def test_the_payment_of_a_job_is_proven_from_a_checkpoint_three_epochs_old(tmp_path: Path) -> None:
    world = Restless(tmp_path / "chain", make_market(**SHORT, epoch_blocks=24))
    try:
        asks = [world.ask(index, until_height=48) for index in range(7)]
        assert all(receipt.ok for receipt in world.block(*asks).receipts)
        job = world.submit(audit_rate=1_000_000, rounds=2, unsettled=2, state_every=1)
        assert world.play_until(job).status is JobStatus.CLOSED
        while epoch_of(world.height, 24) < 3:
            world.block()
        while world.height % world.gap != 1 or not world.chain.closed:
            world.block()
        store, old = Made(world.chain), epoch_of(world.height, 24) - 3
        seats = [store.set(epoch).seats for epoch in range(old, old + 4)]
        assert all(before != after for before, after in pairwise(seats[1:]))
        trusted = store.checkpoint(24 * old + 10)
        worker, paid = max(world.state.payments(job).items(), key=lambda row: row[1].worker)
        bundle = store.prove("payment", f"{job.hex()}/{address(worker)}", trusted.height)
        proven = check_bundle(read_bundle(bundle_bytes(bundle)), world.genesis, trusted)
        assert isinstance(proven.claim, StateClaim)
        assert record_of(proven.claim) == paid
        assert paid.worker > 0
        assert len(bundle.turns) == 2
        forged = replace(bundle.claim, value=encode(replace(paid, worker=paid.worker + 1)))
        with pytest.raises(ProofRefused, match="does not lead to the header's state root"):
            check_bundle(replace(bundle, claim=forged), world.genesis, trusted)
    finally:
        world.close()


# ---- forgeries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_is_refused(made: Made, forgery: str) -> None:
    why, forge = FORGERIES[forgery]
    with pytest.raises(ProofRefused, match=why):
        check(forge(made.paid(), made), made.checkpoint())


def test_from_genesis_no_turn_may_be_missing_or_come_twice(made: Made) -> None:
    bundle = made.paid(0)
    first, second, third, *rest = bundle.turns
    for rows in (
        (second, third, *rest),
        (first, third, *rest),
        (first, first, third, *rest),
        (first, third, second, *rest),
        (made.turn(0), first, second, third, *rest),
    ):
        with pytest.raises(ProofRefused):
            check(replace(bundle, turns=tuple(rows)), None)
    with pytest.raises(ProofRefused, match="none is trusted here"):
        check(made.paid(), None)
    with pytest.raises(ProofRefused, match="does not show the checkpoint"):
        check(bundle, made.checkpoint())


def test_a_checkpoint_above_the_proof_makes_it_stale(made: Made) -> None:
    with pytest.raises(ProofRefused, match="stale"):
        check(made.paid(), Checkpoint(TOP + 1, ZERO_HASH))
    with pytest.raises(NotProvable, match="above"):
        made.paid(TOP + 1)


def test_headers_that_show_nothing_are_refused(made: Made) -> None:
    bundle = made.prove("block", "7")
    assert isinstance(bundle.claim, BlockClaim)
    assert len(bundle.headers) == 1
    before = made.store.block(bundle.headers[0].height - 1)
    assert before is not None
    with pytest.raises(ProofRefused, match="show nothing"):
        check(replace(bundle, headers=(before.header, *bundle.headers)), made.checkpoint())


def test_the_proof_of_another_network_is_refused(made: Made) -> None:
    for other in (make_genesis(validators=6, epoch_blocks=6), make_genesis(validators=5)):
        with pytest.raises(ProofRefused, match="of the chain"):
            check_bundle(made.paid(), other, made.checkpoint())


def test_a_second_chain_by_the_same_validators_is_refused_from_a_checkpoint(
    made: Made, tmp_path: Path
) -> None:
    """Genesis' validators sign another past, years later. Genesis alone cannot tell the two apart
    (PROOF-7); a checkpoint can, also where the sets are the same on both."""
    with ChainStore(tmp_path / "other", CHANGING) as store:
        extend(store, [pay(0, CHAIN), *churn(store)], step_ms=101)
        grow(store, TOP - 1)
        other = Made(store)
        assert [other.set(epoch) for epoch in range(8)] == [made.set(epoch) for epoch in range(8)]
        check(other.paid(0), None)
        with pytest.raises(ProofRefused, match="does not contain the checkpoint"):
            check(other.paid(), made.checkpoint())
        headers = replace(other.paid(TOP), anchor=made.paid(TOP).anchor)
        with pytest.raises(ProofRefused, match="is not the checkpoint's"):
            check(headers, made.checkpoint(TOP))
        false, true = other.paid(), made.paid()
        for mixed in (
            replace(false, anchor=true.anchor),
            replace(true, turns=false.turns, headers=false.headers, certificate=false.certificate),
            replace(true, headers=false.headers, certificate=false.certificate, claim=false.claim),
        ):
            with pytest.raises(ProofRefused):
                check(mixed, made.checkpoint())


def test_validators_of_ones_own_making_sign_nothing(made: Made) -> None:
    """Where no turn lies between, the checkpoint's header alone says who signs (PROOF-3)."""
    keys = made.set(6).seats[:1]
    mine = ValidatorSet(6, (replace(keys[0], weight=10**6),))
    bundle, trusted = made.paid(TOP - 1), made.checkpoint(TOP - 1)
    assert bundle.anchor is not None
    block = made.store.block(TOP - 1)
    assert block is not None
    last = replace(bundle.headers[-1], validators=set_id(mine), state_root=ZERO_HASH)
    forged = replace(
        bundle,
        anchor=Anchor(bundle.anchor.header, None, mine),
        headers=(block.header, last),
        certificate=certify(CHAIN, last, mine),
    )
    with pytest.raises(ProofRefused, match="of epoch 6 are not those that the header names"):
        check(forged, trusted)
    turns.check_final(CHAIN, EPOCH, mine, last, forged.certificate)


def test_a_set_is_of_the_epoch_for_which_it_is_named(made: Made) -> None:
    chosen = made.set(5)
    turns.check_set(chosen, 5, set_id(chosen))
    with pytest.raises(ProofRefused, match="of epoch 6 are not those"):
        turns.check_set(chosen, 6, set_id(chosen))


def test_a_place_is_given_only_where_it_shows_something(made: Made) -> None:
    bundle = made.paid(TOP)
    assert bundle.anchor is not None
    more = replace(bundle.anchor, place=Ancestor(TOP, ZERO_HASH, ()))
    with pytest.raises(ProofRefused, match="is not the checkpoint's"):
        check(replace(bundle, anchor=more), made.checkpoint(TOP))


def test_no_byte_can_be_changed_and_none_left_out(made: Made) -> None:
    raw, checkpoint = bundle_bytes(made.paid()), made.checkpoint()
    check_bundle(read_bundle(raw), CHANGING, checkpoint)
    for at in range(len(raw)):
        change = (0x01, 0x80, 0x10)[at % 3]
        forged = raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :]
        with pytest.raises(ProofRefused):
            check_bundle(read_bundle(forged), CHANGING, checkpoint)
    for length in range(0, len(raw), 11):
        with pytest.raises(ProofRefused):
            read_bundle(raw[:length])


# ---- limits --------------------------------------------------------------------------------------


def test_more_epochs_than_a_proof_goes_over_ask_for_a_newer_checkpoint(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdmld.node.prover.MAX_TURNS", 2)
    assert check(made.paid(), made.checkpoint()).final.height == TOP
    with pytest.raises(NotProvable, match=r"5 epochs lie between.*--checkpoint HEIGHT:HASH"):
        made.paid(0)
    monkeypatch.setattr("tdmld.node.prover.BUNDLE_BYTES", 1000)
    with pytest.raises(NotProvable, match="limit 1000: name a newer block"):
        made.paid()


def test_a_bundle_with_too_many_turns_is_not_read(made: Made) -> None:
    bundle = made.paid()
    many = replace(bundle, turns=bundle.turns[:1] * (turns.MAX_TURNS + 1))
    raw = bundle_bytes(many)
    assert len(raw) < light.BUNDLE_BYTES
    with pytest.raises(ProofRefused, match="no proof bundle"):
        read_bundle(raw)


# ---- what nodes keep -----------------------------------------------------------------------------


def test_turns_stay_when_blocks_go(made: Made, tmp_path: Path) -> None:
    with ChainStore(tmp_path / "short", CHANGING, keep=1) as short:
        for height in range(1, TOP + 1):
            block = made.store.block(height)
            assert block is not None
            short.apply(block, made.store.certificate(height))
        assert short.lowest > OLD
        for epoch in range(epoch_of(TOP, EPOCH)):
            turn = short.turn(epoch)
            assert turn == made.store.turn(epoch)
            assert turn is not None
            assert ends_epoch(turn.header.height, EPOCH)
        assert short.turn(epoch_of(TOP, EPOCH)) is None, "its epoch is not over"
        pruned = Made(short)
        check(pruned.paid(0), None)
        last = 3 * EPOCH
        assert last < short.lowest
        check(pruned.paid(last), made.checkpoint(last))
        with pytest.raises(NotProvable, match="ask one that keeps all blocks"):
            pruned.paid(last + 1)


def test_a_turn_names_who_signs_next(made: Made) -> None:
    for epoch in range(1, epoch_of(TOP, EPOCH)):
        turn = made.store.turn(epoch)
        assert turn is not None
        assert turn.certificate.hash == block_hash(turn.header)
        assert turn.validators == made.set(epoch + 1)
