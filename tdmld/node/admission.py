"""How transactions enter the pool, and how they spread to everybody who could propose them.

    decode -> could its signer pay? -> turn -> would the pool have it? -> signature (in slices)
    -> pool -> all validators by their streams; a follower also by gossip

What a stranger sends costs us a decoding and a look at one account, unless somebody stands behind
it. Peers are let in by turns, ours first; of each only a little waits, and each has an allowance of
bytes and of our time, from which what is refused is taken many times over (`fairness`). Between two
awaits a transaction is judged whole: the state moves meanwhile. Arrival order is kept, since nonces
must be contiguous. What was submitted here is said again every RESEND seconds until it is executed
or can never be.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import trio

from tdmld.chain.crypto import sha256
from tdmld.chain.errors import ChainError, InvalidTransaction
from tdmld.chain.genesis import Parameters
from tdmld.chain.mempool import PER_OWNER, Mempool
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    EVIDENCE_KINDS,
    Return,
    Transaction,
    decode_transaction,
    verify_transaction,
)
from tdmld.node.chainerrors import ServiceBusy
from tdmld.node.chainwire import TX_BATCH, TX_BATCH_BYTES
from tdmld.node.fairness import Allowance, Meter, Turns
from tdmld.node.finality import Finality
from tdmld.node.store import AppliedBlock

log = logging.getLogger(__name__)

SIGNATURES = 32
"""Checked (41 us each) before others get their turn. Not in a thread: it would have to take the
interpreter lock back after each of them, from a loop that holds it for milliseconds."""
MAX_WAITING_EACH = 8
"""Batches of one peer that wait for admission; above it they are dropped (their origin repeats
them). There is no limit for all together: it would be the first thing that a flood uses up."""
MAX_WAITING_BYTES = 256 << 10
"""The same in bytes; one batch may always wait. So 256 flooding peers hold 64 MiB, or 128 MiB when
each sends one batch of the greatest size."""
MAX_QUEUED_BYTES = 2 << 20
"""Transactions of one other validator that wait for admission; above it they are dropped likewise:
a second's work at most, and what one of them floods is not taken out of another's."""
REMEMBERED = 16_384
"""Ids of transactions whose signatures were good lately: an id covers the signature, and a
transaction comes in a block, from its origin and by gossip."""
MAX_OWN = 4096
"""Transactions submitted here and not executed yet."""
LOOK, SIGNATURE, TRIAL = 10e-6, 45e-6, 15e-6
"""Seconds of work: decoding and a look at an account; a signature; execution by the pool."""
REFUSED = 8
"""What is refused costs its sender so many times the work: honest peers send some of it, because
states differ."""
FORGED = 500
"""And so many times when its signature is false: no honest peer passes that on."""
PEERS = Allowance(work=0.25, size=1 << 20)
"""3500 good transactions a second of one peer; 9 a second with forged signatures, which is half a
millisecond of work."""
VALIDATORS = Allowance(work=0.5, size=4 << 20)
"""They hand on what all their followers send."""
OURS, GOSSIP = "", "gossip"
"""Sources that are not metered: who uses our RPC, and what was metered at its door."""
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


def work_of(transaction: Transaction) -> float:
    """Seconds that its signatures take: evidence holds two more."""
    return SIGNATURE * (3 if isinstance(transaction.payload, EVIDENCE_KINDS) else 1)


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
        self.turns = Turns(first=OURS)
        self.peers = Meter(PEERS)
        """What peers have cost, also at the door of the gossip."""
        self.spent: Callable[[str, float], None] = lambda peer, seconds: None
        """Told how long we worked for what a peer sent us directly; for its account."""
        self._validators = Meter(VALIDATORS)
        self._waiting: Counter[str] = Counter()
        self._waiting_bytes: Counter[str] = Counter()
        self._queues: dict[int | str, deque[Sequence[bytes]]] = {}
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
        async with self.turns.of(OURS):
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
        self._queues.setdefault(source, deque()).append(raws)
        self._queue_news.set()

    async def run_queue(self) -> None:
        """Admit what is queued, for ever: of each validator in order, of all by turns."""
        busy = set[int | str]()
        async with trio.open_nursery() as nursery:
            while True:
                for source in self._queues.keys() - busy:
                    busy.add(source)
                    nursery.start_soon(self._drain, source, busy)
                self._queue_news = trio.Event()
                await self._queue_news.wait()

    async def _drain(self, source: int | str, busy: set[int | str]) -> None:
        queue = self._queues[source]
        while queue:
            raws = queue.popleft()
            self._queued_bytes[source] -= _weight(raws)
            await self._receive(raws, f"validator {source}", self._validators)
            await trio.lowlevel.checkpoint()
        del self._queues[source], self._queued_bytes[source]
        busy.discard(source)

    async def receive(self, raws: Sequence[bytes], *, spread: bool, source: str = OURS) -> None:
        """Admit what the peer `source` sent, leaving out what is bad, known or without backing, and
        everything while its allowance is spent. `spread`: tell validators."""
        meter = None if source in (OURS, GOSSIP) else self.peers
        admitted = await self._receive(raws, source, meter)
        if spread and admitted:
            self._send([transaction.raw for transaction in admitted])

    async def _receive(
        self, raws: Sequence[bytes], source: str, meter: Meter | None
    ) -> list[Transaction]:
        size = _weight(raws)
        if self._waiting[source] >= MAX_WAITING_EACH or (
            self._waiting[source] and self._waiting_bytes[source] + size > MAX_WAITING_BYTES
        ):
            return []
        if meter is not None and not meter.open(source, size):
            log.debug("%s has used up its allowance", source)
            return []
        candidates = self._look(raws, source, meter)
        if not candidates:
            return []
        self._waiting[source] += 1
        self._waiting_bytes[source] += size
        try:
            async with self.turns.of(source):
                return await self._admit(candidates, strict=False, source=source, meter=meter)
        finally:
            self._waiting[source] -= 1
            self._waiting_bytes[source] -= size
            if not self._waiting[source]:
                del self._waiting[source], self._waiting_bytes[source]

    def _look(self, raws: Sequence[bytes], source: str, meter: Meter | None) -> list[Transaction]:
        """Those that are new, and that somebody could pay for."""
        began = time.perf_counter()
        state, parameters = State(self._store.get), self._store.genesis.parameters
        candidates, refused = [], 0
        for raw in raws:
            if self._known(sha256(raw)):
                continue
            try:
                transaction = decode_transaction(raw, self._chain_id)
            except ChainError as error:
                log.debug("%s sent a bad transaction: %s", source, error)
                refused += 1
                continue
            if has_backing(transaction, state, parameters):
                candidates.append(transaction)
            else:
                refused += 1
        if meter is not None:
            meter.charge(source, LOOK * (len(raws) + (REFUSED - 1) * refused))
        if meter is self.peers:
            self.spent(source, time.perf_counter() - began)
        return candidates

    async def _admit(
        self,
        transactions: Sequence[Transaction],
        *,
        strict: bool,
        source: str = OURS,
        meter: Meter | None = None,
    ) -> list[Transaction]:
        state, admitted, signatures = State(self._store.get), list[Transaction](), 0
        for transaction in transactions:
            if self._known(transaction.id):
                continue
            work, times, began = LOOK, 1, time.perf_counter()
            try:
                if self._finality.limbo and self._replaces_final(transaction):
                    raise InvalidTransaction(
                        f"nonce: {transaction.nonce} is in a final block already: use the next one"
                    )
                self.pool.glance(transaction, state)
                work = TRIAL + work_of(transaction)
                signatures += transaction.id not in self._good
                if not self.signed(transaction):
                    times = FORGED
                    raise InvalidTransaction("signature: it is not the signer's")
                self.pool.admit(transaction, state, self._store.height)
            except InvalidTransaction as error:
                times = max(times, REFUSED)
                if strict:
                    raise
                log.debug("not admitted: %s", error)
            else:
                admitted.append(transaction)
            if meter is self.peers:
                self.spent(source, time.perf_counter() - began)
            if meter is not None and not meter.charge(source, work * times):
                log.debug("%s has used up its allowance", source)
                break
            if signatures == SIGNATURES:
                await trio.lowlevel.checkpoint()
                state, signatures = State(self._store.get), 0
        if admitted:
            self._changed()
        return admitted

    def _replaces_final(self, transaction: Transaction) -> bool:
        """Whether it comes in the place of one whose block is final and not executed yet."""
        rival = self.pool.rival(transaction)
        return rival is not None and rival.id in self._finality.limbo

    def signed(self, transaction: Transaction) -> bool:
        """Whether its signature is good, which is remembered."""
        if transaction.id in self._good:
            return True
        if not verify_transaction(transaction, self._chain_id):
            return False
        self._good[transaction.id] = None
        if len(self._good) > REMEMBERED:
            del self._good[next(iter(self._good))]
        return True

    async def verified(self, transactions: Sequence[Transaction]) -> list[bool]:
        """Whether each signature is good. Cancellation changes nothing."""
        good, checked = [], 0
        for transaction in transactions:
            if transaction.id not in self._good:
                checked += 1
                if checked % SIGNATURES == 0:
                    await trio.lowlevel.checkpoint()
            good.append(self.signed(transaction))
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
