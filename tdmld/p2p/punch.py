"""Making a relayed connection direct: by dialling, or by punching a hole through both routers.

A router that translates addresses lets in what answers its own side. When both ends dial each
other at the same moment, from the ports on which they listen, each dial is let out by its own
router and looks like an answer to the other one (TCP simultaneous open). The relayed connection
carries the arrangement: who can be seen where, and when to start.

Source: libp2p specs, relay/DCUtR.md. The end that opens the DCUtR stream is the server of what
comes out of it, the other the client, whichever dial came through. By the specification the
inbound end of the relayed connection opens it; between our nodes the other may too, and when both
do, the inbound one goes on.

A peer tells us addresses and we dial them: that must not become a weapon. Only IP addresses and
ports above 1023, a few of them, of at most two public IP addresses; private ones only when it sits
behind the router that we sit behind, or when we know no other world; few attempts for each peer, a
budget for all strangers together. And who does not answer as the expected peer is left alone.
"""

import ipaddress
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from tdmld.p2p import rawstream
from tdmld.p2p.addresses import TcpAddress, format_address
from tdmld.p2p.circuit import Circuits, direct_addresses
from tdmld.p2p.connector import Connector
from tdmld.p2p.errors import DialFailed, StreamBroken
from tdmld.p2p.peers import Peers
from tdmld.p2p.sockets import connect_from, family_of, raw_connection

log = logging.getLogger(__name__)

DCUTR = TProtocol("/libp2p/dcutr")

_ATTEMPTS = 3
"""As the specification says."""
_PUNCH_SECONDS = 4.0
"""One attempt: time for the first packet, lost at a router that was not open yet, to come again
twice (after 1 and 3 s)."""
_AGAIN_SECONDS = 0.2
"""Pause after a dial that was turned away; the other end may not have begun."""
_MESSAGE_SECONDS = 5.0
"""For the arrangement: three messages over the relay."""
_REFUSED_SECONDS = 0.5
"""In which the other end's own arrangement is heard of, when both began."""
_UNILATERAL_SECONDS = 2.0
"""For an address that can simply be dialled."""
_PATIENCE_SECONDS = 2.0
"""The outbound end lets the inbound one begin."""
_RETRY_FIRST_SECONDS = 30.0
_RETRY_LAST_SECONDS = 900.0
"""Between upgrades of one relayed connection to a kept peer: networks change."""
_ADDRESSES = 8
"""Told to a peer, and taken from one."""
_PUBLIC_HOSTS = 2
"""IP addresses that one peer may have in the public network: one of each version, or two lines."""
_LOWEST_PORT = 1024
"""Below live services that a stranger might want to see troubled, and no node of ours."""
_WINDOW_SECONDS = 600.0
_SERVED_PER_PEER = 9
"""Attempts that one peer may ask of us in a window: three upgrades."""
_DIALS_FOR_STRANGERS = 240
"""Addresses dialled in a window for peers that we do not keep, all together."""

_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
)
_IPV6_PUBLIC = ipaddress.ip_network("2000::/3")
_IPV6_6TO4 = ipaddress.ip_network("2002::/16")


def is_private(host: str) -> bool:
    """An IP address that means different machines in different networks (RFC 1918, 6598, 3927,
    4193, 4291), loopback excluded."""
    address = ipaddress.ip_address(host)
    return any(address.version == net.version and address in net for net in _PRIVATE)


def _is_disguised(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """An IPv6 address that leads to an IPv4 one, or nowhere (RFC 4291, 6052, 3056)."""
    public = ip in _IPV6_PUBLIC and ip not in _IPV6_6TO4
    return ip.version == 6 and not (ip.is_loopback or is_private(str(ip)) or public)


def worth_dialling(theirs: Sequence[TcpAddress], ours: Sequence[TcpAddress]) -> list[TcpAddress]:
    """What we dial of the addresses that a peer tells us, given our own: see the module's head."""
    loopback = any(ipaddress.ip_address(a.host).is_loopback for a in ours)
    here = {a.host for a in ours if not is_private(a.host)}
    same_router = any(a.host in here for a in theirs) or (bool(ours) and not here)
    own = {(a.host, a.port) for a in ours}
    chosen: dict[tuple[str, int], TcpAddress] = {}
    public: set[str] = set()
    for address in theirs:
        if family_of(address.host) is None or address.port < _LOWEST_PORT:
            continue
        ip = ipaddress.ip_address(address.host)
        if ip.is_unspecified or ip.is_multicast or _is_disguised(ip):
            continue
        if (address.host, address.port) in own:
            continue
        if ip.is_loopback:
            if not loopback:
                continue
        elif is_private(address.host):
            if not same_router:
                continue
        elif len(public | {address.host}) > _PUBLIC_HOSTS:
            continue
        else:
            public.add(address.host)
        chosen[address.host, address.port] = address
    return list(chosen.values())[:_ADDRESSES]


class Puncher:
    """All upgrades of one host. `serve` is the handler of DCUtR."""

    def __init__(
        self,
        peers: Peers,
        connector: Connector,
        circuits: Circuits,
        listening: Sequence[TcpAddress],
    ) -> None:
        self._peers = peers
        self._connector = connector
        self._circuits = circuits
        self._listening = listening
        self._nursery: trio.Nursery | None = None
        self._upgrading: dict[ID, trio.Lock] = {}
        self._arranging: set[ID] = set()
        """Peers with which we have begun to arrange a punch ourselves."""
        self._busy: Counter[ID] = Counter()
        """Peers with which a punch is arranged by them, or under way."""
        self._expected: Counter[tuple[str, int]] = Counter()
        """How often `_expecting` holds for a name."""
        self._window_ends = -math.inf
        self._served: Counter[ID] = Counter()
        self._dials_for_strangers = 0
        self.punched = 0
        """Direct connections that came while we punched for them, since the start."""

    def start(self, nursery: trio.Nursery) -> None:
        """Upgrade from now on, in tasks of `nursery`."""
        self._nursery = nursery

    def on_connected(self, conn: INetConn) -> None:
        """The swarm registered a connection."""
        if not rawstream.is_relayed(conn.muxed_conn):
            self.punched += self._busy[conn.muxed_conn.peer_id] > 0
        elif self._nursery is not None:
            self._nursery.start_soon(self._watch, conn)

    def _connection(self, peer_id: ID) -> INetConn | None:
        return self._peers.live(self._peers.entry(peer_id))

    # Upgrading

    async def _watch(self, conn: INetConn) -> None:
        """Try to make a relayed connection direct, as long as it lives and we keep the peer."""
        peer_id = conn.muxed_conn.peer_id
        pause = _PATIENCE_SECONDS if conn.muxed_conn.is_initiator else 0.0
        retry = _RETRY_FIRST_SECONDS
        closed = conn.event_closed  # type: ignore[attr-defined]
        while not closed.is_set():
            with trio.move_on_after(pause):
                await closed.wait()
            while not closed.is_set() and not self._peers.is_kept(peer_id):
                await self._peers.entry(peer_id).changed.wait()
            if closed.is_set() or await self.upgrade(peer_id):
                return
            pause = retry * random.uniform(0.8, 1.0)
            retry = min(retry * 2, _RETRY_LAST_SECONDS)

    async def upgrade(self, peer_id: ID) -> bool:
        """Whether the connection with a peer is direct after all was tried; half a minute at most.

        Cancelled, it leaves the relayed connection as it was. Simultaneous calls try once."""
        lock = self._upgrading.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                return await self._upgrade(peer_id)
        finally:
            if not lock.locked():
                self._upgrading.pop(peer_id, None)

    async def _upgrade(self, peer_id: ID) -> bool:
        known = [a for a in self._peers.entry(peer_id).addresses if isinstance(a, TcpAddress)]
        if known and not self._busy[peer_id]:
            with suppress(DialFailed), trio.move_on_after(_UNILATERAL_SECONDS):
                await self._connector.dial(peer_id, known)
        for _ in range(_ATTEMPTS):
            conn = self._connection(peer_id)
            if conn is None or not rawstream.is_relayed(conn.muxed_conn):
                break
            try:
                theirs = await self._arrange(conn)
            except (StreamBroken, BaseLibp2pError, trio.TooSlowError) as error:
                log.debug("cannot arrange a punch with %s: %r", peer_id, error)
                # Perhaps because the peer has begun itself: we shall hear of it.
                await trio.sleep(_REFUSED_SECONDS)
            else:
                if not theirs:
                    break
                await self._punch(peer_id, theirs, client=False)
            if await self._became_direct(peer_id):
                return True
        return await self._became_direct(peer_id)

    async def _became_direct(self, peer_id: ID) -> bool:
        """Whether the connection is direct, or becomes so by a punch that is under way."""
        while True:
            await self._connector.settled(peer_id)
            changed = self._peers.entry(peer_id).changed
            conn = self._connection(peer_id)
            if conn is not None and not rawstream.is_relayed(conn.muxed_conn):
                return True
            if not self._busy[peer_id]:
                return False
            await changed.wait()

    async def _arrange(self, conn: INetConn) -> list[TcpAddress]:
        """Speak DCUtR as the end that opens the stream; what to dial, and now is the time.

        StreamBroken, TooSlowError and errors of the library."""
        peer_id = conn.muxed_conn.peer_id
        if not (ours := await self._ours(conn.muxed_conn)):
            return []
        self._arranging.add(peer_id)
        try:
            with trio.fail_after(_MESSAGE_SECONDS):
                stream = await rawstream.negotiate(conn, DCUTR)
                try:
                    begun = trio.current_time()
                    await rawstream.send(stream, _connect_message(ours))
                    answer = await rawstream.receive(stream, HolePunch)
                    round_trip = trio.current_time() - begun
                    if answer.type != HolePunch.CONNECT:
                        raise StreamBroken("the peer did not answer CONNECT with CONNECT")
                    theirs = worth_dialling(direct_addresses(answer.ObsAddrs), ours)
                    await rawstream.send(stream, HolePunch(type=HolePunch.SYNC))
                    await stream.close()
                except BaseException:
                    await rawstream.reset(stream)
                    raise
            # Half a round trip: until SYNC is there (specification, step 4).
            await trio.sleep(round_trip / 2)
            return theirs
        finally:
            self._arranging.discard(peer_id)

    async def serve(self, stream: INetStream) -> None:
        """The handler of DCUtR: the other end of `_arrange`. Errors reset the stream."""
        conn, peer_id = stream.muxed_conn, stream.muxed_conn.peer_id
        theirs_begins = conn.is_initiator
        if not rawstream.is_relayed(conn) or (peer_id in self._arranging and not theirs_begins):
            await rawstream.reset(stream)
            return
        with self._working_on(peer_id), trio.fail_after(_MESSAGE_SECONDS):
            ours = await self._ours(conn)
            ask = await rawstream.receive(stream, HolePunch)
            if ask.type != HolePunch.CONNECT:
                raise StreamBroken("DCUtR begins with CONNECT")
            theirs = worth_dialling(direct_addresses(ask.ObsAddrs), ours)
            if not self._grants(peer_id, len(theirs)):
                raise StreamBroken("the peer asks for too many punches")
            # Its dial may come through before SYNC does.
            with self._expecting(peer_id, theirs):
                await rawstream.send(stream, _connect_message(ours))
                sync = await rawstream.receive(stream, HolePunch)
                if sync.type != HolePunch.SYNC:
                    raise StreamBroken("DCUtR goes on with SYNC")
                # Not here: this task ends with the relayed connection, which is to be replaced.
                if self._nursery is not None:
                    await self._nursery.start(self._punch_as_client, peer_id, theirs)
        await stream.close()

    async def _punch_as_client(
        self,
        peer_id: ID,
        theirs: list[TcpAddress],
        task_status: trio.TaskStatus[None],  # type: ignore[name-defined]
    ) -> None:
        with self._expecting(peer_id, theirs):
            task_status.started()
            await self._punch(peer_id, theirs, client=True)

    @contextmanager
    def _expecting(self, peer_id: ID, theirs: Sequence[TcpAddress]) -> Iterator[None]:
        """Meanwhile we are the client of what comes in from these addresses. From a peer that we
        keep, at any port: its router may choose one. Of others that would be too much to ask."""
        names = [(address.host, address.port) for address in theirs]
        if self._peers.is_kept(peer_id):
            names += {(address.host, 0) for address in theirs}
        self._expected.update(names)
        self._connector.punching.update((name, peer_id) for name in names)
        try:
            yield
        finally:
            self._expected.subtract(names)
            self._expected += Counter()  # drops the zeros
            for name in names:
                if name not in self._expected:
                    self._connector.punching.pop(name, None)

    @contextmanager
    def _working_on(self, peer_id: ID) -> Iterator[None]:
        self._busy[peer_id] += 1
        try:
            yield
        finally:
            self._busy[peer_id] -= 1
            if not self._busy[peer_id]:
                del self._busy[peer_id]
            self._peers.entry(peer_id).touch()

    def _grants(self, peer_id: ID, dials: int) -> bool:
        """Count one request against the limits; False when it exceeds them."""
        now = trio.current_time()
        if now >= self._window_ends:
            self._window_ends = now + _WINDOW_SECONDS
            self._served.clear()
            self._dials_for_strangers = 0
        if not self._peers.is_kept(peer_id):
            if self._dials_for_strangers >= _DIALS_FOR_STRANGERS:
                return False
            self._dials_for_strangers += max(dials, 1)
        self._served[peer_id] += 1
        return self._served[peer_id] <= _SERVED_PER_PEER

    # Dialling

    async def _punch(self, peer_id: ID, theirs: Sequence[TcpAddress], *, client: bool) -> None:
        """Dial all addresses at once, again and again, until the connection is direct or the time
        is over."""
        with self._working_on(peer_id), trio.move_on_after(_PUNCH_SECONDS):
            async with trio.open_nursery() as nursery:
                for address in theirs:
                    nursery.start_soon(self._knock, peer_id, address, client)
                await self._until_direct(peer_id)
                nursery.cancel_scope.cancel()

    async def _until_direct(self, peer_id: ID) -> None:
        while True:
            changed = self._peers.entry(peer_id).changed
            conn = self._connection(peer_id)
            if conn is not None and not rawstream.is_relayed(conn.muxed_conn):
                return
            await changed.wait()

    async def _knock(self, peer_id: ID, address: TcpAddress, client: bool) -> None:
        """Dial one address until cancelled."""
        family = family_of(address.host)
        own = next((own for own in self._listening if family_of(own.host) == family), None)
        while own is not None:
            try:
                stream = await connect_from(own, address)
                raw = raw_connection(stream, initiator=client)
                if client:
                    await self._connector.finish_outbound(raw, peer_id)
                else:
                    await self._connector.finish_inbound(raw, address.host)
            except Exception as error:
                # Boundary: hostile bytes in the handshake of whoever is there, many error types.
                log.debug("punching to %s at %s: %r", peer_id, address.text, error)
            await trio.sleep(_AGAIN_SECONDS)

    # What we say of ourselves

    async def _ours(self, relayed: IMuxedConn) -> list[TcpAddress]:
        """Where a dial might reach a socket of ours: as relays see us, with the port that they see
        and with our own (many routers keep it), then as we are in our own network."""
        if self._listening:
            with suppress(DialFailed):
                await self._circuits.look(relayed)
        found: dict[tuple[str, int], None] = {}
        for own in self._listening:
            for seen in self._circuits.seen():
                observed = seen.observed
                if observed is not None and family_of(observed.host) == family_of(own.host):
                    found[observed.host, observed.port] = None
                    found[observed.host, own.port] = None
            if not ipaddress.ip_address(own.host).is_unspecified:
                found[own.host, own.port] = None
                continue
            for seen in self._circuits.seen():
                if seen.local is not None and family_of(seen.local) == family_of(own.host):
                    found[seen.local, own.port] = None
        return [TcpAddress(h, p, format_address(h, p)) for h, p in list(found)[:_ADDRESSES]]


def _connect_message(ours: Sequence[TcpAddress]) -> HolePunch:
    return HolePunch(
        type=HolePunch.CONNECT, ObsAddrs=[Multiaddr(address.text).to_bytes() for address in ours]
    )
