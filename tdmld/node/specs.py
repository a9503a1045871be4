"""Job specs by id: those named on chain are on disk, those just heard of wait in memory.

A spec is taken from gossip only with a signed offer that names it and that its signer could pay
for, one for each of its next nonces; it reaches the disk when that offer has succeeded. So
strangers can fill neither.
"""

from collections import OrderedDict
from dataclasses import dataclass

from tdmld.chain.crypto import sha256
from tdmld.chain.errors import ChainError
from tdmld.chain.events import JobOffered
from tdmld.chain.mempool import debit
from tdmld.chain.state import State
from tdmld.chain.transactions import Offer, decode_transaction, verify_transaction
from tdmld.node.admission import has_backing
from tdmld.node.chainwire import OfferNotice
from tdmld.node.store import AppliedBlock, ChainStore

MAX_HEARD = 256
"""Specs in memory: at most 16 MiB."""


@dataclass(frozen=True, slots=True)
class _Heard:
    raw: bytes
    signer: bytes
    nonce: int


class Specs:
    """What this node knows of specs."""

    def __init__(self, store: ChainStore) -> None:
        self._store = store
        self._heard: OrderedDict[bytes, _Heard] = OrderedDict()

    def get(self, spec: bytes) -> bytes | None:
        heard = self._heard.get(spec)
        return self._store.get_spec(spec) if heard is None else heard.raw

    def put(self, raw: bytes) -> bytes:
        """Keep a spec for good; its id."""
        return self._store.put_spec(raw)

    def hear(self, notice: OfferNotice) -> bool:
        """Remember a gossiped spec, and say whether to pass it on: when its offer names it, is
        signed, could be paid for, and is not another one in the place of one that was heard."""
        spec = sha256(notice.spec)
        try:
            offer = decode_transaction(notice.offer, self._store.chain_id)
        except ChainError:
            return False
        if not isinstance(offer.payload, Offer) or offer.payload.spec_id != spec:
            return False
        state, parameters = State(self._store.get), self._store.genesis.parameters
        place = (offer.signer, offer.nonce)
        fine = (
            has_backing(offer, state, parameters)
            and debit(offer, parameters) <= state.account(offer.signer).balance
            and all((heard.signer, heard.nonce) != place for heard in self._heard.values())
            and verify_transaction(offer, self._store.chain_id)
        )
        if fine:
            self._heard[spec] = _Heard(notice.spec, *place)
            if len(self._heard) > MAX_HEARD:
                self._heard.popitem(last=False)
        return fine

    def executed(self, applied: AppliedBlock) -> None:
        """An offer has succeeded: keep its spec."""
        for event in applied.events:
            if isinstance(event, JobOffered):
                job = State(self._store.get).job(event.job)
                heard = None if job is None else self._heard.pop(job.spec_id, None)
                if heard is not None:
                    self._store.put_spec(heard.raw)
