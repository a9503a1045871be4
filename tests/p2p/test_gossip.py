"""Gossip arrives, once, at others; and no message, however made, takes a host down."""

import time
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed

from tdmld.p2p import GossipMessage, Host, Limits, open_host
from tdmld.p2p.catchup import CatchUp
from tdmld.p2p.errors import GossipRefused
from tdmld.p2p.rawstream import negotiate
from tests.p2p.support import connected_pair, hosts, info, says_hello, seed, until

TOPIC = "/test/gossip/1"
FAST = Limits(gossip_per_second=400)


def accept(source: str, data: bytes) -> bool:
    return True


async def join(*members: Host, validate=accept, limit: int = 1000):
    """Subscribe all and wait until each knows that each of its peers has."""
    channels = [await host.subscribe(TOPIC, limit=limit, validate=validate) for host in members]
    for host in members:
        await until(lambda: known(host) == len(host.connected()))  # noqa: B023
    return channels


def known(host: Host) -> int:
    pubsub = host._gossip._pubsub
    return len(pubsub.peer_topics.get(TOPIC, set()) & pubsub.peers.keys())


async def collect(channel: trio.MemoryReceiveChannel[GossipMessage], count: int) -> list[bytes]:
    with trio.fail_after(10):
        return [(await channel.receive()).data for _ in range(count)]


def noting(write: Callable[..., Awaitable[bool]], seen: list[rpc_pb2.RPC]):
    """`write_msg` that keeps what it wrote."""

    async def write_and_note(stream: object, rpc: rpc_pb2.RPC) -> bool:
        written = await write(stream, rpc)
        seen.append(rpc)
        return written

    return write_and_note


async def test_a_message_reaches_the_others_and_not_its_author():
    async with connected_pair(gossip=True) as (a, b):
        mine, yours = await join(a, b)
        await a.publish(TOPIC, b"news")
        with trio.fail_after(5):
            assert await yours.receive() == GossipMessage(a.peer_id, TOPIC, b"news")
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(trio.WouldBlock):
            mine.receive_nowait()


async def test_a_message_is_relayed_and_delivered_once():
    async with hosts(4, gossip=True) as (a, b, c, d):
        for host in (b, c):
            host.add_peer(info(a))
            host.add_peer(info(d))
        await until(lambda: len(a.connected()) == len(d.connected()) == 2)
        channels = await join(a, b, c, d)
        for number in range(10):
            await a.publish(TOPIC, b"%d" % number)
        received = await collect(channels[3], 10)
        assert sorted(received) == [b"%d" % number for number in range(10)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(trio.WouldBlock):
            channels[3].receive_nowait()


async def test_small_messages_travel_without_records_and_idontwant():
    """A large one is worth telling the others that it has come."""
    seen: list[rpc_pb2.RPC] = []
    async with hosts(3, gossip=True) as (a, b, c):
        for host in (b, c):
            host.add_peer(info(a))
        c.add_peer(info(b))
        await until(lambda: len(a.connected()) == len(b.connected()) == 2)
        channels = await join(a, b, c, limit=50_000)
        for host in (a, b, c):
            await until(lambda: len(host._gossip._router.mesh.get(TOPIC, ())) == 2)  # noqa: B023
            pubsub = host._gossip._pubsub
            pubsub.write_msg = noting(pubsub.write_msg, seen)
        await a.publish(TOPIC, b"small")
        await collect(channels[1], 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert any(rpc.publish for rpc in seen)
        assert not any(rpc.HasField("senderRecord") for rpc in seen)
        assert not any(rpc.control.idontwant for rpc in seen)
        await a.publish(TOPIC, bytes(20_000))
        await collect(channels[1], 1)
        await until(lambda: any(rpc.control.idontwant for rpc in seen))


async def _asks_nobody(_: CatchUp) -> None:
    await trio.sleep_forever()


async def test_a_burst_arrives_completely(monkeypatch: pytest.MonkeyPatch):
    """The library delivers 16 of 100 (its queues hold 32), and 10 a second with spam protection.
    Without asking again for what was lost."""
    monkeypatch.setattr(CatchUp, "run", _asks_nobody)
    async with connected_pair(gossip=True, limits=FAST) as (a, b):
        _, yours = await join(a, b)
        sent = [b"message %d" % number for number in range(100)]
        async with trio.open_nursery() as nursery:
            for message in sent:
                nursery.start_soon(a.publish, TOPIC, message)
            received = await collect(yours, len(sent))
        assert sorted(received) == sorted(sent)
        assert b.gossip_dropped == 0


async def test_a_peer_that_takes_less_than_is_published_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    """The library queues 32 messages for a peer and drops further ones without a word."""
    monkeypatch.setattr(CatchUp, "run", _asks_nobody)
    async with connected_pair(gossip=True, limits=FAST) as (a, b):
        _, yours = await join(a, b)
        pubsub = a._gossip._pubsub
        write = pubsub.write_msg

        async def slowly(stream: object, rpc: rpc_pb2.RPC) -> bool:
            await trio.sleep(0.01)
            return await write(stream, rpc)

        pubsub.write_msg = slowly
        for number in range(100):
            await a.publish(TOPIC, b"message %d" % number)
        assert len(await collect(yours, 100)) == 100


async def test_a_subscriber_that_does_not_read_loses_the_newest_and_it_is_counted():
    limits = Limits(gossip_queue=5, gossip_per_second=400)
    async with connected_pair(gossip=True, limits=limits) as (a, b):
        _, yours = await join(a, b)
        for number in range(12):
            await a.publish(TOPIC, b"%d" % number)
        await until(lambda: b.gossip_dropped == 7)
        assert len(await collect(yours, 5)) == 5
        await a.publish(TOPIC, b"again")
        assert await collect(yours, 1) == [b"again"]


async def test_what_the_validator_refuses_or_fails_on_is_not_delivered(caplog):
    """In the library a validator that raises ends the whole host."""

    def validate(source: str, data: bytes) -> bool:
        if data == b"boom":
            raise KeyError("a bug")
        return data != b"bad"

    async with connected_pair(gossip=True) as (a, b):
        _, yours = await join(a, b, validate=validate)
        for data in (b"bad", b"boom", b"good"):
            await a.publish(TOPIC, data)
        assert await collect(yours, 1) == [b"good"]
        assert await says_hello(a, b.peer_id)
    assert "the validator of /test/gossip/1 failed" in caplog.text


@pytest.mark.parametrize(("verdict", "blamed"), [(False, True), (None, False)])
async def test_who_passes_on_what_nobody_honest_would_is_blamed_and_nobody_else(
    verdict: bool | None, blamed: bool
):
    """The library has two answers: what hangs on the state of who is asked gets the bad one."""
    async with connected_pair(gossip=True) as (a, b):
        await a.subscribe(TOPIC, limit=1000, validate=accept)
        asked = trio.Event()

        def validate(source: str, data: bytes) -> bool | None:
            asked.set()
            return verdict

        yours = await b.subscribe(TOPIC, limit=1000, validate=validate)
        await until(lambda: known(a) == known(b) == 1)
        await a.publish(TOPIC, b"news")
        with trio.fail_after(5):
            await asked.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(trio.WouldBlock):
            yours.receive_nowait()
        [status] = b.peers()
        assert (status.score > 0) == blamed
        assert status.gossip_bytes == 4


async def test_the_heart_beats_every_second_however_few_peers_there_are():
    """The library's beats every two minutes, and more slowly when it likes its peers too little."""
    async with hosts(1, gossip=True) as (a,):
        beats = []
        router = a._gossip._router
        original = router.mesh_heartbeat
        router.mesh_heartbeat = lambda: beats.append(trio.current_time()) or original()
        await until(lambda: len(beats) >= 3, seconds=6)
        assert beats[2] - beats[1] < 2


async def test_a_message_over_the_limit_is_neither_sent_nor_taken():
    seen = []

    def note(source: str, data: bytes) -> bool:
        seen.append(data)
        return True

    async with connected_pair(gossip=True) as (a, b):
        await a.subscribe(TOPIC, limit=100, validate=accept)
        with pytest.raises(GossipRefused, match="at most 100 bytes, not 101"):
            await a.publish(TOPIC, bytes(101))
        yours = await b.subscribe(TOPIC, limit=50, validate=note)
        await until(lambda: known(a) == known(b) == 1)
        await a.publish(TOPIC, bytes(51))
        await a.publish(TOPIC, bytes(50))
        assert await collect(yours, 1) == [bytes(50)]
        assert seen == [bytes(50)]
        assert b._gossip.rejected == 1


async def test_gossip_can_be_switched_off():
    async with open_host(seed(1), gossip=False) as host:
        with pytest.raises(GossipRefused):
            await host.publish(TOPIC, b"x")
        with pytest.raises(GossipRefused):
            await host.subscribe(TOPIC, limit=1, validate=accept)


async def test_a_limit_above_what_gossip_carries_is_refused():
    async with open_host(seed(1)) as host:
        with pytest.raises(GossipRefused, match="serve the rest by stream"):
            await host.subscribe(TOPIC, limit=1 << 20, validate=accept)
        with pytest.raises(GossipRefused, match=r"subscribe to .* before"):
            await host.publish(TOPIC, b"x")


async def test_a_restarted_author_is_heard_at_once():
    """The library repeats its sequence numbers after a restart, and nobody relays it."""
    async with connected_pair(gossip=True, limits=FAST) as (a, b):
        _, yours = await join(a, b)
        for life in range(2):
            async with open_host(seed(9), limits=FAST) as author:
                await author.subscribe(TOPIC, limit=100, validate=accept)
                author.add_peer(info(a))
                await until(lambda: known(author) == 1 and known(a) == 2)
                sent = [b"life %d message %d" % (life, number) for number in range(30)]
                for message in sent:
                    await author.publish(TOPIC, message)
                assert sorted(await collect(yours, 30)) == sorted(sent)


async def test_a_restarted_author_repeats_no_sequence_number():
    """The library's begin at the second of its start: peers that know messages by them, as the
    specification's ids do, drop those of a node that restarts."""
    used: list[list[int]] = []
    for _ in range(2):
        async with connected_pair(gossip=True, limits=FAST) as (a, b):
            await join(a, b)
            seen: list[rpc_pb2.RPC] = []
            pubsub = a._gossip._pubsub
            pubsub.write_msg = noting(pubsub.write_msg, seen)
            for number in range(30):
                await a.publish(TOPIC, b"message %d" % number)
            await until(lambda: sum(len(rpc.publish) for rpc in seen) >= 30)  # noqa: B023
            numbers = [int.from_bytes(m.seqno, "big") for rpc in seen for m in rpc.publish]
            used.append(numbers)
    assert min(used[1]) > max(used[0])


async def test_gossip_goes_on_after_a_connection_was_lost_or_replaced():
    """The library stays deaf to a peer that comes back before its old connection is cleaned up."""
    async with connected_pair(gossip=True) as (a, b):
        _, yours = await join(a, b)
        b.add_peer(info(a))
        for number in range(5):
            for conn in b._swarm.get_connections():
                # As when the socket breaks; b has a stream to open and redials at once.
                await conn.muxed_conn._session.close()
            assert await says_hello(b, a.peer_id)
            assert await hears_again(a, yours, number)


async def hears_again(
    author: Host, channel: trio.MemoryReceiveChannel[GossipMessage], number: int
) -> bool:
    """Gossip is best effort while a connection changes; but soon it must arrive again."""
    for attempt in range(30):
        await author.publish(TOPIC, b"%d, attempt %d" % (number, attempt))
        with trio.move_on_after(0.1):
            await channel.receive()
            return True
    return False


async def test_gossip_survives_a_peer_that_restarts_unnoticed():
    async with hosts(1, gossip=True) as (a,):
        channel = await a.subscribe(TOPIC, limit=100, validate=accept)
        async with open_host(seed(2)) as first:
            first.add_peer(info(a))
            await until(lambda: first.peer_id in a.connected())
            first.remove_peer(a.peer_id)
            async with open_host(seed(2)) as second:
                other = await second.subscribe(TOPIC, limit=100, validate=accept)
                second.add_peer(info(a))
                await until(lambda: known(a) == 1 and known(second) == 1)
                await second.publish(TOPIC, b"here again")
                assert await collect(channel, 1) == [b"here again"]
                await a.publish(TOPIC, b"welcome back")
                assert await collect(other, 1) == [b"welcome back"]


@pytest.mark.parametrize(
    "message",
    [
        {"from_id": b"garbage", "key": b"garbage", "signature": b"x"},
        {"from_id": b"", "signature": b"x"},
        {"from_id": b"\x00\x24\x08\x01\x12\x20" + bytes(32), "signature": bytes(64)},
        {"from_id": b"\x00\x24\x08\x01\x12\x20" + bytes(32)},
    ],
)
async def test_a_forged_message_is_dropped_and_the_host_lives(message: dict[str, bytes]):
    """A key that cannot be parsed ends the library's host."""
    async with connected_pair(gossip=True) as (a, b):
        _, yours = await join(a, b)
        [conn] = a._swarm.get_connections()
        stream = await negotiate(conn, TProtocol(PROTOCOL_ID_V12))
        forged = rpc_pb2.Message(data=b"forged", topicIDs=[TOPIC], seqno=bytes(8), **message)
        rpc = rpc_pb2.RPC(publish=[forged])
        await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
        await trio.testing.wait_all_tasks_blocked(0.05)
        await a.publish(TOPIC, b"genuine")
        assert await collect(yours, 1) == [b"genuine"]


@pytest.mark.parametrize("raw", [b"\xff" * 20, b"\x05\x12\xff\xff\xff\xff", b"\x80" * 12])
async def test_garbage_on_a_gossip_stream_harms_its_sender_only(raw: bytes):
    async with hosts(3, gossip=True) as (hostile, b, c):
        for host in (hostile, c):
            host.add_peer(info(b))
        await until(lambda: len(b.connected()) == 2)
        _, _, channel = await join(hostile, b, c)
        [conn] = hostile._swarm.get_connections()
        stream = await negotiate(conn, TProtocol(PROTOCOL_ID_V12))
        await stream.write(raw)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await b.publish(TOPIC, b"genuine")
        assert await collect(channel, 1) == [b"genuine"]
        assert await says_hello(b, c.peer_id)


async def control(host: Host, peer: Host, message: rpc_pb2.ControlMessage) -> None:
    """Send it on a stream of its own, as a hostile peer may."""
    [conn] = [c for c in host._swarm.get_connections() if str(c.muxed_conn.peer_id) == peer.peer_id]
    stream = await negotiate(conn, TProtocol(PROTOCOL_ID_V12))
    rpc = rpc_pb2.RPC(control=message)
    await stream.write(encode_varint_prefixed(rpc.SerializeToString()))


async def test_a_message_that_is_wanted_a_thousand_times_is_sent_once():
    """The library sends as many copies: a small packet makes it build one of gigabytes."""
    seen: list[rpc_pb2.RPC] = []
    async with connected_pair(gossip=True) as (a, b):
        mine, _ = await join(a, b)
        await b.publish(TOPIC, b"news")
        await collect(mine, 1)
        [key] = b._gossip._router.mcache.window(TOPIC)
        pubsub = b._gossip._pubsub
        pubsub.write_msg = noting(pubsub.write_msg, seen)
        want = rpc_pb2.ControlIWant(messageIDs=[key.hex().encode()] * 1000)
        await control(a, b, rpc_pb2.ControlMessage(iwant=[want]))
        await until(lambda: any(rpc.publish for rpc in seen))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sum(len(rpc.publish) for rpc in seen) == 1


async def test_what_was_seen_is_not_asked_for_again():
    """The library announces messages under ids that nobody knows them by."""
    seen: list[rpc_pb2.RPC] = []
    async with connected_pair(gossip=True) as (a, b):
        await join(a, b)
        pubsub = b._gossip._pubsub
        pubsub.write_msg = noting(pubsub.write_msg, seen)
        await a.publish(TOPIC, b"news")
        await until(lambda: len(b._gossip.recent) == 1)
        [known_id] = a._gossip._router.mcache.window(TOPIC)
        for key in (known_id, bytes(32)):
            have = rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=[key.hex().encode()])
            await control(a, b, rpc_pb2.ControlMessage(ihave=[have]))
        await until(lambda: any(rpc.control.iwant for rpc in seen))
        await trio.testing.wait_all_tasks_blocked(0.05)
        asked = [i for rpc in seen for want in rpc.control.iwant for i in want.messageIDs]
        assert len(asked) == 1


async def test_whoever_leaves_our_mesh_makes_us_dial_nobody_and_remember_nothing():
    """In the library it may name peers, whom the host then dials, and topics without end."""
    async with hosts(3, gossip=True) as (a, b, c):
        a.add_peer(info(b))
        c.add_peer(info(b))
        await until(lambda: len(b.connected()) == 2)
        await join(a, b, c)
        # b knows an address of c by identify, and would dial it.
        c.remove_peer(b.peer_id)
        await b.disconnect(c.peer_id)
        await until(lambda: len(b.connected()) == 1)
        named = rpc_pb2.PeerInfo(peerID=ID.from_base58(c.peer_id).to_bytes())
        prunes = [rpc_pb2.ControlPrune(topicID=f"invented {n}", backoff=10**9) for n in range(100)]
        prunes.append(rpc_pb2.ControlPrune(topicID=TOPIC, peers=[named], backoff=10**9))
        await control(a, b, rpc_pb2.ControlMessage(prune=prunes))
        backoffs = b._gossip._router.back_off
        await until(lambda: bool(backoffs.get(TOPIC)))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert set(backoffs) == {TOPIC}
        assert all(at < time.time() + 100 for at in backoffs[TOPIC].values())
        assert b.connected() == {a.peer_id}
