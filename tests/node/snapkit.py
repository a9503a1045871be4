"""Snapshot and block sync between two stores of one process, with peers that lie."""

import contextlib
from collections.abc import Callable
from typing import cast

import trio

from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import decode, encode
from tdmld.node.chainwire import SyncAnswer
from tdmld.node.finality import Finality
from tdmld.node.snapshot import SnapshotClient, SnapshotServer
from tdmld.node.store import ChainStore
from tdmld.node.sync import SyncServer, check_blocks
from tdmld.p2p import Host, Stream


class Pipe:
    """A stream to a server in the same process; `change` plays a lying one."""

    def __init__(self, server: SyncServer, change: Callable[[SyncAnswer], SyncAnswer]) -> None:
        self._server, self._change = server, change
        self._to, self._requests = trio.open_memory_channel[bytes](4)
        self._answers, self._from = trio.open_memory_channel[bytes](4)
        self.peer_id = "client"

    async def __aenter__(self) -> "Pipe":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def send(self, raw: bytes) -> None:
        class OneRequest:
            peer_id = "client"
            done = False

            async def receive(self, _: int) -> bytes:
                if self.done:
                    raise trio.EndOfChannel
                self.done = True
                return raw

            async def send(inner, answer: bytes) -> None:
                found: SyncAnswer = decode(SyncAnswer, answer, 1 << 26)  # type: ignore[arg-type]
                await self._answers.send(encode(self._change(found)))

            async def reset(self) -> None: ...

        with contextlib.suppress(trio.EndOfChannel):
            await self._server.accept(cast(Stream, OneRequest()))

    async def receive(self, _: int) -> bytes:
        return await self._from.receive()


class FakeHost:
    def __init__(self, *pipes: Pipe) -> None:
        self._pipes = {f"peer{n}": pipe for n, pipe in enumerate(pipes)}

    def connected(self) -> frozenset[str]:
        return frozenset(self._pipes)

    async def open_stream(self, peer: str, _: str) -> Pipe:
        return self._pipes[peer]


async def nobody(*_: object) -> None: ...


def pipe(
    store: ChainStore, change: Callable[[SyncAnswer], SyncAnswer] = lambda answer: answer
) -> Pipe:
    snapshots = SnapshotServer(Finality(store))
    return Pipe(SyncServer(store, nobody, lambda _: None, snapshots), change)


def join(store: ChainStore, *pipes: Pipe) -> None:
    client = SnapshotClient(cast(Host, FakeHost(*pipes)), "x", store)
    trio.run(client.join)


def follow(store: ChainStore, served: ChainStore) -> None:
    """Block sync, without a network."""
    server = SyncServer(served, nobody, lambda _: None)
    while store.height < served.height:
        answer = server.blocks(store.height + 1, 64)
        committee, epoch_blocks = (
            store.committee(store.epoch),
            store.genesis.parameters.epoch_blocks,
        )
        assert committee is not None
        found = check_blocks(committee, epoch_blocks, store.height, store.head.hash, answer)
        assert found is not None
        for block in found[0]:
            store.apply(block, found[1] if block is found[0][-1] else None)


def same(one: ChainStore, two: ChainStore) -> None:
    assert one.head == two.head
    assert one.history_root(one.height) == two.history_root(two.height)
    assert list(one.state_items()) == list(two.state_items())
    assert one.taken_root() == one.state_root


def checkpoint(store: ChainStore, height: int) -> Checkpoint:
    leaf = store.history_leaf(height)
    assert leaf is not None
    return Checkpoint(height, leaf[0])
