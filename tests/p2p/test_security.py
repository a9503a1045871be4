"""Nobody gets in without proving an identity, and strangers' bytes harm nothing."""

import os
import ssl
from contextlib import suppress

import libp2p
import pytest
import trio
import trio.testing
from cryptography import x509
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair, KeyType, PrivateKey, PublicKey
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.security.tls.certificate import generate_certificate
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from tdmld.p2p import Host, Limits, PeerInfo, open_host
from tdmld.p2p.errors import AddressInvalid, DialFailed
from tdmld.p2p.noise import ShieldedNoise
from tdmld.p2p.tls import FastTls, _certificate_template
from tests.p2p.lockstep import raw_pair
from tests.p2p.support import connected_pair, hosts, info, says_hello, seed

VICTIM = create_new_key_pair(seed(9))


class ForgedKey(PrivateKey):
    """Signs with its own key and says that it is the victim's."""

    def __init__(self) -> None:
        self._own = create_new_key_pair(seed(66)).private_key

    def to_bytes(self) -> bytes:
        return self._own.to_bytes()

    def get_type(self) -> KeyType:
        return self._own.get_type()

    def sign(self, data: bytes) -> bytes:
        return self._own.sign(data)

    def get_public_key(self) -> PublicKey:
        return VICTIM.public_key


def forged_pair() -> KeyPair:
    return KeyPair(ForgedKey(), VICTIM.public_key)


async def dial_ours(ours: Host, security: dict[TProtocol, object], key_pair: KeyPair) -> bool:
    """Let a libp2p host of the given security dial ours: does it get in?"""
    attacker = libp2p.new_host(
        key_pair=key_pair, sec_opt=security, muxer_opt={TProtocol(YAMUX): Yamux}
    )
    async with attacker.run(listen_addrs=[]):
        target = info_from_p2p_addr(Multiaddr(f"{ours.addresses[0]}/p2p/{ours.peer_id}"))
        try:
            await attacker.connect(target)
        except BaseLibp2pError:
            return False
        return str(attacker.get_id()) in ours.connected()


async def test_a_dialler_that_proposes_plaintext_is_refused():
    own = create_new_key_pair(seed(66))
    async with hosts(1) as (host,):
        plaintext = {TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(own)}
        assert not await dial_ours(host, plaintext, own)
        assert not host.connected()


@pytest.mark.parametrize("protocol", [TLS, NOISE])
async def test_a_forged_identity_is_refused(protocol: TProtocol):
    forged = forged_pair()
    transport = (
        FastTls(forged)
        if protocol == TLS
        else Noise(forged, noise_privkey=create_x25519().private_key)
    )
    async with hosts(1) as (host,):
        assert not await dial_ours(host, {protocol: transport}, forged)
        assert not host.connected()


@pytest.mark.parametrize("protocol", [TLS, NOISE])
async def test_the_same_host_with_an_honest_key_is_let_in(protocol: TProtocol):
    """The control of the test above."""
    transport = (
        FastTls(VICTIM)
        if protocol == TLS
        else Noise(VICTIM, noise_privkey=create_x25519().private_key)
    )
    async with hosts(1) as (host,):
        assert await dial_ours(host, {protocol: transport}, VICTIM)


async def test_a_peer_with_another_identity_than_expected_is_refused_by_the_dialler():
    async with hosts(3) as (a, b, c):
        a.add_peer(PeerInfo(c.peer_id, b.addresses))
        with pytest.raises(DialFailed, match=f"the peer there is {b.peer_id}, not {c.peer_id}"):
            await a.open_stream(c.peer_id, "/any")
        assert not a.connected()


def test_the_certificates_first_extension_is_that_of_libp2p():
    """js-libp2p looks at no other; the library puts one of X.509 before it."""
    pem, _ = generate_certificate(VICTIM.private_key, _certificate_template())
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert certificate.extensions[0].oid.dotted_string == "1.3.6.1.4.1.53594.1.1"


async def test_a_client_without_a_certificate_is_refused():
    client_raw, server_raw = raw_pair()
    tls = FastTls(VICTIM)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    tls._client = bare
    server = create_new_key_pair(seed(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tls.secure_outbound, client_raw, libp2p.generate_peer_id_from(server))
        with pytest.raises(HandshakeFailure, match="no certificate"):
            await FastTls(server).secure_inbound(server_raw)


@pytest.mark.parametrize("make", [FastTls, ShieldedNoise])
async def test_a_write_cancelled_under_back_pressure_is_never_torn(make: type):
    """Half a record on the wire would break every stream of the connection."""
    client_raw, server_raw = raw_pair()
    mine, yours = create_new_key_pair(seed(1)), create_new_key_pair(seed(2))
    sessions = {}

    async def inbound() -> None:
        sessions["server"] = await make(yours).secure_inbound(server_raw)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbound)
        client = await make(mine).secure_outbound(client_raw, libp2p.generate_peer_id_from(yours))
    received = bytearray()
    payload = os.urandom(400_000)

    async def read() -> None:
        while len(received) < len(payload) + 4:
            received.extend(await sessions["server"].read(65536))

    async def write() -> None:
        with scope:
            await client.write(payload)
        await client.write(b"more")

    scope = trio.CancelScope()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()  # nobody reads: the write is stuck
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read)
    assert bytes(received) == payload + b"more"


async def test_garbage_and_silence_on_the_port_leave_the_host_serving():
    limits = Limits(handshake_seconds=0.3, pending_per_address=4)
    async with hosts(2, limits=limits) as (a, b):
        port = int(b.addresses[0].rsplit("/", 1)[1])
        for first in (
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(5000),
            b"\x13/multistream/1.0.0\n\xff\xff",
        ):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
                await stranger.send_all(first)
                with trio.fail_after(2), suppress(trio.BrokenResourceError):
                    while await stranger.receive_some():
                        pass
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(8)]
        for stranger in silent:  # four at once, the other four after the time-out
            with trio.fail_after(2):
                while await stranger.receive_some():
                    pass
            await stranger.aclose()
        assert b._connector.refused == 4
        a.add_peer(info(b))
        assert await says_hello(a, b.peer_id)


async def test_hostile_bytes_in_protocol_negotiation_end_that_stream_only():
    """The library decodes them as text and lets the error end the whole host."""
    async with connected_pair() as (a, b):
        [conn] = a._swarm.get_connections()
        for bad in (b"\x05\xff\xfe\xfd\xfc\n", b"\x00", b"\xff" * 64):
            stream = await conn.new_stream()
            await stream.write(b"\x13/multistream/1.0.0\n" + bad)
            with trio.fail_after(2), suppress(BaseLibp2pError):
                while await stream.read(1000):
                    pass
        assert await says_hello(a, b.peer_id)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:4001",
        "/ip4/127.0.0.1",
        "/ip4/1.2.3.4/udp/4001/quic-v1",
        "/tcp/4001",
        "/ip4/1.2.3.4/tcp/99999",
        "/ip4/1.2.3.4/tcp/1/ws",
        "x" * 1000,
    ],
)
async def test_an_address_that_cannot_be_dialled_is_refused_when_added(address: str):
    async with hosts(1) as (a,):
        with pytest.raises(AddressInvalid):
            a.add_peer(PeerInfo("12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq", (address,)))
        assert not a.peers()


@pytest.mark.parametrize("peer_id", ["", "12D3", "0OIl" * 13, "x" * 1000, "é" * 52])
async def test_a_malformed_peer_id_is_refused(peer_id: str):
    async with open_host(seed(1), gossip=False) as a:
        with pytest.raises(AddressInvalid):
            await a.open_stream(peer_id, "/any")
        with pytest.raises(AddressInvalid):
            a.add_peer(PeerInfo(peer_id))
