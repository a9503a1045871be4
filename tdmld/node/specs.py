"""Job specs by id: those named on chain are on disk, those just heard of wait in memory.

A spec is taken from gossip only with a signed offer that names it, and reaches the disk when that
offer is final, so that strangers cannot fill it.
"""

from collections import OrderedDict

from tdmld.chain.crypto import sha256
from tdmld.chain.errors import ChainError
from tdmld.chain.transactions import Offer, decode_transaction, verify_transaction
from tdmld.node.chainwire import OfferNotice
from tdmld.node.store import AppliedBlock, ChainStore

MAX_HEARD = 256
"""Specs in memory: at most 16 MiB."""


class Specs:
    """What this node knows of specs."""

    def __init__(self, store: ChainStore) -> None:
        self._store = store
        self._heard: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, spec: bytes) -> bytes | None:
        return self._heard.get(spec) or self._store.get_spec(spec)

    def put(self, raw: bytes) -> bytes:
        """Keep a spec for good; its id."""
        return self._store.put_spec(raw)

    def hear(self, notice: OfferNotice) -> bool:
        """Remember a gossiped spec; False when its offer is not signed or names another."""
        try:
            offer = decode_transaction(notice.offer, self._store.chain_id)
        except ChainError:
            return False
        spec = sha256(notice.spec)
        if not isinstance(offer.payload, Offer) or offer.payload.spec_id != spec:
            return False
        if not verify_transaction(offer, self._store.chain_id):
            return False
        self._heard[spec] = notice.spec
        while len(self._heard) > MAX_HEARD:
            self._heard.popitem(last=False)
        return True

    def executed(self, applied: AppliedBlock) -> None:
        """An offer is final: keep its spec."""
        if not self._heard:
            return
        for raw in applied.block.transactions:
            offer = decode_transaction(raw, self._store.chain_id).payload
            if isinstance(offer, Offer):
                heard = self._heard.pop(offer.spec_id, None)
                if heard is not None:
                    self._store.put_spec(heard)
