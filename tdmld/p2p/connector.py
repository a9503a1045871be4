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
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Literal, Protocol

import trio
from libp2p.abc import IMuxedConn, INetConn
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID

from tdmld.p2p.addresses import TcpAddress, format_address, parse_address
from tdmld.p2p.errors import AddressInvalid, DialFailed, ListenFailed
from tdmld.p2p.limits import Limits
from tdmld.p2p.shield import shielded
from tdmld.p2p.types import Direction

log = logging.getLogger(__name__)

SIMULTANEOUS_SECONDS = 5.0
"""Two connections begun within this time were dialled at the same time by both sides."""
_NEXT_ADDRESS_SECONDS = 0.25
"""Head start of one address before the next is tried beside it (RFC 8305)."""
_BACKLOG = 128
_CLOSE_SECONDS = 1.0
_ACCEPT_PAUSE_SECONDS = 0.1
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
"""Accepting fails for lack of these, and may succeed again when connections close."""


def decide(
    existing: Direction, existing_age: float, new: Direction, *, we_are_smaller: bool
) -> Literal["replace", "refuse"]:
    """What to do with a second connection to a peer, as seen from one side.

    A peer that dials us again has lost the first connection, whether we have noticed or not:
    replace. Only when both sides dialled at the same time is there a choice, and then the dial of
    the smaller PeerId stays.
    """
    if new == existing:
        return "replace" if new == "inbound" else "refuse"
    if existing_age > SIMULTANEOUS_SECONDS:
        return "replace" if new == "inbound" else "refuse"
    keep: Direction = "outbound" if we_are_smaller else "inbound"
    return "replace" if new == keep else "refuse"


async def open_listeners(addresses: Sequence[str]) -> list[trio.SocketListener]:
    """Bind and listen on every address, or raise ListenFailed and leave none open."""
    listeners: list[trio.SocketListener] = []
    try:
        for text in addresses:
            listeners.append(await _open_listener(text))
    except BaseException:  # also cancellation: no port stays taken
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


async def _open_listener(text: str) -> trio.SocketListener:
    try:
        address = parse_address(text)
    except AddressInvalid as error:
        raise ListenFailed(f"cannot listen: {error}") from error
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    opened = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        # Reuse of TIME_WAIT only; no SO_REUSEPORT, or two nodes would share a port unnoticed.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await opened.bind((address.host, address.port))
        opened.listen(_BACKLOG)
        return trio.SocketListener(opened)
    except OSError as error:
        opened.close()
        raise ListenFailed(f"cannot listen on {text}: {_explain(error)}") from error
    except BaseException:  # also cancellation: no port stays taken
        opened.close()
        raise


def _explain(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use by another process; stop it, or listen on another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address; use one of its own, or 0.0.0.0"
    if error.errno == errno.EACCES:
        return "no permission for this port; use one above 1023"
    return os.strerror(error.errno) if error.errno else str(error)


def listened(listeners: Sequence[trio.SocketListener]) -> tuple[str, ...]:
    """The multiaddrs really bound, with the ports that the system chose."""
    names = [listener.socket.getsockname() for listener in listeners]
    return tuple(format_address(name[0], name[1]) for name in names)


class Registry(Protocol):
    """What the connector asks the peer manager."""

    def is_kept(self, peer_id: ID) -> bool: ...

    async def gone(self, peer_id: ID) -> None:
        """Return when the end of the peer's last connection has been told to everybody."""


class Connector:
    """Accepts and dials on behalf of one swarm."""

    def __init__(self, swarm: Swarm, limits: Limits, registry: Registry) -> None:
        self._swarm = swarm
        self._limits = limits
        self._registry = registry
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
            host = str(stream.socket.getpeername()[0])
        except OSError:
            await trio.aclose_forcefully(stream)
            return
        if (
            self._pending.total() >= self._limits.pending_handshakes
            or self._pending[host] >= self._limits.pending_per_address
        ):
            self.refused += 1
            await trio.aclose_forcefully(stream)
            return
        self._pending[host] += 1
        try:
            with trio.move_on_after(self._limits.handshake_seconds) as scope:
                await self._upgrade_inbound(RawConnection(TrioTCPStream(stream), False))
            if scope.cancelled_caught:
                log.debug("handshake with %s took too long", host)
        except Exception as error:
            # Boundary: whatever a stranger's bytes do to the handshake ends this socket only.
            log.debug("refused a connection from %s: %s", host, error)
        finally:
            self._pending[host] -= 1
            if not self._pending[host]:
                del self._pending[host]

    async def _upgrade_inbound(self, raw: RawConnection) -> None:
        admitted = False
        try:
            secured = await self._swarm.upgrader.upgrade_security(raw, False)
            peer = secured.get_remote_peer()
            if peer == self._me:
                return
            if (
                self._swarm.get_total_connections() >= self._limits.connections
                and not self._registry.is_kept(peer)
            ):
                self.refused += 1
                return
            muxed = await self._swarm.upgrader.upgrade_connection(secured, peer)
            admitted = await self._admit(muxed, peer, "inbound")
        finally:
            if not admitted:
                await _close_raw(raw)

    # Outbound

    async def dial(self, peer: ID, addresses: Sequence[TcpAddress]) -> None:
        """Connect to `peer` at the first address that works; on return there is or was a
        connection.

        Raises DialFailed with the reason for each address.
        """
        if not addresses:
            raise DialFailed(f"no address of {peer} is known")
        failures: list[str] = []
        done = trio.Event()

        async def attempt(address: TcpAddress, failed: trio.Event) -> None:
            try:
                await self._dial_one(peer, address)
            except (OSError, BaseLibp2pError) as error:
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
                for address in addresses:
                    failed = trio.Event()
                    nursery.start_soon(attempt, address, failed)
                    with trio.move_on_after(_NEXT_ADDRESS_SECONDS):
                        await failed.wait()
        if done.is_set():
            return
        if scope.cancelled_caught:
            failures.append(f"no answer within {self._limits.dial_seconds:g} s")
        raise DialFailed(f"cannot connect to {peer}: " + "; ".join(failures))

    async def _dial_one(self, peer: ID, address: TcpAddress) -> None:
        stream = await trio.open_tcp_stream(address.host, address.port)
        raw = RawConnection(TrioTCPStream(stream), True)
        admitted = False
        try:
            with trio.fail_after(self._limits.handshake_seconds):
                secured = await self._swarm.upgrader.upgrade_security(raw, True, peer)
                muxed = await self._swarm.upgrader.upgrade_connection(secured, peer)
                admitted = await self._admit(muxed, peer, "outbound")
        except trio.TooSlowError:
            raise OSError("the handshake took too long") from None
        finally:
            if not admitted:
                await _close_raw(raw)

    # Both

    async def _admit(self, muxed: IMuxedConn, peer: ID, direction: Direction) -> bool:
        """Register the connection with the swarm; False when the peer's other connection stays."""
        smaller = self._me.to_bytes() < peer.to_bytes()
        async with self._admission_of(peer):
            for conn in self._live(peer):
                age = trio.current_time() - self._admitted_at.get(conn, 0.0)
                existing: Direction = "outbound" if conn.muxed_conn.is_initiator else "inbound"
                if decide(existing, age, direction, we_are_smaller=smaller) == "refuse":
                    log.debug("dropped a second %s connection with %s", direction, peer)
                    return False
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
