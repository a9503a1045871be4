"""A stock libp2p host with Noise and Yamux is an ordinary peer: streams, limits, gossip."""

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from tdmld.p2p import Host, PeerInfo, Stream, open_host
from tdmld.p2p.errors import MessageTooLarge
from tests.p2p.support import ECHO, MOST, SINK, connected_pair, echo, foreign_host, seed, until


async def foreign_echo(stream: INetStream) -> None:
    """Echo one message and close; speaks our framing with the library's own means."""
    (size,) = struct.unpack("!I", await read_exactly(stream, 4))
    await stream.write(struct.pack("!I", size) + await read_exactly(stream, size))
    await stream.close()


@asynccontextmanager
async def foreign_pair(**options: object) -> AsyncIterator[tuple[Host, IHost]]:
    foreign = foreign_host(5)
    foreign.set_stream_handler(TProtocol(ECHO), foreign_echo)
    async with open_host(seed(1), **options) as ours:
        ours.set_handler(ECHO, echo)
        async with foreign.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            yield ours, foreign
            await foreign.close()


def address_of(foreign: IHost) -> PeerInfo:
    text = str(foreign.get_addrs()[0]).split("/p2p/")[0]
    return PeerInfo(str(foreign.get_id()), (text,))


async def test_we_dial_a_foreign_host_and_exchange_a_megabyte():
    async with foreign_pair(gossip=False) as (ours, foreign):
        ours.add_peer(address_of(foreign))
        payload = os.urandom(1 << 20)
        async with await ours.open_stream(str(foreign.get_id()), ECHO) as stream:
            await stream.send(payload[:1000], memoryview(payload)[1000:])
            assert await stream.receive(MOST) == payload
        assert ours.peers()[0].transport == "/noise /yamux/1.0.0"
        await until(lambda: ours.peers()[0].latency is not None)


async def test_a_foreign_host_dials_us():
    async with foreign_pair(gossip=False) as (ours, foreign):
        target = info_from_p2p_addr(Multiaddr(f"{ours.addresses[0]}/p2p/{ours.peer_id}"))
        await foreign.connect(target)
        stream = await foreign.new_stream(ID.from_base58(ours.peer_id), [TProtocol(ECHO)])
        await stream.write(struct.pack("!I", 5) + b"hello")
        assert await read_exactly(stream, 9) == struct.pack("!I", 5) + b"hello"
        await stream.close()


async def test_the_size_limit_holds_for_foreign_peers():
    refused = trio.Event()

    async def strict(stream: Stream) -> None:
        with pytest.raises(MessageTooLarge):
            await stream.receive(10)
        refused.set()

    async with foreign_pair(gossip=False) as (ours, foreign):
        ours.set_handler(SINK, strict)
        target = info_from_p2p_addr(Multiaddr(f"{ours.addresses[0]}/p2p/{ours.peer_id}"))
        await foreign.connect(target)
        stream = await foreign.new_stream(ID.from_base58(ours.peer_id), [TProtocol(SINK)])
        await stream.write(struct.pack("!I", 1 << 30))
        with trio.fail_after(2):
            await refused.wait()


async def test_our_own_hosts_agree_on_the_fast_path():
    async with connected_pair() as (a, _):
        assert a.peers()[0].transport == "/tls/1.0.0 /tdmld/fastmux/1.0.0"


async def test_gossip_passes_between_ours_and_a_foreign_host():
    foreign = foreign_host(5)
    router = GossipSub(
        [PROTOCOL_ID_V12, PROTOCOL_ID_V11],
        degree=4,
        degree_low=2,
        degree_high=6,
        heartbeat_interval=1,
        spam_protection_enabled=False,
    )
    pubsub = Pubsub(foreign, router)
    async with (
        open_host(seed(1)) as ours,
        foreign.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(pubsub),
        background_trio_service(router),
    ):
        theirs = await pubsub.subscribe("t")
        messages = await ours.subscribe("t", limit=100, validate=lambda source, data: True)
        ours.add_peer(address_of(foreign))
        await pubsub.wait_for_subscription(ID.from_base58(ours.peer_id), "t")
        await until(lambda: bool(ours._gossip._pubsub.peer_topics.get("t")))
        await until(lambda: bool(router.mesh.get("t")))
        with trio.fail_after(5):
            await pubsub.publish("t", b"from abroad")
            message = await messages.receive()
            assert (message.source, message.data) == (str(foreign.get_id()), b"from abroad")
            await ours.publish("t", b"from us")
            while (await theirs.get()).data != b"from us":
                pass
        await foreign.close()
