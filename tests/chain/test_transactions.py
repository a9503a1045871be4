"""Bytes become a transaction in one way only, and mean nothing on another chain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdmld.chain import limits
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import DecodeError, InvalidTransaction
from tdmld.chain.transactions import (
    Bond,
    Commit,
    LinkRoots,
    Offer,
    Payload,
    Stage,
    Transfer,
    decode_transaction,
    registration_bytes,
    sign_registration,
    sign_transaction,
    verify_transaction,
)
from tests.chain.world import mark, node_key, owner_key

CHAIN = mark("chain")
KEY = owner_key(1)


def signed(payload: Payload | None = None, **header: int) -> bytes:
    return sign_transaction(KEY, CHAIN, payload or Transfer(mark("to"), 5), **header)


def test_what_was_signed_is_what_is_read() -> None:
    raw = signed(Bond("work", 7), nonce=3, fee=10, expiry=99)
    found = decode_transaction(raw, CHAIN)
    assert found.payload == Bond("work", 7)
    assert (found.signer, found.nonce, found.fee, found.expiry) == (KEY.public, 3, 10, 99)
    assert found.id == sha256(raw)
    assert verify_transaction(found, CHAIN)


def test_a_transaction_of_another_chain_is_refused_by_name() -> None:
    with pytest.raises(InvalidTransaction, match="signed for the chain"):
        decode_transaction(signed(), mark("other chain"))


def test_another_signer_or_changed_body_does_not_verify() -> None:
    raw = signed()
    forged = node_key(1).sign("transaction", CHAIN, raw[64:]) + raw[64:]
    assert not verify_transaction(decode_transaction(forged, CHAIN), CHAIN)
    changed = raw[:-1] + b"\x06"
    assert not verify_transaction(decode_transaction(changed, CHAIN), CHAIN)


def test_a_signature_for_another_purpose_does_not_verify() -> None:
    raw = signed()
    other = KEY.sign("vote", CHAIN, raw[64:]) + raw[64:]
    assert not verify_transaction(decode_transaction(other, CHAIN), CHAIN)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(64),
        bytes(65),
        signed()[:-1],
        signed() + b"\0",
        b"\0" * (limits.TRANSACTION_BYTES + 1),
    ],
    ids=["empty", "signature only", "no body", "truncated", "trailing byte", "oversized"],
)
def test_bytes_that_are_no_transaction_are_refused(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_transaction(raw, CHAIN)


@given(st.binary(max_size=400))
def test_noise_never_gets_past_the_door(noise: bytes) -> None:
    with pytest.raises((DecodeError, InvalidTransaction)):
        decode_transaction(bytes(64) + noise, CHAIN)


@given(st.integers(min_value=0, max_value=len(signed()) - 65), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_does_not_verify(at: int, flip: int) -> None:
    raw = bytearray(signed())
    raw[64 + at] ^= flip
    try:
        found = decode_transaction(bytes(raw), CHAIN)
    except (DecodeError, InvalidTransaction):
        return
    assert not verify_transaction(found, CHAIN)


def test_amounts_below_zero_do_not_decode() -> None:
    with pytest.raises(DecodeError):
        decode_transaction(signed(Transfer(mark("to"), -1)), CHAIN)


def test_the_greatest_offer_and_commit_fit() -> None:
    offer = Offer(
        *(mark(1), 65_536, (Stage(2**44, 2**50),) * limits.STAGES, 64, 2**20, 2**20, 64, 32),
        *(2**40, "c" * 64, "p" * 64, 2**53, 2**53, 10**6, 2**53, 2**60, 2**60, mark(2), mark(3)),
    )
    roots = tuple(LinkRoots(name, mark(1), mark(2)) for name in ("up", "down"))
    commit = Commit(mark(1), 0, 255, 0, 2**20, *[mark(2)] * 4, roots, mark(3), 2**62)
    for payload in (offer, commit):
        raw = signed(payload)
        assert decode_transaction(raw, CHAIN).payload == payload
    assert len(signed(commit)) < 600


def test_a_registration_is_bound_to_owner_and_height() -> None:
    owner, node = owner_key(1), node_key(1)
    proof = sign_registration(node, CHAIN, owner.public, 9)
    assert proof == node.sign("register", CHAIN, registration_bytes(owner.public, 9))
    assert proof != sign_registration(node, CHAIN, owner_key(2).public, 9)
