"""A bound for what all muxers of one host hold for readers that have not taken it yet.

Each stream may hold its window; windows of many streams together may be more than the machine has.
So: above half of the bound nobody is granted anything on a stream that has bytes waiting, and who
holds more than an equal share opens no streams. What was granted before may still come; at the
bound, the peer that has most waiting loses the stream on which most of it waits, strangers before
peers that we keep. It is no offence: they only used what we had granted.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import trio
from libp2p.abc import INetConn
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import Yamux

LOOK_SECONDS = 0.5
"""Between two looks at what foreign muxers hold: the library tells nobody."""
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

        self._foreign = 0

    @property
    def is_scarce(self) -> bool:
        return self.used > self._limit // 2

    def refuses_stream(self, holder: Holder) -> bool:
        """Whether a new stream, which may fill its first window unasked, is too much now: for a
        connection that holds more than its share."""
        return self.is_scarce and holder.held > self._limit // 2 // max(len(self._holders), 1)

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

    async def watch_foreign(self, connections: Callable[[], Iterable[INetConn]]) -> None:
        """For ever: count what the connections with Yamux hold, too, and close the one that holds
        most when they hold more than half of the bound. The library grants windows by itself, so
        this is late by what comes in `LOOK_SECONDS`."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            held = {conn: _held(conn) for conn in connections()}
            self.used += sum(held.values()) - self._foreign
            self._foreign = sum(held.values())
            if self._foreign > self._limit // 2:
                await max(
                    held, key=lambda conn: (not self._kept(conn.muxed_conn.peer_id), held[conn])
                ).close()


def _held(conn: INetConn) -> int:
    """Bytes that wait for their readers on a connection with Yamux."""
    muxed = conn.muxed_conn
    return sum(map(len, muxed.stream_buffers.values())) if isinstance(muxed, Yamux) else 0
