"""Blocks, votes and certificates: what verifies, and what must not."""

import msgspec
import pytest

from tdmld.chain import blocks, vrf
from tdmld.chain.blocks import (
    Block,
    BlockLimits,
    Certificate,
    Committee,
    Header,
    Kind,
    Vote,
    block_hash,
)
from tdmld.chain.codec import ZERO_HASH, decode, encode
from tdmld.chain.crypto import KeyPair
from tdmld.chain.errors import DecodeError, InvalidBlock

CHAIN = bytes(range(32))
KEYS = sorted((KeyPair(bytes([i]) * 32) for i in range(1, 5)), key=lambda key: key.public)
COMMITTEE = Committee.of(CHAIN, [(key.public, 10 + i) for i, key in enumerate(KEYS)])
LIMITS = BlockLimits(size=1000, transactions=10, protocol=1)


def header(**changes: object) -> Header:
    mix = blocks.beacon_start(CHAIN)
    plain = Header(
        protocol=1,
        height=1,
        view=3,
        parent_view=0,
        parent=ZERO_HASH,
        time_ms=1000,
        proposer=KEYS[2].public,
        proof=vrf.prove(KEYS[2].seed, blocks.beacon_input(CHAIN, mix, 1)),
        tx_root=blocks.transactions_root([b"a", b"b"]),
        state_height=0,
        history_root=ZERO_HASH,
        state_root=ZERO_HASH,
        validators=ZERO_HASH,
        next_validators=ZERO_HASH,
    )
    return msgspec.structs.replace(plain, **changes)


def signed(**changes: object) -> Block:
    return blocks.sign_block(KEYS[2], CHAIN, header(**changes), [b"a", b"b"])


def votes(kind: Kind, value: bytes, voters: tuple[int, ...], view: int = 3) -> list[Vote]:
    return [blocks.sign_vote(KEYS[v], CHAIN, kind, view, value, v) for v in voters]


def certificate(kind: Kind, value: bytes, voters: tuple[int, ...]) -> Certificate:
    rows = tuple((vote.voter, vote.signature) for vote in votes(kind, value, voters))
    return Certificate(kind, 3, value, rows)


def test_a_block_survives_the_wire() -> None:
    block = signed()
    again = decode(Block, encode(block), 10_000)
    assert again == block
    assert block_hash(again.header) == block_hash(block.header)
    blocks.check_block(COMMITTEE, 2, again, LIMITS)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"proposer": KEYS[1].public}, "led by"),
        ({"parent_view": 3}, "does not follow"),
        ({"state_height": 1}, "state height"),
        ({"protocol": 2}, "protocol"),
        ({"tx_root": ZERO_HASH}, "transactions"),
    ],
)
def test_a_block_that_breaks_a_rule_is_named(changes: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidBlock, match=text):
        blocks.check_block(COMMITTEE, 2, signed(**changes), LIMITS)


def test_bounds_and_signature_of_a_block() -> None:
    block = signed()
    with pytest.raises(InvalidBlock, match="limit"):
        blocks.check_block(COMMITTEE, 2, block, BlockLimits(1000, 1, 1))
    with pytest.raises(InvalidBlock, match="bytes"):
        blocks.check_block(COMMITTEE, 2, block, BlockLimits(1, 10, 1))
    forged = msgspec.structs.replace(block, signature=bytes(64))
    with pytest.raises(InvalidBlock, match="signature"):
        blocks.check_block(COMMITTEE, 2, forged, LIMITS)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"height": 3}, "follow"),
        ({"parent": b"\x09" * 32}, "parent"),
        ({"parent_view": 2}, "parent"),
        ({"time_ms": 1000}, "time"),
        ({"state_height": 0}, "goes back"),
    ],
)
def test_a_child_fits_its_parent(changes: dict[str, object], text: str) -> None:
    parent = header(height=5, state_height=2)
    right: dict[str, object] = {
        "height": 6,
        "view": 4,
        "parent_view": 3,
        "parent": block_hash(parent),
        "time_ms": 1001,
        "state_height": 2,
    }
    blocks.check_child(parent, block_hash(parent), header(**right), 500)
    with pytest.raises(InvalidBlock, match=text):
        blocks.check_child(parent, block_hash(parent), header(**(right | changes)), 500)


def test_the_beacon_mixes_the_leaders_proof_and_refuses_another() -> None:
    mix = blocks.beacon_start(CHAIN)
    following = blocks.beacon_mix(CHAIN, mix, header())
    assert len(following) == 32
    assert following != mix
    with pytest.raises(InvalidBlock, match="VRF"):
        blocks.beacon_mix(CHAIN, mix, header(proof=bytes(80)))
    with pytest.raises(InvalidBlock, match="VRF"):
        blocks.beacon_mix(CHAIN, following, header())


def test_a_vote_is_bound_to_everything_that_it_says() -> None:
    value = b"\x07" * 32
    vote = votes(Kind.NOTARIZE, value, (1,))[0]
    assert blocks.verify_vote(COMMITTEE, vote)
    for change in ({"kind": Kind.FINALIZE}, {"view": 4}, {"hash": b"\x08" * 32}, {"voter": 2}):
        assert not blocks.verify_vote(COMMITTEE, msgspec.structs.replace(vote, **change))
    assert not blocks.verify_vote(COMMITTEE, msgspec.structs.replace(vote, voter=9))
    other = Committee(bytes(32), COMMITTEE.nodes, COMMITTEE.stakes)
    assert not blocks.verify_vote(other, vote)


def test_nullify_and_only_nullify_speaks_of_no_block() -> None:
    assert blocks.verify_vote(COMMITTEE, votes(Kind.NULLIFY, ZERO_HASH, (0,))[0])
    assert not blocks.verify_vote(COMMITTEE, votes(Kind.NULLIFY, b"\x07" * 32, (0,))[0])
    assert not blocks.verify_vote(COMMITTEE, votes(Kind.NOTARIZE, ZERO_HASH, (0,))[0])


def test_a_header_has_no_room_for_more_than_a_proof() -> None:
    with pytest.raises(DecodeError):
        decode(Header, encode(header(proof=bytes(81))), 4096)


def test_a_certificate_needs_more_than_two_thirds_of_the_stake() -> None:
    value = b"\x07" * 32
    assert COMMITTEE.quorum == 31
    assert blocks.verify_certificate(COMMITTEE, certificate(Kind.FINALIZE, value, (0, 1, 2)))
    assert not blocks.verify_certificate(COMMITTEE, certificate(Kind.FINALIZE, value, (2, 3)))


def test_a_certificate_counts_nobody_twice_and_checks_everybody() -> None:
    value = b"\x07" * 32
    good = certificate(Kind.FINALIZE, value, (1, 2, 3))
    rows = good.signatures
    for wrong in (
        (),
        (rows[0], rows[0], rows[1], rows[2]),
        (rows[1], rows[0], rows[2]),
        (rows[0], rows[1], (3, bytes(64))),
        (*rows, (4, bytes(64))),
    ):
        broken = msgspec.structs.replace(good, signatures=wrong)
        assert not blocks.verify_certificate(COMMITTEE, broken)
    wrong_kind = msgspec.structs.replace(good, kind=Kind.NOTARIZE)
    assert not blocks.verify_certificate(COMMITTEE, wrong_kind)


def test_an_unknown_kind_of_vote_does_not_decode() -> None:
    raw = encode(votes(Kind.NULLIFY, ZERO_HASH, (0,))[0])
    with pytest.raises(DecodeError):
        decode(Vote, raw.replace(b"\xa4vote\x01", b"\xa4vote\x07"), 1000)


def test_a_committee_is_sorted_distinct_and_staked() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Committee(CHAIN, (b"b", b"a"), (1, 1))
    with pytest.raises(ValueError, match="stake"):
        Committee(CHAIN, (b"a", b"b"), (1, 0))
    for leads in ((True,), (False, False)):
        with pytest.raises(ValueError, match="leads"):
            Committee(CHAIN, (b"a", b"b"), (1, 1), 0, leads)
    assert COMMITTEE.leads == (True,) * len(KEYS)
    assert COMMITTEE.index(KEYS[2].public) == 2
    assert COMMITTEE.index(b"x") is None
