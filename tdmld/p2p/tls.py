"""TLS 1.3 bound to a libp2p identity: `/tls/1.0.0` on the wire, our own machinery inside.

The library's transport works but reads sockets 4 KiB at a time, writes its private key to a
temporary file at every handshake, lets a cancelled write tear a record, and puts an X.509
extension before the libp2p one, which js-libp2p refuses. Here: one context per direction made at
start, OpenSSL over memory
BIOs, 256 KiB socket reads, one socket write per flush, shielded writes, a bare certificate.
Source: libp2p specs, tls/tls.md; the certificate's libp2p extension is made and checked by the
library.
"""

import datetime
import os
import ssl
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import trio
from cryptography import x509
from cryptography.x509.oid import NameOID
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.tls.certificate import (
    ALPN_PROTOCOL,
    generate_certificate,
    verify_certificate_chain,
)
from libp2p.security.tls.openssl_verify import install_skip_pkix_peer_verification
from multiaddr import Multiaddr

from tdmld.p2p.limits import WRITE_SECONDS
from tdmld.p2p.shield import acquire, shielded

_SOCKET_READ_BYTES = 128 * 1024
RECORD_BYTES = 16 * 1024
"""Plaintext of a full record. OpenSSL hands out at most one per read, so asking for more only
allocates more."""
_CERTIFICATE_DAYS = 3650
"""The certificate is made anew at every start; long, so that a node may run for years."""


def _certificate_template() -> x509.CertificateBuilder:
    """A certificate without extensions: the libp2p one must stand first (js-libp2p reads index
    0)."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "libp2p")])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .serial_number(int.from_bytes(os.urandom(8), "big") >> 1)
        .subject_name(name)
        .issuer_name(name)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_CERTIFICATE_DAYS))
    )


def _context(certificate: Path, key: Path, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # There is no CA: identity is the libp2p extension, checked after the handshake in `_handshake`.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_OPTIONAL if server else ssl.CERT_NONE
    context.load_cert_chain(certfile=certificate, keyfile=key)
    context.set_alpn_protocols([ALPN_PROTOCOL])
    if server:
        context.num_tickets = 0
        install_skip_pkix_peer_verification(context)
    return context


class TlsSession(BaseSession):
    """An authenticated TLS connection. One reader at a time; writers are serialized.

    `read` may be cancelled at any moment without losing data. `write` is shielded for at most
    `WRITE_SECONDS`; after that the connection is closed and RawConnError raised.
    """

    def __init__(
        self,
        raw: IRawConnection,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        *,
        key_pair: KeyPair,
        remote: x509.Certificate,
        initiator: bool,
    ) -> None:
        public_key = verify_certificate_chain([remote])
        super().__init__(
            local_peer=ID.from_pubkey(key_pair.public_key),
            local_private_key=key_pair.private_key,
            remote_peer=ID.from_pubkey(public_key),
            remote_permanent_pubkey=public_key,
            is_initiator=initiator,
        )
        self._raw = raw
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._write_lock = trio.Lock()

    async def write(self, data: bytes) -> None:
        await self.write_parts((data,))

    async def write_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """Encrypt and send the parts in order, without joining them first."""
        # A record cut by cancellation would poison the whole connection, hence the shield.
        with shielded(WRITE_SECONDS) as scope:
            await acquire(self._write_lock)
            try:
                for part in parts:
                    view = memoryview(part)
                    while view:
                        view = view[self._tls.write(view) :]
                await self._raw.write(self._outgoing.read())
            except ssl.SSLError as error:
                raise RawConnError(f"TLS: {error}") from error
            finally:
                self._write_lock.release()
        if scope.cancelled_caught:
            await self._raw.close()
            raise RawConnError(f"the peer took no data for {WRITE_SECONDS:.0f} s")

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, at most one record; empty at the end of the connection."""
        if n == 0:
            return b""
        want = RECORD_BYTES if n is None or n < 0 else min(n, RECORD_BYTES)
        while True:
            try:
                return self._tls.read(want)
            except ssl.SSLWantReadError:
                if not await self._receive():
                    return b""
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLError as error:
                raise RawConnError(f"TLS: {error}") from error

    async def read_into(self, target: memoryview) -> int:
        """Decrypt into `target` what has arrived: at least one byte, or none at the end."""
        filled = 0
        while True:
            try:
                while filled < len(target):
                    # Typeshed does not know that any writable buffer will do, and what comes back.
                    rest = cast(bytearray, target[filled:])
                    size = cast(int, self._tls.read(len(rest), rest))
                    if not size:
                        break
                    filled += size
                return filled
            except ssl.SSLWantReadError:
                if filled or not await self._receive():
                    return filled
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return filled
            except ssl.SSLError as error:
                raise RawConnError(f"TLS: {error}") from error

    async def _receive(self) -> bool:
        """More bytes for OpenSSL; False at the end of the connection."""
        data = await self._raw.read(_SOCKET_READ_BYTES)
        self._incoming.write(data)
        return bool(data)

    async def close(self) -> None:
        await self._raw.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._raw.get_connection_type()


class FastTls(ISecureTransport):
    """The security transport to register under `/tls/1.0.0`."""

    def __init__(self, key_pair: KeyPair) -> None:
        self._key_pair = key_pair
        certificate, key = generate_certificate(key_pair.private_key, _certificate_template())
        # `load_cert_chain` takes paths only. The key is the certificate's own, made just now; it
        # lies in a directory of mode 0700 for these few lines and identifies nobody.
        with tempfile.TemporaryDirectory(prefix="tls-") as directory:
            certificate_path, key_path = Path(directory, "certificate"), Path(directory, "key")
            certificate_path.write_text(certificate)
            key_path.write_text(key)
            self._client = _context(certificate_path, key_path, server=False)
            self._server = _context(certificate_path, key_path, server=True)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return await self._handshake(conn, server=True)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        session = await self._handshake(conn, server=False)
        if session.get_remote_peer() != peer_id:
            raise HandshakeFailure(f"the peer there is {session.get_remote_peer()}, not {peer_id}")
        return session

    async def _handshake(self, conn: IRawConnection, *, server: bool) -> TlsSession:
        """Raises HandshakeFailure; the caller bounds the time and closes `conn`."""
        context = self._server if server else self._client
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=server)
        done = False
        while not done:
            try:
                tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                raise HandshakeFailure(f"TLS: {error}") from error
            try:
                if outgoing.pending:
                    await conn.write(outgoing.read())
                if not done:
                    data = await conn.read(_SOCKET_READ_BYTES)
                    if not data:
                        raise HandshakeFailure("the peer closed during the TLS handshake")
                    incoming.write(data)
            except (IOException, RawConnError) as error:
                raise HandshakeFailure(f"the connection broke: {error}") from error
        der = tls.getpeercert(binary_form=True)
        if der is None:
            raise HandshakeFailure("the peer presented no certificate")
        try:
            return TlsSession(
                conn,
                tls,
                incoming,
                outgoing,
                key_pair=self._key_pair,
                remote=x509.load_der_x509_certificate(der),
                initiator=not server,
            )
        except Exception as error:
            # Boundary: the certificate is hostile input to three parsers with many error types.
            raise HandshakeFailure(f"bad libp2p certificate: {error}") from error
