"""Noise for foreign peers: the library's transport with writes shielded from cancellation.

A cancelled write in the library leaves half a Noise record on the wire, after which every stream of
the connection dies. The handshake itself is the library's.
"""

import trio
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.transport import Transport
from multiaddr import Multiaddr

from tdmld.p2p.limits import WRITE_SECONDS
from tdmld.p2p.shield import shielded


class NoiseSession(BaseSession):
    """A Noise session whose `write` is never cut. `read` may be cancelled between records."""

    def __init__(self, inner: ISecureConn, key_pair: KeyPair) -> None:
        super().__init__(
            local_peer=ID.from_pubkey(key_pair.public_key),
            local_private_key=key_pair.private_key,
            remote_peer=inner.get_remote_peer(),
            remote_permanent_pubkey=inner.get_remote_public_key(),
            is_initiator=inner.is_initiator,
        )
        self._inner = inner
        self._write_lock = trio.Lock()
        self._buffer = memoryview(b"")

    async def write(self, data: bytes) -> None:
        with shielded(WRITE_SECONDS) as scope:
            async with self._write_lock:
                await self._inner.write(data)
        if scope.cancelled_caught:
            await self._inner.close()
            raise RawConnError(f"the peer took no data for {WRITE_SECONDS:.0f} s")

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, at most one record. (The library's waits until it has all `n`.)"""
        if not self._buffer:
            self._buffer = memoryview(await self._inner.read(None))
        end = len(self._buffer) if n is None or n < 0 else n
        data, self._buffer = bytes(self._buffer[:end]), self._buffer[end:]
        return data

    async def close(self) -> None:
        await self._inner.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._inner.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._inner.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._inner.get_connection_type()


class ShieldedNoise(ISecureTransport):
    """The security transport to register under `/noise`."""

    def __init__(self, key_pair: KeyPair) -> None:
        self._key_pair = key_pair
        self._noise = Transport(key_pair, noise_privkey=create_x25519().private_key)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return NoiseSession(await self._noise.secure_inbound(conn), self._key_pair)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        session = NoiseSession(await self._noise.secure_outbound(conn, peer_id), self._key_pair)
        if session.get_remote_peer() != peer_id:
            raise HandshakeFailure(f"the peer there is {session.get_remote_peer()}, not {peer_id}")
        return session
