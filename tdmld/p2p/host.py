"""The face of the package: `open_host` and `Host`.

Built from the library's swarm, identify and gossipsub; sockets, security, muxer, admission,
redial, keepalive and message framing are ours (see the sibling modules for why). Nothing of the
library leaves this package.
"""

import functools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import cast

import libp2p
import trio
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee, IPeerStore
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import StreamHandlerFn, TMuxerClass, TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.protocol_muxer.exceptions import ProtocolNotSupportedError
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from tdmld.p2p import rawstream
from tdmld.p2p.accounting import STREAMS_LATELY, Offence
from tdmld.p2p.addresses import parse_direct, parse_peer_id
from tdmld.p2p.bans import Ban, Bans
from tdmld.p2p.catchup import CatchUp
from tdmld.p2p.circuit import HOP, STOP, Circuits
from tdmld.p2p.connector import Connector
from tdmld.p2p.errors import DialFailed, GossipRefused, ProtocolRefused, StreamError
from tdmld.p2p.fastmux import PROTOCOL as FASTMUX
from tdmld.p2p.fastmux import FastMux
from tdmld.p2p.gossip import Gossip, open_gossip
from tdmld.p2p.identify import limit_identify
from tdmld.p2p.limits import Limits
from tdmld.p2p.noise import ShieldedNoise
from tdmld.p2p.peers import Peers
from tdmld.p2p.punch import DCUTR, Puncher
from tdmld.p2p.relay import Relay, RelayPolicy, RelayUse
from tdmld.p2p.shield import shielded
from tdmld.p2p.sockets import listened, open_listeners
from tdmld.p2p.streams import Stream
from tdmld.p2p.tls import FastTls
from tdmld.p2p.types import GossipMessage, PeerChange, PeerInfo, PeerStatus

log = logging.getLogger(__name__)

Handler = Callable[[Stream], Awaitable[None]]
Validator = Callable[[str, bytes], bool | None]

_OPEN_ATTEMPTS = 3
"""A stream may meet a connection that is just being replaced; then the next one is used."""
_TURN_SECONDS = 0.1
_SWARM_CONNECTIONS = 65536
"""The swarm's own bound must never bite: ours (`Limits.connections`) is checked before."""


def _quiet_libp2p() -> None:
    """The library logs every refused dial and broken socket as an error; we report these
    ourselves."""
    logging.getLogger("libp2p").setLevel(logging.WARNING)
    logging.getLogger("multiaddr").setLevel(logging.WARNING)
    for name in (
        "network.swarm",
        "network.auto_connector",
        "host.basic_host",
        "protocol_muxer",
        "stream_muxer",
        "security",
        "pubsub",
        "identity",
        "transport",
        "io",
    ):
        logging.getLogger(f"libp2p.{name}").setLevel(logging.CRITICAL)


class _Notifee(INotifee):
    """Tells the peer manager what the swarm registers and loses."""

    def __init__(
        self, peers: Peers, puncher: Puncher, gossip: Gossip | None, peerstore: IPeerStore
    ) -> None:
        self._peers = peers
        self._puncher = puncher
        self._peerstore = peerstore
        self._gossip = gossip

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._peers.on_connected(conn)
        self._puncher.on_connected(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        if self._gossip is not None:
            self._gossip.forget(conn.muxed_conn.peer_id)
        with suppress(PeerStoreError):
            # Or everybody who was ever here would stay in memory: identities cost nothing.
            self._peerstore.clear_peerdata(conn.muxed_conn.peer_id)
        self._peers.on_disconnected(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...


class Host:
    """A running libp2p node. Made by `open_host`; all methods belong to its trio loop."""

    def __init__(
        self,
        inner: IHost,
        peers: Peers,
        listening: tuple[str, ...],
        limits: Limits,
        gossip: Gossip | None,
        relay: RelayPolicy | None,
    ) -> None:
        self.peer_id: str = str(inner.get_id())
        self.listening = listening
        """Where we really listen, as multiaddrs without `/p2p/`."""
        self.limits = limits
        self._inner = inner
        self._swarm = cast(Swarm, inner.get_network())
        self._gossip = gossip
        self._peers = peers
        sockets = [parse_direct(text) for text in listening]
        self._connector = Connector(self._swarm, limits, self._peers, sockets)
        self._circuits = Circuits(limits, self._peers, self._connector)
        self._connector.through_relay = self._circuits.dial
        inner.set_stream_handler(STOP, self._circuits.serve_stop)
        self._puncher = Puncher(self._peers, self._connector, self._circuits, sockets)
        inner.set_stream_handler(DCUTR, self._puncher.serve)
        self._relay: Relay | None = None
        if relay is not None:
            self._relay = Relay(
                self._swarm, inner.get_private_key(), relay, lambda: listening, self._peers.is_kept
            )
            inner.set_stream_handler(HOP, self._relay.serve_hop)
        limit_identify(inner, peers)
        self._inbound_streams: Counter[str] = Counter()
        self._swarm.register_notifee(
            _Notifee(self._peers, self._puncher, gossip, inner.get_peerstore())
        )
        self._swarm.set_stream_handler(self._guard(self._swarm.common_stream_handler))

    # Streams

    def set_handler(self, protocol: str, handler: Handler) -> None:
        """Serve a protocol. Each inbound stream runs `handler` in its own task.

        When it returns, the stream is closed; when it raises, that stream is reset and the error
        logged, and nothing else happens. A StreamError that leaves it counts as an ordinary end.
        """

        async def serve(inner: INetStream) -> None:
            peer = self._peers.entry(inner.muxed_conn.peer_id)
            stream = Stream(inner, peer.text, protocol, peer.account, self.limits.message_bytes)
            try:
                await handler(stream)
            except StreamError as error:
                log.debug("%s ended: %s", stream, error)
                await stream.reset()
            except Exception:
                # Boundary: a defect in one handler must not take the host down.
                log.exception("the handler of %s failed; the stream is reset", stream)
                await stream.reset()
            except BaseException:
                await stream.reset()
                raise
            else:
                await stream.close()

        self._inner.set_stream_handler(TProtocol(protocol), serve)

    async def open_stream(self, peer_id: str, protocol: str) -> Stream:
        """A new stream, over the present connection or a new one if addresses are known.

        Raises AddressInvalid, DialFailed (not reachable, or no answer within
        `Limits.open_stream_seconds`) and ProtocolRefused. Cancelled, it leaves nothing behind.
        """
        peer = self._peers.entry(parse_peer_id(peer_id))
        last: BaseException | None = None
        for _ in range(_OPEN_ATTEMPTS):
            conn = await self._peers.connect(peer)
            try:
                with trio.fail_after(self.limits.open_stream_seconds):
                    inner = await rawstream.negotiate(conn, TProtocol(protocol))
            except ProtocolNotSupportedError as error:
                raise ProtocolRefused(f"{peer_id} does not serve {protocol}") from error
            except trio.TooSlowError as error:
                raise DialFailed(
                    f"{peer_id} is connected but did not answer within "
                    f"{self.limits.open_stream_seconds:g} s"
                ) from error
            except (BaseLibp2pError, UnicodeDecodeError) as error:
                last = error
                if conn.is_closed or conn.muxed_conn.is_closed:
                    continue
                raise ProtocolRefused(
                    f"{peer_id} refused a stream for {protocol}: {error}"
                ) from error
            return Stream(inner, peer.text, protocol, peer.account, self.limits.message_bytes)
        raise DialFailed(f"the connection to {peer_id} broke {_OPEN_ATTEMPTS} times: {last}")

    # Peers

    def add_peer(self, info: PeerInfo, *, patient: bool = False) -> None:
        """Remember a peer and keep connected to it until `remove_peer`. `patient`: the addresses
        are hearsay; redial seldom until they have led to the peer. AddressInvalid."""
        self._peers.add(info, patient=patient)

    def remove_peer(self, peer_id: str) -> None:
        """Keep it no longer. A present connection stays; see `disconnect`."""
        self._peers.remove(peer_id)

    async def connect(self, peer_id: str) -> PeerStatus:
        """Connect now, if need be, to a peer whose addresses are known. AddressInvalid; DialFailed
        says what was tried."""
        peer = self._peers.entry(parse_peer_id(peer_id))
        await self._peers.connect(peer)
        return self._peers.status(peer)

    async def disconnect(self, peer_id: str) -> None:
        """Close the connection, if any. A kept peer is dialled again at once."""
        for conn in self._swarm.get_connections(parse_peer_id(peer_id)):
            await conn.close()

    def connected(self) -> frozenset[str]:
        return self._peers.connected()

    def peers(self) -> tuple[PeerStatus, ...]:
        """Every connected and every kept peer, ordered by PeerId."""
        return self._peers.statuses()

    # Who may not be here

    @property
    def bans(self) -> Bans:
        """Who may not connect. To change it use `ban` and `unban`, which also enforce it."""
        return self._peers.bans

    def ban(self, subject: str, seconds: float | None = None, reason: str = "") -> Ban:
        """Disconnect and refuse a PeerId, IP address or network; without `seconds` until `unban`.

        AddressInvalid, BansFull.
        """
        ban = self._peers.bans.add(subject, seconds, reason)
        self._peers.enforce()
        return ban

    def unban(self, subject: str) -> Ban | None:
        """Take a ban back, also one of the host itself; None when none holds. AddressInvalid."""
        return self._peers.bans.lift(subject)

    def set_bans(self, bans: Sequence[Ban]) -> None:
        """Replace what another host of this node has banned; what this one found out stays."""
        self._peers.bans.replace(bans)
        self._peers.enforce()

    def misbehaved(self, peer_id: str, offence: Offence, why: str) -> None:
        """A service saw a peer do what no honest one does: its score grows, and it may be
        disconnected and banned (see `accounting`). `why` is for logs and for the ban's reason."""
        self._peers.accuse(parse_peer_id(peer_id), offence, why)

    def spent(self, peer_id: str, seconds: float) -> None:
        """A service worked for a peer for so long; shown in its status."""
        self._peers.account(parse_peer_id(peer_id)).spent += seconds

    def changes(self) -> trio.MemoryReceiveChannel[PeerChange]:
        """Connections that come and go from now on; it ends when the host closes."""
        return self._peers.changes()

    # Being reached

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we can be dialled now: where we listen, and through which relays."""
        return self.listening + self._circuits.addresses

    def address_changes(self) -> trio.MemoryReceiveChannel[None]:
        """An item whenever `addresses` has changed (several changes may come as one); it ends when
        the host closes. Close it when done."""
        return self._circuits.changes()

    def set_relays(self, peers: Sequence[PeerInfo]) -> None:
        """Keep reservations on up to `Limits.relays` of these, the first by preference, and on no
        others. None are kept before the first call. AddressInvalid, and then nothing changes."""
        self._circuits.set_relays(peers)

    async def connect_direct(self, peer_id: str, timeout: float) -> bool:  # noqa: ASYNC109
        """Whether a direct connection, not a relayed one, is there within `timeout` seconds.

        Connects if need be, and makes a relayed connection direct if it can. False also when the
        peer cannot be reached at all. AddressInvalid.
        """
        peer = self._peers.entry(parse_peer_id(peer_id))
        with trio.move_on_after(timeout), suppress(DialFailed):
            await self._peers.connect(peer)
            return await self._puncher.upgrade(peer.id)
        return False

    @property
    def relay_use(self) -> RelayUse | None:
        """What our relay service carries; None when it is off."""
        return None if self._relay is None else self._relay.use

    @property
    def holes_punched(self) -> int:
        """Relayed connections that became direct by a hole in a router, since the host started."""
        return self._puncher.punched

    # Gossip

    async def subscribe(
        self, topic: str, *, limit: int, validate: Validator
    ) -> trio.MemoryReceiveChannel[GossipMessage]:
        """Messages of others on a topic. A topic is subscribed at most once.

        `validate(forwarder, data)` is synchronous, must be fast, and is called before a message is
        forwarded or delivered, after the check of `limit`. True: good. None: not passed on, but
        nobody's fault, for the answer hangs on what one has seen. False: no honest node would have
        passed it on, and its forwarder is blamed. What it raises counts as None and is logged.
        `forwarder` is the connected peer that it came from: authors cost nothing. Delivery
        is best effort: a subscriber that leaves `Limits.gossip_queue` messages unread loses the
        newer ones (`gossip_dropped`).
        """
        if self._gossip is None:
            raise GossipRefused("gossip is switched off on this host")
        return await self._gossip.subscribe(topic, limit=limit, validate=validate)

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message; returns when handed to the mesh, paced. GossipRefused when too
        large."""
        if self._gossip is None:
            raise GossipRefused("gossip is switched off on this host")
        await self._gossip.publish(topic, data)

    @property
    def gossip_dropped(self) -> int:
        """Messages lost so far because a subscriber did not read."""
        return 0 if self._gossip is None else self._gossip.dropped

    # Running

    def _guard(self, inner: StreamHandlerFn) -> StreamHandlerFn:
        """Every inbound stream of every protocol, also of the library's own, passes here."""

        async def handle(stream: INetStream) -> None:
            peer = str(stream.muxed_conn.peer_id)
            if self._inbound_streams[peer] >= self.limits.streams_per_peer:
                self._peers.accuse(
                    stream.muxed_conn.peer_id, Offence.STREAMS, f"{self._inbound_streams[peer]}"
                )
                await rawstream.reset(stream)
                return
            self._inbound_streams[peer] += 1
            try:
                await self._take_turn(stream.muxed_conn.peer_id)
                await inner(stream)
            except Exception as error:
                # Boundary: the library lets a handler's exception end the whole host.
                log.debug("a stream of %s failed: %r", peer, error)
                if isinstance(error, UnicodeDecodeError):
                    self._peers.accuse(stream.muxed_conn.peer_id, Offence.NEGOTIATION, repr(error))
                await rawstream.reset(stream)
            finally:
                self._inbound_streams[peer] -= 1
                if not self._inbound_streams[peer]:
                    del self._inbound_streams[peer]

        return handle

    async def _take_turn(self, peer_id: ID) -> None:
        """Wait while a peer opens streams faster than we can serve them."""
        opened = self._peers.account(peer_id).opened
        opened.add(1.0, trio.current_time())
        while opened.now(trio.current_time()) > STREAMS_LATELY:  # noqa: ASYNC110 (time does it)
            await trio.sleep(_TURN_SECONDS)

    def _start(self, nursery: trio.Nursery, listeners: list[trio.SocketListener]) -> None:
        self._peers.start(self._connector, nursery)
        if self._gossip is not None:
            nursery.start_soon(CatchUp(self, self._gossip).run)
        nursery.start_soon(self._circuits.run)
        self._puncher.start(nursery)
        nursery.start_soon(self._peers.memory.watch_foreign, self._swarm.get_connections)
        for listener in listeners:
            nursery.start_soon(self._connector.serve, listener)

    async def _goodbye(self) -> None:
        """Close every connection, so that peers learn of it now and not by a time-out."""
        self._peers.stop()
        with shielded(self.limits.shutdown_seconds):
            async with trio.open_nursery() as nursery:
                for conn in self._swarm.get_connections():
                    nursery.start_soon(conn.close)
        self._peers.close()
        self._circuits.close()


@asynccontextmanager
async def open_host(
    seed: bytes,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    *,
    gossip: bool = True,
    limits: Limits | None = None,
    bans: Bans | None = None,
    relay: RelayPolicy | None = None,
) -> AsyncIterator[Host]:
    """Run a host whose identity is the Ed25519 key of the 32-byte `seed`.

    Without a `listen` address it works outbound only. With `relay` it carries the connections of
    others, as far as the policy goes.

    Raises ListenFailed before anything runs. Leaving the block disconnects every peer and ends
    every task within two seconds, also when cancelled. An exception of the block comes out as
    itself, not in a group.
    """
    limits = limits or Limits()
    _quiet_libp2p()
    listeners = await open_listeners(listen)
    failure: BaseException | None = None
    try:
        async with AsyncExitStack() as stack:
            for listener in listeners:
                stack.push_async_callback(listener.aclose)
            addresses = listened(listeners)
            key_pair = create_new_key_pair(seed)
            peers = Peers(ID.from_pubkey(key_pair.public_key), limits, bans)
            inner = _new_host(key_pair, addresses, limits, peers)
            await stack.enter_async_context(inner.run(listen_addrs=[]))
            # It would dial, of its own choice, whatever addresses strangers have told us.
            await cast(Swarm, inner.get_network()).auto_connector.stop()
            running = (
                await stack.enter_async_context(open_gossip(inner, limits, peers))
                if gossip
                else None
            )
            host = Host(inner, peers, addresses, limits, running, relay)
            async with trio.open_nursery() as nursery:
                host._start(nursery, listeners)
                try:
                    yield host
                except BaseException as error:
                    failure = error
                    raise
                finally:
                    await host._goodbye()
                    nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if failure is not None and not isinstance(failure, trio.Cancelled):
            raise failure from None
        raise group from None


def _new_host(key_pair: KeyPair, addresses: Sequence[str], limits: Limits, peers: Peers) -> IHost:
    muxer = functools.partial(
        FastMux,
        inbound_streams=2 * limits.streams_per_peer,
        memory=peers.memory,
        accuse=peers.accuse,
    )
    return libp2p.new_host(
        key_pair=key_pair,
        # Only these: the library's defaults accept plaintext, and with it forged identities.
        sec_opt={TLS: FastTls(key_pair), NOISE: ShieldedNoise(key_pair)},
        muxer_opt={FASTMUX: cast(TMuxerClass, muxer), TProtocol(YAMUX): Yamux},
        announce_addrs=[Multiaddr(address) for address in addresses],
        connection_config=ConnectionConfig(
            max_connections=_SWARM_CONNECTIONS,
            high_watermark=_SWARM_CONNECTIONS,
            low_watermark=0,
            min_connections=0,
        ),
        disable_identify_address_discovery=True,
    )
