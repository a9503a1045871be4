"""From a TCP socket to an admitted connection, in both directions.

The library's own accept and dial paths are not used. Its listener shares ports silently
(SO_REUSEPORT), keeps a task and a slot of a fixed budget for every connection that ever came in,
and its dialler waits 250 ms at each success and refuses a peer for 60 s after one failure. Here we
open the sockets and call the library's public upgrade steps: security, muxer, `add_conn`.

Admission keeps one invariant: **a peer has at most one registered connection.** Gossipsub goes
deaf towards a peer that has two. `decide` says what to do with a second one; both ends come to the
same answer.
"""

import errno
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Literal, Protocol

import trio
from libp2p.abc import IMuxedConn, INetConn
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID

from tdmld.p2p.accounting import Account, Metered, Offence
from tdmld.p2p.addresses import (
    Address,
    RelayedAddress,
    TcpAddress,
)
from tdmld.p2p.errors import DialFailed, P2PError
from tdmld.p2p.limits import Limits
from tdmld.p2p.rawstream import is_relayed
from tdmld.p2p.shield import shielded
from tdmld.p2p.sockets import (
    UNUSABLE_PORT,
    connect_from,
    family_of,
    raw_connection,
    remote_of,
)
from tdmld.p2p.types import Direction, Path
from tdmld.p2p.wholereads import read_whole

log = logging.getLogger(__name__)

SIMULTANEOUS_SECONDS = 5.0
"""Two connections begun within this time were dialled at the same time by both sides."""
_NEXT_ADDRESS_SECONDS = 0.25
"""Head start of one address before the next is tried beside it (RFC 8305)."""
_DIRECT_SECONDS = 1.0
"""Head start of all direct addresses before a relay is troubled."""
_CLOSE_SECONDS = 1.0
_ACCEPT_PAUSE_SECONDS = 0.1
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
"""Accepting fails for lack of these, and may succeed again when connections close."""


def decide(
    existing: Direction,
    existing_age: float,
    new: Direction,
    *,
    we_are_smaller: bool,
    existing_path: Path = "direct",
    new_path: Path = "direct",
) -> Literal["replace", "refuse"]:
    """What to do with a second connection to a peer, as seen from one side.

    A direct connection replaces a relayed one. Otherwise: a peer that dials us again has lost the
    first connection, whether we have noticed or not: replace. (Also through a relay, for direct
    addresses are tried first.) Only when both sides dialled at the same time is there a choice:
    the direct one, or else the dial of the smaller PeerId stays.
    """
    if existing_path == "relayed" and new_path == "direct":
        return "replace"
    if existing_path == "direct" and new_path == "relayed" and existing_age <= SIMULTANEOUS_SECONDS:
        return "refuse"
    if new == existing:
        return "replace" if new == "inbound" else "refuse"
    if existing_age > SIMULTANEOUS_SECONDS:
        return "replace" if new == "inbound" else "refuse"
    keep: Direction = "outbound" if we_are_smaller else "inbound"
    return "replace" if new == keep else "refuse"


ThroughRelay = Callable[[ID, RelayedAddress], Awaitable[RawConnection]]
"""Opens a circuit to a peer; DialFailed, StreamBroken or an error of the library when it cannot."""


class Registry(Protocol):
    """What the connector asks the peer manager."""

    def is_kept(self, peer_id: ID) -> bool: ...

    async def gone(self, peer_id: ID) -> None:
        """Return when the end of the peer's last connection has been told to everybody."""

    def account(self, peer_id: ID) -> Account: ...

    def blame_address(self, host: str, offence: Offence) -> None: ...

    def refuses(self, host: str) -> bool:
        """Whether a connection from an IP address is closed before a byte of it is read."""

    def admits(self, peer_id: ID, host: str) -> bool:
        """Whether a peer that proved its identity may come in from there."""

    def connections_from(self, host: str) -> int: ...


class Connector:
    """Accepts and dials on behalf of one swarm."""

    def __init__(
        self,
        swarm: Swarm,
        limits: Limits,
        registry: Registry,
        listening: Sequence[TcpAddress] = (),
    ) -> None:
        self._swarm = swarm
        self._limits = limits
        self._registry = registry
        self._listening = listening
        self.through_relay: ThroughRelay | None = None
        """How to dial a relayed address; set once the relay's client runs."""
        self.from_listener: set[ID] = set()
        """Relays: they are to see the port on which we listen, so we dial them from it."""
        self.punching: dict[tuple[str, int], ID] = {}
        """Sockets from these addresses (port 0: any) are answers to our own simultaneous dial:
        there we are the client, whoever of the two dials came through (DCUtR, step 5)."""
        self._me = swarm.get_peer_id()
        self._admission: dict[ID, trio.Lock] = {}
        self._admitted_at: dict[INetConn, float] = {}
        self._pending: Counter[str] = Counter()
        self.refused = 0
        """Inbound sockets and connections turned away by a limit."""

    # Inbound

    async def serve(self, listener: trio.SocketListener) -> None:
        """Accept until cancelled; every connection is upgraded in a task of its own.

        Not `trio.serve_listeners`: that closes a connection when its handler returns.
        """
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in _OUT_OF_RESOURCES:
                        raise
                    log.warning("cannot accept connections now: %s", error)
                    await trio.sleep(_ACCEPT_PAUSE_SECONDS)
                else:
                    nursery.start_soon(self.accept, stream)

    async def accept(self, stream: trio.SocketStream) -> None:
        """Upgrade one accepted socket; never raises but cancellation. Run it in a task of its
        own."""
        try:
            remote = remote_of(stream)
        except OSError:
            await trio.aclose_forcefully(stream)
            return
        raw = raw_connection(stream, initiator=False)
        expected = self.punching.get(remote) or self.punching.get((remote[0], 0))
        await self.accept_raw(raw, remote[0], client_of=expected)

    async def accept_raw(self, raw: RawConnection, host: str, client_of: ID | None = None) -> None:
        """Upgrade one connection that `host` (an IP address, or a relay's PeerId) brought; as the
        client of a peer that was expected to come."""
        if self._registry.refuses(host):
            self.refused += 1
            await _close_raw(raw)
            return
        if (
            self._pending.total() >= self._limits.pending_handshakes
            or self._pending[host] >= self._limits.pending_per_address
        ):
            self.refused += 1
            self._registry.blame_address(host, Offence.CROWDING)
            await _close_raw(raw)
            return
        self._pending[host] += 1
        meter = _metered(raw)
        try:
            with trio.move_on_after(self._limits.handshake_seconds) as scope:
                if client_of is None:
                    await self._upgrade_inbound(raw, host)
                else:
                    raw.is_initiator = True
                    await self.finish_outbound(raw, client_of)
            if scope.cancelled_caught:
                log.debug("handshake with %s took too long", host)
                # Not when it was us who had no time.
                if meter.waited > self._limits.handshake_seconds / 2 and client_of is None:
                    self._registry.blame_address(host, Offence.SILENCE)
        except Exception as error:
            # Boundary: whatever a stranger's bytes do to the handshake ends this socket only.
            log.debug("refused a connection from %s: %s", host, error)
            offence = Offence.CROWDING if meter.ended else Offence.GARBAGE
            # Two clients understand nothing: somebody else came from where a peer was expected.
            if client_of is None:
                self._registry.blame_address(host, offence)
        finally:
            self._pending[host] -= 1
            if not self._pending[host]:
                del self._pending[host]

    async def finish_inbound(self, raw: RawConnection, host: str) -> None:
        """As the server of a socket that we dialled ourselves (DCUtR). Nobody is blamed for
        silence: whoever sits there did not ask for it. OSError and errors of the library."""
        try:
            with trio.fail_after(self._limits.handshake_seconds):
                await self._upgrade_inbound(raw, host)
        except trio.TooSlowError:
            raise OSError("the handshake took too long") from None

    async def _upgrade_inbound(self, raw: RawConnection, host: str) -> None:
        admitted = False
        try:
            secured = await self._swarm.upgrader.upgrade_security(raw, False)
            peer = secured.get_remote_peer()
            if peer == self._me:
                return
            if not self._registry.admits(peer, host) or (
                not self._registry.is_kept(peer)
                and (
                    self._swarm.get_total_connections() >= self._limits.connections
                    or self._registry.connections_from(host) >= self._limits.connections_per_address
                )
            ):
                self.refused += 1
                self._registry.blame_address(host, Offence.CROWDING)
                return
            _metered(raw).charge(self._registry.account(peer))
            muxed = await self._swarm.upgrader.upgrade_connection(secured, peer)
            async with self._admission_of(peer):
                admitted = await self._admit(muxed, peer, "inbound")
        finally:
            if not admitted:
                await _close_raw(raw)

    # Outbound

    async def dial(self, peer: ID, addresses: Sequence[Address]) -> None:
        """Connect to `peer` at the first address that works, direct ones first; on return there is
        or was a connection.

        Raises DialFailed with the reason for each address.
        """
        if not addresses:
            raise DialFailed(f"no address of {peer} is known")
        failures: list[str] = []
        done = trio.Event()

        async def attempt(address: Address, failed: trio.Event) -> None:
            try:
                raw = await self._open(peer, address)
                await self.finish_outbound(raw, peer)
            except (OSError, BaseLibp2pError, P2PError) as error:
                failures.append(f"{address.text}: {_describe(error)}")
                failed.set()
            except Exception as error:
                # Boundary: hostile bytes in the handshake of the other side, many error types.
                log.debug("dialling %s at %s", peer, address.text, exc_info=True)
                failures.append(f"{address.text}: {type(error).__name__}: {error}")
                failed.set()
            else:
                done.set()
                failed.set()
                nursery.cancel_scope.cancel()

        with trio.move_on_after(self._limits.dial_seconds) as scope:
            async with trio.open_nursery() as nursery:
                tried: list[trio.Event] = []
                for address in sorted(addresses, key=lambda a: isinstance(a, RelayedAddress)):
                    if isinstance(address, RelayedAddress) and tried:
                        with trio.move_on_after(_DIRECT_SECONDS):
                            for failed in tried:
                                await failed.wait()
                    failed = trio.Event()
                    nursery.start_soon(attempt, address, failed)
                    tried.append(failed)
                    with trio.move_on_after(_NEXT_ADDRESS_SECONDS):
                        await failed.wait()
        if done.is_set():
            return
        if scope.cancelled_caught:
            failures.append(f"no answer within {self._limits.dial_seconds:g} s")
        raise DialFailed(f"cannot connect to {peer}: " + "; ".join(failures))

    async def _open(self, peer: ID, address: Address) -> RawConnection:
        if isinstance(address, RelayedAddress):
            if self.through_relay is None:
                raise DialFailed("the host is closed")
            return await self.through_relay(peer, address)
        stream = await self._from_listener(address) if peer in self.from_listener else None
        if stream is None:
            stream = await trio.open_tcp_stream(address.host, address.port)
        return raw_connection(stream, initiator=True)

    async def _from_listener(self, address: TcpAddress) -> trio.SocketStream | None:
        """A connection from a listening port; None when none fits or the system refuses."""
        family = family_of(address.host)
        local = next((own for own in self._listening if family_of(own.host) == family), None)
        if family is None or local is None:
            return None
        try:
            return await connect_from(local, address)
        except OSError as error:
            if error.errno in UNUSABLE_PORT:
                return None
            raise

    async def finish_outbound(self, raw: RawConnection, peer: ID) -> None:
        """From a socket to a connection with `peer`, as the client, unless the present one is as
        good. OSError and errors of the library; `raw` is closed then."""
        admitted, meter = False, _metered(raw)
        try:
            with trio.fail_after(self._limits.handshake_seconds):
                secured = await self._swarm.upgrader.upgrade_security(raw, True, peer)
                meter.charge(self._registry.account(peer))
                # The peer admits us once the muxer is agreed: only one of ours may get so far at
                # a time, or it would replace the first by the second and we refuse the second.
                async with self._admission_of(peer):
                    if self._wanted(peer, "outbound", raw.get_connection_type()):
                        muxed = await self._swarm.upgrader.upgrade_connection(secured, peer)
                        admitted = await self._admit(muxed, peer, "outbound")
        except trio.TooSlowError:
            raise OSError("the handshake took too long") from None
        finally:
            if not admitted:
                await _close_raw(raw)

    # Both

    def _wanted(self, peer: ID, direction: Direction, kind: ConnectionType) -> bool:
        """Whether a new connection replaces what is there, which may be nothing."""
        for conn in self._live(peer):
            muxed = conn.muxed_conn
            choice = decide(
                "outbound" if muxed.is_initiator else "inbound",
                trio.current_time() - self._admitted_at.get(conn, 0.0),
                direction,
                we_are_smaller=self._me.to_bytes() < peer.to_bytes(),
                existing_path="relayed" if is_relayed(muxed) else "direct",
                new_path="relayed" if kind == ConnectionType.RELAYED else "direct",
            )
            if choice == "refuse":
                log.debug("dropped a second %s connection with %s", direction, peer)
                return False
        return True

    async def _admit(self, muxed: IMuxedConn, peer: ID, direction: Direction) -> bool:
        """With the peer's lock: register the connection with the swarm in place of others; False
        when the present one stays."""
        if not self._wanted(peer, direction, muxed.get_connection_type()):
            return False
        read_whole(muxed)
        for conn in self._live(peer):
            log.debug("a new %s connection replaces that with %s", direction, peer)
            await conn.close()
        # The library tells of an end 100 ms late. A connection registered before that would be
        # mistaken for the old one by gossip.
        with trio.move_on_after(_CLOSE_SECONDS):
            await self._registry.gone(peer)
        # Shielded: the library logs and half-undoes a registration that is cancelled.
        with trio.CancelScope(shield=True):
            conn = await self._swarm.add_conn(muxed, direction=direction)
        self._admitted_at = {c: t for c, t in self._admitted_at.items() if not c.is_closed}
        self._admitted_at[conn] = trio.current_time()
        return True

    async def settled(self, peer: ID) -> None:
        """Return when no connection with the peer is just being replaced by another."""
        async with self._admission_of(peer):
            pass

    @asynccontextmanager
    async def _admission_of(self, peer: ID) -> AsyncIterator[None]:
        """One admission at a time for each peer."""
        lock = self._admission.setdefault(peer, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._admission.pop(peer, None)

    def _live(self, peer: ID) -> list[INetConn]:
        return [conn for conn in self._swarm.get_connections(peer) if not conn.is_closed]


def _metered(raw: RawConnection) -> Metered:
    """What counts the connection's bytes; put in place at the first call."""
    if not isinstance(raw.stream, Metered):
        raw.stream = Metered(raw.stream)
    return raw.stream


async def _close_raw(raw: RawConnection) -> None:
    with shielded(_CLOSE_SECONDS), suppress(OSError, BaseLibp2pError, trio.ClosedResourceError):
        await raw.close()


def _describe(error: BaseException) -> str:
    """The innermost reason, which the library's wrappers hide."""
    if isinstance(error, OSError):
        inner = error.__cause__
        if isinstance(inner, BaseExceptionGroup):
            inner = inner.exceptions[0]
        reason = inner if isinstance(inner, OSError) else error
        return os.strerror(reason.errno) if reason.errno else str(reason)
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
