"""Relays and their users that are not ours: the library's own, over Noise and Yamux."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from libp2p.abc import IHost
from libp2p.custom_types import TProtocol
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.relay.circuit_v2.config import RelayConfig
from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
from libp2p.relay.circuit_v2.resources import RelayLimits
from libp2p.relay.circuit_v2.transport import CircuitV2Transport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from tdmld.p2p import PeerInfo
from tests.p2p.relays import OPEN, connect, path, relayed_hosts, relayed_only, reserve
from tests.p2p.support import ECHO, foreign_host, says_hello, until

AMPLE = RelayLimits(duration=600, data=1 << 30, max_circuit_conns=8, max_reservations=8)


@asynccontextmanager
async def foreign(*, relays: bool) -> AsyncIterator[tuple[IHost, CircuitV2Protocol]]:
    host = foreign_host(5)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        protocol = CircuitV2Protocol(host, AMPLE, allow_hop=relays)
        async with background_trio_service(protocol):
            await protocol.event_started.wait()
            yield host, protocol
        await host.close()


async def test_our_hosts_speak_through_a_foreign_relay():
    async with foreign(relays=True) as (relay, _), relayed_hosts(2) as (_, [a, b]):
        text = str(relay.get_addrs()[0]).split("/p2p/")[0]
        b.set_relays([PeerInfo(str(relay.get_id()), (text,))])
        await until(lambda: bool(b.addresses))
        await connect(a, relayed_only(b))
        assert path(a, b) == "relayed"
        assert await says_hello(a, b.peer_id)
        assert await says_hello(b, a.peer_id)


async def test_a_foreign_host_dials_ours_through_our_relay():
    async with (
        foreign(relays=False) as (other, protocol),
        relayed_hosts(1, OPEN) as (
            [relay],
            [ours],
        ),
    ):
        await reserve(ours, relay)
        dialler = CircuitV2Transport(other, protocol, RelayConfig())
        await other.connect(
            info_from_p2p_addr(Multiaddr(f"{relay.addresses[0]}/p2p/{relay.peer_id}"))
        )
        await dialler.dial(Multiaddr(f"{ours.addresses[0]}/p2p/{ours.peer_id}"))
        stream = await other.new_stream(ID.from_base58(ours.peer_id), [TProtocol(ECHO)])
        await stream.write(struct.pack("!I", 5) + b"hello")
        assert await read_exactly(stream, 9) == struct.pack("!I", 5) + b"hello"
        [seen] = [peer for peer in ours.peers() if peer.peer_id == str(other.get_id())]
        assert seen.path == "relayed"
        await stream.close()
