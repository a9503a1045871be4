"""Tells those who do not validate that a block is final, by gossip.

Its proposer does; the next leader does in its stead when it hears nothing for a moment, so that one
of them may be lost. Both at once cost every validator a third of its time on a quiet chain.
"""

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from tdmld.chain.codec import encode
from tdmld.node.chainwire import GOSSIP_BODY_BYTES, Announcement
from tdmld.node.store import AppliedBlock

LATE = 0.25
"""Seconds that the next leader waits for the proposer's announcement."""
MAX_WAITING = 64
"""Announcements that wait to be sent; above it the oldest are forgotten: newer ones say more."""


class Announcer:
    """`publish` gossips an announcement; `heard` is whether one of a block id came lately."""

    def __init__(
        self, publish: Callable[[bytes], Awaitable[None]], heard: Callable[[bytes], bool]
    ) -> None:
        self._publish, self._heard = publish, heard
        self._ready: deque[AppliedBlock] = deque(maxlen=MAX_WAITING)
        self._later: deque[tuple[float, AppliedBlock]] = deque(maxlen=MAX_WAITING)
        self._news = trio.Event()

    def proposed(self, applied: AppliedBlock) -> None:
        """A block of our own is final; without a finalization of its own nobody is told."""
        if applied.certificate is not None:
            self._ready.append(applied)
            self._news.set()

    def leads_next(self, applied: AppliedBlock) -> None:
        """A block is final, and we are the next leader."""
        if applied.certificate is not None:
            self._later.append((trio.current_time() + LATE, applied))
            self._news.set()

    async def run(self) -> None:
        """Announce until cancelled."""
        while True:
            while self._later and self._later[0][0] <= trio.current_time():
                _, applied = self._later.popleft()
                if not self._heard(applied.hash):
                    self._ready.append(applied)
            if self._ready:
                await self._publish(_announcement(self._ready.popleft()))
                continue
            self._news = trio.Event()
            due = self._later[0][0] if self._later else float("inf")
            with trio.move_on_at(due):
                await self._news.wait()


def _announcement(applied: AppliedBlock) -> bytes:
    assert applied.certificate is not None
    block = applied.block
    small = sum(map(len, block.transactions)) <= GOSSIP_BODY_BYTES
    return encode(
        Announcement(
            block.header,
            block.signature,
            applied.certificate,
            block.transactions if small else None,
        )
    )
