"""The client of circuit relays: reservations, relayed addresses, circuits in and out.

A node that nobody can dial keeps reservations on `Limits.relays` of the candidates that it was
given (`set_relays`): each holds a connection to its relay, renewed in time, and is replaced by
another when the relay refuses or dies. For its life the node has relayed addresses. Whoever dials
one gets a stream through the relay, on which security and muxer are negotiated end to end: the
relay carries ciphertext, and can neither read nor forge.

Source: libp2p specs, relay/circuit-v2.md (RESERVE and CONNECT of the hop protocol, CONNECT of the
stop protocol). Vouchers are advisory there and ignored here.
"""

import ipaddress
import logging
import math
import random
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Reservation, Status, StopMessage
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from tdmld.p2p import rawstream
from tdmld.p2p.addresses import (
    Address,
    RelayedAddress,
    TcpAddress,
    parse_address,
    parse_direct,
    parse_peer_id,
    relayed_through,
)
from tdmld.p2p.connector import Connector
from tdmld.p2p.errors import AddressInvalid, DialFailed, StreamBroken
from tdmld.p2p.limits import Limits
from tdmld.p2p.types import PeerInfo

log = logging.getLogger(__name__)

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP = TProtocol("/libp2p/circuit/relay/0.2.0/stop")
_IDENTIFY = TProtocol("/ipfs/id/1.0.0")

_ANSWER_SECONDS = 10.0
"""The relay may have to wait for the other end as long as we do for it."""
_RENEW_PART = 0.6
"""Part of a reservation's time after which it is renewed."""
_RENEW_LEAST_SECONDS = 15.0
_RENEW_MOST_SECONDS = 1800.0
"""Bounds of that, for a relay's clock may be wrong."""
_RETRY_FIRST_SECONDS = 1.0
_RETRY_LAST_SECONDS = 300.0
"""Back-off of one relay that refused us or could not be reached."""
_PROVEN_SECONDS = 60.0
"""A reservation that lasted shorter does not reset it: whenever one comes or goes, our addresses
change, and the whole network is told."""
_HANDSHAKES_PER_SOURCE = 2
"""At a time: `Limits.pending_per_address` holds for all that one relay brings, and a single peer
shall not take all of that."""
_ANNOUNCED_PER_RELAY = 2
_RELAYS = 4096
"""Relays that are dialled from the listening port; others may be in any address we dial."""
_IDENTIFY_BYTES = 64 * 1024


class Dialler(Protocol):
    """What the peer manager does for us."""

    async def connect_to(self, peer_id: ID, addresses: Sequence[Address]) -> INetConn:
        """The present connection or a new one; DialFailed."""


class CircuitStream(ReadWriteCloser):
    """A stream to or through a relay, in the role of a socket."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream
        self.closed = trio.Event()
        """Set when our end is closed."""

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await self._stream.read(n)
        except StreamEOF:
            return b""

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        self.closed.set()
        with suppress(BaseLibp2pError):
            await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the relay's address would be taken for the peer's."""
        return None


@dataclass(slots=True)
class _Candidate:
    """A relay that we may use."""

    id: ID
    addresses: tuple[TcpAddress, ...]
    taken: trio.CancelScope | None = None
    """Set while a task tries it or holds a reservation on it; cancel it to let go."""
    since: float = math.inf
    """When the present reservation was made."""
    failures: int = 0
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """How a relay sees us, over one connection."""

    conn: INetConn
    observed: TcpAddress | None
    """Where we come from."""
    local: str | None
    """Our own IP address on the way to the relay."""


class Circuits:
    """All of one host's dealings with relays. `run` keeps the reservations."""

    def __init__(self, limits: Limits, dialler: Dialler, connector: Connector) -> None:
        self._limits = limits
        self._dialler = dialler
        self._connector = connector
        self._candidates: dict[ID, _Candidate] = {}
        self._held: dict[ID, tuple[RelayedAddress, ...]] = {}
        """Relays on which we have a reservation, and where we can be dialled through them."""
        self._seen: dict[ID, Seen] = {}
        self._handshakes: Counter[tuple[ID, bytes]] = Counter()
        """Circuits that have not proved an identity: by relay, and whom it says they are from."""
        self._changed = trio.Event()
        """Set and replaced when there are other candidates."""
        self._subscribers: list[trio.MemorySendChannel[None]] = []

    # What we have

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we can be dialled through relays now."""
        return tuple(address.text for held in self._held.values() for address in held)

    def seen(self) -> list[Seen]:
        """How the relays see us that we use, or have dialled through, and are connected to."""
        self._seen = {relay: seen for relay, seen in self._seen.items() if not seen.conn.is_closed}
        return list(self._seen.values())

    async def look(self, relayed: IMuxedConn) -> None:
        """Find out how the relay of this connection sees us, unless we know."""
        through = parse_address(str(relayed.get_transport_addresses()[0]))
        if isinstance(through, RelayedAddress):
            conn = await self._dialler.connect_to(through.relay_id, (through.relay,))
            await self._look_over(conn, (through.relay,))

    async def _look_over(self, conn: INetConn, relay: Sequence[TcpAddress]) -> None:
        relay_id = conn.muxed_conn.peer_id
        known = self._seen.get(relay_id)
        if known is None or known.conn is not conn:
            self._seen[relay_id] = Seen(conn, await _observed(conn), _local_host(relay))

    def changes(self) -> trio.MemoryReceiveChannel[None]:
        """One item after each change of `addresses`; several at once count as one."""
        send, receive = trio.open_memory_channel[None](1)
        self._subscribers.append(send)
        return receive

    def close(self) -> None:
        """End the subscriptions."""
        for subscriber in self._subscribers:
            subscriber.close()

    def _tell(self) -> None:
        for subscriber in list(self._subscribers):
            try:
                subscriber.send_nowait(None)
            except trio.BrokenResourceError:
                self._subscribers.remove(subscriber)
            except trio.WouldBlock:
                pass  # it has one waiting already, and will find this change too

    # Which relays

    def set_relays(self, peers: Sequence[PeerInfo]) -> None:
        """Use these relays, the first ones by preference; let go of others. AddressInvalid, and
        then nothing changes."""
        wanted: dict[ID, tuple[TcpAddress, ...]] = {}
        for info in peers:
            addresses = (parse_address(text) for text in info.addresses)
            wanted[parse_peer_id(info.peer_id)] = tuple(
                address for address in addresses if isinstance(address, TcpAddress)
            )
        for peer_id, candidate in list(self._candidates.items()):
            if peer_id not in wanted:
                del self._candidates[peer_id]
                if candidate.taken is not None:
                    candidate.taken.cancel()
        known, self._candidates = self._candidates, {}
        for peer_id, direct in wanted.items():
            candidate = known.get(peer_id) or _Candidate(peer_id, direct)
            candidate.addresses = direct
            self._candidates[peer_id] = candidate
        self._connector.from_listener.update(wanted)
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Keep reservations until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._limits.relays):
                nursery.start_soon(self._keep_one)

    async def _keep_one(self) -> None:
        """Hold one reservation, on whichever relay gives it."""
        while True:
            changed = self._changed
            free = [c for c in self._candidates.values() if c.taken is None]
            due = min(free, key=lambda c: max(c.retry_at, trio.current_time()), default=None)
            if due is None or due.retry_at > trio.current_time():
                with trio.move_on_at(math.inf if due is None else due.retry_at):
                    await changed.wait()
                continue
            due.taken = trio.CancelScope()
            try:
                with due.taken:
                    await self._hold(due)
            except (DialFailed, StreamBroken, BaseLibp2pError) as error:
                log.debug("relay %s: %s", due.id, error)
            finally:
                due.taken = None
                if self._held.pop(due.id, None) is not None:
                    self._tell()
            now = trio.current_time()
            if now - due.since > _PROVEN_SECONDS:
                due.failures = 0
            due.failures, due.since = due.failures + 1, math.inf
            # The power ends where a float does: some days of a dead relay.
            delay = min(
                _RETRY_FIRST_SECONDS * 2.0 ** min(due.failures - 1, 32), _RETRY_LAST_SECONDS
            )
            due.retry_at = now + delay * random.uniform(0.5, 1.0)

    async def _hold(self, relay: _Candidate) -> None:
        """Reserve, announce and renew until the relay is lost or refuses; errors of the library,
        DialFailed, StreamBroken."""
        while True:
            conn = await self._dialler.connect_to(relay.id, relay.addresses)
            if rawstream.is_relayed(conn.muxed_conn):
                raise DialFailed("it can be reached only through a relay itself")
            reservation = await self._reserve(conn)
            relay.since = min(relay.since, trio.current_time())
            addresses = relay.addresses or tuple(direct_addresses(reservation.addrs))
            await self._look_over(conn, addresses)
            fresh = tuple(relayed_through(a, relay.id) for a in addresses[:_ANNOUNCED_PER_RELAY])
            known, self._held[relay.id] = self._held.get(relay.id), fresh
            if known != fresh:
                self._tell()
            left = (reservation.expire - time.time()) * _RENEW_PART
            left = min(max(left, _RENEW_LEAST_SECONDS), _RENEW_MOST_SECONDS)
            with trio.move_on_after(left) as renewal:
                await conn.event_closed.wait()  # type: ignore[attr-defined]
            if not renewal.cancelled_caught:
                raise DialFailed("it disconnected")

    async def _reserve(self, conn: INetConn) -> Reservation:
        try:
            with trio.fail_after(_ANSWER_SECONDS):
                stream = await rawstream.negotiate(conn, HOP)
                try:
                    await rawstream.send(stream, HopMessage(type=HopMessage.RESERVE))
                    answer = await rawstream.receive(stream, HopMessage)
                finally:
                    await rawstream.reset(stream)
        except trio.TooSlowError:
            raise DialFailed(f"no answer within {_ANSWER_SECONDS:g} s") from None
        if answer.type != HopMessage.STATUS or answer.status != Status.OK:
            raise DialFailed(f"it refused a reservation: {_name(answer.status)}")
        return answer.reservation

    # Circuits

    async def dial(self, peer: ID, address: RelayedAddress) -> RawConnection:
        """A circuit to `peer`, not secured yet. DialFailed, StreamBroken, errors of the library.

        Connects to the relay if need be; that connection stays."""
        if peer == address.relay_id:
            raise DialFailed("a relay is not reached through itself")
        if len(self._connector.from_listener) < _RELAYS:
            self._connector.from_listener.add(address.relay_id)
        conn = await self._dialler.connect_to(address.relay_id, (address.relay,))
        if rawstream.is_relayed(conn.muxed_conn):
            raise DialFailed("a relay cannot be reached through another")
        stream = await rawstream.negotiate(conn, HOP)
        opened = False
        try:
            request = HopMessage(type=HopMessage.CONNECT)
            request.peer.id = peer.to_bytes()
            await rawstream.send(stream, request)
            answer = await rawstream.receive(stream, HopMessage)
            if answer.type != HopMessage.STATUS or answer.status != Status.OK:
                raise DialFailed(f"the relay refused: {_name(answer.status)}")
            opened = True
            return _as_socket(CircuitStream(stream), address, initiator=True)
        finally:
            if not opened:
                await rawstream.reset(stream)

    async def serve_stop(self, stream: INetStream) -> None:
        """The handler of the stop protocol: a relay brings a connection. Runs as long as it
        lives."""
        relay = stream.muxed_conn.peer_id
        held = self._held.get(relay)
        if not held:
            log.debug("%s relays to us without a reservation", relay)
            await rawstream.reset(stream)
            return
        with trio.fail_after(_ANSWER_SECONDS):
            request = await rawstream.receive(stream, StopMessage)
            brought = (relay, request.peer.id)
            status = Status.OK
            if request.type != StopMessage.CONNECT:
                status = Status.UNEXPECTED_MESSAGE
            elif self._handshakes[brought] >= _HANDSHAKES_PER_SOURCE:
                status = Status.RESOURCE_LIMIT_EXCEEDED
            await rawstream.send(stream, StopMessage(type=StopMessage.STATUS, status=status))
        if status != Status.OK:
            await rawstream.reset(stream)
            return
        circuit = CircuitStream(stream)
        raw = _as_socket(circuit, held[0], initiator=False)
        self._handshakes[brought] += 1
        try:
            await self._connector.accept_raw(raw, str(relay))
        finally:
            self._handshakes[brought] -= 1
            self._handshakes += Counter()  # drops the zeros
        await circuit.closed.wait()


def _as_socket(circuit: CircuitStream, through: RelayedAddress, initiator: bool) -> RawConnection:
    return RawConnection(circuit, initiator, ConnectionType.RELAYED, [Multiaddr(through.text)])


def direct_addresses(addresses: Sequence[bytes]) -> list[TcpAddress]:
    """The IP addresses in what a peer says of itself, with or without its PeerId at the end."""
    found: list[TcpAddress] = []
    for data in addresses:
        with suppress(AddressInvalid, MultiaddrError, ValueError):
            parts = str(Multiaddr(data)).split("/p2p/")
            if len(parts) == 1 or "/" not in parts[1]:
                address = parse_direct(parts[0])
                if not ipaddress.ip_address(address.host).is_unspecified:
                    found.append(address)
    return found


async def _observed(conn: INetConn) -> TcpAddress | None:
    """Where the peer sees us, by the identify protocol; None when it does not say."""
    try:
        with trio.fail_after(_ANSWER_SECONDS):
            stream = await rawstream.negotiate(conn, _IDENTIFY)
            try:
                answer = await rawstream.receive(stream, Identify, _IDENTIFY_BYTES)
            finally:
                await rawstream.reset(stream)
    except (BaseLibp2pError, StreamBroken, trio.TooSlowError) as error:
        log.debug("no identify from %s: %r", conn.muxed_conn.peer_id, error)
        return None
    return next(iter(direct_addresses([answer.observed_addr])), None)


def _local_host(relays: Sequence[TcpAddress]) -> str | None:
    """Our own address on the way to a relay. A datagram socket finds the route; nothing is sent."""
    for relay in relays:
        # A name raises ValueError: it would be looked up here and now, blocking everybody.
        with suppress(OSError, ValueError):
            version = ipaddress.ip_address(relay.host).version
            family = socket.AF_INET6 if version == 6 else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((relay.host, relay.port))
                return str(probe.getsockname()[0])
    return None


def _name(status: Status.ValueType) -> str:
    return Status.Name(status) if status in Status.values() else str(status)
