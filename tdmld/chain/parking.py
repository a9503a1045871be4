"""Nodes' transactions that came before the block they answer.

Nodes execute blocks a moment apart: a worker's answer to the block it just saw may reach a
validator that has not executed it. What a registered node signed about a job is kept aside for a
few blocks and tried again after each, once its job is known.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from tdmld.chain.state import State
from tdmld.chain.transactions import FREE_KINDS, Transaction

PARKED_BLOCKS = 10
"""Heights for which a node's transaction is kept although it fails."""


class _Parked(NamedTuple):
    transaction: Transaction
    job: bytes
    since: int


class Parking:
    """At most `most`, and `each` of one node: its nodes repeat what was not kept."""

    def __init__(self, most: int, each: int) -> None:
        self._most, self._each = most, each
        self._parked: dict[bytes, _Parked] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def park(self, transaction: Transaction, state: State, height: int) -> None:
        """Keep one that failed, if it may have been early and there is room."""
        payload = transaction.payload
        if (
            transaction.by_owner
            or isinstance(payload, FREE_KINDS)
            or transaction.id in self._parked
            or len(self._parked) >= self._most
            or state.node(transaction.signer) is None
        ):
            return
        of_node = sum(p.transaction.signer == transaction.signer for p in self._parked.values())
        if of_node < self._each:
            job: bytes = getattr(payload, "job", b"")
            self._parked[transaction.id] = _Parked(transaction, job, height)

    def ready(self, state: State) -> Iterator[Transaction]:
        """Those whose jobs are known. While this runs others may be taken out."""
        for parked in list(self._parked.values()):
            job = state.job(parked.job)
            if job is not None and not job.final:
                yield parked.transaction

    def remove(self, ids: Collection[bytes]) -> None:
        if self._parked:
            for transaction_id in ids:
                self._parked.pop(transaction_id, None)

    def expire(self, height: int) -> None:
        """Forget what has waited for PARKED_BLOCKS."""
        for key, parked in list(self._parked.items()):
            if parked.since < height - PARKED_BLOCKS:
                del self._parked[key]
