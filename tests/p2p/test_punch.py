"""Relayed connections that become direct, and what nobody can make us dial."""

import time

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from tdmld.chain.crypto import KeyPair
from tdmld.p2p import PeerInfo, open_host, punch, rawstream
from tdmld.p2p.addresses import TcpAddress, parse_address
from tdmld.p2p.errors import DialFailed, ListenFailed, StreamBroken
from tdmld.p2p.punch import DCUTR, worth_dialling
from tests.p2p.relays import OPEN, connect, path, relayed_hosts, relayed_only, reserve
from tests.p2p.support import connected_pair, count_tasks, says_hello, seed, until

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def tcp(*pairs):
    found = []
    for pair in pairs:
        host, port = pair.rsplit(":", 1)
        kind = "ip6" if ":" in host else "ip4" if host[0].isdigit() else "dns"
        found.append(TcpAddress(host, int(port), f"/{kind}/{host}/tcp/{port}"))
    return found


# What a peer may make us dial


def test_the_peers_public_address_is_dialled():
    ours = tcp("203.0.113.2:4001", "10.0.1.2:4001")
    assert worth_dialling(tcp("203.0.113.3:4001"), ours) == tcp("203.0.113.3:4001")


@pytest.mark.parametrize(
    "address",
    [
        "example.org:4001",
        "203.0.113.3:22",
        "203.0.113.3:1023",
        "0.0.0.0:4001",
        "224.0.0.1:4001",
        "127.0.0.1:4001",
        "::1:4001",
        "10.0.1.9:4001",
        "192.168.0.9:4001",
        "100.64.0.9:4001",
        "169.254.169.254:8080",
        "fd00::9:4001",
        "203.0.113.2:4001",
        "::ffff:127.0.0.1:4001",
        "::ffff:192.168.0.9:4001",
        "64:ff9b::7f00:1:4001",
        "2002:7f00:1::1:4001",
    ],
)
def test_what_no_punch_can_lead_to_is_not_dialled(address):
    ours = tcp("203.0.113.2:4001", "10.0.1.2:4001")
    assert worth_dialling(tcp(address, "203.0.113.3:4001"), ours) == tcp("203.0.113.3:4001")


def test_behind_our_own_router_private_addresses_are_dialled():
    ours = tcp("203.0.113.2:4001", "10.0.1.2:4001")
    theirs = tcp("203.0.113.2:4002", "10.0.1.3:4001")
    assert worth_dialling(theirs, ours) == theirs


def test_when_we_know_no_public_network_private_addresses_are_dialled():
    theirs = tcp("10.0.1.3:4001")
    assert worth_dialling(theirs, tcp("10.0.1.2:4001")) == theirs
    assert worth_dialling(theirs, []) == []


def test_a_peer_has_two_public_addresses_at_most():
    theirs = tcp("203.0.113.3:4001", "198.51.100.1:4001", "192.0.2.1:4001", "203.0.113.3:4002")
    assert worth_dialling(theirs, tcp("203.0.113.2:4001")) == [theirs[0], theirs[1], theirs[3]]


def test_of_many_ports_a_few_are_dialled_and_none_twice():
    theirs = tcp(*(f"203.0.113.3:{port}" for port in (*range(5000, 5100), *range(5000, 5100))))
    assert worth_dialling(theirs, tcp("203.0.113.2:4001")) == theirs[:8]


# Upgrades


async def relayed_pair(relay, a, b):
    """`a` keeps `b`, of which it knows only the relayed address; relayed when it returns, but not
    for long."""
    relayed = await reserve(b, relay)
    await reserve(a, relay)
    await connect(a, relayed)


@pytest.mark.parametrize("listen", ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"])
async def test_a_relayed_connection_to_a_kept_peer_becomes_direct_by_itself(listen):
    async with relayed_hosts(2, OPEN, listen=(listen,), relay_listen=listen) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        await until(lambda: path(a, b) == path(b, a) == "direct")
        assert await says_hello(a, b.peer_id)
        assert await says_hello(b, a.peer_id)
        await until(lambda: relay.relay_use.circuits == 0)
        assert (a.holes_punched, b.holes_punched, relay.holes_punched) == (1, 1, 0)


async def test_the_end_that_was_dialled_begins_when_it_keeps_the_peer():
    async with relayed_hosts(2, OPEN, listen=LOOPBACK) as ([relay], [a, b]):
        b.add_peer(PeerInfo(a.peer_id))
        began = time.monotonic()
        await relayed_pair(relay, a, b)
        await until(lambda: path(a, b) == path(b, a) == "direct")
        assert time.monotonic() - began < punch._PATIENCE_SECONDS


async def test_nobody_upgrades_for_a_peer_that_nobody_keeps():
    async with relayed_hosts(2, OPEN, listen=LOOPBACK) as ([relay], [a, b]):
        relayed = await reserve(b, relay)
        await a._peers.connect_to(ID.from_base58(b.peer_id), [parse_address(relayed.addresses[0])])
        await trio.sleep(punch._PATIENCE_SECONDS + 0.5)
        assert path(a, b) == path(b, a) == "relayed"


@pytest.mark.parametrize("both", [False, True])
async def test_a_direct_connection_can_be_asked_for(both):
    async with relayed_hosts(2, OPEN, listen=LOOPBACK) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        results = []

        async def ask(host, other):
            results.append(await host.connect_direct(other.peer_id, 10.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, a, b)
            nursery.start_soon(ask, a, b)
            if both:
                nursery.start_soon(ask, b, a)
        assert all(results)
        await until(lambda: path(a, b) == path(b, a) == "direct")
        assert await says_hello(a, b.peer_id)


@pytest.mark.parametrize("who_dials", ["client", "server"])
async def test_it_does_not_matter_whose_dial_comes_through(who_dials, monkeypatch):
    async with relayed_hosts(2, OPEN, listen=LOOPBACK) as ([relay], [a, b]):
        relayed = await reserve(b, relay)
        await reserve(a, relay)
        silent = b if who_dials == "server" else a  # `a` asks: it is the server of what comes out

        async def nothing(*_, **__):
            await trio.sleep_forever()

        monkeypatch.setattr(silent._puncher, "_knock", nothing)
        monkeypatch.setattr(b._puncher, "on_connected", lambda conn: None)
        await connect(a, relayed)
        began = time.monotonic()
        assert await a.connect_direct(b.peer_id, 10.0)
        assert time.monotonic() - began < punch._PUNCH_SECONDS
        await until(lambda: path(a, b) == path(b, a) == "direct")
        [seen] = [peer for peer in b.peers() if peer.peer_id == a.peer_id]
        assert seen.direction == "outbound"
        assert await says_hello(a, b.peer_id)


async def test_it_is_there_at_once_when_the_connection_is_direct():
    async with connected_pair() as (a, b):
        began = time.monotonic()
        assert await a.connect_direct(b.peer_id, 10.0)
        assert time.monotonic() - began < 0.5


async def test_it_is_not_there_when_the_peer_cannot_be_reached_at_all():
    async with relayed_hosts(1) as (_, [a]):
        nobody = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
        assert not await a.connect_direct(nobody, 5.0)


async def test_the_relayed_connection_stays_when_no_hole_can_be_punched():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        assert not await a.connect_direct(b.peer_id, 5.0)
        assert path(a, b) == path(b, a) == "relayed"
        assert await says_hello(a, b.peer_id)


async def test_a_cancelled_upgrade_leaves_the_connection_and_no_task():
    async with relayed_hosts(2, OPEN, listen=LOOPBACK) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        for delay in (0.0, 0.002, 0.01, 0.03):
            with trio.move_on_after(delay):
                await a.connect_direct(b.peer_id, 10.0)
        assert await a.connect_direct(b.peer_id, 10.0)
        await until(lambda: path(a, b) == path(b, a) == "direct")
        assert a._puncher._busy.total() == 0


async def test_upgrades_leave_no_tasks_behind():
    async with relayed_hosts(2, OPEN, listen=LOOPBACK) as ([relay], [a, b]):
        counts = []
        await relayed_pair(relay, a, b)
        for _ in range(3):
            assert await a.connect_direct(b.peer_id, 10.0)
            await until(lambda: path(a, b) == path(b, a) == "direct")
            await until(lambda: a._puncher._busy.total() + b._puncher._busy.total() == 0)
            await trio.testing.wait_all_tasks_blocked(0.2)
            counts.append(count_tasks())
            await a.disconnect(b.peer_id)
            await until(lambda: path(a, b) == "relayed")
        assert counts[2] <= counts[0] + 2


async def test_gossip_passes_a_relay_and_goes_on_when_the_connection_becomes_direct():
    async with relayed_hosts(2, OPEN, listen=LOOPBACK, gossip=True) as ([relay], [a, b]):
        heard = await b.subscribe("topic", limit=100, validate=lambda peer, data: True)
        await a.subscribe("topic", limit=100, validate=lambda peer, data: True)

        async def heard_of(data):
            with trio.fail_after(10):
                while True:
                    await a.publish("topic", data)
                    with trio.move_on_after(0.5):
                        if (await heard.receive()).data == data:
                            return

        await relayed_pair(relay, a, b)
        await heard_of(b"through the relay")
        assert await a.connect_direct(b.peer_id, 10.0)
        await until(lambda: path(a, b) == path(b, a) == "direct")
        await heard_of(b"directly")


# The protocol


def message(kind, *addresses):
    return HolePunch(type=kind, ObsAddrs=[Multiaddr(text).to_bytes() for text in addresses])


async def arranged(host, other, first):
    """The answer to a first message over a new DCUtR stream, and the stream."""
    conn = host._swarm.get_connections(ID.from_base58(other.peer_id))[0]
    stream = await rawstream.negotiate(conn, DCUTR)
    await rawstream.send(stream, first)
    with trio.fail_after(5):
        return await rawstream.receive(stream, HolePunch), stream


async def test_it_is_not_spoken_over_a_direct_connection():
    async with connected_pair() as (a, b):
        with pytest.raises(StreamBroken):
            await arranged(a, b, message(HolePunch.CONNECT))
        assert await says_hello(a, b.peer_id)


async def test_it_begins_with_connect():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        with pytest.raises(StreamBroken):
            await arranged(a, b, message(HolePunch.SYNC))
        assert path(a, b) == "relayed"


async def test_a_peer_may_ask_only_so_often():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        for _ in range(punch._SERVED_PER_PEER):
            _, stream = await arranged(a, b, message(HolePunch.CONNECT))
            await rawstream.reset(stream)
        with pytest.raises(StreamBroken):
            await arranged(a, b, message(HolePunch.CONNECT))
        assert path(a, b) == "relayed"


async def test_strangers_together_may_ask_only_so_much(monkeypatch):
    monkeypatch.setattr(punch, "_DIALS_FOR_STRANGERS", 3)
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        many = [f"/ip4/203.0.113.3/tcp/{port}" for port in range(5000, 5003)]
        _, stream = await arranged(a, b, message(HolePunch.CONNECT, *many))
        await rawstream.reset(stream)
        with pytest.raises(StreamBroken):
            await arranged(a, b, message(HolePunch.CONNECT))


async def test_addresses_are_expected_no_longer_than_the_attempt():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await relayed_pair(relay, a, b)
        _, stream = await arranged(a, b, message(HolePunch.CONNECT, "/ip4/203.0.113.3/tcp/5000"))
        assert ("203.0.113.3", 5000) in b._connector.punching
        await rawstream.reset(stream)
        await until(lambda: not b._connector.punching)


async def test_who_comes_while_another_is_expected_is_blamed_for_nothing():
    """Behind one router there are many; and a peer may name addresses of others."""
    async with open_host(seed(1), LOOPBACK) as a, open_host(seed(2), LOOPBACK) as b:
        stranger = ID.from_base58(KeyPair(seed(3)).address)
        b._connector.punching["127.0.0.1", 0] = stranger
        blamed = []
        b._peers.blame_address = lambda host, offence: blamed.append((host, offence))
        with pytest.raises(DialFailed):
            await a._connector.dial(ID.from_base58(b.peer_id), [parse_address(b.addresses[0])])
        assert blamed == []


# The port


async def test_dials_to_relays_come_from_the_listening_port_and_nobody_else_gets_it():
    async with relayed_hosts(1, OPEN, listen=LOOPBACK) as ([relay], [host]):
        await reserve(host, relay)
        [seen] = host._circuits.seen()
        assert seen.observed.text == host.addresses[0]
        assert seen.local == "127.0.0.1"
        with pytest.raises(ListenFailed, match="in use"):
            async with open_host(seed(9), host.addresses[:1], gossip=False):
                pass


async def test_a_port_is_free_again_when_its_host_is_gone():
    async with relayed_hosts(1, OPEN, listen=LOOPBACK) as ([relay], [host]):
        await reserve(host, relay)
        listening = host.listening
    async with open_host(seed(1), listening, gossip=False) as again:
        assert relayed_only(again).addresses == ()
        assert again.listening == listening
