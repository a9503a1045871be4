"""What local discovery finds is dialled, and kept when it proves itself."""

import pytest
import trio

from tdmld.chain.crypto import KeyPair
from tdmld.node import reachlan
from tdmld.node.peers import PeerBook, PeerRecord
from tdmld.node.reachlan import LanPeers
from tdmld.p2p import Host, PeerInfo, open_host
from tests.p2p.support import free_port, seed, until

CHAIN = b"c" * 32


def lan(host: Host, port: int, chain: bytes = CHAIN, book: PeerBook | None = None) -> LanPeers:
    return LanPeers(host, chain, book or PeerBook(chain), loopback=True, port=port)


async def test_two_daemons_of_a_chain_connect_without_any_configuration() -> None:
    port = free_port()
    async with (
        open_host(seed(1), gossip=False) as a,
        open_host(seed(2), gossip=False) as b,
        open_host(seed(3), gossip=False) as other,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lan(a, port).run)
        nursery.start_soon(lan(b, port).run)
        nursery.start_soon(lan(other, port, b"d" * 32).run)
        await until(lambda: a.peer_id in b.connected() and b.peer_id in a.connected())
        assert other.connected() == frozenset()
        nursery.cancel_scope.cancel()


async def test_who_sends_no_record_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachlan, "RECORDS_SECONDS", 0.1)
    async with (
        open_host(seed(1), gossip=False) as a,
        open_host(seed(2), gossip=False) as b,
        trio.open_nursery() as nursery,
    ):
        found = lan(a, free_port())
        nursery.start_soon(found.run)
        await until(lambda: found._nursery is not None)
        found._found(PeerInfo(b.peer_id, b.addresses))
        await until(lambda: b.peer_id in a.connected())
        await until(lambda: not any(peer.kept for peer in a.peers()))
        nursery.cancel_scope.cancel()


async def test_who_sends_one_is_left_to_the_peer_service() -> None:
    key, book = KeyPair(seed(2)), PeerBook(CHAIN)
    async with (
        open_host(seed(1), gossip=False) as a,
        open_host(key.seed, gossip=False) as b,
        trio.open_nursery() as nursery,
    ):
        book.sign(key, PeerRecord(key.public, 1, b.addresses, key.public, (), False))
        found = lan(a, free_port(), book=book)
        nursery.start_soon(found.run)
        await until(lambda: found._nursery is not None)
        found._found(PeerInfo(b.peer_id, b.addresses))
        await until(lambda: not found._trying)
        assert [(peer.peer_id, peer.kept) for peer in a.peers()] == [(b.peer_id, True)]
        nursery.cancel_scope.cancel()


async def test_lies_are_tried_a_few_at_a_time_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reachlan, "TRY_SECONDS", 0.2)
    async with open_host(seed(1), gossip=False) as a, trio.open_nursery() as nursery:
        found = lan(a, free_port())
        nursery.start_soon(found.run)
        await until(lambda: found._nursery is not None)
        nobody = f"/ip4/127.0.0.1/tcp/{free_port()}"
        for number in range(2, 60):
            found._found(PeerInfo(KeyPair(bytes([number]) * 32).address, (nobody,)))
        assert len(found._trying) == reachlan.TRIES_AT_ONCE
        found._found(PeerInfo("1" * 46, (nobody,)))
        await until(lambda: not found._trying)
        assert a.peers() == ()
        nursery.cancel_scope.cancel()
