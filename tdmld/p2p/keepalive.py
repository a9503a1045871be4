"""Is the other end of a connection still there?"""

import logging
import os

import trio
from libp2p.abc import INetConn
from libp2p.host.ping import ID as PING
from libp2p.io.utils import read_exactly
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from tdmld.p2p.fastmux import FastMux
from tdmld.p2p.shield import shielded

log = logging.getLogger(__name__)

_PING_BYTES = 32


async def is_alive(conn: INetConn, seconds: float) -> float | None:
    """The round trip in seconds; None when the peer is gone.

    Our muxer has a ping of its own, and on it any byte received in time proves life: an answer may
    queue behind bulk data. Foreign peers get the standard ping protocol.
    """
    started = trio.current_time()
    muxed = conn.muxed_conn
    latency: float | None = None
    with trio.move_on_after(seconds) as scope:
        try:
            latency = await (muxed.ping() if isinstance(muxed, FastMux) else _ping_by_stream(conn))
        except Exception as error:
            # Boundary: a foreign muxer and a hostile peer's negotiation fail in many ways, and the
            # keepalive task must outlive them all.
            log.debug("a keepalive failed: %r", error)
            return None
    late = scope.cancelled_caught and isinstance(muxed, FastMux) and muxed.last_received > started
    return seconds if late else latency


async def _ping_by_stream(conn: INetConn) -> float:
    stream = await conn.new_stream()
    done = False
    try:
        client, communicator = MultiselectClient(), MultiselectCommunicator(stream)
        await client.handshake(communicator)
        await client.try_select(communicator, PING)
        payload = os.urandom(_PING_BYTES)
        started = trio.current_time()
        await stream.write(payload)
        await read_exactly(stream, _PING_BYTES)
        latency = trio.current_time() - started
        done = True
        return latency
    finally:
        with shielded(1):
            await (stream.close() if done else stream.reset())
