"""How transactions enter the pool, and how they spread to everybody who could propose them.

    decode -> could its signer pay? -> signature (in slices)
    -> look again at the state -> pool -> all validators by their streams; a follower also by gossip

What a stranger sends costs us a decoding and a look at one account, unless somebody stands behind
it; and of each peer only a few batches wait. Checks against the state come after the last await:
the state moves meanwhile. Arrival order is kept, since nonces must be contiguous. What was
submitted here is said again every RESEND seconds until it is executed or can never be.
"""

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import trio

from tdmld.chain.crypto import sha256
from tdmld.chain.errors import ChainError, InvalidTransaction
from tdmld.chain.genesis import Parameters
from tdmld.chain.mempool import PER_OWNER, Mempool
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Return,
    Transaction,
    decode_transaction,
    verify_transaction,
)
from tdmld.node.chainerrors import ServiceBusy
from tdmld.node.chainwire import TX_BATCH, TX_BATCH_BYTES
from tdmld.node.finality import Finality
from tdmld.node.store import AppliedBlock

log = logging.getLogger(__name__)

SIGNATURES = 32
"""Checked (41 us each) before others get their turn. Not in a thread: it would have to take the
interpreter lock back after each of them, from a loop that holds it for milliseconds."""
MAX_WAITING = 256
"""Batches waiting for admission; above it a peer's batch is dropped (its origin repeats it)."""
MAX_WAITING_EACH = 8
"""Of them, batches of one peer."""
MAX_QUEUED_BYTES = 2 << 20
"""Transactions of one other validator that wait for admission; above it they are dropped likewise:
a second's work at most, and what one of them floods is not taken out of another's."""
REMEMBERED = 16_384
"""Ids of transactions whose signatures were good lately: an id covers the signature, and a
transaction comes in a block, from its origin and by gossip."""
MAX_OWN = 4096
"""Transactions submitted here and not executed yet."""
RESEND = 5.0
GATHER = 0.02
"""Seconds between two batches that are spread: a lone transaction leaves at once, many go
together, since a message costs ten times what a transaction costs."""

Spread = Callable[[Sequence[bytes]], Awaitable[None]]


def has_backing(transaction: Transaction, state: State, parameters: Parameters) -> bool:
    """Whether an account that can pay the fee, or a registered node, stands behind it, if the
    signature is good: the cheap question before the dear one. A Return needs a jailed one."""
    if not transaction.by_owner:
        node = state.node(transaction.signer)
        wanted = not isinstance(transaction.payload, Return)
        return node is not None and (wanted or node.jailed > 0)
    account = state.account(transaction.signer)
    return (
        account.balance >= transaction.fee >= parameters.fee_floor
        and account.nonce <= transaction.nonce < account.nonce + PER_OWNER
    )


class Admission:
    """The pool and its door. `changed` is called when the pool grows."""

    def __init__(
        self, finality: Finality, pool: Mempool, spread: Spread, changed: Callable[[], None]
    ) -> None:
        self._finality = finality
        self._store = finality.store
        self._chain_id = finality.store.chain_id
        self.pool = pool
        pool.time_ms = finality.store.head.header.time_ms
        self._spread = spread
        self._changed = changed
        self._lock = trio.Lock()
        self._waiting: Counter[str] = Counter()
        self._queue: deque[tuple[int | str, Sequence[bytes]]] = deque()
        self._queued_bytes: Counter[int | str] = Counter()
        self._queue_news = trio.Event()
        self._good: dict[bytes, None] = {}
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
        if self._known(transaction.id) or self._settled(transaction):
            return transaction.id
        if len(self._own) >= MAX_OWN:
            raise ServiceBusy(f"{MAX_OWN} submitted transactions are waiting: try again later")
        async with self._lock:
            await self._admit([transaction], strict=True)
        self._own[transaction.id] = transaction.raw
        self._send([transaction.raw])
        return transaction.id

    def _settled(self, transaction: Transaction) -> bool:
        """Whether nothing can become of it any more. One that failed in a block may have come too
        early, and may yet succeed: unless it paid for its failure."""
        receipt = self._store.receipt(transaction.id)
        if receipt is None or receipt.ok:
            return receipt is not None
        account = State(self._store.get).account(transaction.signer)
        return transaction.by_owner and transaction.nonce < account.nonce

    def enqueue(self, raws: Sequence[bytes], source: int | str) -> None:
        """Admit what the validator `source` sent, soon and in order: the votes behind it on the
        same stream do not wait for that."""
        size = _weight(raws)
        if self._queued_bytes[source] + size > MAX_QUEUED_BYTES:
            return
        self._queued_bytes[source] += size
        self._queue.append((source, raws))
        self._queue_news.set()

    async def run_queue(self) -> None:
        """Admit what is queued, for ever."""
        while True:
            while not self._queue:
                self._queue_news = trio.Event()
                await self._queue_news.wait()
            source, raws = self._queue.popleft()
            self._queued_bytes[source] -= _weight(raws)
            await self.receive(raws, spread=False)

    async def receive(self, raws: Iterable[bytes], *, spread: bool, source: str = "") -> None:
        """Admit what the peer `source` sent, leaving out what is bad, known or without backing.
        `spread`: tell validators."""
        if self._waiting[source] >= MAX_WAITING_EACH or self._waiting.total() >= MAX_WAITING:
            return
        state, parameters = State(self._store.get), self._store.genesis.parameters
        candidates = []
        for raw in raws:
            if self._known(sha256(raw)):
                continue
            try:
                transaction = decode_transaction(raw, self._chain_id)
            except ChainError as error:
                log.info("a peer sent a bad transaction: %s", error)
                continue
            if has_backing(transaction, state, parameters):
                candidates.append(transaction)
        if not candidates:
            return
        self._waiting[source] += 1
        try:
            async with self._lock:
                admitted = await self._admit(candidates, strict=False)
        finally:
            self._waiting[source] -= 1
            if not self._waiting[source]:
                del self._waiting[source]
        if spread:
            self._send([transaction.raw for transaction in admitted])

    async def _admit(
        self, transactions: Sequence[Transaction], *, strict: bool
    ) -> list[Transaction]:
        good = await self.verified(transactions)
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

    async def verified(self, transactions: Sequence[Transaction]) -> list[bool]:
        """Whether each signature is good. Cancellation changes nothing."""
        good, checked = [], 0
        for transaction in transactions:
            fine = transaction.id in self._good
            if not fine:
                checked += 1
                if checked % SIGNATURES == 0:
                    await trio.lowlevel.checkpoint()
                fine = verify_transaction(transaction, self._chain_id)
            if fine:
                self._good[transaction.id] = None
            good.append(fine)
        for _ in range(len(self._good) - REMEMBERED):
            del self._good[next(iter(self._good))]
        return good

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
            await trio.sleep(GATHER)

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
        return self.pool.waits_besides(self._finality.limbo, exclude)

    def _executed(self, applied: AppliedBlock) -> None:
        """From finality to here the block's transactions were in limbo: in the pool, so that those
        behind them are judged rightly, but never selected."""
        self.pool.remove([receipt.id for receipt in applied.receipts])
        self.pool.time_ms = applied.block.header.time_ms
        revived = self.pool.refresh(State(self._store.get), applied.height, applied.touched)
        if revived:
            self._send([transaction.raw for transaction in revived])
            self._changed()
        if self._own:
            self._own = {key: raw for key, raw in self._own.items() if self._known(key)}


def _weight(raws: Sequence[bytes]) -> int:
    """Bytes in memory, about: also of a great many empty ones."""
    return 64 * (1 + len(raws)) + sum(map(len, raws))


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
