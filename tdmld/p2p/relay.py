"""The relay service: carries the bytes of nodes that nobody can dial, within limits.

A peer that reserves may be dialled through us; a circuit is two streams, one to each end, between
which bytes are copied. Everything is bounded: reservations in number, per IP address and in time;
circuits in number, per peer, in bytes, in time and in bytes a second. A circuit reads only what it
could pass on, so what waits here is at most one stream window for each direction, and a slow
reader slows its writer. All circuits together share one pace, in turns of one piece: relayed bulk
takes its part of our line and processor and no more.

What is carried is encrypted end to end by the two peers (see `circuit`).

Source: libp2p specs, relay/circuit-v2.md. A relay relays only what it is connected to itself:
neither reservations nor circuits over relayed connections, no dialling on behalf of others.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import trio
from libp2p.abc import IMuxedConn, INetStream
from libp2p.crypto.keys import PrivateKey
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.envelope import Envelope, make_unsigned
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    HopMessage,
    Limit,
    Reservation,
    Status,
    StopMessage,
    Voucher,
)
from multiaddr import Multiaddr

from tdmld.p2p import rawstream
from tdmld.p2p.accounting import network_of
from tdmld.p2p.circuit import STOP
from tdmld.p2p.errors import StreamBroken
from tdmld.p2p.muxstream import FastMuxStream

log = logging.getLogger(__name__)

_REQUEST_SECONDS = 5.0
"""From the opened stream to the request on it."""
_STOP_SECONDS = 5.0
"""For the target to accept; less than a dialler waits for us."""
_PIECE_BYTES = 64 * 1024
"""One turn of a circuit: what other circuits, and our own frames, may have to wait for."""
_URGENT_BYTES = 1024
"""Smaller pieces overtake bulk on their connection: handshakes, pings, credit. The others, however
they come, do not overtake our own."""
_CIRCUITS_PER_PAIR = 2
"""One, and one that replaces it: a single peer cannot take all the places of another."""
_BURST_SECONDS = 0.1
"""What an idle pace lets through at once."""
_VOUCHER_DOMAIN = "libp2p-relay-rsvp"
_VOUCHER_TYPE = b"\x03\x02"


@dataclass(frozen=True, slots=True)
class CircuitQuota:
    """What one circuit may use; 0 bytes mean no circuits at all."""

    bytes: int
    """In each direction."""
    seconds: float
    bytes_per_second: int
    """Both directions together."""


OURS = CircuitQuota(bytes=1 << 40, seconds=24 * 3600.0, bytes_per_second=16 << 20)
"""A volunteer that stands by, audits or trains a small slot for a day."""
STRANGERS = CircuitQuota(bytes=16 << 20, seconds=600.0, bytes_per_second=1 << 20)
"""Enough to find out about the network, to register, and to punch a hole."""


def nobody(peer_id: str) -> bool:
    """The policy of a relay that knows nobody."""
    return False


@dataclass(frozen=True, slots=True)
class RelayPolicy:
    """What one relay grants. The defaults cost it at most 64 circuits, 32 MB/s each way, and with
    every window full 128 MiB of memory."""

    allow: Callable[[str], bool] = nobody
    """Whether a PeerId is one of ours; asked at every reservation and circuit, must be fast. A
    circuit has the quota `ours` when both of its ends are."""
    ours: CircuitQuota = OURS
    strangers: CircuitQuota = STRANGERS
    reservations: int = 256
    reservations_per_address: int = 8
    """From one IP address, or /64 of IPv6: a household, or a small office."""
    reservation_seconds: float = 3600.0
    circuits: int = 64
    circuits_per_peer: int = 16
    bytes_per_second: int = 32 << 20
    """All circuits together."""


@dataclass(frozen=True, slots=True)
class RelayUse:
    """What a relay does now, and did so far."""

    reservations: int
    circuits: int
    bytes: int
    """Carried since the start, both directions."""
    refused: int
    """Requests turned down since the start."""


class Pace:
    """So many bytes a second; who comes first goes first."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._lock = trio.Lock()
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        """Return when `size` bytes may pass. Cancelled while waiting in line, it took nothing."""
        async with self._lock:
            self._free_at = max(self._free_at, trio.current_time() - _BURST_SECONDS)
            self._free_at += size / self._rate
            await trio.sleep_until(self._free_at)


@dataclass(frozen=True, slots=True)
class _Place:
    """A reservation."""

    conn: IMuxedConn
    """It ends with this connection."""
    address: str
    until: float
    """trio's clock."""

    @property
    def valid(self) -> bool:
        return not self.conn.is_closed and trio.current_time() < self.until


class _Refused(Exception):
    """A request is not granted; answered with this status."""

    def __init__(self, status: Status.ValueType, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _QuotaSpent(Exception):
    """A circuit has carried what it may."""


class Relay:
    """The service of one host. Its handler is `serve_hop`."""

    def __init__(
        self,
        swarm: Swarm,
        key: PrivateKey,
        policy: RelayPolicy,
        addresses: Callable[[], Sequence[str]],
        is_kept: Callable[[ID], bool],
    ) -> None:
        self._swarm = swarm
        self._key = key
        self._policy = policy
        self._addresses = addresses
        self._is_kept = is_kept
        self._places: dict[ID, _Place] = {}
        self._circuits: Counter[ID] = Counter()
        """Open circuits by each of their ends."""
        self._pairs: Counter[tuple[ID, ID]] = Counter()
        """The same by who dialled whom."""
        self._pace = Pace(policy.bytes_per_second)
        self._carried = 0
        self._refusals = 0

    @property
    def use(self) -> RelayUse:
        self._forget_ended()
        return RelayUse(
            reservations=len(self._places),
            circuits=self._circuits.total() // 2,
            bytes=self._carried,
            refused=self._refusals,
        )

    async def serve_hop(self, stream: INetStream) -> None:
        """The handler of the hop protocol; for a circuit it runs as long as the circuit."""
        with trio.fail_after(_REQUEST_SECONDS):
            request = await rawstream.receive(stream, HopMessage)
        try:
            if rawstream.is_relayed(stream.muxed_conn):
                raise _Refused(Status.PERMISSION_DENIED, "it comes through a relay itself")
            if request.type == HopMessage.RESERVE:
                answer = self._reserve(stream)
            elif request.type == HopMessage.CONNECT:
                await self._connect(stream, request)
                return
            else:
                raise _Refused(Status.UNEXPECTED_MESSAGE, "a status is no request")
        except _Refused as refusal:
            self._refusals += 1
            log.debug("refused %s: %s", stream.muxed_conn.peer_id, refusal)
            answer = HopMessage(type=HopMessage.STATUS, status=refusal.status)
        await rawstream.send(stream, answer)
        await stream.close()

    # Reservations

    def _reserve(self, stream: INetStream) -> HopMessage:
        peer, policy = stream.muxed_conn.peer_id, self._policy
        quota = self._quota(peer)
        if not quota.bytes:
            raise _Refused(Status.PERMISSION_DENIED, "a stranger")
        remote = stream.get_remote_address()
        address = str(network_of(remote[0])) if remote is not None else ""
        self._forget_ended()
        others = [place for other, place in self._places.items() if other != peer]
        if len(others) >= policy.reservations:
            raise _Refused(Status.RESERVATION_REFUSED, "every place is taken")
        if sum(p.address == address for p in others) >= policy.reservations_per_address:
            raise _Refused(Status.RESERVATION_REFUSED, f"too many from {address}")
        until = trio.current_time() + policy.reservation_seconds
        self._places[peer] = _Place(stream.muxed_conn, address, until)
        expire = int(time.time() + policy.reservation_seconds)
        return HopMessage(
            type=HopMessage.STATUS,
            status=Status.OK,
            reservation=Reservation(
                expire=expire,
                addrs=[
                    Multiaddr(f"{text}/p2p/{self._swarm.get_peer_id()}").to_bytes()
                    for text in self._addresses()
                ],
                voucher=self._voucher(peer, expire),
            ),
            limit=_limit(quota),
        )

    def _voucher(self, peer: ID, expire: int) -> bytes:
        payload = Voucher(
            relay=self._swarm.get_peer_id().to_bytes(), peer=peer.to_bytes(), expiration=expire
        ).SerializeToString(deterministic=True)
        unsigned = make_unsigned(_VOUCHER_DOMAIN, _VOUCHER_TYPE, payload)
        envelope = Envelope(
            self._key.get_public_key(), _VOUCHER_TYPE, payload, self._key.sign(unsigned)
        )
        return envelope.marshal_envelope()

    def _forget_ended(self) -> None:
        self._places = {peer: place for peer, place in self._places.items() if place.valid}

    def _quota(self, *peers: ID) -> CircuitQuota:
        known = all(self._is_kept(peer) or self._policy.allow(str(peer)) for peer in peers)
        return self._policy.ours if known else self._policy.strangers

    # Circuits

    async def _connect(self, near: INetStream, request: HopMessage) -> None:
        """Open and carry a circuit; _Refused before it stands."""
        source = near.muxed_conn.peer_id
        try:
            target = ID(request.peer.id)
            place = self._places.get(target)
        except ValueError as error:
            raise _Refused(Status.MALFORMED_MESSAGE, f"no PeerId: {error}") from error
        if place is None or not place.valid:
            raise _Refused(Status.NO_RESERVATION, f"{target} has no reservation")
        quota = self._quota(source, target)
        if not quota.bytes:
            raise _Refused(Status.PERMISSION_DENIED, "a stranger")
        most = self._policy.circuits_per_peer
        if self._circuits.total() // 2 >= self._policy.circuits:
            raise _Refused(Status.RESOURCE_LIMIT_EXCEEDED, "every circuit is in use")
        if self._circuits[source] >= most or self._circuits[target] >= most:
            raise _Refused(Status.RESOURCE_LIMIT_EXCEEDED, "too many circuits of one peer")
        if self._pairs[source, target] >= _CIRCUITS_PER_PAIR:
            raise _Refused(Status.RESOURCE_LIMIT_EXCEEDED, f"too many circuits to {target}")
        self._circuits.update((source, target))
        self._pairs[source, target] += 1
        try:
            far = await self._stop(source, target, quota)
            try:
                answer = HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=_limit(quota))
                await rawstream.send(near, answer)
                await self._carry(near, far, quota)
            finally:
                # After a clean end this costs nothing; otherwise both ends must learn of it.
                await rawstream.reset(far)
                await rawstream.reset(near)
        finally:
            self._circuits.subtract((source, target))
            self._pairs[source, target] -= 1
            self._circuits += Counter()  # drops the zeros
            self._pairs += Counter()

    async def _stop(self, source: ID, target: ID, quota: CircuitQuota) -> INetStream:
        """A stream to the target, which has accepted the circuit; _Refused."""
        conns = [conn for conn in self._swarm.get_connections(target) if not conn.is_closed]
        if not conns:
            raise _Refused(Status.NO_RESERVATION, f"{target} is not connected")
        try:
            with trio.fail_after(_STOP_SECONDS):
                far = await rawstream.negotiate(conns[0], STOP)
                accepted = False
                try:
                    ask = StopMessage(type=StopMessage.CONNECT, limit=_limit(quota))
                    ask.peer.id = source.to_bytes()
                    await rawstream.send(far, ask)
                    answer = await rawstream.receive(far, StopMessage)
                    accepted = answer.type == StopMessage.STATUS and answer.status == Status.OK
                finally:
                    if not accepted:
                        await rawstream.reset(far)
        except (BaseLibp2pError, StreamBroken, trio.TooSlowError) as error:
            reason = f"{target}: {error or type(error).__name__}"
            raise _Refused(Status.CONNECTION_FAILED, reason) from error
        if not accepted:
            raise _Refused(Status.CONNECTION_FAILED, f"{target} does not take it")
        return far

    async def _carry(self, near: INetStream, far: INetStream, quota: CircuitQuota) -> None:
        """Copy in both directions until both ended, one broke, or the quota is spent."""
        pace = Pace(quota.bytes_per_second)

        async def copy(source: INetStream, sink: INetStream) -> None:
            left = quota.bytes
            try:
                while True:
                    piece = await source.read(_PIECE_BYTES)
                    left -= len(piece)
                    if left < 0:
                        raise _QuotaSpent
                    await pace.take(len(piece))
                    await self._pace.take(len(piece))
                    await _write(sink, piece)
                    self._carried += len(piece)
            except StreamEOF:
                await cast(NetStream, sink).close_write()
            except (BaseLibp2pError, _QuotaSpent) as error:
                log.debug("a circuit ended: %r", error)
                nursery.cancel_scope.cancel()

        with trio.move_on_after(quota.seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, near, far)
                nursery.start_soon(copy, far, near)


async def _write(sink: INetStream, piece: bytes) -> None:
    muxed = cast(NetStream, sink).muxed_stream
    if isinstance(muxed, FastMuxStream):
        await muxed.write_parts((piece,), urgent_bytes=_URGENT_BYTES)
    else:
        await sink.write(piece)


def _limit(quota: CircuitQuota) -> Limit:
    return Limit(duration=int(quota.seconds), data=quota.bytes)
