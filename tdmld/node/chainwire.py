"""What validators and daemons say to each other about the chain, and how large it may be.

Every message is one canonical Record; `decode` checks the size given here before it parses.
"""

from typing import Annotated

import msgspec

from tdmld.chain.blocks import MAX_VALIDATORS, Block, Certificate, Header, Vote
from tdmld.chain.codec import Hash, Natural, Record, Signature
from tdmld.chain.consensus import MAX_CERTIFICATES
from tdmld.chain.limits import SPEC_BYTES, TRANSACTION_BYTES

SYNC_BLOCKS = 64
"""Blocks in one answer; more only where a height without its own finalization would be last."""
SYNC_BLOCKS_MAX = 256
SYNC_BYTES = 8 << 20
"""An answer stops after the block that passes this."""
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


class BlocksRequest(Record, tag="blocks_request", frozen=True):
    """Final blocks from height `start` on; answered by Blocks."""

    start: Natural
    count: Natural


class Blocks(Record, tag="blocks", frozen=True):
    """Blocks in order, the finalization of the last, and the sender's height."""

    height: Natural
    blocks: Annotated[tuple[Block, ...], msgspec.Meta(max_length=SYNC_BLOCKS_MAX)]
    certificate: Certificate | None


class SpecRequest(Record, tag="spec_request", frozen=True):
    """A job's canonical spec by its id; answered by Spec."""

    spec: Hash


class Spec(Record, tag="spec", frozen=True):
    """The spec's bytes, or none when they are not held."""

    raw: Annotated[bytes, msgspec.Meta(max_length=SPEC_BYTES)]


SyncRequest = BlocksRequest | SpecRequest | Transactions
"""Transactions on a sync stream are a follower's submission; they are not answered."""
SyncAnswer = Blocks | Spec
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
