"""Peers that flood a validator over real streams and gossip, an honest follower, and a client of
the validator's own: the honest ones' transactions become final."""

from pathlib import Path

import pytest
import trio

from tdmld.chain.codec import encode
from tdmld.chain.crypto import KeyPair
from tdmld.chain.transactions import verify_transaction
from tdmld.node import admission
from tdmld.node.chainservice import ChainService
from tdmld.node.chainwire import GOSSIP_TX_BYTES, Protocols, Transactions
from tdmld.node.store import ChainStore
from tdmld.p2p import Host, PeerInfo, open_host
from tdmld.p2p.errors import P2PError
from tests.node.lonechain import CHAIN, GENESIS, VALIDATOR, pay

pytestmark = pytest.mark.e2e
FOLLOWER = KeyPair(b"\x71" * 32)
FLOODERS = [KeyPair(bytes([0x80 + number]) * 32) for number in range(3)]
PROTOCOLS = Protocols(CHAIN)


def junk(number: int) -> bytes:
    """64 transactions that a rich owner never signed, each time others."""
    raws = [(64 * number + place).to_bytes(64, "big") + pay(place % 16)[64:] for place in range(64)]
    return encode(Transactions(tuple(raws)))


async def flood(host: Host, victim: PeerInfo, nursery: trio.Nursery) -> None:
    """As much as the victim reads, over four streams and by gossip."""
    host.add_peer(victim)
    await host.subscribe(PROTOCOLS.tx, limit=GOSSIP_TX_BYTES, validate=lambda *_: True)

    async def pour(first: int) -> None:
        number = first
        while True:
            try:
                async with await host.open_stream(victim.peer_id, PROTOCOLS.sync) as stream:
                    while True:
                        await stream.send(junk(number))
                        number += 1
            except P2PError:
                await trio.sleep(0.05)

    async def shout() -> None:
        number = 1 << 20
        while True:
            await host.publish(PROTOCOLS.tx, junk(number))
            number += 1

    for stream in range(4):
        nursery.start_soon(pour, stream << 24)
    nursery.start_soon(shout)


async def test_floods_keep_neither_a_follower_nor_a_client_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = 0

    def verify(transaction: object, chain_id: bytes) -> bool:
        nonlocal forged
        fine = verify_transaction(transaction, chain_id)  # type: ignore[arg-type]
        forged += not fine
        return fine

    monkeypatch.setattr(admission, "verify_transaction", verify)
    with (
        ChainStore(tmp_path / "maker", GENESIS) as made,
        ChainStore(tmp_path / "follower", GENESIS) as store,
        trio.fail_after(60),
    ):
        async with (
            open_host(VALIDATOR.seed) as maker,
            open_host(FOLLOWER.seed) as other,
            open_host(FLOODERS[0].seed) as first,
            open_host(FLOODERS[1].seed) as second,
            open_host(FLOODERS[2].seed) as third,
            trio.open_nursery() as nursery,
        ):
            service = ChainService(maker, made, GENESIS, VALIDATOR)
            await nursery.start(service.run)
            victim = PeerInfo(maker.peer_id, tuple(maker.addresses))
            for host in (first, second, third):
                await flood(host, victim, nursery)
            other.add_peer(victim)
            follower = ChainService(other, store, GENESIS)
            await nursery.start(follower.run)
            while not forged:  # noqa: ASYNC110  # the flood has arrived
                await trio.sleep(0.02)
            for nonce in range(20):
                node = (follower, service)[nonce % 2]
                receipt = await node.wait_for(await node.submit(pay(nonce)))
                assert receipt.ok
                await follower.wait_for(receipt.id)
            nursery.cancel_scope.cancel()
    assert 0 < forged < 3 * 200, "after a few they are not looked at"
