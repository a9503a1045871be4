"""Makes proof bundles (`chain.light`) from a node's store."""

import trio

from tdmld.chain.blocks import Header
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import DecodeError
from tdmld.chain.history import NotHeld, outcome_leaves
from tdmld.chain.light import (
    Ancestor,
    BlockClaim,
    Bundle,
    StateClaim,
    TransactionClaim,
    state_key,
)
from tdmld.chain.merkle import proof as list_proof
from tdmld.node.chainerrors import NotProvable
from tdmld.node.finality import Finality
from tdmld.node.pinning import Pinned, pin
from tdmld.node.store import ChainStore, StoreView

SECONDS = 20.0
"""How long a proof waits for the chain to commit the present state."""


async def prove(finality: Finality, kind: str, name: str, checkpoint: int = 0) -> Bundle:
    """A bundle that shows `kind` `name` (see `light.state_key`, or transaction ID, block HEIGHT),
    and the block `checkpoint` in its history.

    Waits for the block that commits the present state; on an idle chain it is there. Raises
    DecodeError for a name that means nothing, NotProvable otherwise.
    """
    store = finality.store
    height = None
    key = b""
    if kind == "transaction":
        height = _block_of(store, name)
    elif kind == "block":
        if not name.isascii() or not name.isdigit():
            raise DecodeError(f"{name!r} is not a height")
        height = int(name)
        if store.block(height) is None:
            raise NotProvable(_absent(store, height))
    else:
        key = state_key(kind, name)
    pinned = await _pin(finality, height, checkpoint)
    with_state = pinned.view
    try:
        last = pinned.headers[-1]
        claim: StateClaim | TransactionClaim | BlockClaim
        if height is None:
            claim = StateClaim(key, with_state.get(key) or b"", with_state.prove(key))
        elif kind == "block":
            claim = BlockClaim(_header(store, height), _place(store, height, last))
        else:
            claim = _transaction(store, bytes.fromhex(name), height, last)
        place = None
        if checkpoint and checkpoint < pinned.headers[0].height:
            place = _place(store, checkpoint, last)
    except NotHeld as error:
        raise NotProvable(
            f"this node began with a snapshot at height {store.base} and cannot prove what was "
            "before: ask another one"
        ) from error
    finally:
        pinned.view.close()
    return Bundle(store.chain_id, pinned.headers, pinned.certificate, place, claim)


async def _pin(finality: Finality, height: int | None, checkpoint: int) -> Pinned[StoreView]:
    """A pinned view whose last header's history covers `height` and the checkpoint."""
    with trio.move_on_after(SECONDS):
        while True:
            pinned = await pin(finality, finality.store.view)
            first, last = pinned.headers[0], pinned.headers[-1]
            covered = height is None or height <= last.state_height
            if covered and (checkpoint <= last.state_height or checkpoint >= first.height):
                return pinned
            pinned.view.close()
            with trio.move_on_after(0.1):
                await finality.room()
                await trio.sleep(0.1)
    raise NotProvable(
        f"no block commits the present state of height {finality.store.height} within "
        f"{SECONDS:.0f} seconds: the chain does not go on, or this node is cut off"
    )


def _block_of(store: ChainStore, name: str) -> int:
    try:
        transaction = bytes.fromhex(name)
    except ValueError as error:
        raise DecodeError(f"{name!r} is not the id of a transaction: {error}") from error
    receipt = store.receipt(transaction)
    if receipt is None:
        raise NotProvable(f"no final block that this node executed has the transaction {name}")
    if store.block(receipt.height) is None:
        raise NotProvable(_absent(store, receipt.height))
    return receipt.height


def _absent(store: ChainStore, height: int) -> str:
    return (
        f"block {height} is not held here: this node has {store.lowest} to {store.height}; ask "
        "one that keeps all blocks"
    )


def _header(store: ChainStore, height: int) -> Header:
    block = store.block(height)
    if block is None:
        raise NotProvable(_absent(store, height))
    return block.header


def _place(store: ChainStore, height: int, last: Header) -> Ancestor:
    """Where a block stands in the history of `last`."""
    leaf = store.history_leaf(height)
    if leaf is None:
        raise NotHeld(height)
    return Ancestor(height, leaf[1], store.history_proof(height, last.state_height))


def _transaction(
    store: ChainStore, transaction: bytes, height: int, last: Header
) -> TransactionClaim:
    block, outcomes = store.block(height), store.outcomes(height)
    if block is None or outcomes is None:
        raise NotProvable(_absent(store, height))
    ids = [sha256(raw) for raw in block.transactions]
    found = [n for n, one in enumerate(ids) if one == transaction]
    index = next((n for n in found if outcomes[n].ok), found[0])
    leaves = outcome_leaves([(one, what.ok) for one, what in zip(ids, outcomes, strict=True)])
    return TransactionClaim(
        header=block.header,
        raw=block.transactions[index],
        ok=outcomes[index].ok,
        index=index,
        count=len(ids),
        siblings=list_proof(leaves, index),
        place=_place(store, height, last),
    )
