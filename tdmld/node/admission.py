"""How transactions enter the pool, and how they spread to everybody who could propose them.

    decode -> signature (a thread, for more than a few) -> look again at the state -> pool
    -> all validators by their streams; a follower also by gossip

Checks against the state come after the last await: the state moves meanwhile. Arrival order is
kept, since nonces must be contiguous. What was submitted here is said again every RESEND seconds
until it is executed or can never be.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import trio

from tdmld.chain.crypto import sha256
from tdmld.chain.errors import ChainError, InvalidTransaction
from tdmld.chain.limits import TRANSACTION_BYTES
from tdmld.chain.mempool import Mempool
from tdmld.chain.state import State
from tdmld.chain.transactions import Transaction, decode_transaction, verify_transaction
from tdmld.node.chainerrors import ServiceBusy
from tdmld.node.chainwire import TX_BATCH, TX_BATCH_BYTES
from tdmld.node.finality import Finality
from tdmld.node.store import AppliedBlock

log = logging.getLogger(__name__)

INLINE_SIGNATURES = 4
"""Signatures (41 us each) checked in the event loop; more go to a thread."""
MAX_WAITING = 256
"""Batches waiting for admission; above it a peer's batch is dropped (its origin repeats it)."""
MAX_OWN = 4096
"""Transactions submitted here and not executed yet."""
RESEND = 5.0

Spread = Callable[[Sequence[bytes]], Awaitable[None]]


def verified(transactions: Sequence[Transaction], chain_id: bytes) -> list[bool]:
    """Whether each signature is good. libsodium releases the interpreter lock: fit for a thread."""
    return [verify_transaction(transaction, chain_id) for transaction in transactions]


class Admission:
    """The pool and its door. `changed` is called when the pool grows."""

    def __init__(
        self, finality: Finality, pool: Mempool, spread: Spread, changed: Callable[[], None]
    ) -> None:
        self._finality = finality
        self._store = finality.store
        self._chain_id = finality.store.chain_id
        self.pool = pool
        self._spread = spread
        self._changed = changed
        self._lock = trio.Lock()
        self._waiting = 0
        self._own: dict[bytes, bytes] = {}
        self._outgoing: list[bytes] = []
        self._outgoing_news = trio.Event()
        finality.on_executed.append(self._executed)

    # ---- in ----------------------------------------------------------------------------------

    async def submit(self, raw: bytes) -> bytes:
        """Admit one of our own; its id. Raises DecodeError, InvalidTransaction or ServiceBusy.

        After a cancellation it may or may not have been admitted.
        """
        transaction = decode_transaction(raw, self._chain_id)
        if self._known(transaction.id) or self._store.receipt(transaction.id) is not None:
            return transaction.id
        if len(self._own) >= MAX_OWN:
            raise ServiceBusy(f"{MAX_OWN} submitted transactions are waiting: try again later")
        async with self._lock:
            await self._admit([transaction], strict=True)
        self._own[transaction.id] = transaction.raw
        self._send([transaction.raw])
        return transaction.id

    async def receive(self, raws: Iterable[bytes], *, spread: bool) -> None:
        """Admit what a peer sent, leaving out what is bad or known. `spread`: tell validators."""
        if self._waiting >= MAX_WAITING:
            return
        candidates = []
        for raw in raws:
            if self._known(sha256(raw)):
                continue
            try:
                candidates.append(decode_transaction(raw, self._chain_id))
            except ChainError as error:
                log.info("a peer sent a bad transaction: %s", error)
        if not candidates:
            return
        self._waiting += 1
        try:
            async with self._lock:
                admitted = await self._admit(candidates, strict=False)
        finally:
            self._waiting -= 1
        if spread:
            self._send([transaction.raw for transaction in admitted])

    async def _admit(
        self, transactions: Sequence[Transaction], *, strict: bool
    ) -> list[Transaction]:
        if len(transactions) > INLINE_SIGNATURES:
            good = await trio.to_thread.run_sync(verified, transactions, self._chain_id)
        else:
            good = verified(transactions, self._chain_id)
        state, admitted = State(self._store.get), []
        for transaction, fine in zip(transactions, good, strict=True):
            try:
                if not fine:
                    raise InvalidTransaction("signature: it is not the signer's")
                if self._known(transaction.id):
                    continue
                self.pool.admit(transaction, state, self._store.height)
            except InvalidTransaction as error:
                if strict:
                    raise
                log.debug("not admitted: %s", error)
                continue
            admitted.append(transaction)
        if admitted:
            self._changed()
        return admitted

    def _known(self, transaction: bytes) -> bool:
        return transaction in self.pool or transaction in self._finality.limbo

    # ---- out ---------------------------------------------------------------------------------

    def _send(self, raws: Sequence[bytes]) -> None:
        self._outgoing += raws
        self._outgoing_news.set()

    async def run(self) -> None:
        """Spread what was admitted, and repeat what was submitted here, for ever."""
        while True:
            with trio.move_on_after(RESEND) as quiet:
                await self._outgoing_news.wait()
            self._outgoing_news = trio.Event()
            if quiet.cancelled_caught:
                self._outgoing = list(self._own.values())
            outgoing, self._outgoing = self._outgoing, []
            for batch in batches(outgoing):
                await self._spread(batch)

    # ---- the pool's life ---------------------------------------------------------------------

    def select(self, exclude: Collection[bytes]) -> list[Transaction]:
        """What a block would carry now, in order."""
        parameters = self._store.genesis.parameters
        taken = self.pool.select(
            parameters.block_bytes,
            parameters.block_transactions,
            self._finality.limbo.union(exclude),
        )
        return list(taken)

    def waiting(self, exclude: Collection[bytes]) -> bool:
        """Whether the pool holds something that is not in `exclude`."""
        ours = self._finality.limbo.union(exclude)
        return bool(self.pool.select(TRANSACTION_BYTES, 1, ours)) if len(self.pool) else False

    def _executed(self, applied: AppliedBlock) -> None:
        """From finality to here the block's transactions were in limbo: in the pool, so that those
        behind them are judged rightly, but never selected."""
        ids = [sha256(raw) for raw in applied.block.transactions]
        self.pool.remove(ids)
        revived = self.pool.refresh(State(self._store.get), applied.height)
        if revived:
            self._send([transaction.raw for transaction in revived])
            self._changed()
        if self._own:
            self._own = {key: raw for key, raw in self._own.items() if self._known(key)}


def batches(raws: Sequence[bytes]) -> Iterable[list[bytes]]:
    """Split into batches of at most TX_BATCH transactions and TX_BATCH_BYTES."""
    batch: list[bytes] = []
    size = 0
    for raw in raws:
        if batch and (len(batch) == TX_BATCH or size + len(raw) > TX_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(raw)
        size += len(raw)
    if batch:
        yield batch
