"""The peer manager: whom we know, whom we keep connected, who is here, who is banned, and telling
others about it.

A kept peer (`add`) has a task that dials it whenever it is away: at once when the connection
drops, then with exponential back-off and jitter. Every connection has a keepalive task; without it
a peer that vanished (power, network, SIGSTOP) would stay listed for ever. The library reconnects
nobody and notices nothing of this.
"""

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import trio
from libp2p.abc import INetConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID

from tdmld.p2p.accounting import (
    BAN_SCORE,
    PATIENCE,
    Account,
    AddressScores,
    Offence,
    network_of,
)
from tdmld.p2p.addresses import Address, TcpAddress, parse_address, parse_peer_id
from tdmld.p2p.bans import Ban, Bans
from tdmld.p2p.connector import Connector
from tdmld.p2p.errors import DialFailed
from tdmld.p2p.keepalive import is_alive
from tdmld.p2p.limits import Limits
from tdmld.p2p.memory import Memory
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
"""Entries of strangers that are no longer connected, kept for their counters and scores."""


@dataclass(slots=True)
class _Peer:
    """What we know of one peer."""

    id: ID
    text: str
    addresses: tuple[Address, ...] = ()
    kept: trio.CancelScope | None = None
    patient: bool = False
    """The addresses are hearsay, and have not led to the peer yet."""
    conn: INetConn | None = None
    connected_at: float = 0.0
    """Unix time."""
    latency: float | None = None
    last_error: str = ""
    dials: int = 0
    account: Account = field(default_factory=Account)
    dialling: trio.Lock = field(default_factory=trio.Lock)
    changed: trio.Event = field(default_factory=trio.Event)
    """Set and replaced whenever the connection or the addresses change."""

    def touch(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class Peers:
    """All peers of one host. Between `start` and `stop` it redials."""

    def __init__(self, me: ID, limits: Limits, bans: Bans | None = None) -> None:
        self._me = me
        self._limits = limits
        self.bans = bans if bans is not None else Bans()
        self._address_scores = AddressScores()
        self.memory = Memory(limits.buffer_bytes, self.is_kept)
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

    def add(self, info: PeerInfo, *, patient: bool = False) -> None:
        """Keep a peer connected; a second call replaces its addresses. Ourselves are ignored.

        Raises AddressInvalid, and then changes nothing.
        """
        peer_id = parse_peer_id(info.peer_id)
        addresses = tuple(parse_address(text) for text in info.addresses)
        if peer_id == self._me:
            return
        peer = self.entry(peer_id)
        peer.patient = patient and (peer.patient or addresses != peer.addresses)
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
                    while peer.patient and self.live(peer) is None:
                        await peer.changed.wait()  # new addresses are no better than the old ones
                patient, limits = peer.patient, self._limits
                last = limits.redial_patient_seconds if patient else limits.redial_last_seconds
                delay = min(delay * 2, last)

    async def connect_to(self, peer_id: ID, addresses: Sequence[Address]) -> INetConn:
        """Like `connect`, at these addresses instead of those that we know."""
        return await self.connect(self.entry(peer_id), addresses)

    async def connect(self, peer: _Peer, addresses: Sequence[Address] | None = None) -> INetConn:
        """The present connection, or a new one; DialFailed. Simultaneous calls dial once."""
        dials = peer.dials
        async with peer.dialling:
            if (conn := self.live(peer)) is not None:
                return conn
            if peer.dials > dials and peer.last_error:
                raise DialFailed(peer.last_error)  # of the dial that we have been waiting for
            peer.dials += 1
            if (connector := self._connector) is None:
                raise DialFailed("the host is closed")
            await connector.settled(peer.id)
            if (conn := self.live(peer)) is not None:
                return conn
            if (ban := self.ban_of(peer.id)) is not None:
                raise DialFailed(f"{peer.text} is banned: {ban.reason or 'no reason was given'}")
            try:
                allowed = self._allowed(peer.addresses if addresses is None else addresses)
                await connector.dial(peer.id, allowed)
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
            peer.account = Account(partial(self.blame, peer))
        return peer

    def _forget_strangers(self) -> None:
        if len(self._peers) < _FORGOTTEN_PEERS:
            return
        needed = {key: peer for key, peer in self._peers.items() if peer.kept or self.live(peer)}
        now = time.monotonic()
        blamed = {
            key: peer
            for key, peer in self._peers.items()
            if key not in needed and peer.account.score.now(now) >= 1
        }
        self._peers = needed | blamed if len(blamed) < _FORGOTTEN_PEERS // 2 else needed

    def live(self, peer: _Peer) -> INetConn | None:
        return peer.conn if peer.conn is not None and not peer.conn.is_closed else None

    def connected(self) -> frozenset[str]:
        return frozenset(peer.text for peer in self._peers.values() if self.live(peer))

    def statuses(self) -> tuple[PeerStatus, ...]:
        """Connected and kept peers, by PeerId."""
        shown = [peer for peer in self._peers.values() if peer.kept or self.live(peer)]
        return tuple(self.status(peer) for peer in sorted(shown, key=lambda peer: peer.text))

    def status(self, peer: _Peer) -> PeerStatus:
        """One peer as it is now."""
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
            bytes_in=peer.account.bytes_in,
            bytes_out=peer.account.bytes_out,
            messages_in=peer.account.messages_in,
            messages_out=peer.account.messages_out,
            gossip_bytes=peer.account.gossip_bytes,
            spent_seconds=peer.account.spent,
            score=peer.account.score.now(time.monotonic()),
            connected_since=peer.connected_at if conn is not None else None,
            last_error=peer.last_error,
        )

    def on_connected(self, conn: INetConn) -> None:
        """The swarm registered a connection."""
        peer = self.entry(conn.muxed_conn.peer_id)
        was_here = self.live(peer) is not None
        peer.conn = conn
        if conn.muxed_conn.is_initiator:
            peer.patient = False
        peer.connected_at = time.time()
        peer.latency = None
        peer.last_error = ""
        peer.touch()
        if self._nursery is not None:
            self._nursery.start_soon(self._keep_alive, peer, conn)
        if not was_here:
            self._tell(PeerConnected(peer.text))
        # A name may have led to an address that is denied, or the ban came during the handshake.
        self._enforce(peer)

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

    # Who behaves, and who may not come

    def account(self, peer_id: ID) -> Account:
        """What the peer used of us."""
        return self.entry(peer_id).account

    def accuse(self, peer_id: ID, offence: Offence, why: str) -> None:
        """A peer did what no honest one does."""
        self.blame(self.entry(peer_id), offence, why)

    def blame(self, peer: _Peer, offence: Offence, why: str) -> None:
        """A peer did what no honest one does; at `BAN_SCORE` it is disconnected and banned."""
        if self.bans.peer(peer.text) is not None:
            return
        weight = offence.weight / (PATIENCE if peer.kept is not None else 1.0)
        score = peer.account.score.add(weight, time.monotonic())
        log.info("%s %s: %s (score %.1f)", peer.text, offence.meaning, why, score)
        if score < BAN_SCORE:
            return
        peer.account.score.value = 0.0
        ban = self.bans.punish(peer.text, f"{offence.meaning}: {why}")
        log.warning("banned %s until %s: %s", peer.text, ban.until, ban.reason)
        conn = self.live(peer)
        if conn is not None and is_direct(conn):
            self.blame_address(_host_of(conn), Offence.IMPOSTOR)
        self.enforce()

    def blame_address(self, host: str, offence: Offence) -> None:
        """Somebody at an IP address did something before proving an identity. Connections that
        are established from there stay: they are judged by their own."""
        try:
            network = network_of(host)
        except ValueError:
            return  # a relay's PeerId stands for it
        if self._address_scores.add(network, offence):
            ban = self.bans.punish(str(network), offence.meaning)
            log.warning("banned %s until %s: %s", network, ban.until, ban.reason)

    def ban_of(self, peer_id: ID) -> Ban | None:
        """The entry that keeps a PeerId out now."""
        return self.bans.peer(str(peer_id))

    def refuses(self, host: str) -> bool:
        """Whether a connection from this IP address is not even listened to. Where a peer that we
        keep lives, it is: behind one address there may be many."""
        ban = self.bans.address(host)
        if ban is None:
            return False
        return ban.author != "node" or not self._keeps_at(host)

    def admits(self, peer_id: ID, host: str) -> bool:
        """Whether a peer that proved its identity may come in from there."""
        if self.ban_of(peer_id) is not None:
            return False
        return self.bans.address(host) is None or self.is_kept(peer_id)

    def _allowed(self, addresses: Sequence[Address]) -> tuple[Address, ...]:
        """Those that nobody has denied by hand."""
        found = []
        for address in addresses:
            ban = self.bans.address(_ip(address))
            if ban is None or ban.author == "node":
                found.append(address)
        return tuple(found)

    def _keeps_at(self, host: str) -> bool:
        return any(
            peer.kept is not None and any(host == _ip(address) for address in peer.addresses)
            for peer in self._peers.values()
        )

    def connections_from(self, host: str) -> int:
        """Established direct connections with an IP address."""
        found = (peer.conn for peer in self._peers.values() if self.live(peer))
        return sum(
            conn is not None and is_direct(conn) and _host_of(conn) == host for conn in found
        )

    def enforce(self) -> None:
        """Disconnect whom the bans keep out. Those of addresses by the host itself are for
        newcomers."""
        for peer in list(self._peers.values()):
            self._enforce(peer)

    def _enforce(self, peer: _Peer) -> None:
        conn = self.live(peer)
        if conn is None or self._nursery is None:
            return
        ban = self.ban_of(peer.id)
        if ban is None and is_direct(conn):
            ban = self.bans.address(_host_of(conn))
            ban = None if ban is not None and ban.author == "node" else ban
        if ban is not None:
            peer.last_error = f"banned: {ban.reason or 'no reason was given'}"
            self._nursery.start_soon(conn.close)

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


def is_direct(conn: INetConn) -> bool:
    """Whether the connection's bytes pass no relay: then its address is the peer's."""
    return conn.muxed_conn.get_connection_type() != ConnectionType.RELAYED


def _host_of(conn: INetConn) -> str:
    address = conn.muxed_conn.get_remote_address()  # type: ignore[attr-defined]
    return address[0] if address is not None else ""


def _ip(address: Address) -> str:
    """The IP address of a direct address; empty for a name or a relay."""
    return address.host if isinstance(address, TcpAddress) else ""
