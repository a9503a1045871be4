"""The list tree against RFC 6962's recursive definition, and its proofs."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdmld.chain import merkle
from tdmld.chain.codec import ZERO_HASH

LISTS = st.lists(st.binary(max_size=8), max_size=24)


def rfc6962(leaves: list[bytes]) -> bytes:
    """MTH of the RFC: split at the largest power of two below the count."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\1" + rfc6962(leaves[:split]) + rfc6962(leaves[split:])).digest()


def test_the_empty_list_has_the_zero_root() -> None:
    assert merkle.root([]) == ZERO_HASH


@given(LISTS.filter(bool))
def test_root_is_that_of_rfc_6962(leaves: list[bytes]) -> None:
    assert merkle.root(leaves) == rfc6962(leaves)


@given(LISTS.filter(bool), st.data())
def test_a_proof_shows_its_leaf_and_place(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    root, proof = merkle.root(leaves), merkle.proof(leaves, index)
    assert merkle.verify_proof(root, leaves[index], index, len(leaves), proof)
    assert not merkle.verify_proof(root, leaves[index] + b"!", index, len(leaves), proof)
    assert not merkle.verify_proof(root, leaves[index], index, len(leaves), (*proof, bytes(32)))
    assert not merkle.verify_proof(root, leaves[index], len(leaves), len(leaves), proof)
    if proof:
        assert not merkle.verify_proof(root, leaves[index], index, len(leaves), proof[:-1])
        assert not merkle.verify_proof(root, leaves[index], index, len(leaves), (b"", *proof[1:]))


def test_there_is_no_proof_of_a_missing_leaf() -> None:
    with pytest.raises(IndexError, match="leaf 2 of 2"):
        merkle.proof([b"a", b"b"], 2)
