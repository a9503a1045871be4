"""Two nodes over real sockets: one makes the chain, the other begins with its state, then follows
and proves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.genesis import chain_id
from tdmld.chain.light import check_bundle
from tdmld.node.chainservice import ChainService
from tdmld.node.chainwire import Protocols
from tdmld.node.snapshot import SnapshotClient
from tdmld.node.store import ChainStore
from tdmld.p2p import Host, PeerInfo, open_host
from tests.node.lonechain import OWNER, VALIDATOR, make_genesis, pay

pytestmark = pytest.mark.e2e
FOLLOWER = KeyPair(b"\x71" * 32)
GENESIS = make_genesis(epoch_blocks=8)
CHAIN = chain_id(GENESIS)


async def until(true: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not true():  # noqa: ASYNC110  # nothing tells of another node's state
            await trio.sleep(0.02)


async def join(host: Host, store: ChainStore) -> None:
    await SnapshotClient(host, Protocols(CHAIN).sync, store).join()


async def test_a_node_joins_a_running_chain_by_snapshot(tmp_path: Path) -> None:
    with (
        ChainStore(tmp_path / "maker", GENESIS) as made,
        ChainStore(tmp_path / "new", GENESIS) as store,
        trio.fail_after(60),
    ):
        # Both outlive the tasks that use them: those end with the nursery.
        async with (
            open_host(VALIDATOR.seed) as maker,
            open_host(FOLLOWER.seed) as other,
            trio.open_nursery() as nursery,
        ):
            service = ChainService(maker, made, GENESIS, VALIDATOR)
            await nursery.start(service.run)
            sent = 0

            async def keep_paying() -> None:
                nonlocal sent
                while True:
                    receipt = await service.wait_for(await service.submit(pay(sent, CHAIN)))
                    assert receipt.ok
                    sent += 1

            nursery.start_soon(keep_paying)
            await until(lambda: made.height > 30)
            leaf = made.history_leaf(20)
            assert leaf is not None
            store.checkpoint = Checkpoint(20, leaf[0])
            other.add_peer(PeerInfo(maker.peer_id, tuple(maker.addresses)))
            await join(other, store)
            assert store.base > 20
            assert store.lowest == store.base + 1
            assert store.turn(1) is not None
            follower = ChainService(other, store, GENESIS)
            await nursery.start(follower.run)
            await until(lambda: store.height > store.base + 5)
            height = store.height
            assert store.root_at(height) == made.root_at(height)
            for node, kind, name in (
                (follower, "account", OWNER.address),
                (service, "transaction", sha256(pay(0, CHAIN)).hex()),
                (service, "block", "7"),
            ):
                bundle = await node.prove(kind, name, height - 1)
                known = made.history_leaf(height - 1)
                assert known is not None
                check_bundle(bundle, GENESIS, Checkpoint(height - 1, known[0]))
            nursery.cancel_scope.cancel()
