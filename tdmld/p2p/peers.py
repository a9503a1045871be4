"""The peer manager: whom we know, whom we keep connected, who is here, and telling others about it.

A kept peer (`add`) has a task that dials it whenever it is away: at once when the connection
drops, then with exponential back-off and jitter. Every connection has a keepalive task; without it
a peer that vanished (power, network, SIGSTOP) would stay listed for ever. The library reconnects
nobody and notices nothing of this.
"""

import logging
import random
import time
from dataclasses import dataclass, field

import trio
from libp2p.abc import INetConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID

from tdmld.p2p.addresses import TcpAddress, parse_address, parse_peer_id
from tdmld.p2p.connector import Connector
from tdmld.p2p.errors import DialFailed
from tdmld.p2p.keepalive import is_alive
from tdmld.p2p.limits import Limits
from tdmld.p2p.streams import Traffic
from tdmld.p2p.types import (
    Direction,
    Path,
    PeerChange,
    PeerConnected,
    PeerDisconnected,
    PeerInfo,
    PeerStatus,
)

log = logging.getLogger(__name__)

_CHANGES_WAITING = 1024
"""Changes that a subscriber may leave unread; more are dropped with a warning."""
_LIVED_SECONDS = 1.0
"""A connection that lived shorter does not reset the back-off: the peer takes us and throws us
out."""
_SETTLE_SECONDS = 1.0
"""After a dial that came out second in a simultaneous dial, the first should be here so soon."""
_FORGOTTEN_PEERS = 4096
"""Entries of strangers that are no longer connected, kept for their traffic counters."""


@dataclass(slots=True)
class _Peer:
    """What we know of one peer."""

    id: ID
    text: str
    addresses: tuple[TcpAddress, ...] = ()
    kept: trio.CancelScope | None = None
    conn: INetConn | None = None
    connected_at: float = 0.0
    """Unix time."""
    latency: float | None = None
    last_error: str = ""
    dials: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    dialling: trio.Lock = field(default_factory=trio.Lock)
    changed: trio.Event = field(default_factory=trio.Event)
    """Set and replaced whenever the connection or the addresses change."""

    def touch(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class Peers:
    """All peers of one host. Between `start` and `stop` it redials."""

    def __init__(self, me: ID, limits: Limits) -> None:
        self._me = me
        self._limits = limits
        self._peers: dict[ID, _Peer] = {}
        self._subscribers: list[trio.MemorySendChannel[PeerChange]] = []
        self._nursery: trio.Nursery | None = None
        self._connector: Connector | None = None

    def start(self, connector: Connector, nursery: trio.Nursery) -> None:
        """Redial and ping from now on, in tasks of `nursery`."""
        self._connector = connector
        self._nursery = nursery

    def stop(self) -> None:
        """Dial no more; before the last connections are closed."""
        self._nursery = None
        self._connector = None
        for peer in self._peers.values():
            if peer.kept is not None:
                peer.kept.cancel()

    def close(self) -> None:
        """End the subscriptions."""
        for subscriber in self._subscribers:
            subscriber.close()

    # Whom we keep

    def add(self, info: PeerInfo) -> None:
        """Keep a peer connected; a second call replaces its addresses. Ourselves are ignored.

        Raises AddressInvalid, and then changes nothing.
        """
        peer_id = parse_peer_id(info.peer_id)
        addresses = tuple(parse_address(text) for text in info.addresses)
        if peer_id == self._me:
            return
        peer = self.entry(peer_id)
        peer.addresses = addresses
        peer.touch()
        if peer.kept is None and self._nursery is not None:
            peer.kept = trio.CancelScope()
            self._nursery.start_soon(self._keep, peer, peer.kept)

    def remove(self, peer_id: str) -> None:
        """Keep it no longer and forget its addresses. A present connection stays until it drops."""
        peer = self._peers.get(parse_peer_id(peer_id))
        if peer is None:
            return
        peer.addresses = ()
        if peer.kept is not None:
            peer.kept.cancel()
            peer.kept = None

    def is_kept(self, peer_id: ID) -> bool:
        peer = self._peers.get(peer_id)
        return peer is not None and peer.kept is not None

    async def gone(self, peer_id: ID) -> None:
        peer = self.entry(peer_id)
        while peer.conn is not None:
            await peer.changed.wait()

    async def _keep(self, peer: _Peer, scope: trio.CancelScope) -> None:
        """Dial whenever the peer is away."""
        delay = self._limits.redial_first_seconds
        with scope:
            while True:
                changed = peer.changed
                if self.live(peer) is not None:
                    since = trio.current_time()
                    await changed.wait()
                    if trio.current_time() - since > _LIVED_SECONDS:
                        delay = self._limits.redial_first_seconds
                        continue
                    if self.live(peer) is not None:
                        continue
                else:
                    try:
                        await self.connect(peer)
                        continue
                    except DialFailed as error:
                        log.debug("%s", error)
                with trio.move_on_after(delay * random.uniform(0.5, 1.0)):
                    await changed.wait()
                delay = min(delay * 2, self._limits.redial_last_seconds)

    async def connect(self, peer: _Peer) -> INetConn:
        """The present connection, or a new one; DialFailed. Simultaneous calls dial once."""
        dials = peer.dials
        async with peer.dialling:
            if (conn := self.live(peer)) is not None:
                return conn
            if peer.dials > dials and peer.last_error:
                raise DialFailed(peer.last_error)  # of the dial that we have been waiting for
            peer.dials += 1
            if self._connector is None:
                raise DialFailed("the host is closed")
            try:
                await self._connector.dial(peer.id, peer.addresses)
            except DialFailed as error:
                # The peer may have dialled us meanwhile.
                if (conn := self.live(peer)) is not None:
                    return conn
                peer.last_error = str(error)
                raise
            peer.last_error = ""
            # When both sides dialled at once, ours may be the one that the peer drops: its own is
            # on the way then.
            with trio.move_on_after(_SETTLE_SECONDS):
                while self.live(peer) is None:
                    await peer.changed.wait()
            if (conn := self.live(peer)) is not None:
                return conn
            peer.last_error = "the peer closed the connection at once: it may be full or stopping"
            raise DialFailed(f"cannot stay connected to {peer.text}: {peer.last_error}")

    # Who is here

    def entry(self, peer_id: ID) -> _Peer:
        peer = self._peers.get(peer_id)
        if peer is None:
            self._forget_strangers()
            peer = self._peers[peer_id] = _Peer(id=peer_id, text=str(peer_id))
        return peer

    def _forget_strangers(self) -> None:
        if len(self._peers) < _FORGOTTEN_PEERS:
            return
        self._peers = {
            key: peer for key, peer in self._peers.items() if peer.kept or self.live(peer)
        }

    def live(self, peer: _Peer) -> INetConn | None:
        return peer.conn if peer.conn is not None and not peer.conn.is_closed else None

    def connected(self) -> frozenset[str]:
        return frozenset(peer.text for peer in self._peers.values() if self.live(peer))

    def statuses(self) -> tuple[PeerStatus, ...]:
        """Connected and kept peers, by PeerId."""
        shown = [peer for peer in self._peers.values() if peer.kept or self.live(peer)]
        return tuple(self._status(peer) for peer in sorted(shown, key=lambda peer: peer.text))

    def _status(self, peer: _Peer) -> PeerStatus:
        conn = self.live(peer)
        remote = transport = ""
        direction: Direction | None = None
        path: Path | None = None
        if conn is not None:
            direction = "outbound" if conn.muxed_conn.is_initiator else "inbound"
            # Who makes the raw connection says which kind it is.
            kind = conn.muxed_conn.get_connection_type()
            path = "relayed" if kind == ConnectionType.RELAYED else "direct"
            remote = next(iter(map(str, conn.get_transport_addresses())), "")
            negotiated = ("negotiated_security_protocol", "negotiated_muxer_protocol")
            transport = " ".join(str(getattr(conn.muxed_conn, name, "?")) for name in negotiated)
        return PeerStatus(
            peer_id=peer.text,
            connected=conn is not None,
            kept=peer.kept is not None,
            addresses=tuple(address.text for address in peer.addresses),
            direction=direction,
            path=path,
            remote=remote,
            transport=transport,
            latency=peer.latency if conn is not None else None,
            bytes_in=peer.traffic.bytes_in,
            bytes_out=peer.traffic.bytes_out,
            connected_since=peer.connected_at if conn is not None else None,
            last_error=peer.last_error,
        )

    def on_connected(self, conn: INetConn) -> None:
        """The swarm registered a connection."""
        peer = self.entry(conn.muxed_conn.peer_id)
        was_here = self.live(peer) is not None
        peer.conn = conn
        peer.connected_at = time.time()
        peer.latency = None
        peer.last_error = ""
        peer.touch()
        if self._nursery is not None:
            self._nursery.start_soon(self._keep_alive, peer, conn)
        if not was_here:
            self._tell(PeerConnected(peer.text))

    def on_disconnected(self, conn: INetConn) -> None:
        """The swarm lost a connection, which may have been replaced already."""
        peer = self.entry(conn.muxed_conn.peer_id)
        if peer.conn is conn:
            peer.conn = None
            peer.touch()
            self._tell(PeerDisconnected(peer.text))

    async def _keep_alive(self, peer: _Peer, conn: INetConn) -> None:
        closed = conn.event_closed  # type: ignore[attr-defined]
        while not closed.is_set():
            latency = await is_alive(conn, self._limits.keepalive_timeout_seconds)
            if latency is None:
                if not closed.is_set():
                    log.info("%s does not answer: disconnected", peer.text)
                    await conn.close()
                return
            if peer.conn is conn:
                peer.latency = latency
            pause = self._limits.keepalive_seconds * random.uniform(0.8, 1.0)
            with trio.move_on_after(pause):
                await closed.wait()

    # Telling others

    def changes(self) -> trio.MemoryReceiveChannel[PeerChange]:
        """Connections that come and go from now on. Close it when done."""
        send, receive = trio.open_memory_channel[PeerChange](_CHANGES_WAITING)
        self._subscribers.append(send)
        return receive

    def _tell(self, change: PeerChange) -> None:
        for subscriber in list(self._subscribers):
            try:
                subscriber.send_nowait(change)
            except trio.BrokenResourceError:
                self._subscribers.remove(subscriber)
            except trio.WouldBlock:
                log.warning("a subscriber does not read peer changes: %s was dropped", change)
