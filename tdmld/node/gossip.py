"""What of the gossip is true and worth passing on. Each question is asked before anything else
happens to a message, in the event loop; so what a stranger can make for nothing must be refused for
next to nothing, and nobody may get two versions of one thing passed on, unless it pays for both.

The first argument of each question is who handed the message to us. It has asked itself the same
before: what is false costs it much of its allowance. True: pass it on. None: not from us, but
another honest node may see it otherwise. False: none would; the forwarder's score pays for it.
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
from tdmld.chain.errors import ChainError, DecodeError, InvalidBlock, InvalidTransaction
from tdmld.chain.state import State
from tdmld.chain.transactions import EVIDENCE_KINDS, Transaction, decode_transaction
from tdmld.node.admission import (
    FORGED,
    LOOK,
    REFUSED,
    SIGNATURE,
    TRIAL,
    Admission,
    has_backing,
    work_of,
)
from tdmld.node.chainwire import (
    GOSSIP_BLOCK_BYTES,
    GOSSIP_OFFER_BYTES,
    GOSSIP_TX_BYTES,
    Announcement,
    OfferNotice,
    Transactions,
)
from tdmld.node.fairness import Allowance, Meter
from tdmld.node.finality import Finality
from tdmld.node.specs import Specs

OLD_HEIGHTS = 16
"""Announcements this far below our head are still passed on."""
COPIES = 2
"""Announcements of one block that are passed on: two validators make one when the first seems lost.
The same quorum can be put together in many ways."""
MAX_REMEMBERED = 128
"""Announced blocks that are remembered."""
MAX_PASSED = 8192
"""Nonces of owners for which it is remembered what was passed on."""
EARLY = Allowance(work=0.5, size=1 << 20, burst=32.0)
"""A node's transactions that fail here, since it has seen a block more than we: 16 at once are
passed on unproven, then one in two seconds. They are free, and a node is registered for a fee."""


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
        self._passed: OrderedDict[tuple[bytes, int], Transaction] = OrderedDict()
        """(owner, nonce) -> the last version that was passed on."""
        self._early = Meter(EARLY)

    def heard(self, block: bytes) -> bool:
        """Whether an announcement of a block was passed on lately."""
        return block in self._announced

    def announcement(self, _: str, raw: bytes) -> bool | None:
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
        old = header.height <= self._finality.height - OLD_HEIGHTS
        if times >= COPIES or old or committee is None:
            return None
        fine = (
            self._is_by_leader(committee, header, notice.signature)
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

    def transactions(self, forwarder: str, raw: bytes) -> bool | None:
        """Whether every transaction of a batch could be paid for and is signed for this chain, and
        none takes the place of another one without paying for that."""
        chain_id, peers = self._store.chain_id, self._admission.peers
        if not peers.open(forwarder, len(raw)):
            return None
        try:
            batch = decode(Transactions, raw, GOSSIP_TX_BYTES)
            found = [decode_transaction(raw, chain_id) for raw in batch.raws]
        except ChainError:
            peers.charge(forwarder, TRIAL * REFUSED)
            return False
        state = State(self._store.get)
        peers.charge(forwarder, LOOK * len(found))
        verdicts = (self._passes(forwarder, transaction, state) for transaction in found)
        return next((verdict for verdict in verdicts if not verdict), True)

    def _passes(self, forwarder: str, transaction: Transaction, state: State) -> bool | None:
        admission, parameters = self._admission, self._store.genesis.parameters
        if transaction.id in admission.pool:
            return True
        fine = has_backing(transaction, state, parameters) and self._is_paid_for(transaction)
        if not fine:
            admission.peers.charge(forwarder, LOOK * REFUSED)
            return None
        admission.peers.charge(forwarder, SIGNATURE)
        if not admission.signed(transaction):
            admission.peers.charge(forwarder, SIGNATURE * FORGED)
            return False
        if not transaction.by_owner:
            return self._is_timely(forwarder, transaction, state) or None
        self._passed[transaction.signer, transaction.nonce] = transaction
        if len(self._passed) > MAX_PASSED:
            self._passed.popitem(last=False)
        return True

    def _is_paid_for(self, transaction: Transaction) -> bool:
        """Whether it pays for an earlier version too, if there is one that may yet succeed."""
        pool, height = self._admission.pool, self._store.height
        others = (
            pool.rival(transaction),
            self._passed.get((transaction.signer, transaction.nonce)),
        )
        return not transaction.by_owner or all(
            other is None
            or other.id == transaction.id
            or 0 < other.expiry <= height
            or transaction.fee >= pool.fee_to_replace(other)
            for other in others
        )

    def _is_timely(self, forwarder: str, transaction: Transaction, state: State) -> bool:
        """Whether what a node sends for no fee succeeds here, or may at least have come early."""
        peers = self._admission.peers
        try:
            self._admission.pool.check(transaction, state, self._store.height)
        except InvalidTransaction:
            evidence = isinstance(transaction.payload, EVIDENCE_KINDS)
            peers.charge(forwarder, work_of(transaction) * REFUSED)
            signer = transaction.signer.hex()
            if evidence or not self._early.open(signer, len(transaction.raw)):
                return False
            self._early.charge(signer, 1.0)
        return True

    def offer(self, forwarder: str, raw: bytes) -> bool | None:
        """Whether a spec comes with a signed offer that could be paid for; then remember it."""
        peers = self._admission.peers
        if not peers.open(forwarder, len(raw)):
            return None
        try:
            fine: bool | None = (
                self._specs.hear(decode(OfferNotice, raw, GOSSIP_OFFER_BYTES)) or None
            )
        except DecodeError:
            fine = False
        peers.charge(forwarder, (LOOK + SIGNATURE) * (1 if fine else REFUSED))
        return fine
