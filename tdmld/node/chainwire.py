"""What validators and daemons say to each other about the chain, and how large it may be.

Every message is one canonical Record; `decode` checks the size given here before it parses.
"""

from typing import Annotated

import msgspec

from tdmld.chain.blocks import MAX_VALIDATORS, Block, Certificate, Header, Vote
from tdmld.chain.codec import Hash, Natural, Record, Signature
from tdmld.chain.consensus import MAX_CERTIFICATES
from tdmld.chain.light import MAX_HEADERS, Ancestor
from tdmld.chain.limits import SPEC_BYTES, TRANSACTION_BYTES
from tdmld.chain.turns import Turn

SYNC_BLOCKS = 64
"""Blocks in one answer; more only where a height without its own finalization would be last."""
SYNC_BLOCKS_MAX = 256
SYNC_BYTES = 8 << 20
"""An answer stops after the block that passes this."""
STATE_BYTES = 1 << 20
"""The same for a part of a state, and for turns."""
TURNS = 1024
"""Turns in one answer, at most."""
TX_BATCH = 64
TX_BATCH_BYTES = 128 << 10
"""ANNEX A5: a gossiped batch of transactions."""
GOSSIP_TX_BYTES = TX_BATCH_BYTES + 1024
GOSSIP_BODY_BYTES = 128 << 10
"""Bodies up to this size travel with the gossiped header."""
VOTE_BYTES = 72
"""One vote in a certificate: index, signature, and their headers."""
CERTIFICATE_BYTES = MAX_VALIDATORS * VOTE_BYTES + 64
"""A certificate of everybody's votes."""
GOSSIP_BLOCK_BYTES = GOSSIP_BODY_BYTES + CERTIFICATE_BYTES + 4096
GOSSIP_OFFER_BYTES = SPEC_BYTES + TRANSACTION_BYTES + 64

_Raw = Annotated[bytes, msgspec.Meta(max_length=TRANSACTION_BYTES)]
_Raws = Annotated[tuple[_Raw, ...], msgspec.Meta(max_length=TX_BATCH)]
_Certificates = Annotated[tuple[Certificate, ...], msgspec.Meta(max_length=MAX_CERTIFICATES)]


def consensus_bytes(block_bytes: int, validators: int) -> int:
    """Greatest message on a consensus stream: a full block with the certificates that allow it."""
    return 2 * block_bytes + MAX_CERTIFICATES * (validators * VOTE_BYTES + 64) + (1 << 20)


def blocks_bytes(block_bytes: int) -> int:
    """Greatest answer on a sync stream."""
    return SYNC_BYTES + 2 * block_bytes + (1 << 20)


class Hello(Record, tag="hello", frozen=True):
    """First on a consensus stream, both ways: finalized height and the certificates above it.
    The sender's stored votes and proposals follow as messages of their own."""

    height: Natural
    certificates: _Certificates


class Transactions(Record, tag="transactions", frozen=True):
    """Signed transactions, in an order in which they can be admitted."""

    raws: _Raws


class Proposal(Record, tag="proposal", frozen=True):
    """A block and certificates that its voters may lack; also the answer to a BlockRequest."""

    block: Block
    why: _Certificates


class BlockRequest(Record, tag="block_request", frozen=True):
    """Send the body of this unfinalized block, if you have it."""

    hash: Hash


ConsensusMessage = Hello | Transactions | Proposal | Vote | Certificate | BlockRequest


class SnapshotRequest(Record, tag="snapshot_request", frozen=True):
    """What state can you give? Answered by Snapshot, which shows `checkpoint` in its history."""

    checkpoint: Natural


class Snapshot(Record, tag="snapshot", frozen=True):
    """A state and who vouches for it: the header of its height, the headers that follow it up to
    one that is finalized by the certificate, and what a chain goes on from."""

    header: Header
    mix: Hash
    peaks: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=64)]
    headers: Annotated[tuple[Header, ...], msgspec.Meta(max_length=MAX_HEADERS)]
    certificate: Certificate
    checkpoint: tuple[Hash, Ancestor] | None


class NoSnapshot(Record, tag="no_snapshot", frozen=True):
    """None can be given now; `why` is for the log."""

    why: Annotated[str, msgspec.Meta(max_length=200)]


class TurnsRequest(Record, tag="turns_request", frozen=True):
    """Who validated, from the end of epoch `start` on? Answered by Turns."""

    start: Natural


class Turns(Record, tag="turns", frozen=True):
    """Ends of epochs one after another, about STATE_BYTES of them; none: the epoch is not over."""

    turns: Annotated[tuple[Turn, ...], msgspec.Meta(max_length=TURNS)]


class StateRequest(Record, tag="state_request", frozen=True):
    """The state of the snapshot at `height`, above the key `after`; answered by StateItems."""

    height: Natural
    after: Annotated[bytes, msgspec.Meta(max_length=256)]


class StateItems(Record, tag="state_items", frozen=True):
    """State items in ascending order of keys, about STATE_BYTES of them. `more`: not the last."""

    height: Natural
    items: Annotated[tuple[tuple[bytes, bytes], ...], msgspec.Meta(max_length=STATE_BYTES)]
    more: bool


class BlocksRequest(Record, tag="blocks_request", frozen=True):
    """Final blocks from height `start` on; answered by Blocks."""

    start: Natural
    count: Natural


class Blocks(Record, tag="blocks", frozen=True):
    """Blocks in order, the finalization of the last, the sender's height, and the lowest height
    that it still has."""

    height: Natural
    lowest: Natural
    blocks: Annotated[tuple[Block, ...], msgspec.Meta(max_length=SYNC_BLOCKS_MAX)]
    certificate: Certificate | None


class SpecRequest(Record, tag="spec_request", frozen=True):
    """A job's canonical spec by its id; answered by Spec."""

    spec: Hash


class Spec(Record, tag="spec", frozen=True):
    """The spec's bytes, or none when they are not held."""

    raw: Annotated[bytes, msgspec.Meta(max_length=SPEC_BYTES)]


SyncRequest = (
    BlocksRequest | SpecRequest | Transactions | SnapshotRequest | TurnsRequest | StateRequest
)
"""Transactions on a sync stream are a follower's submission; they are not answered."""
SyncAnswer = Blocks | Spec | Snapshot | NoSnapshot | Turns | StateItems
SYNC_REQUEST_BYTES = TX_BATCH * (TRANSACTION_BYTES + 8) + 64


class Announcement(Record, tag="announcement", frozen=True):
    """Gossip: a final block. `transactions` is None when the body must be fetched."""

    header: Header
    signature: Signature
    certificate: Certificate
    transactions: tuple[_Raw, ...] | None


class OfferNotice(Record, tag="offer_notice", frozen=True):
    """Gossip: an offer (may be empty) and the spec that it names."""

    offer: _Raw
    spec: Annotated[bytes, msgspec.Meta(max_length=SPEC_BYTES)]


class Protocols:
    """Stream protocols and topics of one chain (ANNEX A5)."""

    def __init__(self, chain_id: bytes) -> None:
        base = f"/tdmld/{chain_id.hex()[:8]}"
        self.consensus = f"{base}/consensus/1"
        self.sync = f"{base}/sync/1"
        self.tx = f"{base}/tx/1"
        self.block = f"{base}/block/1"
        self.offer = f"{base}/offer/1"
