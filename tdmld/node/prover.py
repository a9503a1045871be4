"""Makes proof bundles (`chain.light`) from a node's store."""

import trio

from tdmld.chain.accounts import (
    ValidatorSet,
)
from tdmld.chain.blocks import Header, ends_epoch, epoch_of
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import DecodeError
from tdmld.chain.history import NotHeld, outcome_leaves
from tdmld.chain.light import (
    BUNDLE_BYTES,
    Ancestor,
    Anchor,
    BlockClaim,
    Bundle,
    StateClaim,
    TransactionClaim,
    bundle_bytes,
    state_key,
)
from tdmld.chain.merkle import proof as list_proof
from tdmld.chain.state import State
from tdmld.chain.turns import MAX_TURNS, Turn
from tdmld.node.chainerrors import NotProvable
from tdmld.node.finality import Finality
from tdmld.node.pinning import Pinned, pin
from tdmld.node.store import ChainStore, StoreView

SECONDS = 20.0
"""How long a proof waits for the chain to commit the present state."""


async def prove(finality: Finality, kind: str, name: str, checkpoint: int = 0) -> Bundle:
    """A bundle that shows `kind` `name` (see `light.state_key`, or transaction ID, block HEIGHT),
    from genesis, or from the block of height `checkpoint`.

    Waits for the block that commits the present state; on an idle chain it is there. Raises
    DecodeError for a name that means nothing, NotProvable otherwise. Cancellation leaves nothing.
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
        headers = pinned.headers if height is None else pinned.headers[-1:]
        last = headers[-1]
        claim: StateClaim | TransactionClaim | BlockClaim
        if height is None:
            claim = StateClaim(key, with_state.get(key) or b"", with_state.prove(key))
        elif kind == "block":
            claim = BlockClaim(_header(store, height), _place(store, height, last))
        else:
            claim = _transaction(store, bytes.fromhex(name), height, last)
        anchor = _anchor(store, checkpoint, headers) if checkpoint else None
        # As many as there are epochs, in megabytes: not in the event loop, where votes wait.
        turns = await trio.to_thread.run_sync(_turns, store, last, anchor)
    except NotHeld as error:
        raise NotProvable(
            f"this node began with a snapshot at height {store.base} and cannot prove what was "
            "before: ask another one"
        ) from error
    finally:
        pinned.view.close()
    bundle = Bundle(store.chain_id, anchor, turns, headers, pinned.certificate, claim)
    size = len(await trio.to_thread.run_sync(bundle_bytes, bundle))
    if size > BUNDLE_BYTES:
        raise NotProvable(f"the proof has {size} bytes, limit {BUNDLE_BYTES}: {_NEWER}")
    return bundle


_NEWER = "name a newer block that you trust, with --checkpoint HEIGHT:HASH"


def _anchor(store: ChainStore, height: int, headers: tuple[Header, ...]) -> Anchor:
    """A trusted block, and the validators that sign on from it."""
    last, epoch_blocks = headers[-1], store.genesis.parameters.epoch_blocks
    if height > last.height:
        raise NotProvable(
            f"the checkpoint {height} is above {last.height}, the last final block here: ask again "
            "when this node has it"
        )
    place = _place(store, height, last) if height < headers[0].height else None
    header = next((one for one in headers if one.height == height), None)
    if header is None:
        header = _kept_header(store, height)
    begins = epoch_of(height, epoch_blocks)
    epoch = min(begins + 1, epoch_of(last.height, epoch_blocks))
    return Anchor(header, place, _validators(store, epoch))


def _turns(store: ChainStore, last: Header, anchor: Anchor | None) -> tuple[Turn, ...]:
    """From genesis' validators, or the anchor's, to those of the last header's epoch."""
    epoch = epoch_of(last.height, store.genesis.parameters.epoch_blocks)
    first = 1 if anchor is None else anchor.validators.epoch
    if epoch - first > MAX_TURNS:
        raise NotProvable(
            f"{epoch - first} epochs lie between, and a proof goes over {MAX_TURNS}: {_NEWER}"
        )
    found = []
    for one in range(first, epoch):
        turn = store.turn(one)
        if turn is None:
            raise NotProvable(f"this node does not hold the end of epoch {one}: ask another one")
        found.append(turn)
    return tuple(found)


def _validators(store: ChainStore, epoch: int) -> ValidatorSet:
    chosen = State(store.get).validator_set(epoch)
    if chosen is None:
        raise NotProvable(f"the validators of epoch {epoch} are not known here")
    return chosen


def _kept_header(store: ChainStore, height: int) -> Header:
    """A header of before, of which that of an epoch's last block is never forgotten."""
    epoch_blocks = store.genesis.parameters.epoch_blocks
    if ends_epoch(height, epoch_blocks):
        end = store.epoch_end(epoch_of(height, epoch_blocks))
        if end is not None:
            return end.header
    return _header(store, height)


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
