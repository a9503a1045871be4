"""Proof bundles: what a stranger can check without the chain, and the forgeries it refuses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from tdmld.chain.accounts import (
    Account,
)
from tdmld.chain.blocks import Block, Kind, block_hash
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import sha256
from tdmld.chain.epochs import genesis_set
from tdmld.chain.errors import DecodeError, ProofRefused
from tdmld.chain.light import (
    BlockClaim,
    Bundle,
    Proven,
    StateClaim,
    TransactionClaim,
    bundle_bytes,
    check_bundle,
    read_bundle,
    record_of,
    state_key,
)
from tdmld.chain.turns import Turn, check_final
from tdmld.node.chainerrors import NotProvable
from tdmld.node.finality import Finality
from tdmld.node.prover import prove
from tdmld.node.store import ChainStore
from tests.node.chainkit import (
    CHAIN,
    GENESIS,
    KEYS,
    OWNERS,
    certificate,
    make_genesis,
    next_block,
    transfer,
)

replace = msgspec.structs.replace


@dataclass
class Made:
    store: ChainStore
    blocks: list[Block]
    good: bytes
    bad: bytes

    def prove(self, kind: str, name: str, checkpoint: int = 0) -> Bundle:
        async def run() -> Bundle:
            return await prove(Finality(self.store), kind, name, checkpoint)

        return trio.run(run)

    def checkpoint(self, height: int) -> Checkpoint:
        return Checkpoint(height, block_hash(self.blocks[height - 1].header))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """20 blocks; the transfers stand in block 2, and the last block closes the chain."""
    good, bad = transfer(0, 0), transfer(1, 7)
    with ChainStore(tmp_path_factory.mktemp("proven"), GENESIS) as store:
        blocks = []
        for height in range(1, 21):
            body = [good, bad, transfer(2, 0)] if height == 2 else []
            block = next_block(store, body)
            own = height % 2 == 0
            store.apply(block, certificate(Kind.FINALIZE, block) if own else None)
            blocks.append(block)
        yield Made(store, blocks, good, bad)


def check(bundle: Bundle, checkpoint: Checkpoint | None = None) -> Proven:
    return check_bundle(read_bundle(bundle_bytes(bundle)), GENESIS, checkpoint)


def test_an_account_is_proven_present_or_absent(made: Made) -> None:
    bundle = made.prove("account", OWNERS[3].address)
    proven = check(bundle)
    assert isinstance(proven.claim, StateClaim)
    assert record_of(proven.claim) == Account(balance=1010, vote_stake=10)
    nobody = check(made.prove("account", KEYS[0].address))
    assert isinstance(nobody.claim, StateClaim)
    assert record_of(nobody.claim) is None


def test_a_transaction_is_proven_with_its_outcome(made: Made) -> None:
    for raw, ok in ((made.good, True), (made.bad, False)):
        proven = check(made.prove("transaction", sha256(raw).hex()))
        assert isinstance(proven.claim, TransactionClaim)
        assert (proven.claim.ok, proven.height) == (ok, 2)
        assert proven.transaction is not None
        assert proven.transaction.id == sha256(raw)


def test_an_old_block_is_proven(made: Made) -> None:
    proven = check(made.prove("block", "5"))
    assert isinstance(proven.claim, BlockClaim)
    assert proven.claim.header == made.blocks[4].header


def test_a_checkpoint_is_shown_to_be_of_the_same_chain(made: Made) -> None:
    checkpoint = made.checkpoint(7)
    bundle = made.prove("account", OWNERS[0].address, 7)
    assert check(bundle, checkpoint).final.height == 20
    with pytest.raises(ProofRefused, match="does not contain the checkpoint"):
        check(bundle, Checkpoint(7, ZERO_HASH))
    assert bundle.anchor is not None
    assert bundle.anchor.place is not None
    assert made.prove("block", "5", 20).anchor == replace(
        bundle.anchor, header=made.blocks[19].header, place=None
    )
    with pytest.raises(ProofRefused, match="does not show the checkpoint 8"):
        check(bundle, made.checkpoint(8))
    with pytest.raises(ProofRefused, match="none is trusted"):
        check(bundle)
    with pytest.raises(ProofRefused, match="stale"):
        check(made.prove("block", "5"), Checkpoint(10_000, ZERO_HASH))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("account", OWNERS[3].address), ("transaction", ""), ("block", "5")],
)
def test_no_byte_can_be_changed_and_none_left_out(made: Made, kind: str, name: str) -> None:
    bundle = made.prove(kind, name or sha256(made.good).hex(), 7)
    checkpoint = made.checkpoint(7)
    raw = bundle_bytes(bundle)
    check(read_bundle(raw), checkpoint)
    for at in range(len(raw)):
        for change in (0x01, 0x80):
            forged = raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :]
            with pytest.raises(ProofRefused):
                check_bundle(read_bundle(forged), GENESIS, checkpoint)
    for length in range(0, len(raw), 7):
        with pytest.raises(ProofRefused):
            read_bundle(raw[:length])
    with pytest.raises(ProofRefused):
        read_bundle(raw + b"\0")


def _claim(**changes: object) -> Callable[[Bundle, Made], Bundle]:
    return lambda bundle, _: replace(bundle, claim=replace(bundle.claim, **changes))


STATE_FORGERIES: dict[str, Callable[[Bundle, Made], Bundle]] = {
    "of another key": _claim(key=state_key("account", OWNERS[1].address)),
    "of more money": _claim(value=msgspec.msgpack.encode([10_000, 1, 0, 0])),
    "of an absence": _claim(value=b""),
    "of another chain": lambda b, _: replace(b, chain=ZERO_HASH),
    "with a notarization": lambda b, m: replace(
        b, certificate=certificate(Kind.NOTARIZE, m.blocks[19])
    ),
    "with too little stake": lambda b, m: replace(
        b, certificate=certificate(Kind.FINALIZE, m.blocks[19], (0, 1))
    ),
    "with an older block's certificate": lambda b, m: replace(
        b, certificate=certificate(Kind.FINALIZE, m.blocks[18])
    ),
    "with one voter twice": lambda b, _: replace(
        b,
        certificate=replace(b.certificate, signatures=(b.certificate.signatures[0],) * 3),
    ),
    "with an end of an epoch too many": lambda b, m: replace(
        b,
        turns=(Turn(m.blocks[19].header, b.certificate, genesis_set(GENESIS, 1)),),
    ),
    "with a gap in the headers": lambda b, m: replace(
        b, headers=(m.blocks[16].header, m.blocks[19].header)
    ),
    "with an older header": lambda b, m: replace(b, headers=(m.blocks[0].header,)),
    "at another height": lambda b, _: replace(
        b, headers=(*b.headers[:-1], replace(b.headers[-1], height=21))
    ),
    "with another state root": lambda b, _: replace(
        b, headers=(*b.headers[:-1], replace(b.headers[-1], state_root=ZERO_HASH))
    ),
}


@pytest.mark.parametrize("forgery", STATE_FORGERIES)
def test_a_forged_state_proof_is_refused(made: Made, forgery: str) -> None:
    bundle = made.prove("account", OWNERS[3].address)
    with pytest.raises(ProofRefused):
        check(STATE_FORGERIES[forgery](bundle, made))


def test_a_forged_transaction_or_block_is_refused(made: Made) -> None:
    bundle = made.prove("transaction", sha256(made.bad).hex())
    claim, other = bundle.claim, made.prove("block", "5").claim
    assert isinstance(claim, TransactionClaim)
    assert isinstance(other, BlockClaim)
    for forged in (
        replace(claim, ok=True),
        replace(claim, raw=made.good),
        replace(claim, index=0),
        replace(claim, count=4),
        replace(claim, header=made.blocks[2].header),
        replace(claim, place=replace(claim.place, height=3)),
        replace(claim, place=replace(claim.place, outcomes=ZERO_HASH)),
        replace(other, header=made.blocks[5].header),
        replace(other, place=replace(other.place, height=6)),
        replace(other, header=replace(other.header, time_ms=1)),
    ):
        with pytest.raises(ProofRefused):
            check(replace(bundle, claim=forged))


def test_another_validator_set_vouches_for_nothing(made: Made) -> None:
    strangers = genesis_set(make_genesis("others"), 0)
    seats = tuple(replace(seat, node=seat.owner) for seat in strangers.seats)
    last, own = made.blocks[19].header, certificate(Kind.FINALIZE, made.blocks[19])
    check_final(CHAIN, 500, strangers, last, own)
    with pytest.raises(ProofRefused, match="not those that the header names"):
        check_final(CHAIN, 500, replace(strangers, seats=seats), last, own)


def test_what_cannot_be_proven_says_why(made: Made) -> None:
    with pytest.raises(NotProvable, match="no final block"):
        made.prove("transaction", "00" * 32)
    with pytest.raises(NotProvable, match="this node has 1 to 20"):
        made.prove("block", "21")
    for kind, name in (("account", "x"), ("job", "12"), ("nonsense", "x"), ("audit", "00/1")):
        with pytest.raises(DecodeError):
            made.prove(kind, name)


def test_a_proof_waits_for_the_block_that_commits_the_state(tmp_path: Path) -> None:
    async def run() -> None:
        with ChainStore(tmp_path, GENESIS) as store:
            finality = Finality(store)

            def add(*body: bytes) -> None:
                block = next_block(store, body)
                finality.advance([block], certificate(Kind.FINALIZE, block))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(finality.run)
                found: list[Bundle] = []

                async def ask() -> None:
                    found.append(await prove(finality, "account", OWNERS[3].address))

                async def until(done: Callable[[], bool]) -> None:
                    with trio.fail_after(20):
                        while not done():
                            await trio.testing.wait_all_tasks_blocked(0.01)

                add(transfer(0, 0))
                await until(lambda: store.height == 1)
                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not found
                add(transfer(0, 1))
                await until(lambda: bool(found))
                (bundle,) = found
                assert check(bundle).height == 1
                assert isinstance(bundle.claim, StateClaim)
                account = record_of(bundle.claim)
                assert isinstance(account, Account)
                assert account.balance == 1005
                nursery.cancel_scope.cancel()

    trio.run(run)
