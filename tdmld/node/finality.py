"""What is final, and its execution: the one way by which blocks reach the store.

Consensus, gossip and sync hand over final blocks in order; one task executes them. Whoever waits
for a transaction or follows the heads is told after execution.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence

import trio

from tdmld.chain.blocks import Block, Certificate, Header, block_hash, ends_epoch
from tdmld.chain.crypto import sha256
from tdmld.chain.ledger import Receipt
from tdmld.node.store import AppliedBlock, ChainStore

log = logging.getLogger(__name__)

MAX_BACKLOG = 128
"""Final blocks waiting for execution above which sync pauses."""
FEED_LENGTH = 256
"""Applied blocks, with their bodies, kept for one slow subscriber before the oldest are dropped."""
INLINE_TRANSACTIONS = 32
"""Blocks up to this size (about 2 ms) are executed in the event loop, larger ones in a thread."""


class HeadFeed:
    """One subscriber's applied blocks, in order: `async for block in feed`.

    A subscriber that falls FEED_LENGTH blocks behind loses the oldest: it sees a gap in the
    heights and reads what it missed from the store. `close` ends the iteration.
    """

    def __init__(self, closed: Callable[["HeadFeed"], None]) -> None:
        self._blocks: deque[AppliedBlock] = deque(maxlen=FEED_LENGTH)
        self._news = trio.Event()
        self._closed = False
        self._on_close = closed

    def put(self, block: AppliedBlock) -> None:
        self._blocks.append(block)
        self._news.set()

    def close(self) -> None:
        """End the iteration; what is still queued is dropped."""
        self._closed = True
        self._news.set()
        self._on_close(self)

    def __aiter__(self) -> "HeadFeed":
        return self

    async def receive(self) -> AppliedBlock:
        """The next applied block; trio.EndOfChannel after `close`. Cancellation loses nothing."""
        while not self._blocks:
            if self._closed:
                raise trio.EndOfChannel
            self._news = trio.Event()
            await self._news.wait()
        if self._closed:
            raise trio.EndOfChannel
        await trio.lowlevel.checkpoint()
        return self._blocks.popleft()

    async def __anext__(self) -> AppliedBlock:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class Finality:
    """The final head (which may be ahead of the executed one) and the executing task."""

    def __init__(self, store: ChainStore) -> None:
        head = store.head
        self.store = store
        self.height = head.height
        self.hash = head.hash
        self.header: Header = head.header
        self.limbo: set[bytes] = set()
        """Ids of transactions that are final and not executed yet."""
        self._queue: deque[tuple[Block, Certificate | None]] = deque()
        self._news = trio.Event()
        self._executed = trio.Event()
        self._waiting: dict[bytes, list[trio.Event]] = {}
        self._feeds: set[HeadFeed] = set()
        self.on_final: list[Callable[[Sequence[Block]], None]] = []
        self.on_executed: list[Callable[[AppliedBlock], None]] = []

    @property
    def backlog(self) -> int:
        """Final blocks that are not executed yet."""
        return self.height - self.store.height

    def advance(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        """Take final blocks that follow the head; `certificate` finalizes the last of them."""
        for block in blocks:
            if block.header.parent != self.hash:
                raise ValueError("final blocks must follow the head")
            last = block is blocks[-1]
            self.height, self.header = block.header.height, block.header
            self.hash = block_hash(block.header)
            self.limbo.update(map(sha256, block.transactions))
            self._queue.append((block, certificate if last else None))
        self._news.set()
        for tell in self.on_final:
            tell(blocks)

    async def room(self) -> None:
        """Wait until the backlog is small. Cancellation changes nothing."""
        while len(self._queue) > MAX_BACKLOG:
            await self._executed.wait()

    async def settled(self) -> None:
        """At the end of an epoch, wait until all that is final is executed: only then is it known
        who validates, and a later block can be checked. Cancellation changes nothing."""
        while ends_epoch(self.height, self.store.genesis.parameters.epoch_blocks) and self.backlog:
            await self._executed.wait()

    async def run(self) -> None:
        """Execute for ever. An InvariantViolation or StoreError ends the node: see `apply`."""
        while True:
            while not self._queue:
                self._news = trio.Event()
                await self._news.wait()
            block, certificate = self._queue[0]
            if len(block.transactions) > INLINE_TRANSACTIONS:
                applied = await trio.to_thread.run_sync(self.store.apply, block, certificate)
            else:
                applied = self.store.apply(block, certificate)
                await trio.lowlevel.checkpoint()
            self._queue.popleft()
            self._publish(applied)

    def _publish(self, applied: AppliedBlock) -> None:
        self.limbo.difference_update([receipt.id for receipt in applied.receipts])
        for tell in list(self.on_executed):
            tell(applied)
        for receipt in applied.receipts:
            for event in self._waiting.pop(receipt.id, ()):
                event.set()
        for feed in self._feeds:
            feed.put(applied)
        self._executed.set()
        self._executed = trio.Event()

    def receipt(self, transaction: bytes) -> Receipt | None:
        """What became of a transaction, when it has been executed."""
        stored = self.store.receipt(transaction)
        return None if stored is None else Receipt(transaction, stored.ok, stored.reason)

    async def wait_for(self, transaction: bytes) -> Receipt:
        """Wait until the transaction is final and executed. Cancellation forgets the wait."""
        while (receipt := self.receipt(transaction)) is None:
            event = trio.Event()
            waiting = self._waiting.setdefault(transaction, [])
            waiting.append(event)
            try:
                await event.wait()
            finally:
                if event in waiting:
                    waiting.remove(event)
                if not waiting:
                    self._waiting.pop(transaction, None)
        return receipt

    def heads(self) -> HeadFeed:
        """A new subscription to applied blocks, from the next one on."""
        feed = HeadFeed(self._feeds.discard)
        self._feeds.add(feed)
        return feed
