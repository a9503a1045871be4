"""Catch-up answers from strangers: what is taken and what is refused."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from tdmld.chain.blocks import Block, Certificate, Kind, block_hash
from tdmld.chain.codec import decode, encode
from tdmld.chain.consensus import MAX_CERTIFICATES
from tdmld.node.chainwire import (
    SYNC_BLOCKS,
    Blocks,
    BlocksRequest,
    Hello,
    Proposal,
    blocks_bytes,
    consensus_bytes,
)
from tdmld.node.finality import Finality
from tdmld.node.store import ChainStore
from tdmld.node.sync import (
    ANSWERS,
    HEAD_START,
    SEND_SECONDS,
    BadAnswer,
    SyncClient,
    SyncServer,
    check_blocks,
)
from tests.node.chainkit import COMMITTEE, GENESIS, certificate, next_block, transfer
from tests.node.fake_stream import FakeStream, stream_pair

EPOCH = GENESIS.parameters.epoch_blocks


async def _nobody(_peer: object, _raws: object) -> None: ...


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChainStore, list[Block]]]:
    """A chain of 80 blocks; every third has no finalization of its own, nor has the last."""
    made = []
    with ChainStore(tmp_path_factory.mktemp("served"), GENESIS) as store:
        for height in range(1, 81):
            block = next_block(store, [transfer(0, height - 1)] if height < 5 else [])
            own = certificate(Kind.FINALIZE, block) if height % 3 and height < 80 else None
            store.apply(block, own)
            made.append(block)
        yield store, made


def start(store: ChainStore) -> tuple[int, bytes]:
    first = store.block(1)
    assert first is not None
    return 0, first.header.parent


def test_batches_end_with_a_finalized_block(served: tuple[ChainStore, list[Block]]) -> None:
    store, made = served
    server = SyncServer(store, _nobody, lambda _: None)
    height, head = start(store)
    heights = []
    while (
        found := check_blocks(COMMITTEE, EPOCH, height, head, server.blocks(height + 1, 500))
    ) is not None:
        blocks, _ = found
        height, head = height + len(blocks), block_hash(blocks[-1].header)
        heights.append(height)
    assert heights == [SYNC_BLOCKS, 79]
    assert head == block_hash(made[78].header)


def test_a_far_or_empty_request_gets_an_empty_answer(
    served: tuple[ChainStore, list[Block]],
) -> None:
    server = SyncServer(served[0], _nobody, lambda _: None)
    assert server.blocks(10_000, 64) == Blocks(80, 1, (), None)
    assert server.blocks(80, 64) == Blocks(80, 1, (), None)
    assert check_blocks(COMMITTEE, EPOCH, 80, bytes(32), server.blocks(1, 64)) is None


def test_what_is_wrong_is_refused(served: tuple[ChainStore, list[Block]]) -> None:
    store, made = served
    height, head = start(store)
    good = SyncServer(store, _nobody, lambda _: None).blocks(1, 4)
    assert len(good.blocks) == 4
    b1, b2, b3, b4 = good.blocks
    empty = msgspec.structs.replace(b2, transactions=())
    notarized = certificate(Kind.NOTARIZE, b4)
    weak = certificate(Kind.FINALIZE, b4, (0, 1))
    for blocks, proof in (
        ((b1, b3, b4), good.certificate),
        ((b2, b3, b4), good.certificate),
        ((b1, empty, b3, b4), good.certificate),
        ((b1, b2, b3), good.certificate),
        ((b1, b2, b3, b4), notarized),
        ((b1, b2, b3, b4), weak),
        ((b1, b2, b3, b4), certificate(Kind.FINALIZE, made[6])),
    ):
        with pytest.raises(BadAnswer):
            check_blocks(COMMITTEE, EPOCH, height, head, Blocks(80, 1, tuple(blocks), proof))
    assert check_blocks(COMMITTEE, EPOCH, height, head, Blocks(80, 1, good.blocks, None)) is None


# ---- the server, and peers that mean no good -----------------------------------------------------


async def serve(server: SyncServer, stream: FakeStream) -> None:
    async with stream:
        await server.accept(cast(Any, stream))


async def test_requests_are_answered_one_after_another(
    served: tuple[ChainStore, list[Block]],
) -> None:
    server = SyncServer(served[0], _nobody, lambda _: None)
    mine, theirs = stream_pair("client", "server")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, server, theirs)
        for start in (1, 65):
            await mine.send(encode(BlocksRequest(start, 64)))
            limit = blocks_bytes(GENESIS.parameters.block_bytes)
            answer = decode(Blocks, await mine.receive(limit), limit)
            assert answer == server.blocks(start, 64)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_reads_no_answer_holds_one_place_and_not_for_ever(
    served: tuple[ChainStore, list[Block]], autojump_clock: trio.testing.MockClock
) -> None:
    server = SyncServer(served[0], _nobody, lambda _: None)
    request = encode(BlocksRequest(1, 64))
    deaf, _open = trio.open_memory_channel[bytes](0)
    ask, asked = trio.open_memory_channel[bytes](8)
    await ask.send(request)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, server, FakeStream("deaf", deaf, asked))
        await trio.testing.wait_all_tasks_blocked()
        mine, theirs = stream_pair("deaf", "server")
        theirs.peer_id = "deaf"
        await mine.send(request)
        await serve(server, theirs)  # refused at once: it has not read the first answer
        began = trio.current_time()
    assert trio.current_time() - began >= SEND_SECONDS
    assert server._places.value == ANSWERS


# ---- the client, and whom it asks ----------------------------------------------------------------


class Client(SyncClient):
    """Notes whom it asks; `specs` says what a peer answers, None: nothing, ever."""

    def __init__(self, store: ChainStore, connected: Sequence[str], validators: list[str]) -> None:
        host = SimpleNamespace(connected=lambda: frozenset(connected))
        super().__init__(
            cast(Any, host),
            "sync",
            Finality(store),
            lambda *_: None,
            lambda: validators,
        )
        self.asked: list[str] = []
        self.specs: dict[str, bytes | Exception | None] = {}

    async def _drain(self, peer: str) -> bool:
        self.asked.append(peer)
        return False

    async def spec(self, peer: str, spec: bytes) -> bytes | None:
        self.asked.append(peer)
        found = self.specs.get(peer, b"")
        if found is None:
            await trio.sleep_forever()
        if isinstance(found, Exception):
            raise found
        return found or None


async def test_hints_do_not_crowd_out_the_validators(
    served: tuple[ChainStore, list[Block]],
) -> None:
    hints = [f"h{number}" for number in range(9)]
    client = Client(served[0], [*hints, "v1", "v2"], ["v1", "v2"])
    for hint in hints:
        client.hint(hint)
    await client._follow()
    assert client.asked[:3] == ["h0", "v1", "v2"]


async def test_peers_that_hang_or_lie_hold_up_a_spec_only_shortly(
    served: tuple[ChainStore, list[Block]], autojump_clock: trio.testing.MockClock
) -> None:
    client = Client(served[0], [], [])
    client.specs = {"a": None, "b": BadAnswer("another spec"), "c": None, "d": b"spec"}
    began = trio.current_time()
    assert await client.spec_from_any(["a", "b", "c", "d", "e"], bytes(32)) == b"spec"
    assert trio.current_time() - began <= 2 * HEAD_START + 0.01
    assert client.asked == ["a", "b", "c", "d"]
    client.specs = {}
    assert await client.spec_from_any(["a", "b"], bytes(32)) is None


def test_the_greatest_messages_of_validators_are_within_the_limit(
    served: tuple[ChainStore, list[Block]],
) -> None:
    validators = 300
    rows = tuple((voter, bytes(64)) for voter in range(validators))
    known = Certificate(Kind.NULLIFY, 2**62, bytes(32), rows)
    block = msgspec.structs.replace(
        served[1][0], transactions=(bytes(8000),) * (GENESIS.parameters.block_bytes // 8000)
    )
    for message in (
        Hello(2**62, (known,) * MAX_CERTIFICATES),
        Proposal(block, (known,) * MAX_CERTIFICATES),
    ):
        limit = consensus_bytes(GENESIS.parameters.block_bytes, validators)
        assert len(encode(message)) <= limit
