"""What of the gossip is true and worth passing on. Each question is asked before anything else
happens to a message, in the event loop; so what a stranger can make for nothing must be refused for
next to nothing, and nobody may get two versions of one thing passed on.
"""

from collections import OrderedDict

from tdmld.chain.blocks import (
    Committee,
    Header,
    block_hash,
    check_finalization,
    check_proposer,
    epoch_of,
    transactions_root,
)
from tdmld.chain.codec import decode
from tdmld.chain.errors import ChainError, DecodeError, InvalidBlock
from tdmld.chain.state import State
from tdmld.chain.transactions import decode_transaction, verify_transaction
from tdmld.node.admission import Admission, has_backing
from tdmld.node.chainwire import (
    GOSSIP_BLOCK_BYTES,
    GOSSIP_OFFER_BYTES,
    GOSSIP_TX_BYTES,
    Announcement,
    OfferNotice,
    Transactions,
)
from tdmld.node.finality import Finality
from tdmld.node.specs import Specs

OLD_HEIGHTS = 16
"""Announcements this far below our head are still passed on."""
COPIES = 2
"""Announcements of one block that are passed on: two validators make one, so that one may be lost.
The same quorum can be put together in many ways."""
MAX_REMEMBERED = 128
"""Announced blocks that are remembered."""


class GossipDoor:
    """Validates the messages of the three topics, whoever published them."""

    def __init__(
        self,
        finality: Finality,
        admission: Admission,
        specs: Specs,
    ) -> None:
        self._finality, self._store = finality, finality.store
        self._admission, self._specs = admission, specs
        self._announced: OrderedDict[bytes, int] = OrderedDict()

    def announcement(self, _: str, raw: bytes) -> bool:
        """Whether a block is final, recent, whole, and not announced enough already."""
        try:
            notice = decode(Announcement, raw, GOSSIP_BLOCK_BYTES)
        except DecodeError:
            return False
        header, body = notice.header, notice.transactions
        blocks = self._store.genesis.parameters.epoch_blocks
        committee = (
            self._store.committee(epoch_of(header.height, blocks)) if header.height else None
        )
        key = block_hash(header)
        times = self._announced.get(key, 0)
        fine = (
            times < COPIES
            and header.height > self._finality.height - OLD_HEIGHTS
            and committee is not None
            and self._is_by_leader(committee, header, notice.signature)
            and (body is None or transactions_root(body) == header.tx_root)
            and check_finalization(committee, header, blocks, notice.certificate)
        )
        if fine:
            self._announced[key] = times + 1
            if len(self._announced) > MAX_REMEMBERED:
                self._announced.popitem(last=False)
        return fine

    def _is_by_leader(self, committee: Committee, header: Header, signature: bytes) -> bool:
        """One signature that no stranger can make, before those of a whole committee."""
        try:
            check_proposer(committee, committee.leader(header.view), header, signature)
        except InvalidBlock:
            return False
        return True

    def transactions(self, _: str, raw: bytes) -> bool:
        """Whether every transaction of a batch could be paid for and is signed for this chain, and
        none takes the place of one that waits here."""
        chain_id, parameters = self._store.chain_id, self._store.genesis.parameters
        try:
            batch = decode(Transactions, raw, GOSSIP_TX_BYTES)
            found = [decode_transaction(raw, chain_id) for raw in batch.raws]
        except ChainError:
            return False
        state, pool = State(self._store.get), self._admission.pool
        return all(
            transaction.id in pool
            or (
                has_backing(transaction, state, parameters)
                and not pool.has_rival(transaction)
                and verify_transaction(transaction, chain_id)
            )
            for transaction in found
        )

    def offer(self, _: str, raw: bytes) -> bool:
        """Whether a spec comes with a signed offer that could be paid for; then remember it."""
        try:
            return self._specs.hear(decode(OfferNotice, raw, GOSSIP_OFFER_BYTES))
        except DecodeError:
            return False
