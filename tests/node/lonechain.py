"""A chain of one validator by hand, for long ones: every block is final by itself."""

from collections.abc import Sequence

from tdmld.chain import vrf
from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    Header,
    Kind,
    beacon_input,
    block_hash,
    sign_block,
    sign_vote,
    transactions_root,
)
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.genesis import Genesis, chain_id, genesis_from_document
from tdmld.chain.transactions import Transfer, sign_transaction
from tdmld.node.store import ChainStore

VALIDATOR = KeyPair(b"\x61" * 32)
OWNER = KeyPair(b"\x62" * 32)
PAYEES = [KeyPair(sha256(bytes([i, 7]))).public for i in range(200)]


def make_genesis(unbonding: tuple[int, int] = (10, 1)) -> Genesis:
    return genesis_from_document(
        {
            "chain": "alone",
            "time": "2026-01-01T00:00:00Z",
            "accounts": [[OWNER.address, 10**12]],
            "validators": [[OWNER.address, VALIDATOR.address, 10]],
            "parameters": {"unbonding": list(unbonding), "interval_ms": 10},
        }
    )


GENESIS = make_genesis()
CHAIN = chain_id(GENESIS)
COMMITTEE = Committee.of(CHAIN, [(VALIDATOR.public, 10)])


def pay(nonce: int) -> bytes:
    to = PAYEES[nonce % len(PAYEES)]
    return sign_transaction(OWNER, CHAIN, Transfer(to, 1 + nonce), nonce=nonce, fee=10)


def extend(store: ChainStore, body: Sequence[bytes] = (), step_ms: int = 100) -> Block:
    """One more block, final by itself."""
    head = store.head
    root = store.history_root(head.height)
    assert root is not None
    header = Header(
        protocol=1,
        height=head.height + 1,
        view=head.view + 1,
        parent_view=head.view,
        parent=head.hash,
        time_ms=head.header.time_ms + step_ms,
        proposer=VALIDATOR.public,
        proof=vrf.prove(VALIDATOR.seed, beacon_input(CHAIN, head.mix, head.height + 1)),
        tx_root=transactions_root(body),
        state_height=head.height,
        history_root=root,
        state_root=head.state_root,
    )
    block = sign_block(VALIDATOR, CHAIN, header, body)
    store.apply(block, certify(block))
    return block


def certify(block: Block) -> Certificate:
    key, view = block_hash(block.header), block.header.view
    vote = sign_vote(VALIDATOR, CHAIN, Kind.FINALIZE, view, key, 0)
    return Certificate(Kind.FINALIZE, view, key, ((0, vote.signature),))


def grow(store: ChainStore, blocks: int, every: int = 1) -> None:
    """Blocks with one payment in each `every`-th, and one that closes the chain."""
    start = store.height
    for height in range(start, start + blocks - 1):
        extend(store, [pay(height // every)] if height % every == 0 else [])
    extend(store)
