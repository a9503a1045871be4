"""Batches on their way to several destinations, each at its own pace.

A follower hands its transactions to every validator it knows. One of them may hang; what is meant
for the others does not wait for it.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import trio

MAX_BATCHES = 64
"""Batches that wait for one destination; then the oldest are dropped: their origin repeats them."""

Deliver = Callable[[str, Sequence[bytes]], Awaitable[None]]


class HandOver:
    """`deliver(to, batch)` is called with the batches for `to` one after another, in order."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._queues: dict[str, deque[Sequence[bytes]]] = {}
        self._news = trio.Event()

    def send(self, to: str, batch: Sequence[bytes]) -> None:
        """Queue a batch; returns at once."""
        queue = self._queues.get(to)
        if queue is None:
            queue = self._queues[to] = deque(maxlen=MAX_BATCHES)
            self._news.set()
        queue.append(batch)

    async def run(self) -> None:
        """Deliver until cancelled. What `deliver` raises ends it."""
        busy = set[str]()
        async with trio.open_nursery() as nursery:
            while True:
                for to in self._queues.keys() - busy:
                    busy.add(to)
                    nursery.start_soon(self._drain, to, busy)
                self._news = trio.Event()
                await self._news.wait()

    async def _drain(self, to: str, busy: set[str]) -> None:
        queue = self._queues[to]
        while queue:
            await self._deliver(to, queue.popleft())
        del self._queues[to]
        busy.discard(to)
