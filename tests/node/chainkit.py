"""A small chain by hand: four validators, blocks and certificates with real signatures."""

from collections.abc import Sequence

from tdmld.chain import vrf
from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    Header,
    Kind,
    Vote,
    beacon_input,
    block_hash,
    sign_block,
    sign_vote,
    start_view,
    transactions_root,
)
from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import Genesis, chain_id, genesis_from_document, validators
from tdmld.chain.transactions import Transfer, sign_transaction
from tdmld.node.store import ChainStore

OWNERS = [KeyPair(bytes([10 + i]) * 32) for i in range(4)]
KEYS = sorted((KeyPair(bytes([50 + i]) * 32) for i in range(4)), key=lambda key: key.public)


def make_genesis(name: str = "chainkit", **parameters: int) -> Genesis:
    return genesis_from_document(
        {
            "chain": name,
            "time": "2026-01-01T00:00:00Z",
            "accounts": [[owner.address, 1000] for owner in OWNERS],
            "validators": [
                [owner.address, key.address, 10] for owner, key in zip(OWNERS, KEYS, strict=True)
            ],
            "parameters": {"interval_ms": 10, "offer_deposit": 100, "tx_fee": 0, **parameters},
        }
    )


GENESIS = make_genesis()
CHAIN = chain_id(GENESIS)
COMMITTEE = Committee.of(CHAIN, [(v.node, v.stake) for v in validators(GENESIS)])
ROTATION = COMMITTEE.rotation


def transfer(sender: int, nonce: int, amount: int = 5, to: int = 3) -> bytes:
    return sign_transaction(
        OWNERS[sender], CHAIN, Transfer(OWNERS[to].public, amount), nonce=nonce, fee=10
    )


def next_block(
    store: ChainStore, body: Sequence[bytes] = (), view: int = 0, **changes: object
) -> Block:
    """A valid block on the store's head, by the view's leader."""
    head, chain = store.head, store.chain_id
    epoch_blocks = store.genesis.parameters.epoch_blocks
    view = view or start_view(head.height, head.view, epoch_blocks) + 1
    committee = store.committee(store.epoch)
    assert committee is not None
    leader = KEYS[committee.leader(view)]
    fields: dict[str, object] = {
        "protocol": 1,
        "height": head.height + 1,
        "view": view,
        "parent_view": head.view,
        "parent": head.hash,
        "time_ms": head.header.time_ms + 1,
        "proposer": leader.public,
        "proof": vrf.prove(leader.seed, beacon_input(chain, head.mix, head.height + 1)),
        "tx_root": transactions_root(body),
        "state_height": head.height,
        "history_root": store.history_root(head.height),
        "state_root": head.state_root,
        "validators": store.set_ids(store.epoch)[0],
        "next_validators": store.set_ids(store.epoch)[1],
    }
    return sign_block(leader, chain, Header(**(fields | changes)), body)  # type: ignore[arg-type]


def vote(kind: Kind, block: Block, voter: int, view: int = 0, chain: bytes = CHAIN) -> Vote:
    """In the block's own view, or in another one."""
    key = block_hash(block.header)
    return sign_vote(KEYS[voter], chain, kind, view or block.header.view, key, voter)


def certificate(
    kind: Kind,
    block: Block,
    voters: Sequence[int] = (0, 1, 2),
    view: int = 0,
    chain: bytes = CHAIN,
) -> Certificate:
    view = view or block.header.view
    rows = tuple((voter, vote(kind, block, voter, view, chain).signature) for voter in voters)
    return Certificate(kind, view, block_hash(block.header), rows)
