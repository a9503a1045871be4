"""Catch-up: final blocks by height, and specs by id, between any two daemons.

The client asks a peer for blocks above its final head; the finalization of the last one vouches
for all, by their hash chain. Anything that is wrong costs that peer its turn, nothing else.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    block_hash,
    check_finalization,
    ends_epoch,
    epoch_of,
    transactions_root,
    verify_proposal,
)
from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import DecodeError
from tdmld.node.chainwire import (
    SYNC_BLOCKS,
    SYNC_BLOCKS_MAX,
    SYNC_BYTES,
    SYNC_REQUEST_BYTES,
    Blocks,
    BlocksRequest,
    SnapshotRequest,
    Spec,
    SpecRequest,
    StateRequest,
    SyncAnswer,
    SyncRequest,
    Transactions,
    TurnsRequest,
    blocks_bytes,
)
from tdmld.node.finality import Finality
from tdmld.node.snapshot import SnapshotServer, turns_from
from tdmld.node.store import ChainStore
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import P2PError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
ANSWERS = 32
"""Answers with blocks or state on their way at once, one for each peer: up to SYNC_BYTES each."""
SEND_SECONDS = 30.0
"""For so long an answer may take a place, with a peer that reads slowly."""
HEAD_START = 0.2
"""Seconds between asking one peer and the next for a spec."""
HINT_PAUSE = 0.05
"""Between two rounds: hints are free for whoever gives them."""
PAUSE = 0.5
"""After a round in which no peer helped."""
ROUNDS = 6
"""Rounds without progress before we rest until the next hint."""

Adopt = Callable[[Sequence[Block], Certificate], None]
Submitted = Callable[[str, Sequence[bytes]], Awaitable[None]]
"""Takes what a peer hands over."""


class BadAnswer(Exception):
    """A peer's answer does not hold; ask another."""


def check_blocks(
    committee: Committee, epoch_blocks: int, height: int, head: bytes, answer: Blocks
) -> tuple[list[Block], Certificate] | None:
    """The new final blocks of an answer that extends (height, head); None when there are none.
    They are of one epoch, whose validators are `committee`.

    Raises BadAnswer. Transactions' signatures are not checked again: the quorum did.
    """
    fresh = [block for block in answer.blocks if block.header.height > height]
    if not fresh or answer.certificate is None:
        return None
    for block in fresh:
        header = block.header
        height += 1
        if header.parent != head or header.height != height:
            raise BadAnswer(f"block {header.height} does not follow {height - 1}")
        if transactions_root(block.transactions) != header.tx_root:
            raise BadAnswer(f"the body of block {height} is not the header's")
        if not verify_proposal(committee.chain_id, header, block.signature):
            raise BadAnswer(f"block {height} does not carry its proposer's signature")
        head = block_hash(header)
    certificate = answer.certificate
    if not check_finalization(committee, fresh[-1].header, epoch_blocks, certificate):
        raise BadAnswer(f"block {height} is not finalized by its certificate")
    return fresh, certificate


class SyncServer:
    """The answering side."""

    def __init__(
        self,
        store: ChainStore,
        submitted: Submitted,
        spec: Callable[[bytes], bytes | None],
        snapshots: SnapshotServer | None = None,
    ) -> None:
        self._store = store
        self._snapshots = snapshots
        self._submitted = submitted
        self._spec = spec
        self._answering: set[str] = set()
        self._places = trio.Semaphore(ANSWERS)

    async def accept(self, stream: Stream) -> None:
        """Handler: requests one after another until the peer closes."""
        while True:
            raw = await stream.receive(SYNC_REQUEST_BYTES)
            try:
                request: SyncRequest = decode(SyncRequest, raw, SYNC_REQUEST_BYTES)  # type: ignore[arg-type]
            except DecodeError as error:
                log.info("%s sent a malformed request: %s", stream.peer_id, error)
                stream.blame(str(error))
                await stream.reset()
                return
            match request:
                case BlocksRequest(start, count):
                    if not await self._send(stream, partial(self.blocks, start, count)):
                        await stream.reset()
                        return
                case SpecRequest(spec):
                    await stream.send(encode(Spec(self._spec(spec) or b"")))
                case Transactions(raws):
                    await self._submitted(stream.peer_id, raws)
                case SnapshotRequest(checkpoint) if self._snapshots is not None:
                    await stream.send(encode(await self._snapshots.offer(checkpoint)))
                case TurnsRequest(first):
                    if not await self._send(stream, partial(turns_from, self._store, first)):
                        await stream.reset()
                        return
                case StateRequest(height, after) if self._snapshots is not None:
                    items = partial(self._snapshots.items, height, after)
                    if not await self._send(stream, items):
                        await stream.reset()
                        return
                case _:
                    await stream.reset()
                    return

    async def _send(self, stream: Stream, answer: Callable[[], SyncAnswer]) -> bool:
        """A large answer; False when the peer asks for two at a time, or does not read.

        Reading and encoding megabytes takes a tenth of a second: not in the event loop, for a
        request of a few bytes.
        """
        peer = stream.peer_id
        if peer in self._answering:
            log.info("%s asks again before it has its answer", peer)
            return False
        self._answering.add(peer)
        try:
            async with self._places:
                raw = await trio.to_thread.run_sync(lambda: encode(answer()))
                with trio.fail_after(SEND_SECONDS):
                    await stream.send(raw)
        except trio.TooSlowError:
            log.info("%s does not read what it asked for", peer)
            return False
        finally:
            self._answering.discard(peer)
        return True

    def blocks(self, start: int, count: int) -> Blocks:
        """Blocks from `start`, of one epoch, ending with one that has its own finalization; none
        when `start` was pruned, or lies before the snapshot that this node began with."""
        epoch_blocks = self._store.genesis.parameters.epoch_blocks
        top = self._store.height
        found: list[Block] = []
        whole, certificate, size = 0, None, 0
        height = max(start, 1)
        while height <= top and len(found) < SYNC_BLOCKS_MAX:
            if certificate is not None and (
                size > SYNC_BYTES or len(found) >= min(count, SYNC_BLOCKS)
            ):
                break
            block = self._store.block(height)
            if block is None:
                break
            found.append(block)
            size += sum(map(len, block.transactions)) + 512
            own = self._store.certificate(height)
            if own is not None:
                whole, certificate = len(found), own
            if ends_epoch(height, epoch_blocks):
                break
            height += 1
        return Blocks(top, self._store.lowest, tuple(found[:whole]), certificate)


class SyncClient:
    """The asking side: one task, woken by hints."""

    def __init__(
        self,
        host: Host,
        protocol: str,
        finality: Finality,
        adopt: Adopt,
        preferred: Callable[[], Sequence[str]],
    ) -> None:
        self._host = host
        self._protocol = protocol
        self._finality = finality
        self._adopt = adopt
        self._preferred = preferred
        self._epoch_blocks = finality.store.genesis.parameters.epoch_blocks
        self._limit = blocks_bytes(finality.store.genesis.parameters.block_bytes)
        self._hints: dict[str, None] = {}
        self._news = trio.Event()
        self.active = False
        """Whether blocks are being fetched now."""

    def hint(self, peer_id: str | None = None) -> None:
        """There may be final blocks above ours, perhaps at `peer_id`. Cheap; call it freely."""
        if peer_id is not None and len(self._hints) < 64:
            self._hints[peer_id] = None
        self._news.set()

    async def run(self) -> None:
        """Follow hints for ever."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            await self._follow()
            self.active = False
            await trio.sleep(HINT_PAUSE)

    async def _follow(self) -> None:
        """Ask peers in turn until a whole round of them has nothing more."""
        for attempt in range(ROUNDS):
            failed = False
            hints, self._hints = list(self._hints), {}
            connected = self._host.connected()
            # Anybody can hint, and fill every place with peers that do not answer.
            peers = list(dict.fromkeys([*hints[:1], *self._preferred(), *hints[1:]]))
            others = sorted(connected.difference(peers))
            for peer in [peer for peer in (*peers, *others) if peer in connected][:8]:
                try:
                    with trio.fail_after(60):
                        if await self._drain(peer):
                            return
                except (P2PError, BadAnswer, DecodeError, trio.TooSlowError) as error:
                    log.info("catch-up from %s: %s", peer, error)
                    failed = True
            if not failed and not self._hints:
                return
            await trio.sleep(PAUSE * (attempt + 1))

    async def _drain(self, peer: str) -> bool:
        """Take all that one peer has; whether it had something new."""
        progress = False
        stream = await self._host.open_stream(peer, self._protocol)
        async with stream:
            while True:
                await self._finality.room()
                await self._finality.settled()
                with trio.fail_after(ANSWER_SECONDS):
                    request = BlocksRequest(self._finality.height + 1, SYNC_BLOCKS)
                    await stream.send(encode(request))
                    answer = await self._answer(stream)
                if not isinstance(answer, Blocks):
                    raise BadAnswer("an answer to another question")
                await self._finality.settled()  # consensus may have moved on meanwhile
                finality, blocks = self._finality, self._epoch_blocks
                committee = finality.store.committee(epoch_of(finality.height + 1, blocks))
                assert committee is not None
                found = check_blocks(committee, blocks, finality.height, finality.hash, answer)
                if found is None:
                    if finality.height + 1 < answer.lowest <= answer.height:
                        raise BadAnswer(
                            f"it has blocks from {answer.lowest} on, and {finality.height + 1} is "
                            "needed: looking elsewhere. When no peer keeps all blocks, start from "
                            'an empty directory with sync = "snapshot"'
                        )
                    return progress
                self.active = len(found[0]) > 1 or answer.height > found[0][-1].header.height
                self._adopt(*found)
                progress = True
                await trio.lowlevel.checkpoint()

    async def _answer(self, stream: Stream) -> SyncAnswer:
        raw = await stream.receive(self._limit)
        answer: SyncAnswer = decode(SyncAnswer, raw, self._limit)  # type: ignore[arg-type]
        return answer

    # ---- beside blocks -------------------------------------------------------------------------

    async def spec(self, peer: str, spec: bytes) -> bytes | None:
        """A spec from one peer; None when it has none. Raises P2PError or BadAnswer."""
        answer: SyncAnswer = Spec(b"")
        with trio.move_on_after(ANSWER_SECONDS):
            async with await self._host.open_stream(peer, self._protocol) as stream:
                await stream.send(encode(SpecRequest(spec)))
                answer = await self._answer(stream)
        if not isinstance(answer, Spec) or (answer.raw and sha256(answer.raw) != spec):
            raise BadAnswer("not the spec that was asked for")
        return answer.raw or None

    async def spec_from_any(self, peers: Sequence[str], spec: bytes) -> bytes | None:
        """A spec from the first peer that has it. Each has a head start of HEAD_START before the
        next: a few that hang cost no more than that."""
        found: list[bytes] = []

        async def ask(peer: str, done: trio.Event) -> None:
            try:
                raw = await self.spec(peer, spec)
            except (P2PError, BadAnswer, DecodeError) as error:
                log.info("spec %s from %s: %s", spec.hex()[:16], peer, error)
            else:
                if raw is not None:
                    found.append(raw)
                    nursery.cancel_scope.cancel()
            done.set()

        async with trio.open_nursery() as nursery:
            for peer in peers:
                done = trio.Event()
                nursery.start_soon(ask, peer, done)
                with trio.move_on_after(HEAD_START):
                    await done.wait()
        return found[0] if found else None

    async def submit(self, peer: str, raws: Sequence[bytes]) -> None:
        """Hand transactions to one peer. Raises P2PError."""
        with trio.move_on_after(ANSWER_SECONDS):
            async with await self._host.open_stream(peer, self._protocol) as stream:
                await stream.send(encode(Transactions(tuple(raws))))
