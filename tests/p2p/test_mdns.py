"""Finding each other on a local network: what is said, what is believed, what is left alone."""

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from zeroconf import DNSIncoming

from tdmld.chain.crypto import KeyPair
from tdmld.p2p.mdns import (
    GROUP,
    PER_SECOND,
    Announcement,
    LanDiscovery,
    answer,
    answers,
    asks,
    query,
)
from tdmld.p2p.types import PeerInfo
from tests.p2p.support import free_port, until

A, B = (KeyPair(bytes([n]) * 32).address for n in (1, 2))
ADDRESS = "/ip4/127.0.0.1/tcp/4001"


def said(**changes: object) -> Announcement:
    values = {
        "name": "x" * 40,
        "peer_id": A,
        "network": "0011aabb",
        "ip": "127.0.0.1",
        "addresses": (ADDRESS,),
    }
    return Announcement(**values | changes)  # type: ignore[arg-type]


def heard(raw: bytes, sender: str = "127.0.0.1", network: str = "0011aabb") -> list[PeerInfo]:
    return list(answers(DNSIncoming(raw), sender, network))


def test_an_answer_names_the_peer_and_where_it_listens() -> None:
    assert heard(answer(said())) == [PeerInfo(A, (ADDRESS,))]


def test_another_network_is_left_alone() -> None:
    assert heard(answer(said()), network="99999999") == []


def test_a_goodbye_names_nobody() -> None:
    assert heard(answer(said(), goodbye=True)) == []


def test_nobody_can_send_us_elsewhere() -> None:
    elsewhere = (ADDRESS, "/ip4/8.8.8.8/tcp/53", "/dns4/localhost/tcp/4001")
    assert heard(answer(said(addresses=elsewhere))) == [PeerInfo(A, (ADDRESS,))]
    assert heard(answer(said()), sender="192.168.1.7") == []


@pytest.mark.parametrize("peer_id", ["", "QmShort", "12D3KooW" + "0" * 44, "é" * 40])
def test_what_is_no_peer_id_is_not_believed(peer_id: str) -> None:
    assert heard(answer(said(peer_id=peer_id))) == []


def test_a_query_for_all_is_for_us_and_others_are_not() -> None:
    assert asks(DNSIncoming(query()), "x" * 40) == (True, False)
    other = query().replace(b"\x04_p2p", b"\x04_ftp")
    assert asks(DNSIncoming(other), "x" * 40) == (False, False)


def test_garbage_raises_nothing() -> None:
    chance = random.Random(5)
    good = answer(said(), meta=True)
    for _ in range(5000):
        raw = bytearray(good)
        for _ in range(chance.randrange(1, 8)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        cut = bytes(raw[: chance.randrange(len(raw) + 1)])
        packet = DNSIncoming(cut)
        if packet.valid:
            asks(packet, "x" * 40)
            heard(cut)


@asynccontextmanager
async def discovering(
    peer_id: str, port: int, *, network: str = "0011aabb", listening: str = ADDRESS
) -> AsyncIterator[dict[str, PeerInfo]]:
    found: dict[str, PeerInfo] = {}

    def take(info: PeerInfo) -> None:
        found[info.peer_id] = info

    lan = LanDiscovery(peer_id, network, lambda: [listening], take, loopback=True, port=port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lan.run)
        await until(lambda: "127.0.0.1" in lan.interfaces)
        yield found
        nursery.cancel_scope.cancel()


async def test_two_nodes_find_each_other_and_not_themselves() -> None:
    port = free_port()
    async with (
        discovering(A, port) as of_a,
        discovering(B, port, listening="/ip4/0.0.0.0/tcp/4002") as of_b,
    ):
        await until(lambda: B in of_a and A in of_b)
        assert "/ip4/127.0.0.1/tcp/4002" in of_a[B].addresses
        assert set(of_a) == {B}
        assert set(of_b) == {A}


async def test_networks_do_not_mix() -> None:
    port = free_port()
    async with (
        discovering(A, port) as of_a,
        discovering(B, port, network="22222222") as of_b,
        discovering(KeyPair(b"3" * 32).address, port) as of_c,
    ):
        await until(lambda: A in of_c)
        assert B not in of_a
        assert not of_b


async def test_it_ends_at_once() -> None:
    with trio.fail_after(2):
        async with discovering(A, free_port()):
            pass


async def test_a_flood_of_answers_is_looked_at_slowly() -> None:
    port = free_port()
    async with discovering(A, port) as found:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            flood.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            flood.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            interface = socket.inet_aton("127.0.0.1")
            flood.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            flood.bind(("127.0.0.1", port))
            begun = trio.current_time()
            for number in range(300):
                identity = KeyPair(number.to_bytes(32, "big")).address
                flood.sendto(answer(said(peer_id=identity)), (GROUP, port))
                await trio.lowlevel.checkpoint()
            await until(lambda: len(found) > 1)
            seconds = trio.current_time() - begun
        assert len(found) <= PER_SECOND * (1 + seconds) + 1
