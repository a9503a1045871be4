"""A bound for what all muxers of one host hold for readers that have not taken it yet.

Each stream may hold its window; windows of many streams together may be more than the machine has.
So: above half of the bound nobody is granted anything on a stream that has bytes waiting, and
strangers open no streams. What was granted before may still come; at the bound, the peer that has
most waiting loses the stream on which most of it waits, strangers before peers that we keep. It is
no offence: they only used what we had granted.
"""

from collections.abc import Callable
from typing import Protocol

from libp2p.peer.id import ID

CHUNK_BYTES = 100
"""Counted for each chunk besides its bytes: a megabyte in chunks of one byte takes a hundred."""


class Holder(Protocol):
    """A connection whose streams hold bytes."""

    peer_id: ID
    held: int

    def relieve(self) -> None:
        """Drop the stream that holds most."""


class Memory:
    """The bytes held by the connections of one host. `kept` says whose go last."""

    def __init__(self, limit: int, kept: Callable[[ID], bool] = lambda peer: False) -> None:
        self._limit = limit
        self._kept = kept
        self._holders: set[Holder] = set()
        self.used = 0

    @property
    def is_scarce(self) -> bool:
        return self.used > self._limit // 2

    def refuses_stream(self, peer: ID) -> bool:
        """Whether a new stream, which may fill its first window unasked, is too much now."""
        return self.is_scarce and not self._kept(peer)

    def hold(self, holder: Holder, size: int) -> None:
        """`size` bytes more (or less, if negative) wait on a stream of `holder`."""
        holder.held += size
        self.used += size
        if holder.held:
            self._holders.add(holder)
        else:
            self._holders.discard(holder)
        while self.used > self._limit and self._holders:
            max(self._holders, key=lambda one: (not self._kept(one.peer_id), one.held)).relieve()
