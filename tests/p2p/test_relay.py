"""What a relay grants, and what it does not."""

import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.envelope import unmarshal_envelope
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, Voucher

from tdmld.p2p import CircuitQuota, Host, RelayPolicy, rawstream
from tdmld.p2p import relay as relaying
from tdmld.p2p.circuit import HOP
from tdmld.p2p.errors import StreamBroken, StreamError
from tdmld.p2p.relay import Pace
from tests.p2p.relays import AMPLE, OPEN, connect, path, relayed_hosts, relayed_only, reserve
from tests.p2p.support import ECHO, SINK, connected_pair, echo, info, says_hello, until


async def ask(host, relay, request):
    """The relay's answer to one message on a new hop stream."""
    host.add_peer(info(relay))
    await until(lambda: relay.peer_id in host.connected())
    stream = await rawstream.negotiate(connection(host, relay), HOP)
    try:
        await rawstream.send(stream, request)
        with trio.fail_after(5):
            return await rawstream.receive(stream, HopMessage)
    finally:
        await rawstream.reset(stream)


def connection(host, other):
    return host._swarm.get_connections(ID.from_base58(other.peer_id))[0]


def connect_to(peer_id):
    request = HopMessage(type=HopMessage.CONNECT)
    request.peer.id = ID.from_base58(peer_id).to_bytes()
    return request


RESERVE = HopMessage(type=HopMessage.RESERVE)


# Who is let in


async def test_a_host_relays_for_nobody_unless_it_was_opened_to():
    async with connected_pair() as (a, b):
        with pytest.raises(Exception, match="not supported"):
            await rawstream.negotiate(connection(a, b), HOP)
        assert b.relay_use is None
        a.set_relays([info(b)])
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert len(a.addresses) == 1


async def test_a_reservation_says_until_when_where_and_what_and_is_signed():
    policy = replace(OPEN, reservation_seconds=1000.0)
    async with relayed_hosts(1, policy) as ([relay], [host]):
        answer = await ask(host, relay, RESERVE)
        assert answer.status == Status.OK
        assert answer.limit.data == AMPLE.bytes
        assert answer.limit.duration == AMPLE.seconds
        assert abs(answer.reservation.expire - time.time() - 1000) < 5
        assert len(answer.reservation.addrs) == 1
        envelope = unmarshal_envelope(answer.reservation.voucher)
        envelope.validate("libp2p-relay-rsvp")
        assert ID.from_pubkey(envelope.public_key) == ID.from_base58(relay.peer_id)
        voucher = Voucher()
        voucher.ParseFromString(envelope.raw_payload)
        assert str(ID(voucher.peer)) == host.peer_id
        assert voucher.expiration == answer.reservation.expire


async def test_places_are_limited():
    policy = replace(OPEN, reservations=2)
    async with relayed_hosts(3, policy) as ([relay], [a, b, c]):
        await reserve(a, relay)
        await reserve(b, relay)
        answer = await ask(c, relay, RESERVE)
        assert answer.status == Status.RESERVATION_REFUSED
        assert (await ask(a, relay, RESERVE)).status == Status.OK, "its own place is renewed"
        await a.disconnect(relay.peer_id)
        a.set_relays([])
        await until(lambda: relay.relay_use.reservations == 1)
        assert (await ask(c, relay, RESERVE)).status == Status.OK
        assert relay.relay_use.refused == 1


async def test_places_of_one_address_are_limited():
    policy = replace(OPEN, reservations_per_address=1)
    async with relayed_hosts(2, policy) as ([relay], [a, b]):
        await reserve(a, relay)
        assert (await ask(b, relay, RESERVE)).status == Status.RESERVATION_REFUSED


@pytest.mark.parametrize(
    ("second", "status"),
    [("2001:db8::2", Status.RESERVATION_REFUSED), ("2001:db8:0:1::1", Status.OK)],
)
async def test_of_ipv6_the_64_is_the_address(monkeypatch, second, status):
    policy = replace(OPEN, reservations_per_address=1)
    async with relayed_hosts(2, policy) as ([relay], [a, b]):
        at = {a.peer_id: "2001:db8::1", b.peer_id: second}

        def remote(stream):
            return at[str(stream.muxed_conn.peer_id)], 4001

        monkeypatch.setattr(NetStream, "get_remote_address", remote)
        await reserve(a, relay)
        assert (await ask(b, relay, RESERVE)).status == status


async def test_a_place_is_lost_when_its_time_is_over():
    policy = replace(OPEN, reservation_seconds=0.3)
    async with relayed_hosts(2, policy) as ([relay], [a, b]):
        await reserve(b, relay)
        await until(lambda: relay.relay_use.reservations == 0)
        answer = await ask(a, relay, connect_to(b.peer_id))
        assert answer.status == Status.NO_RESERVATION


async def test_strangers_are_refused_when_their_quota_is_nothing():
    nothing = CircuitQuota(bytes=0, seconds=0, bytes_per_second=1)
    known = set()
    policy = replace(OPEN, strangers=nothing, ours=AMPLE, allow=known.__contains__)
    async with relayed_hosts(3, policy) as ([relay], [a, b, stranger]):
        known |= {a.peer_id, b.peer_id}
        await connect(a, await reserve(b, relay))
        assert (await ask(stranger, relay, RESERVE)).status == Status.PERMISSION_DENIED
        refused = await ask(stranger, relay, connect_to(b.peer_id))
        assert refused.status == Status.PERMISSION_DENIED


async def test_a_circuit_has_the_larger_quota_only_when_both_ends_are_ours():
    known = set()
    tight = CircuitQuota(bytes=1 << 16, seconds=60.0, bytes_per_second=1 << 30)
    policy = replace(OPEN, strangers=tight, ours=AMPLE, allow=known.__contains__)
    async with relayed_hosts(3, policy) as ([relay], [a, b, stranger]):
        known |= {a.peer_id, b.peer_id}
        await reserve(b, relay)
        for host, limit in ((a, AMPLE.bytes), (stranger, tight.bytes)):
            answer = await ask(host, relay, connect_to(b.peer_id))
            assert answer.limit.data == limit


async def test_a_peer_that_the_relay_keeps_is_one_of_ours():
    async with relayed_hosts(1, RelayPolicy(ours=AMPLE)) as ([relay], [host]):
        host.add_peer(info(relay))
        await until(lambda: host.peer_id in relay.connected())
        relay.add_peer(info(host))
        assert (await ask(host, relay, RESERVE)).limit.data == AMPLE.bytes


# Requests


@pytest.mark.parametrize("peer", [b"", b"nonsense", bytes(100)])
async def test_a_circuit_to_nobody_is_refused(peer):
    async with relayed_hosts(1, OPEN) as ([relay], [host]):
        request = HopMessage(type=HopMessage.CONNECT)
        request.peer.id = peer
        answer = await ask(host, relay, request)
        assert answer.status in (Status.NO_RESERVATION, Status.MALFORMED_MESSAGE)


async def test_a_status_is_no_request():
    async with relayed_hosts(1, OPEN) as ([relay], [host]):
        answer = await ask(host, relay, HopMessage(type=HopMessage.STATUS))
        assert answer.status == Status.UNEXPECTED_MESSAGE


@pytest.mark.parametrize("garbage", [b"\xff" * 20, b"\x05hello", b"\xff\xff\x7f", b""])
async def test_garbage_ends_its_stream_and_nothing_else(garbage):
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        relayed = await reserve(b, relay)
        a.add_peer(info(relay))
        await until(lambda: relay.peer_id in a.connected())
        stream = await rawstream.negotiate(connection(a, relay), HOP)
        await stream.write(garbage)
        await stream.close_write()
        with pytest.raises(StreamBroken):
            await rawstream.receive(stream, HopMessage)
        await connect(a, relayed)
        assert await says_hello(a, b.peer_id)


async def test_nothing_is_granted_over_a_relayed_connection():
    async with relayed_hosts(1, OPEN, OPEN) as ([relay, second], [a]):
        # The second relay itself is reached through the first one.
        relayed = await reserve(second, relay)
        await connect(a, relayed_only(second))
        assert relayed.addresses
        for request in (RESERVE, connect_to(a.peer_id)):
            stream = await rawstream.negotiate(connection(a, second), HOP)
            await rawstream.send(stream, request)
            answer = await rawstream.receive(stream, HopMessage)
            assert answer.status == Status.PERMISSION_DENIED


# Circuits


async def test_circuits_of_one_peer_and_in_all_are_limited():
    policy = replace(OPEN, circuits=2, circuits_per_peer=1)
    async with relayed_hosts(6, policy) as ([relay], [a, b, c, d, e, f]):
        await connect(a, await reserve(b, relay))
        too_many = await ask(c, relay, connect_to(b.peer_id))
        assert too_many.status == Status.RESOURCE_LIMIT_EXCEEDED
        await connect(c, await reserve(d, relay))
        assert relay.relay_use.circuits == 2
        await reserve(f, relay)
        full = await ask(e, relay, connect_to(f.peer_id))
        assert full.status == Status.RESOURCE_LIMIT_EXCEEDED
        await a.disconnect(b.peer_id)
        a.remove_peer(b.peer_id)
        await until(lambda: relay.relay_use.circuits == 1)
        assert (await ask(e, relay, connect_to(f.peer_id))).status == Status.OK


async def open_circuits(
    stack: AsyncExitStack, host: Host, relay: Host, target: Host, count: int
) -> list[int]:
    """What the relay answers to each; they stay open as long as the stack."""
    answers = []
    for _ in range(count):
        stream = await rawstream.negotiate(connection(host, relay), HOP)
        stack.push_async_callback(rawstream.reset, stream)
        await rawstream.send(stream, connect_to(target.peer_id))
        answers.append((await rawstream.receive(stream, HopMessage)).status)
    return answers


async def test_one_peer_cannot_take_all_circuits_of_another():
    async with relayed_hosts(3, OPEN) as ([relay], [flooder, b, c]):
        relayed = await reserve(b, relay)
        flooder.add_peer(info(relay))
        await until(lambda: relay.peer_id in flooder.connected())
        async with AsyncExitStack() as stack:
            answers = await open_circuits(stack, flooder, relay, b, 4)
            assert answers == [Status.OK] * 2 + [Status.RESOURCE_LIMIT_EXCEEDED] * 2
            await connect(c, relayed)
            assert await says_hello(c, b.peer_id)


async def test_who_is_relayed_to_waits_for_few_handshakes_of_one_peer(monkeypatch):
    monkeypatch.setattr(relaying, "_CIRCUITS_PER_PAIR", 100)
    async with relayed_hosts(3, OPEN) as ([relay], [flooder, b, c]):
        relayed = await reserve(b, relay)
        flooder.add_peer(info(relay))
        await until(lambda: relay.peer_id in flooder.connected())
        async with AsyncExitStack() as stack:
            answers = await open_circuits(stack, flooder, relay, b, 4)
            assert answers == [Status.OK] * 2 + [Status.CONNECTION_FAILED] * 2
            await connect(c, relayed)
        await until(lambda: not [k for k in b._circuits._handshakes if k[1]])


@asynccontextmanager
async def sinking(quota, **options):
    """Two hosts with one circuit, and how many bytes have arrived."""
    arrived = [0]

    async def sink(stream):
        while True:
            arrived[0] += len(await stream.receive(1 << 20))

    policy = RelayPolicy(strangers=quota, **options)
    async with relayed_hosts(2, policy) as ([relay], [a, b]):
        b.set_handler(SINK, sink)
        await connect(a, await reserve(b, relay))
        yield a, b, arrived


async def fill(stream):
    while True:
        await stream.send(bytes(1 << 16))


async def test_a_circuit_ends_when_its_bytes_are_spent():
    quota = CircuitQuota(bytes=1 << 20, seconds=60.0, bytes_per_second=1 << 30)
    async with sinking(quota) as (a, b, arrived):
        stream = await a.open_stream(b.peer_id, SINK)
        a.remove_peer(b.peer_id)
        with trio.fail_after(5), pytest.raises(StreamError):
            await fill(stream)
        await until(lambda: a.peer_id not in b.connected())
        assert 0 < arrived[0] <= 1 << 20


async def test_a_circuit_ends_when_its_time_is_over():
    quota = CircuitQuota(bytes=1 << 30, seconds=0.5, bytes_per_second=1 << 30)
    async with sinking(quota) as (a, b, _):
        a.remove_peer(b.peer_id)
        began = time.monotonic()
        await until(lambda: b.peer_id not in a.connected(), 3)
        assert time.monotonic() - began > 0.2


@pytest.mark.parametrize("of_all", [False, True])
async def test_a_circuit_is_no_faster_than_granted(of_all):
    slow, fast = 1 << 20, 1 << 30
    quota = CircuitQuota(bytes=1 << 30, seconds=60.0, bytes_per_second=fast if of_all else slow)
    whole = slow if of_all else fast
    async with sinking(quota, bytes_per_second=whole) as (a, b, arrived):
        began = time.monotonic()
        stream = await a.open_stream(b.peer_id, SINK)
        for _ in range(16):
            await stream.send(bytes(1 << 16))
        await until(lambda: arrived[0] == 1 << 20)
        assert 0.8 < time.monotonic() - began < 3


async def test_a_reader_that_stops_stops_the_writer_and_the_relay_holds_little():
    gate = trio.Event()
    sent = [0]

    async def stuck(stream):
        await gate.wait()
        while True:
            await stream.receive(1 << 20)

    async def flood(stream):
        while True:
            await stream.send(bytes(1 << 16))
            sent[0] += 1 << 16

    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        b.set_handler(SINK, stuck)
        await connect(a, await reserve(b, relay))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, await a.open_stream(b.peer_id, SINK))
            before = -1
            while sent[0] != before:
                before = sent[0]
                await trio.testing.wait_all_tasks_blocked(0.3)
            assert sent[0] < 8 << 20
            assert relay.relay_use.bytes < 8 << 20
            assert await says_hello(a, b.peer_id), "other streams of the circuit go on"
            gate.set()
            await until(lambda: sent[0] > before + (4 << 20))
            nursery.cancel_scope.cancel()


async def test_the_relays_own_streams_go_on_beside_relayed_bulk():
    async with relayed_hosts(2, replace(OPEN, bytes_per_second=64 << 20)) as ([relay], [a, b]):

        async def sink(stream):
            while True:
                await stream.receive(1 << 20)

        relay.set_handler(ECHO, echo)
        b.set_handler(SINK, sink)
        await connect(a, await reserve(b, relay))

        async def flood(stream):
            while True:
                await stream.send(bytes(1 << 19))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, await a.open_stream(b.peer_id, SINK))
            await until(lambda: relay.relay_use.bytes > 16 << 20)
            began = time.monotonic()
            for _ in range(10):
                assert await says_hello(b, relay.peer_id)
            assert time.monotonic() - began < 5
            nursery.cancel_scope.cancel()


async def test_a_circuit_ends_with_either_end():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await connect(a, await reserve(b, relay))
        await b.disconnect(relay.peer_id)
        await until(lambda: relay.relay_use.circuits == 0)
        await until(lambda: path(a, b) is None or a.peer_id in b.connected())


async def test_the_pace_serves_in_order_and_forgets_who_gave_up(autojump_clock):
    pace, order = Pace(100), []

    async def take(name, size):
        await pace.take(size)
        order.append((name, round(trio.current_time() - began)))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, "a", 110)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.5):
            await pace.take(1000)
        nursery.start_soon(take, "b", 100)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(take, "c", 100)
    assert order == [("a", 1), ("b", 2), ("c", 3)]
