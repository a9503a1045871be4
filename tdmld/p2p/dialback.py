"""Whether somebody can be reached: a fresh connection, a handshake, goodbye.

As AutoNAT v2 (libp2p/specs autonat) asks of a dial back: a socket of its own, so
that no existing connection and no translation entry made for one answers in its stead (the port is
a new one, never that of our listener), and nothing is believed but the authenticated handshake. The
connection ends before a muxer is agreed on, so neither end ever registers it, and a connection that
the two already have is not disturbed.

Whom to dial, and how often, is the caller's business: see `tdmld.node.reachwitness`.
"""

from collections.abc import Sequence

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.transport.upgrader import TransportUpgrader

from tdmld.p2p.addresses import TcpAddress, parse_direct, parse_peer_id
from tdmld.p2p.errors import DialFailed
from tdmld.p2p.shield import shielded
from tdmld.p2p.sockets import raw_connection
from tdmld.p2p.tls import FastTls

ATTEMPT_SECONDS = 5.0
"""One address, handshake included."""
_CLOSE_SECONDS = 1.0


class Prober:
    """Dials others with the identity of a 32-byte `seed`. Needs no host."""

    def __init__(self, seed: bytes) -> None:
        self._upgrader = TransportUpgrader({TLS: FastTls(create_new_key_pair(seed))}, {})

    async def probe(self, peer_id: str, addresses: Sequence[str]) -> str:
        """The first of the direct addresses where `peer_id` proves its identity; ATTEMPT_SECONDS
        for each, one after the other.

        AddressInvalid before anything is dialled; DialFailed with the reason for each address.
        Cancelled, it closes its socket.
        """
        peer = parse_peer_id(peer_id)
        failures: list[str] = []
        for address in [parse_direct(text) for text in addresses]:
            try:
                with trio.fail_after(ATTEMPT_SECONDS):
                    await self._one(peer, address)
            except trio.TooSlowError:
                failures.append(f"{address.text}: no answer within {ATTEMPT_SECONDS:g} s")
            except (OSError, BaseLibp2pError) as error:
                failures.append(f"{address.text}: {_describe(error)}")
            except Exception as error:
                # Boundary: hostile bytes in the handshake of the other side, many error types.
                failures.append(f"{address.text}: {type(error).__name__}: {error}")
            else:
                return address.text
        raise DialFailed("; ".join(failures) or f"no direct address of {peer_id} is given")

    async def _one(self, peer: ID, address: TcpAddress) -> None:
        stream = await trio.open_tcp_stream(address.host, address.port)
        try:
            await self._upgrader.upgrade_security(raw_connection(stream, True), True, peer)
        finally:
            with shielded(_CLOSE_SECONDS):
                await trio.aclose_forcefully(stream)


def _describe(error: BaseException) -> str:
    """The innermost reason in words."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
