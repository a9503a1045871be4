"""Long chains by hand: every block is final by itself, or by the next.

`GENESIS` has one validator for ever. `CHANGING` has short epochs and five validators of six stakes:
in every epoch one unbinds and leaves, and who left before binds and comes back (`churn`).
"""

from collections.abc import Sequence
from functools import cache

from tdmld.chain import vrf
from tdmld.chain.accounts import (
    ValidatorSet,
)
from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    Header,
    Kind,
    beacon_input,
    block_hash,
    ends_epoch,
    epoch_of,
    sign_block,
    sign_vote,
    start_view,
    transactions_root,
    turn,
)
from tdmld.chain.crypto import KeyPair, address, sha256
from tdmld.chain.genesis import Genesis, chain_id, genesis_from_document
from tdmld.chain.leader import Rotation
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Bond,
    Payload,
    Transfer,
    Unbond,
    Withdraw,
    sign_transaction,
)
from tdmld.node.store import ChainStore

VALIDATOR = KeyPair(b"\x61" * 32)
OWNER = KeyPair(b"\x62" * 32)
OTHERS = [KeyPair(sha256(bytes([i, 8]))) for i in range(5)]
NODES = [VALIDATOR, *(KeyPair(sha256(bytes([i, 9]))) for i in range(5))]
KEYS = {key.public: key for key in NODES}
PAYEES = [KeyPair(sha256(bytes([i, 7]))).public for i in range(200)]
STAKE = 100


def make_genesis(
    unbonding: tuple[int, int] = (10, 1), validators: int = 1, epoch_blocks: int = 500
) -> Genesis:
    owners = [OWNER, *OTHERS[: validators - 1]]
    return genesis_from_document(
        {
            "chain": f"alone-{validators}",
            "time": "2026-01-01T00:00:00Z",
            "accounts": [[owner.address, 10**12] for owner in owners],
            "validators": [
                [owner.address, node.address, STAKE]
                for owner, node in zip(owners, NODES, strict=False)
            ],
            "parameters": {
                "unbonding": list(unbonding),
                "interval_ms": 10,
                "epoch_blocks": epoch_blocks,
            },
        }
    )


GENESIS = make_genesis()
CHAIN = chain_id(GENESIS)
CHANGING = make_genesis(validators=6, epoch_blocks=5)
CHANGING_PAYEE = address(PAYEES[7])
"""Who is paid in block 8 of it (see `grow`)."""


def pay(nonce: int, chain: bytes = CHAIN) -> bytes:
    to = PAYEES[nonce % len(PAYEES)]
    return sign_transaction(OWNER, chain, Transfer(to, 1 + nonce), nonce=nonce, fee=10)


def churn(store: ChainStore) -> list[bytes]:
    """What changes the validators: of five owners, one leaves in every epoch and one comes back."""
    state, leaves = State(store.get), OTHERS[store.epoch % 5]
    said: list[tuple[KeyPair, Payload]] = []
    stake = state.account(leaves.public).vote_stake
    if stake:
        said += [(leaves, Withdraw()), (leaves, Unbond("vote", stake))]
    if store.epoch:
        said.append((OTHERS[(store.epoch - 1) % 5], Bond("vote", STAKE)))
    nonces = {owner.public: state.account(owner.public).nonce for owner, _ in said}
    raws = []
    for owner, payload in said:
        nonce = nonces[owner.public]
        nonces[owner.public] += 1
        raws.append(sign_transaction(owner, store.chain_id, payload, nonce=nonce, fee=10))
    return raws


@cache
def _rotation(committee: Committee) -> Rotation:
    return Rotation(committee.stakes, committee.leads)


def extend(
    store: ChainStore,
    body: Sequence[bytes] = (),
    step_ms: int = 100,
    final: bool = True,
    **changes: object,
) -> Block:
    """One more block; `final`: by itself, as an epoch's last block always is."""
    head, epoch_blocks = store.head, store.genesis.parameters.epoch_blocks
    root, committee = store.history_root(head.height), store.committee(store.epoch)
    assert root is not None
    assert committee is not None
    view = start_view(head.height, head.view, epoch_blocks) + 1
    leader = KEYS[committee.nodes[_rotation(committee).leader(turn(view))]]
    validators, next_validators = store.set_ids(store.epoch)
    alpha = beacon_input(store.chain_id, head.mix, head.height + 1)
    header = Header(
        protocol=1,
        height=head.height + 1,
        view=view,
        parent_view=head.view,
        parent=head.hash,
        time_ms=head.header.time_ms + step_ms,
        proposer=leader.public,
        proof=vrf.prove(leader.seed, alpha),
        tx_root=transactions_root(body),
        state_height=head.height,
        history_root=root,
        state_root=head.state_root,
        validators=validators,
        next_validators=next_validators,
    )
    block = sign_block(leader, store.chain_id, header, body)
    last = ends_epoch(header.height, epoch_blocks)
    store.apply(block, finalization(store, header) if final or last else None)
    return block


def finalization(store: ChainStore, header: Header) -> Certificate:
    """By all validators. Every other epoch ends with a later view than its last block's."""
    epoch_blocks = store.genesis.parameters.epoch_blocks
    late = header.height % (2 * epoch_blocks) == 0
    chosen = State(store.get).validator_set(epoch_of(header.height, epoch_blocks))
    assert chosen is not None
    return certify(store.chain_id, header, chosen, view=header.view + late)


def certify(
    chain: bytes,
    header: Header,
    chosen: ValidatorSet,
    *,
    view: int = 0,
    kind: Kind = Kind.FINALIZE,
    voters: Sequence[int] | None = None,
) -> Certificate:
    """Of any set, for any header."""
    key, view = block_hash(header), view or header.view
    rows = [
        (voter, sign_vote(KEYS[seat.node], chain, kind, view, key, voter).signature)
        for voter, seat in enumerate(chosen.seats)
        if voters is None or voter in voters
    ]
    return Certificate(kind, view, key, tuple(rows))


def grow(store: ChainStore, blocks: int, every: int = 1) -> None:
    """Blocks with one payment in each `every`-th, and one that closes the chain. With several
    validators these change in every epoch, and two blocks of three are final by descendants."""
    start, changing = store.height, len(store.genesis.validators) > 1
    epoch_blocks = store.genesis.parameters.epoch_blocks
    for height in range(start, start + blocks - 1):
        body = [pay(height // every, store.chain_id)] if height % every == 0 else []
        if changing and height % epoch_blocks == 0:
            body += churn(store)
        extend(store, body, final=not changing or height % 3 == 0)
    extend(store)
