"""Catch-up answers from strangers: what is taken and what is refused."""

from collections.abc import Iterator

import msgspec
import pytest

from tdmld.chain.blocks import Block, Kind, block_hash
from tdmld.node.chainwire import SYNC_BLOCKS, Blocks
from tdmld.node.store import ChainStore
from tdmld.node.sync import BadAnswer, SyncServer, check_blocks
from tests.node.chainkit import COMMITTEE, GENESIS, certificate, next_block, transfer


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
        found := check_blocks(COMMITTEE, height, head, server.blocks(height + 1, 500))
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
    assert server.blocks(10_000, 64) == Blocks(80, (), None)
    assert server.blocks(80, 64) == Blocks(80, (), None)
    assert check_blocks(COMMITTEE, 80, bytes(32), server.blocks(1, 64)) is None


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
            check_blocks(COMMITTEE, height, head, Blocks(80, tuple(blocks), proof))
    assert check_blocks(COMMITTEE, height, head, Blocks(80, good.blocks, None)) is None
