"""A chain service whose chain is `tests.chain.world`: one block when the test says so."""

from typing import Any

import trio

from tdmld.chain.crypto import sha256
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import DialReceipt, Payload, decode_transaction
from tdmld.node.finality import HeadFeed
from tdmld.node.offers import offered_stages
from tdmld.train.spec import decode_spec
from tests.chain.world import World, mark, node_key
from tests.train.support import encode_document, spec_document

RAW = encode_document(spec_document())
SPEC = decode_spec(RAW)


class FakeChain:
    def __init__(self, world: World) -> None:
        self.world, self.genesis = world, world.genesis
        self.feed = HeadFeed(lambda feed: None)
        self.sent: list[Payload] = []
        self.submitted = trio.Event()

    @property
    def height(self) -> int:
        return self.world.height

    def state(self) -> Any:
        return self.world.state

    def heads(self) -> HeadFeed:
        return self.feed

    async def fetch_spec(self, spec: bytes) -> bytes:
        return RAW

    async def submit(self, raw: bytes) -> bytes:
        self.sent.append(decode_transaction(raw, self.world.chain_id).payload)
        self.submitted.set()
        return sha256(raw)


class FakeWitnesses:
    """What others said of this node, and whether more is to come."""

    def __init__(self, *receipts: DialReceipt, settled: bool = True) -> None:
        self.known, self.settled, self.closed = receipts, settled, False

    def receipts(self) -> tuple[DialReceipt, ...]:
        return self.known


def session_of(index: int) -> bytes:
    """The session that World's actors accept with."""
    return mark("session of", node_key(index).public)


def submit(world: World, **changes: Any) -> bytes:
    """Owner 0 offers the small job, as its spec says."""
    job = world.submit(
        spec_id=sha256(RAW),
        spec_bytes=len(RAW),
        stages=offered_stages(SPEC),
        rounds=SPEC.rounds,
        segment_steps=SPEC.pipeline.segment_steps,
        unsettled=SPEC.pipeline.unsettled,
        state_every=SPEC.pipeline.state_every,
        tokens=SPEC.tokens_per_segment,
        **changes,
    )
    world.play_until(job, JobStatus.MATCHED)
    return job


def place_of(world: World, node: bytes) -> int:
    return next(i for i in range(20) if node_key(i).public == node)


def worker_of(world: World, job: bytes, slot: int) -> int:
    found = world.state.slot(job, slot)
    assert found is not None
    return place_of(world, found.worker.node)
